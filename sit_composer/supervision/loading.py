"""Composer's loading of checkpoints, made safe: no code in them runs, and no step is made for an optimizer's state."""

import torch
import torch.distributed.checkpoint as dcp
from composer import algorithms as composer_algorithms
from composer.utils import checkpoint
from torch.distributed.checkpoint import state_dict as torch_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from sit_composer.checkpoint.safe_load import load_file
from sit_composer.checkpoint.sharded import SafePlanner, SafeReader


def guard_composer() -> None:
    """Makes Composer load checkpoints with `safe_load`; 0.32 unpickles them whole, even with `load_weights_only`."""
    checkpoint._torch_load_with_validation = lambda path, map_location: load_file(path)
    torch_state_dict._init_optim_state = start_optimizer
    # Composer bypasses the planner and reader that it is given: after some errors it tries again with torch's planner.
    DefaultLoadPlanner.load_bytes = SafePlanner.load_bytes
    dcp.FileSystemReader.read_metadata = SafeReader.read_metadata


def start_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Gives AdamW, or Muon, the state that a checkpoint is loaded into, if it has none.

    Torch makes a step for that, whose gradients and temporaries are as large as the weights, and counts it.
    """
    for group in [] if optimizer.state else optimizer.param_groups:
        for weight in filter(lambda weight: weight.requires_grad, group["params"]):
            if "momentum" in group:  # Muon's matrices
                optimizer.state[weight] = {"momentum_buffer": torch.zeros_like(weight, requires_grad=False)}
                continue
            place = weight.device if group["fused"] or group["capturable"] else "cpu"
            optimizer.state[weight] = {
                "step": torch.zeros((), dtype=torch.float32, device=place),
                "exp_avg": torch.zeros_like(weight, memory_format=torch.preserve_format, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(weight, memory_format=torch.preserve_format, requires_grad=False),
            }


def excluded_algorithms() -> list[str]:
    """The algorithms that Composer would make by evaluating a checkpoint's text. No run of ours needs one."""
    return [name for name, c in vars(composer_algorithms).items() if getattr(c, "required_on_load", bool)()]
