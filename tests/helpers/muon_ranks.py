"""Checks that ranks step by Muon as one rank does: three, replicated and sharded; or four, two copies of two shards.

composer -n 3 -m tests.helpers.muon_ranks
composer -n 4 -m tests.helpers.muon_ranks
"""

import torch
from composer.utils import dist
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sit_composer.sit import SiT
from sit_composer.training import muon
from tests.helpers.networks import NEWER, small_network

SIZES = {**NEWER, "hidden_size": 40, "num_heads": 2}  # 40 rows, of which three ranks have 14, 14 and 12
LAYOUTS = {3: ((), (3,)), 4: ((2, 2),)}  # of the devices' mesh, by the number of ranks; (): replicated
DONE = {3: (16, 16, 0), 4: (8, 8, 8, 8)}  # matrices that each rank orthogonalizes


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
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    for layout in LAYOUTS[ranks]:
        network = small_network(**SIZES)
        if layout:
            mesh = init_device_mesh("cpu", layout, mesh_dim_names=("copies", "shards")[-len(layout) :])
            for module in (*network.blocks, network):
                fully_shard(module, mesh=mesh)
        for name, weight in steps(network).items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    # Of each of four kinds there are two matrices, and each layout makes two steps. Of three ranks the first two do a
    # matrix each, the third none; copies of shards do the same work.
    assert sum(done) == DONE[ranks][rank], done
    print(f"steps of {ranks} ranks are those of one")


if __name__ == "__main__":
    main()
