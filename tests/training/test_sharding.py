from types import SimpleNamespace

import pytest
import torch
from composer.core import Precision
from composer.distributed.prepare_distributed import parallelize_composer_model
from composer.utils import dist
from torch.distributed.device_mesh import init_device_mesh

from sit_composer.algorithms.ema import EMAWeights
from sit_composer.autoencoder import load_autoencoder
from sit_composer.callbacks import drawing as drawing_module
from sit_composer.callbacks.drawing import Drawing
from sit_composer.choices import Sampling
from sit_composer.config.schema import FSDPConfig
from sit_composer.training.model import ComposerSiT
from sit_composer.training.sharding import parallelism
from sit_composer.transport import Transport
from tests.helpers.networks import SPEC, batch, small_network


@pytest.mark.parametrize("mixed_precision", ["DEFAULT", "PURE", "FULL"])
def test_the_network_sees_exact_times_and_latents_in_bfloat16_too(mixed_precision, monkeypatch):
    """Composer 0.32's own policy would round them to bfloat16, but not the target."""
    monkeypatch.setattr("composer.distributed.prepare_distributed._validate_precision", lambda *_: None)  # a CPU
    dist.initialize_dist("cpu")
    model, data = ComposerSiT(small_network(), Transport(), SPEC), batch()
    config = parallelism(FSDPConfig(mixed_precision=mixed_precision))["fsdp"]
    config.device_mesh = init_device_mesh("cpu", (1,))
    with torch.autocast("cpu", torch.bfloat16):
        replicated = model(data)
    parallelize_composer_model(model, None, config, Precision.AMP_BF16)
    seen = {}
    model.network.t_embedder.register_forward_pre_hook(lambda _, args: seen.update(t=args[0]))
    model.network.x_embedder.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        sharded = model(data)
    assert seen["t"].dtype == seen["x"].dtype == torch.float32
    torch.testing.assert_close(sharded, replicated, rtol=2e-2, atol=1e-2)


def test_images_are_generated_from_weights_gathered_in_bfloat16(monkeypatch):
    """Composer calls callbacks without autocast, so they would meet float32. Only a GPU has that case in Composer."""
    monkeypatch.setattr("composer.distributed.prepare_distributed._validate_precision", lambda *_: None)  # a CPU
    casts = {Precision.AMP_BF16: torch.bfloat16}
    monkeypatch.setattr(drawing_module, "get_precision_context", lambda p: torch.autocast("cpu", casts[p]))
    dist.initialize_dist("cpu")
    model, weights = ComposerSiT(small_network(in_channels=1), Transport(), SPEC), EMAWeights()
    state = SimpleNamespace(model=model, precision=Precision.AMP_BF16)
    drawing = Drawing([0, 1, 2], Sampling(cfg_scale=1.5, num_steps=5), load_autoencoder(None, 1, "cpu"), weights, 2)
    weights.start(state)
    exact = drawing(state, lambda images: images)  # replicated weights stay float32
    config = parallelism(FSDPConfig())["fsdp"]
    config.device_mesh = init_device_mesh("cpu", (1,))
    parallelize_composer_model(model, None, config, Precision.AMP_BF16)
    weights.start(state)
    for _ in range(2):  # again, now that gathered weights were left
        rounded = drawing(state, lambda images: images)
        difference = (rounded.int() - exact.int()).abs()
        assert rounded.dtype == torch.uint8
        assert difference.float().mean() < 1
        assert difference.max() > 0  # it was bfloat16
    assert not weights.swapped


def test_a_block_is_the_unit_of_sharding():
    model = ComposerSiT(small_network(), Transport(), SPEC)
    assert parallelism(None) is None
    config = parallelism(FSDPConfig(data_parallel_replicate_degree=4))["fsdp"]
    assert config.data_parallel_replicate_degree == 4
    assert [m for m in model.network.modules() if model.network.fsdp_wrap_fn(m)] == list(model.network.blocks)
