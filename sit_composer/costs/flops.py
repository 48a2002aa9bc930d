"""The FLOPs of a training step: 2 per multiply-accumulate of a matrix product; a backward pass counts twice."""

from torch import nn

from sit_composer.choices import NEWTON_SCHULZ
from sit_composer.config.schema import AlignmentConfig, OptimizerConfig
from sit_composer.sit import SiT, token_map


def sample_flops(network: SiT, alignment: AlignmentConfig | None = None, projector: nn.Module | None = None) -> int:
    """FLOPs of a sample's step, with those of an alignment's projector, and of SRA's teacher's forward pass."""
    flops = 6 * network.forward_macs()
    if alignment is None:
        return flops
    maps = [layer for layer in projector.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    flops += 6 * network.num_patches * sum(layer.weight.numel() for layer in maps)
    return flops + (2 * network.forward_macs(alignment.teacher_block) if alignment.name == "sra" else 0)


def optimizer_flops(network: SiT, optimizer: OptimizerConfig) -> int:
    """FLOPs of the products in an optimizer's step, all ranks' together: those of Muon's orthogonalization.

    An iteration takes 2 m² n + m³ multiply-accumulates for an m × n matrix with m ≤ n, as `training.muon` makes it.
    """
    macs = 0
    for name, p in network.named_parameters() if optimizer.name == "muon" else ():
        if (kind := token_map(name)) is not None:
            maps = kind[1]
            m, n = sorted((len(p) // maps, p.shape[1]))
            macs += maps * NEWTON_SCHULZ * (2 * m * m * n + m**3)
    return 2 * macs
