"""Attention. On a CPU in bfloat16 it is matrix products and a softmax, as torch's kernel is slower there."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import scaled_dot_product_attention

TILE = 3 * 2**19 * torch.get_num_threads()  # bytes of scores at a time: they stay in the caches, and bound the memory
COMPILED = 8  # tiles at most in a compiled graph, which takes longer to compile with each


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v, for q, k and v of (N, heads, T, d) each: (N, heads, T, d).

    In bfloat16 on a CPU the scores are rounded to bfloat16, as well as the probabilities.
    """
    if v.device.type == "cpu" and v.dtype == torch.bfloat16:
        return Products.apply(q.to(v.dtype), k.to(v.dtype), v)
    return scaled_dot_product_attention(q, k, v)


class Products(torch.autograd.Function):
    """Attention by batched matrix products, some heads at a time; the backward pass computes probabilities again."""

    @staticmethod
    def forward(ctx: FunctionCtx, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)  # themselves, or second derivatives would miss them
        q, k, v = (x.flatten(0, 1) for x in inputs)  # each (N·heads, T, d)
        return torch.cat([torch.bmm(_probabilities(q[i], k[i]), v[i]) for i in _tiles(q)]).view(inputs[0].shape)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (x.flatten(0, 1) for x in ctx.saved_tensors)
        g, scale = gradients[0].flatten(0, 1), q.shape[-1] ** -0.5
        parts = []
        for i in _tiles(q):
            p = _probabilities(q[i], k[i])
            s = torch._softmax_backward_data(torch.bmm(g[i], v[i].transpose(1, 2)), p, -1, p.dtype)  # of the scores
            to_q, to_k = _product(s, k[i], scale), _product(s.transpose(1, 2), q[i], scale)
            parts.append((to_q, to_k, torch.bmm(p.transpose(1, 2), g[i])))
        return tuple(torch.cat(part).view(gradients[0].shape) for part in zip(*parts, strict=True))


def _tiles(q: Tensor) -> list[slice]:
    """Slices of the first axis of q (N·heads, T, d)."""
    each = max(1, TILE // (q.itemsize * q.shape[1] ** 2))
    if torch.compiler.is_compiling():  # each tile is written out in the graph
        each = max(each, -(-len(q) // COMPILED))
    return [slice(start, start + each) for start in range(0, max(len(q), 1), each)]


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q kᵀ / √d), (heads, T, T), of q and k (heads, T, d)."""
    return _product(q, k.transpose(1, 2), q.shape[-1] ** -0.5).softmax(-1)


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a b, which is rounded once."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)
