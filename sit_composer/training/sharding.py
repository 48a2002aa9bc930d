"""FSDP2 through Composer: parameters, gradients, optimizer and average are sharded over the ranks."""

from dataclasses import asdict
from itertools import pairwise

from composer.core import Precision
from composer.distributed import fsdp2
from composer.distributed.mosaic_parallelism import get_mixed_precision
from composer.utils import FSDP2Config
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from sit_composer.checkpoint.sharded import SafePlanner
from sit_composer.config.schema import FSDPConfig


class ShardingConfig(FSDP2Config):
    """Composer's, with two properties that it fixes at None: HSDP's degree of replication, and the loading planner."""

    replicas: int = 1

    @property
    def load_planner(self) -> SafePlanner:
        return SafePlanner()

    @property
    def data_parallel_replicate_degree(self) -> int | None:
        return self.replicas if self.replicas > 1 else None


def prefetch(network: nn.Module) -> None:
    """Gathers each block's weights while the block before it computes; backward passes do so by themselves."""
    _, *blocks = [module for module in network.modules() if isinstance(module, FSDPModule)]  # after the root
    for block, following in pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])


def parallelism(fsdp: FSDPConfig | None, precision: str = "fp32") -> dict[str, FSDP2Config] | None:
    """The Trainer's ``parallelism_config`` for a model of that precision; None for DDP."""
    if fsdp is None:
        return None

    def policy(trainers: Precision, mixed_precision: str) -> MixedPrecisionPolicy:
        """Composer's, except that inputs are not cast; autocast casts those of matrix products, as under DDP."""
        # The Trainer's precision is fp32 if the model itself casts to bfloat16.
        given = Precision.AMP_BF16 if precision.endswith("bf16") else trainers
        # Composer's rounds times and noised latents to bfloat16, while the target is made from the exact ones.
        _, param_dtype, reduce_dtype, _ = get_mixed_precision(given, mixed_precision)
        return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)

    fsdp2.create_mixed_precision_policy = policy
    keys = asdict(fsdp)
    replicas = keys.pop("data_parallel_replicate_degree")
    config = ShardingConfig(**keys)
    config.replicas = replicas
    return {"fsdp": config}
