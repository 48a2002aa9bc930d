"""Classifier-free guidance (arXiv 2207.12598): v + (scale - 1)(v - v_null), applied to whatever the network predicts.

Guiding the prediction guides the velocity and the score alike, as each is affine in it.
"""

import torch
from torch import Tensor

from sit_composer.errors import UserError
from sit_composer.sit import SiT


class Guidance:
    """A guided network: ``Guidance(network, scale)(x, t, y)``, of the same shapes as the network itself.

    One pass over the batch twice, or, at scale 1, one over the batch.

    Args:
        network: a SiT trained with label dropout.
        scale: 1 is no guidance; more follows the labels more closely, and varies less.
        channels: guide only the first so many, and leave the rest conditional; the release guides 3 of 4.

    Raises:
        UserError: for a scale other than 1 on a network that has no null class.
    """

    def __init__(self, network: SiT, scale: float, channels: int | None = None):
        if scale != 1 and network.null_label is None:
            raise UserError(
                f"cfg_scale: got {scale:g}, but the network has no null class to guide away from "
                "(it was trained with class_dropout_prob 0); it takes 1"
            )
        self.network = network
        self.scale = scale
        self.channels = channels

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.scale == 1:
            return self.network(x, t, y)
        null = torch.full_like(y, self.network.null_label)
        both = self.network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))  # (2N, C, H, W)
        conditional, unconditional = both.chunk(2)
        guided = unconditional + self.scale * (conditional - unconditional)
        if self.channels is not None:
            guided = torch.cat([guided[:, : self.channels], conditional[:, self.channels :]], dim=1)
        return guided
