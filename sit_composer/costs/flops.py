"""The FLOPs of a training step: 2 per multiply-accumulate of a matrix product; a backward pass counts twice."""

from torch import nn

from sit_composer.config.schema import AlignmentConfig
from sit_composer.sit import SiT


def sample_flops(network: SiT, alignment: AlignmentConfig | None = None, projector: nn.Module | None = None) -> int:
    """FLOPs of a sample's step, with those of an alignment's projector, and of SRA's teacher's forward pass."""
    flops = 6 * network.forward_macs()
    if alignment is None:
        return flops
    maps = [layer for layer in projector.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    flops += 6 * network.num_patches * sum(layer.weight.numel() for layer in maps)
    return flops + (2 * network.forward_macs(alignment.teacher_block) if alignment.name == "sra" else 0)
