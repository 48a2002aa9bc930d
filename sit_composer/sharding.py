"""FSDP2 through Composer: parameters, gradients, optimizer and average in shards, one a rank."""

from dataclasses import asdict

from composer.utils import FSDP2Config

from sit_composer.config import FSDPConfig
from sit_composer.safe_load import SafePlanner


class ShardingConfig(FSDP2Config):
    """Composer's, with two things that its own code asks for and its FSDP2 class fixes at None.

    They are the degree of replication, without which there is no HSDP, and the planner that loads checkpoints.
    """

    replicas: int = 1

    @property
    def load_planner(self) -> SafePlanner:
        return SafePlanner()

    @property
    def data_parallel_replicate_degree(self) -> int | None:
        return self.replicas if self.replicas > 1 else None


def parallelism(fsdp: FSDPConfig | None) -> dict[str, FSDP2Config] | None:
    """The Trainer's ``parallelism_config``; None is DDP."""
    if fsdp is None:
        return None
    keys = asdict(fsdp)
    replicas = keys.pop("data_parallel_replicate_degree")
    config = ShardingConfig(**keys)
    config.replicas = replicas
    return {"fsdp": config}
