"""The training command on several CPU ranks:   composer -n 2 -m tests.ranks YAML [key=value ...]"""

import sys

import torch
import torch.distributed.fsdp._fully_shard._fsdp_collectives as collectives

from sit_composer import train

torch.set_num_threads(1)
# gloo's reduce_scatter(AVG) of torch 2.7 sums, so that FSDP2's gradients on a CPU are too large by the world size.
collectives._get_gradient_divide_factors = lambda group, *_, **__: (1.0, float(group.size()))

if __name__ == "__main__":
    sys.exit(train.main())
