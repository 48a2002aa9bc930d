"""Makes Composer read checkpoints without running code that might be in them."""

import torch.distributed.checkpoint as dcp
from composer import algorithms as composer_algorithms
from composer.utils import checkpoint
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from sit_composer.checkpoint.safe_load import load_file
from sit_composer.checkpoint.sharded import SafePlanner, SafeReader


def guard_composer() -> None:
    """Makes Composer load checkpoints with `safe_load`; 0.32 unpickles them whole, even with `load_weights_only`."""
    checkpoint._torch_load_with_validation = lambda path, map_location: load_file(path)
    # Composer bypasses the planner and reader that it is given: after some errors it tries again with torch's planner.
    DefaultLoadPlanner.load_bytes = SafePlanner.load_bytes
    dcp.FileSystemReader.read_metadata = SafeReader.read_metadata


def excluded_algorithms() -> list[str]:
    """The algorithms that Composer would make by evaluating a checkpoint's text. No run of ours needs one."""
    return [name for name, c in vars(composer_algorithms).items() if getattr(c, "required_on_load", bool)()]
