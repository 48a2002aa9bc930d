"""Muon for the matrices of blocks, AdamW for all other weights, in one optimizer, as Composer needs it.

A step with gradients G, of a matrix's momentum B and weights W (Keller Jordan, "Muon: An optimizer for hidden layers in
neural networks", 2024; Nesterov's momentum, as there):

    B ← μB + (1 - μ)G,   O = orthogonalize(μB + (1 - μ)G),   W ← (1 - lr·wd)W - lr·0.2·√max(rows, columns)·O

The factor gives the step the root mean square of AdamW's, so that one lr and one weight decay serve all weights ("Muon
is scalable for LLM training", arXiv 2502.16982, section 2.2). A weight that stacks several maps, such as those of
queries, keys and values, is orthogonalized map by map, as the former advises.

It is ours because no library fits (November 2026): torch.optim.Muon is not in torch 2.7, and dion is not on PyPI;
pytorch-optimizer's has every rank orthogonalize everything, in bfloat16 only, and q, k and v as one; its distributed
one keeps a momentum on one rank only, so that rank 0's checkpoint lacks the others; muonium needs a compiler and torch
2.12; and muon-fsdp2 fails on one rank, and on copies of shards.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from sit_composer.algorithms.ema import local_part
from sit_composer.choices import NEWTON_SCHULZ
from sit_composer.sit import token_map

QUINTIC = (3.4445, -4.7750, 2.0315)  # of the published iteration: singular values come near 1, to about 0.7 to 1.2
RMS = 0.2  # of AdamW's usual step, per lr


class Muon(torch.optim.Optimizer):
    """Trains a module's parameters; ``dtype`` is that of the orthogonalization, and ``adamw`` are AdamW's arguments.

    Each kind of matrix is a group of parameters, and what AdamW trains is one. Momenta are sharded as the weights are.
    """

    def __init__(self, network: nn.Module, *, momentum: float = 0.95, dtype: torch.dtype = torch.float32, **adamw: Any):
        matrices: defaultdict[tuple[str, int], list[Tensor]] = defaultdict(list)
        rest: list[Tensor] = []
        for name, p in network.named_parameters():
            if p.requires_grad:
                (matrices[kind] if (kind := token_map(name)) else rest).append(p)
        self.dtype = dtype
        self.adamw = torch.optim.AdamW([{"params": rest}], **adamw)  # of which there may be none
        shared = {name: adamw[name] for name in ("lr", "weight_decay") if name in adamw}
        groups = [{"params": weights, "momentum": momentum, "maps": maps} for (_, maps), weights in matrices.items()]
        super().__init__([*self.adamw.param_groups, *groups], {"lr": 1e-3, "weight_decay": 0.0, **shared})
        self.adamw.param_groups.clear()  # those of this optimizer count, which FSDP2 and checkpoints replace

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """One step of all weights that have gradients. Returns the closure's result."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self.adamw.state = self.state
        self.adamw.param_groups = [group for group in self.param_groups if "momentum" not in group]
        self.adamw.step()
        for group in self.param_groups:
            if "momentum" in group:
                self._step_matrices(group)
        return result

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """The step of matrices of one shape."""
        weights = [p for p in group["params"] if p.grad is not None]
        if not weights:
            return
        for p in weights:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients, momenta = (
            [local_part(p.grad) for p in weights],
            [local_part(self.state[p]["momentum_buffer"]) for p in weights],
        )
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"])).to(self.dtype)
        rows, columns = weights[0].shape
        rows //= group["maps"]

        def orthogonalized(whole: Tensor) -> Tensor:
            return orthogonalize(whole.reshape(-1, rows, columns)).reshape(whole.shape)

        updates = share(orthogonalized, updates, weights[0]).to(weights[0].dtype)
        local = [local_part(p) for p in weights]
        if group["weight_decay"]:
            torch._foreach_mul_(local, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(local, updates.unbind(), alpha=-group["lr"] * RMS * math.sqrt(max(rows, columns)))


def orthogonalize(matrices: Tensor) -> Tensor:
    """About U Vᵀ for each matrix U S Vᵀ of (n, rows, columns): the quintic Newton-Schulz iteration, in their dtype.

    X ← aX + (bA + cA²)X with A = XXᵀ keeps U and V, and maps each singular value s to as + bs³ + cs⁵.
    """
    a, b, c = QUINTIC
    x = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)  # at least the largest s
    x = x / norm.clamp(min=1e-7).to(x.dtype)
    for _ in range(NEWTON_SCHULZ):
        gram = torch.bmm(x, x.mT)  # A
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT


def share(function: Callable[[Tensor], Tensor], updates: Tensor, weight: Tensor) -> Tensor:
    """``function`` of matrices (n, rows, columns), divided among the ranks, which get all results: (n, rows, columns).

    If ``weight`` is sharded, each rank gives and gets its rows of them. Copies of shards (HSDP) repeat the work.
    """
    if isinstance(weight, DTensor):
        [axis] = [axis for axis, placement in enumerate(weight.placements) if placement.is_shard()]
        group = weight.device_mesh.get_group(axis)
        return _exchange(function, updates, len(weight), group) if group.size() > 1 else function(updates)
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return function(updates)
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    part = -(-len(updates) // ranks)
    mine = updates[rank * part : (rank + 1) * part]
    results = updates.new_zeros(part, *updates.shape[1:])
    results[: len(mine)] = function(mine)
    gathered = updates.new_empty(ranks * part, *updates.shape[1:])
    distributed.all_gather_into_tensor(gathered, results)
    return gathered[: len(updates)]


def _exchange(
    function: Callable[[Tensor], Tensor], shards: Tensor, rows: int, group: distributed.ProcessGroup
) -> Tensor:
    """``function`` of whole matrices, of which each rank has its rows: (n, own rows, columns), as its result.

    Each rank gets all rows of its part of the matrices, and gives the results' rows back.
    """
    n, own, columns = shards.shape
    ranks, rank = group.size(), group.rank()
    counts = [n // ranks + (i < n % ranks) for i in range(ranks)]  # matrices of each rank
    height = -(-rows // ranks)
    heights = [min(max(rows - i * height, 0), height) for i in range(ranks)]  # rows of each rank, as FSDP2 cuts them
    sent = [count * own * columns for count in counts]
    received = [counts[rank] * height * columns for height in heights]
    buffer = shards.new_empty(sum(received))
    distributed.all_to_all_single(buffer, shards.flatten(), received, sent, group=group)
    parts = zip(buffer.split(received), heights, strict=True)
    whole = function(torch.cat([part.view(counts[rank], height, columns) for part, height in parts], dim=1))
    back = torch.cat([part.flatten() for part in whole.split(heights, dim=1)])
    results = torch.empty_like(shards)
    distributed.all_to_all_single(results.view(-1), back, sent, received, group=group)
    return results
