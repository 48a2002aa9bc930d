"""REPA, representation alignment (arXiv 2410.06940), and iREPA's two changes (arXiv 2512.10794): the teacher is a
frozen vision transformer, which sees the clean image.

The network's tokens after an early block are aligned with the teacher's features of the same places of the image.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sit_composer.algorithms.alignment import Alignment, Noised
from sit_composer.algorithms.projector import build_projector, seeded
from sit_composer.autoencoder import from_uint8
from sit_composer.config.schema import AlignmentConfig
from sit_composer.teacher import Teacher


class REPA(Alignment):
    """Aligns h(tokens of ``block``) with the features of a batch's images, or those in it.

    d = -(1/T) Σ_n cos(y[n], h[n]), equation 8 of REPA, with the teacher's features y of the T places; from 1 to -1.

    Args:
        network_width: of the network's tokens.
        width: of the teacher's features.
        teacher: computes the features of ``image`` in each step; None if batches have ``features``.
        seed: determines the projector's weights.
    """

    def __init__(
        self, config: AlignmentConfig, network_width: int, width: int, teacher: Teacher | None = None, seed: int = 0
    ):
        super().__init__(config, seeded(lambda: build_projector(config, network_width, width), seed))
        self.teacher = teacher

    @torch.no_grad()
    def teach(self, batch: dict[str, Tensor], noised: Noised) -> Tensor:
        given = self.teacher is None
        features = batch["features"].float() if given else self.teacher.features(from_uint8(batch["image"]))
        return features if self.config.spatial_norm is None else spatial_norm(features, self.config.spatial_norm)

    def distance(self, projected: Tensor, target: Tensor) -> Tensor:
        return -(normalize(target, dim=-1) * normalize(projected, dim=-1)).sum(-1).mean(1)


def spatial_norm(features: Tensor, gamma: float, eps: float = 1e-6) -> Tensor:
    """iREPA's: (y - gamma · mean) / (std + eps), over the places (N, T, D) of an image; std divides by T - 1."""
    return (features - gamma * features.mean(1, keepdim=True)) / (features.std(1, keepdim=True) + eps)
