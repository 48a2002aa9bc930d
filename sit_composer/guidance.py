"""Guidance of what a network predicts: v_weak + scale · (v - v_weak), within an interval of times.

v_weak is the prediction without the label (classifier-free guidance, arXiv 2207.12598), or the prediction of a weaker
network with the label (autoguidance, arXiv 2406.02507). Guiding the prediction also guides the velocity and the score,
as both are affine in it. The interval (arXiv 2404.07724) is in our time, from noise at 0 to data at 1.
"""

import math

import torch
from torch import Tensor

from sit_composer.errors import UserError
from sit_composer.sit import SiT


class Guidance:
    """A guided network: ``Guidance(network, scale)(x, t, y)``, of the same shapes as the network itself.

    ``passes`` counts the forward passes per sample: 2 per evaluation inside the interval, 1 outside.

    Args:
        network: a SiT, trained with label dropout unless there is a guide; else a scale other than 1 is a UserError.
        scale: 1 is no guidance; a larger scale follows the labels more closely, with less variety.
        channels: guide only this many first channels, and leave the rest conditional; the release guides 3 of 4. None
            guides all.
        interval: the first and the last time at which it guides.
        guide: a weaker network, for autoguidance.
    """

    def __init__(
        self,
        network: SiT,
        scale: float,
        channels: int | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
        guide: SiT | None = None,
    ):
        start, end = interval
        if scale != 1 and network.null_label is None and guide is None:
            reason = "the network was trained with class_dropout_prob 0, and has no null class to guide away from"
            raise UserError(f"cfg_scale: got {scale:g}, expected 1: {reason}")
        if not 0 <= start <= end <= 1:
            raise UserError(f"cfg_interval: got {start:g} to {end:g}, expected two times in [0, 1], in order")
        self.network = network
        self.scale = scale
        self.channels = channels
        # An adaptive solver also evaluates past the ends 0 and 1, so that an interval up to an end includes what is
        # beyond. The margin is for times in float32, in which 0.7 is less than Python's 0.7.
        self.interval = (-math.inf if start == 0 else start - 1e-6, math.inf if end == 1 else end + 1e-6)
        self.guide = guide
        self.passes = 0

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        # Samplers use one time for the whole batch.
        if self.scale == 1 or not self.interval[0] <= float(t[0]) <= self.interval[1]:
            self.passes += 1
            return self.network(x, t, y)
        self.passes += 2
        if self.guide is not None:
            strong, weak = self.network(x, t, y), self.guide(x, t, y)
        else:
            labels = torch.cat([y, torch.full_like(y, self.network.null_label)])  # (2N,)
            strong, weak = self.network(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)  # each (N, C, H, W)
        guided = weak + self.scale * (strong - weak)
        if self.channels is None:
            return guided
        return torch.cat([guided[:, : self.channels], strong[:, self.channels :]], dim=1)
