from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sit_composer import attention
from sit_composer.attention import attend
from sit_composer.costs.live_bytes import Ledger
from sit_composer.sit import Attention
from tests.helpers.networks import small_network


def inputs(*shape: int, scale: float = 1.0) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, (N, heads, T, d), of which T comes before heads, as in a network."""
    torch.manual_seed(0)
    q, k, v, g = torch.randn(4, *shape).transpose(2, 3).unbind()
    return [scale * q, scale * k, v, g]


def passes(attention, tensors, dtype) -> list[torch.Tensor]:
    """The output and the gradients of q, k and v."""
    *qkv, g = (x.to(dtype) for x in tensors)
    qkv = [x.detach().requires_grad_() for x in qkv]
    out = attention(*qkv)
    return [out, *torch.autograd.grad(out, qkv, g)]


@pytest.mark.parametrize("tile", [1, 3 * 2 * 50**2, 2**20], ids=["one head", "three of four heads", "all"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_products_are_about_as_close_to_float32_as_the_kernel(monkeypatch, tile, scale):
    monkeypatch.setattr(attention, "TILE", tile)
    tensors = inputs(2, 50, 2, 24, scale=scale)
    exact = passes(scaled_dot_product_attention, tensors, torch.float64)
    products, kernel = (passes(f, tensors, torch.bfloat16) for f in (attend, scaled_dot_product_attention))
    for ours, theirs, right in zip(products, kernel, exact, strict=True):
        assert ours.shape == right.shape
        assert (ours - right).norm() < 2.5 * (theirs - right).norm() < 0.1 * right.norm()


def test_a_network_in_bfloat16_is_as_close_to_float32_as_with_the_kernel(monkeypatch):
    network = small_network(depth=4)
    x, t, y = torch.randn(4, 4, 8, 8), torch.rand(4), torch.arange(4)

    def run(dtype: torch.dtype | None) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype) if dtype else nullcontext():
            return network.eval()(x, t, y).float()

    right, products = run(None), run(torch.bfloat16)
    monkeypatch.setattr(Attention, "attend", staticmethod(scaled_dot_product_attention))
    kernel = run(torch.bfloat16)
    assert not torch.equal(products, kernel)
    assert (products - right).norm() < 1.2 * (kernel - right).norm()


def test_second_derivatives_are_those_of_the_formula():
    def second(attention, dtype) -> list[torch.Tensor]:
        *qkv, g = (x.to(dtype).requires_grad_() for x in inputs(2, 20, 2, 8))
        first = torch.autograd.grad(attention(*qkv), qkv, g, create_graph=True)
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), [*qkv, g]))

    def formula(q, k, v):
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

    for ours, right in zip(second(attend, torch.bfloat16), second(formula, torch.float64), strict=True):
        assert (ours - right).norm() < 0.05 * right.norm()


def test_no_samples_have_no_attention():
    assert attend(*torch.empty(3, 0, 2, 4, 8, dtype=torch.bfloat16)).shape == (0, 2, 4, 8)


def test_memory_does_not_grow_with_the_square_of_the_tokens(monkeypatch):
    monkeypatch.setattr(attention, "TILE", 2 * 256**2)  # the scores of one head
    *qkv, g = (x.bfloat16() for x in inputs(4, 256, 3, 8))
    qkv = [x.detach().requires_grad_() for x in qkv]
    kept = []
    with (
        Ledger([*qkv, g]) as ledger,
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
    ):
        attend(*qkv).backward(g)
    assert sum(x.nbytes for x in kept) == 3 * g.nbytes
    assert max(ledger.history) < 12 * g.nbytes + 4 * attention.TILE < 12 * attention.TILE  # of all twelve heads


@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.bfloat16), ("cpu", torch.float32)])
def test_gpus_and_float32_take_the_kernel(monkeypatch, device, dtype):
    calls = []
    monkeypatch.setattr(attention, "scaled_dot_product_attention", lambda q, k, v: calls.append(v) or v)
    attend(*torch.empty(3, 1, 1, 4, 8, device=device, dtype=dtype))
    assert len(calls) == 1
