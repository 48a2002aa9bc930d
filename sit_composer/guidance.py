"""Guidance of what a network predicts: v_weak + scale · (v - v_weak), within an interval of times.

v_weak is the prediction without the label (classifier-free guidance, arXiv 2207.12598), or the prediction of a weaker
network with the label (autoguidance, arXiv 2406.02507). Guiding the prediction also guides the velocity and the score,
as both are affine in it. The interval (arXiv 2404.07724) is in our time, from noise at 0 to data at 1.
"""

import math

import torch
from torch import Tensor

from sit_composer.choices import check_interval
from sit_composer.errors import UserError
from sit_composer.precision import autocast
from sit_composer.sit import SiT

Condition = tuple[Tensor, Tensor]  # what y is for the prediction and for the weak one: labels (N,) or embedded (N, D)


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
        precision: ``fp32``, or ``bf16``: the networks run under autocast, and all else stays in float32.
    """

    def __init__(
        self,
        network: SiT,
        scale: float,
        channels: int | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
        guide: SiT | None = None,
        precision: str = "fp32",
    ):
        if scale != 1 and network.null_label is None and guide is None:
            reason = "the network was trained with class_dropout_prob 0, and has no null class to guide away from"
            raise UserError(f"cfg_scale: got {scale:g}, expected 1: {reason}")
        check_interval(interval, "cfg_interval")
        start, end = interval
        self.network = network
        self.scale = scale
        self.channels = channels
        # An adaptive solver also evaluates past the ends 0 and 1, so that an interval up to an end includes what is
        # beyond. The margin is for times in float32, in which 0.7 is less than Python's 0.7.
        self.interval = (-math.inf if start == 0 else start - 1e-6, math.inf if end == 1 else end + 1e-6)
        self.guide = guide
        self.precision = precision
        self.passes = 0

    def embed(self, y: Tensor) -> Condition:
        """What to pass for the labels y (N,), embedded once for all evaluations. The bits are those of the labels.

        Sharded weights (FSDP2) exist only while their network runs, which then embeds the labels itself.
        """
        strong, weak = self._condition(y)
        guide = self.guide or self.network
        if hasattr(self.network.y_embedder.embedding_table.weight, "device_mesh"):  # a DTensor, which is slow to import
            return strong, weak
        return self.network.y_embedder(strong, False), guide.y_embedder(weak, False)

    def _condition(self, y: Tensor) -> Condition:
        """The labels y (N,) for the prediction and for the weak one, if there is any."""
        null = None if self.guide is not None else self.network.null_label
        return y, y if null is None else torch.full_like(y, null)

    def _predict(self, network: SiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The network's output; in float32 if it runs in another precision."""
        if self.precision == "fp32":
            return network(x, t, y)
        with autocast(self.precision, x.device.type):
            return network(x, t, y).float()

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | Condition) -> Tensor:
        # Samplers use one time for the whole batch. Reading it waits for a GPU, so that it is read only if it matters.
        strong_y, weak_y = self._condition(y) if isinstance(y, Tensor) else y
        always = self.interval == (-math.inf, math.inf)
        if self.scale == 1 or not (always or self.interval[0] <= float(t[0]) <= self.interval[1]):
            self.passes += 1
            return self._predict(self.network, x, t, strong_y)
        self.passes += 2
        if self.guide is not None:
            strong, weak = self._predict(self.network, x, t, strong_y), self._predict(self.guide, x, t, weak_y)
        else:
            pair = [torch.cat(both) for both in ((x, x), (t, t), (strong_y, weak_y))]  # each of 2N rows
            strong, weak = self._predict(self.network, *pair).chunk(2)  # each (N, C, H, W)
        guided = weak + self.scale * (strong - weak)
        if self.channels is None:
            return guided
        return torch.cat([guided[:, : self.channels], strong[:, self.channels :]], dim=1)
