"""Whether a run's microbatch fits into the memory of its ranks' device, and which one would."""

import os
from pathlib import Path

import psutil
import torch

from sit_composer.config.schema import Config, ConfigError
from sit_composer.costs.estimate import GIB, encoder_memory, fits, memory

CGROUP = Path("/sys/fs/cgroup/memory.max")  # a container's limit, or "max"


def room() -> int:
    """Bytes that a rank has here: its GPU's, or its share of the machine's, or of the container's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return ram() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def ram() -> int:
    """Bytes of memory that the machine has, or the container."""
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
    total = psutil.virtual_memory().total
    return min(total, int(limit) if limit.isdigit() else total)


def check_room(config: Config, encodes: bool, ranks: int, microbatch: int | str) -> str:
    """What the config needs, of what there is. A ConfigError if that is too much for a CPU.

    On a GPU only torch's own refusal counts, see `too_large`: these sums were never measured there.
    """
    if not isinstance(microbatch, int):
        return "the microbatch is found by Composer"
    cuda, here = torch.cuda.is_available(), room()
    needs = memory(config, ranks, microbatch, cuda, encoder_memory(config) if encodes else (0, 0)).total
    if needs > here and not cuda:
        raise too_large(config, encodes, ranks, microbatch, f"which needs {needs / GIB:.3g} GiB per rank")
    return f"{needs / GIB:.3g} of {here / GIB:.3g} GiB per rank"


def too_large(config: Config, encodes: bool, ranks: int, microbatch: int | str, why: str) -> ConfigError:
    """The error that names the largest microbatch that fits."""
    here, encoder = room(), encoder_memory(config) if encodes else (0, 0)
    largest = fits(config, ranks, here / GIB, encoder, cuda=torch.cuda.is_available())
    expected = f"at most {largest}" if largest else "a smaller network, or fsdp with more ranks"
    where = f"there are {here / GIB:.3g} GiB"
    return ConfigError(f"trainer.device_train_microbatch_size: got {microbatch}, {why}; {where}, expected {expected}")
