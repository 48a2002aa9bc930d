import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sit_composer.errors import UserError
from sit_composer.guidance import Guidance
from sit_composer.precision import cast_once
from sit_composer.samplers import Counted, sample_ode, sample_sde
from sit_composer.sit import SiT
from sit_composer.transport import Transport
from tests.helpers.networks import small_network


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(2, 4, 8, 8), torch.full((2,), 0.4), torch.tensor([1, 2])


def test_it_is_the_weak_prediction_plus_the_scaled_difference(tiny, inputs):
    x, t, y = inputs
    strong, weak = tiny(x, t, y), tiny(x, t, torch.full_like(y, tiny.null_label))
    torch.testing.assert_close(Guidance(tiny, 3.0)(x, t, y), weak + 3 * (strong - weak), rtol=1e-4, atol=1e-5)


def test_all_channels_are_guided_unless_only_some_are_asked_for(tiny, inputs):
    x, t, y = inputs
    everything, three = Guidance(tiny, 3.0)(x, t, y), Guidance(tiny, 3.0, channels=3)(x, t, y)
    assert torch.equal(everything[:, :3], three[:, :3])
    torch.testing.assert_close(three[:, 3], tiny(x, t, y)[:, 3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(everything[:, 3], three[:, 3])


def test_three_channels_are_the_releases_guidance(tiny, inputs):
    x, t, y = inputs
    labels = torch.cat([y, torch.full_like(y, tiny.null_label)])
    released = tiny.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), labels, 4.0)[:2]
    torch.testing.assert_close(Guidance(tiny, 4.0, channels=3)(x, t, y), released, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scale", "interval"), [(1.0, (0.0, 1.0)), (3.0, (0.5, 1.0)), (3.0, (0.0, 0.3))])
def test_where_it_does_not_guide_it_is_the_network_in_one_pass(tiny, inputs, scale, interval):
    calls = []
    tiny.register_forward_hook(lambda _, args, out: calls.append(len(args[0])))
    guided = Guidance(tiny, scale, interval=interval)
    assert torch.equal(guided(*inputs), tiny(*inputs))
    assert calls == [2, 2]  # the batch once, not twice
    assert guided.passes == 1


def test_passes_are_counted_where_it_guides_and_where_it_does_not(tiny, inputs):
    guided = Guidance(tiny, 2.0, interval=(0.0, 0.45))
    model = Counted(guided)
    sample_ode(Transport(), model, inputs[0], sampling_method="euler", num_steps=11, y=inputs[2])  # t = 0, 0.1 … 0.9
    assert (model.evaluations, guided.passes) == (10, 15)


def test_a_guided_pair_is_one_call_of_the_network_and_there_is_none_where_it_does_not_guide(tiny, inputs):
    x, _, y = inputs
    rows = []
    tiny.register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    options = {"sampling_method": "euler", "num_steps": 6, "y": y}  # t = 0, 0.2 … 0.8
    for scale, interval, expected in (
        (2.0, (0.0, 1.0), [4, 4, 4, 4, 4]),
        (2.0, (0.3, 0.7), [2, 2, 4, 4, 2]),
        (1.0, (0.0, 1.0), [2, 2, 2, 2, 2]),
    ):
        sample_ode(Transport(), Guidance(tiny, scale, interval=interval), x, **options)
        assert rows == expected
        rows.clear()


@pytest.mark.parametrize("autoguidance", [False, True])
def test_labels_are_embedded_once_for_all_evaluations_with_the_same_bits(inputs, autoguidance):
    x, _, y = inputs
    network, guide = small_network().eval(), small_network(depth=1, hidden_size=16).eval() if autoguidance else None
    guidance = Guidance(network, 2.0, interval=(0.3, 1.0), guide=guide)
    options = {"sampling_method": "heun", "num_steps": 6}
    expected = sample_ode(Transport(), guidance, x, y=y, **options)
    calls = []
    for one in filter(None, (network, guide)):
        one.y_embedder.register_forward_hook(lambda *_: calls.append(1))
    embedded = guidance.embed(y)
    assert torch.equal(sample_ode(Transport(), guidance, x, y=embedded, **options), expected)
    assert len(calls) == 2  # the labels, and the null labels or the guide's; not one per evaluation


def test_bfloat16_is_the_networks_alone_and_weights_cast_once_give_autocasts_bits(inputs):
    x, _, y = inputs
    network, seen = small_network().eval(), set()
    network.register_forward_hook(lambda _, args, out: seen.add((args[0].dtype, args[1].dtype, out.dtype)))
    samples = {}
    for name, precision in (("fp32", "fp32"), ("autocast", "bf16"), ("cast once", "bf16")):
        if name == "cast once":
            cast_once(network, precision)
            assert network.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
        model = Counted(Guidance(network, 2.0, precision=precision))
        samples[name] = sample_ode(Transport(), model, x, sampling_method="heun", num_steps=5, y=y)
        assert model(x, torch.zeros(2), y=y).dtype == torch.float32
    assert torch.equal(samples["cast once"], samples["autocast"])
    assert seen == {(torch.float32,) * 3, (torch.float32, torch.float32, torch.bfloat16)}
    error = (samples["autocast"] - samples["fp32"]).abs().max()
    assert 0 < error < 0.05 * samples["fp32"].abs().max()


class NoReading(TorchDispatchMode):
    """Refuses to read a tensor's value, for which the host waits for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket is not torch.ops.aten._local_scalar_dense
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["euler", "heun", "Euler", "Heun"])
def test_no_step_of_a_guided_batch_waits_for_a_gpu(tiny, inputs, method):
    x, _, y = inputs
    guidance = Guidance(tiny, 2.0)
    with torch.no_grad(), NoReading():
        sampler = sample_ode if method.islower() else sample_sde
        sampler(Transport(), guidance, x, sampling_method=method, num_steps=4, time_shift=2.0, y=guidance.embed(y))
    with pytest.raises(AssertionError), NoReading():  # the mode sees what it is to refuse
        Guidance(tiny, 2.0, interval=(0.0, 0.5))(*inputs)


def test_a_weaker_network_may_guide(inputs):
    network, guide = small_network().eval(), small_network(depth=1, class_dropout_prob=0.0).eval()
    strong, weak = network(*inputs), guide(*inputs)
    torch.testing.assert_close(Guidance(network, 2.0, guide=guide)(*inputs), weak + 2 * (strong - weak))
    # it needs no null class then
    unconditional = small_network(class_dropout_prob=0.0).eval()
    assert Guidance(unconditional, 2.0, guide=guide)(*inputs).isfinite().all()


def test_guiding_a_network_without_a_null_class_is_refused():
    network = SiT(hidden_size=64, depth=0, num_heads=4, input_size=8, num_classes=5, class_dropout_prob=0)
    with pytest.raises(UserError, match="class_dropout_prob 0"):
        Guidance(network, 1.5)


@pytest.mark.parametrize("interval", [(0.5, 0.4), (-0.1, 1.0), (0.0, 1.1)])
def test_an_interval_that_is_none_is_refused(tiny, interval):
    with pytest.raises(UserError, match="cfg_interval: got"):
        Guidance(tiny, 1.5, interval=interval)


def test_the_ends_of_an_interval_are_guided_in_float32_too(tiny, inputs):
    x, _, y = inputs
    times = torch.linspace(0, 1, 11)
    for first in range(11):
        for last in range(first, 11):
            guidance = Guidance(tiny, 2.0, interval=(first / 10, last / 10))
            for time in times:
                guidance(x[:1], time[None], y[:1])
            assert guidance.passes == 11 + (last - first + 1)
