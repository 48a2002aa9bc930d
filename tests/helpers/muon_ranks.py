"""Checks that three ranks, replicated and sharded, step by Muon as one rank does:

composer -n 3 -m tests.helpers.muon_ranks
"""

import torch
from composer.utils import dist
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sit_composer.sit import SiT
from sit_composer.training import muon
from tests.helpers.networks import NEWER, small_network

SIZES = {**NEWER, "hidden_size": 40, "num_heads": 2}  # 40 rows, of which three ranks have 14, 14 and 12


def steps(network: SiT) -> dict[str, Tensor]:
    """The weights after two steps."""
    optimizer = muon.Muon(network, lr=0.01, weight_decay=0.1)
    for seed in (1, 2):
        torch.manual_seed(seed)
        for p in network.parameters():
            gradient = torch.randn(p.shape)
            if p.requires_grad:
                shared = isinstance(p, DTensor)
                p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if shared else gradient
        optimizer.step()
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in network.named_parameters()}


def main() -> None:
    torch.set_num_threads(1)
    dist.initialize_dist("cpu")
    share, done = muon.share, []
    muon.share = lambda function, updates, _: function(updates)  # as one rank does
    expected = steps(small_network(**SIZES))

    def counted(function, updates, weight):
        return share(lambda whole: done.append(len(whole)) or function(whole), updates, weight)

    muon.share = counted
    replicated = steps(small_network(**SIZES))
    sharded = small_network(**SIZES)
    for block in sharded.blocks:
        fully_shard(block)
    fully_shard(sharded)
    for got in (replicated, steps(sharded)):
        for name, weight in expected.items():
            torch.testing.assert_close(got[name], weight, rtol=1e-5, atol=1e-6, msg=name)
    # Two blocks' matrices of each of four kinds, two steps, two ways: the first two ranks do one each, the third none.
    assert sum(done) == (16 if distributed.get_rank() < 2 else 0), done
    print("replicated and sharded steps are those of one rank")


if __name__ == "__main__":
    main()
