"""The tokens' linear maps as convolutions, beside nn.Linear."""

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from sit_composer import linear
from sit_composer.linear import FUSED, Linear, LinearGELU, prefers_convolutions

TORCHS_OWN = {"aten::thnn_conv2d", "aten::slow_conv_dilated2d"}  # slower convolutions


def results(layer, x):
    """The layer's output, its gradients, and the gradients of the gradient's norm."""
    x, leaves = x.clone().requires_grad_(), [layer.weight, layer.bias]
    y = layer(x)
    first = torch.autograd.grad(y.square().sum(), [x, *leaves], create_graph=True)
    return y, *first, *torch.autograd.grad(first[0].square().sum(), [x, *leaves])


@pytest.mark.parametrize("shape", [(20, 256, 8), (4, 256, 32), (1, 81, 256), (300, 1, 72), (1, 9, 4), (1, 1, 4)])
def test_a_convolution_is_the_linear_map_with_its_first_and_second_derivatives(monkeypatch, shape):
    torch.manual_seed(0)
    ours, x = Linear(shape[-1], 20), torch.randn(shape)
    plain = nn.Linear(shape[-1], 20).double()
    plain.load_state_dict(ours.state_dict())
    monkeypatch.setattr(linear, "CONVOLUTIONS", True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as made:
        found = results(ours, x)
    names = {event.name for event in made.events()}
    assert not TORCHS_OWN & names
    assert ("aten::mkldnn_convolution" in names) == ("aten::linear" not in names) == (x.numel() > 36)
    assert found[0].is_contiguous()
    for a, b in zip(found, results(plain, x.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_other_precisions_have_no_convolution(monkeypatch):
    monkeypatch.setattr(linear, "CONVOLUTIONS", True)
    ours, x = Linear(8, 20), torch.randn(20, 256, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as made:
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(x).dtype == torch.bfloat16
        assert ours.double()(x.double()).dtype == torch.float64
    names = {event.name for event in made.events()}
    assert "aten::linear" in names
    assert "aten::convolution" not in names


def test_without_gradients_gelu_in_bfloat16_is_one_pass_and_no_less_exact():
    torch.manual_seed(0)
    layer, x = LinearGELU(32, 96), torch.randn(3, 50, 32)
    right = gelu(nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double()), approximate="tanh")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as made:
        with torch.autocast("cpu", torch.bfloat16):
            two = layer(x)
            with torch.no_grad():
                one = layer(x)
        with torch.no_grad():
            torch.testing.assert_close(layer(x).double(), right, rtol=0, atol=1e-5)
    assert (one.shape, one.dtype, one.is_contiguous()) == (two.shape, torch.bfloat16, True)
    assert (one - right).norm() < 1.01 * (two - right).norm() < 0.01 * right.norm()
    assert [event.count for event in made.key_averages() if event.key == "mkldnn::_linear_pointwise"] == [1] * FUSED


def test_a_compiled_gelu_is_torchs_which_its_compiler_knows_how_to_join():
    layer, graphs = LinearGELU(32, 96), []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.compile(layer, backend=lambda graph, _: graphs.append(graph.code) or graph.forward)(torch.randn(3, 5, 32))
    assert "gelu" in graphs[0]
    assert "mkldnn" not in graphs[0]


def test_convolutions_are_for_amds_processors_since_zen_5():
    text = "vendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: 2\n"
    assert prefers_convolutions(text.format("AuthenticAMD", 26))
    assert not prefers_convolutions(text.format("AuthenticAMD", 25))
    assert not prefers_convolutions(text.format("GenuineIntel", 26))
    assert not prefers_convolutions("")
