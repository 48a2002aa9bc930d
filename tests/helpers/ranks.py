"""The training command on several CPU ranks:   composer -n 2 -m tests.helpers.ranks YAML [key=value ...]

It works around two faults of torch's FSDP2 on the CPU, in 2.7 to 2.14; a GPU has neither.
"""

import sys
from collections.abc import Callable

import torch
import torch.distributed.fsdp._fully_shard._fsdp_collectives as collectives
import torch.distributed.fsdp._fully_shard._fsdp_param_group as param_group

from sit_composer import train

torch.set_num_threads(1)
divide_factors, foreach_reduce = collectives._get_gradient_divide_factors, param_group.foreach_reduce


def summed(*args, **kwargs):
    """Sums, and divides afterwards: gloo's reduce_scatter(AVG) sums, so gradients were too large by the world size."""
    _, _, *operations = divide_factors(*args, **kwargs)  # since torch 2.9, the two reductions' operations follow
    return (1.0, float(torch.distributed.get_world_size()), *(torch.distributed.ReduceOp.SUM for _ in operations))


def reduced(*args, **kwargs):
    """With replicas, the all-reduce is done when it returns and has no event, but torch asserts one."""
    *before, reduced_input, event, partial = foreach_reduce(*args, **kwargs)
    return (*before, None if event is None else reduced_input, event, partial)


def work_around(set_attribute: Callable[..., None] = setattr) -> None:
    set_attribute(collectives, "_get_gradient_divide_factors", summed)
    set_attribute(param_group, "foreach_reduce", reduced)


def main(argv: list[str] | None = None) -> int:
    """The training command's exit code."""
    work_around()
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(main())
