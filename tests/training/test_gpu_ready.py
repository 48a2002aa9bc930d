"""What a GPU needs of a training step, held without one."""

import inspect

import pytest
import torch
from composer.devices import DeviceGPU
from torch.utils._pytree import tree_leaves

from sit_composer import sit
from sit_composer.algorithms.ema import EMA
from sit_composer.data.loader import build_loader
from sit_composer.data.stream import load_spec
from sit_composer.sit import build_sit
from sit_composer.training.model import ComposerSiT
from sit_composer.transport import Transport
from tests.helpers.networks import SPEC, batch, small_network


@pytest.mark.parametrize("transport", [{}, {"time_sampling": "logit-normal", "path_type": "VP", "prediction": "score"}])
def test_a_step_never_waits_for_the_device(transport):
    """On the meta device nothing has a value, so that .item(), .cpu(), nonzero() or an if on a tensor raises."""
    model = ComposerSiT(small_network().to("meta"), Transport(**transport), SPEC)
    data = {name: tensor.to("meta") for name, tensor in batch().items()}
    average = EMA(0.999).weights
    average.start(type("State", (), {"model": model}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for microbatch in (data, {name: tensor[:2] for name, tensor in data.items()}):
        model.loss(model(microbatch), microbatch).backward()
    optimizer.step()
    average.update(0.999)
    model.eval().eval_forward(data)
    assert {p.device.type for p in tree_leaves(optimizer.state_dict()["state"]) if p.ndim} == {"meta"}
    with pytest.raises(RuntimeError):
        model(data).mean().item()


def test_batches_are_pinned_and_copied_without_waiting(few_digits, monkeypatch):
    """What our loader does, and what Composer's device does with its batches, and with float32 products."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    spec = load_spec(None, str(few_digits))
    assert build_loader(remote=None, local=str(few_digits), spec=spec, batch_size=8).pin_memory
    calls, device, tensor = [], DeviceGPU.__new__(DeviceGPU), torch.zeros(1)
    device._device = "a GPU"
    monkeypatch.setattr(torch.Tensor, "to", lambda *args, **options: calls.append((*args[1:], options)))
    device.batch_to_device({"image": tensor})
    assert calls == [("a GPU", {"non_blocking": True})]
    assert inspect.signature(DeviceGPU).parameters["allow_tf32"].default is True


@pytest.mark.parametrize("name", ["SiT-S/2", "SiT-XL/2"])
def test_attention_has_what_the_flash_kernel_takes(monkeypatch, name):
    """As PyTorch's sdp_utils.cpp checks it: half precision, (N, heads, T, d) with d a multiple of 8 up to 256 and
    contiguous, no mask, no dropout; the strides of the other axes are free."""
    seen = []

    def attention(q, k, v, *args, **kwargs):
        assert args == ()
        assert kwargs == {}
        seen.append((q, k, v))
        return q

    monkeypatch.setattr(sit.Attention, "attend", staticmethod(attention))
    model = ComposerSiT(build_sit(name, depth=1, input_size=8), Transport(), SPEC, precision="bf16")
    model(batch())
    ((q, k, v),) = seen
    for x in (q, k, v):
        assert x.dtype == torch.bfloat16
        assert x.shape == (6, model.network.blocks[0].attn.num_heads, 16, x.shape[-1])
        assert x.shape[-1] % 8 == 0
        assert x.shape[-1] <= 256
        assert x.stride(-1) == 1
        assert all(stride % 8 == 0 for stride in x.stride()[:-1])  # 16 bytes, as its loads are aligned
