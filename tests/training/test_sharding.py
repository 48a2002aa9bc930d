from types import SimpleNamespace

import pytest
import torch
from composer.core import Precision
from composer.distributed.prepare_distributed import parallelize_composer_model
from composer.utils import dist
from torch.distributed.device_mesh import init_device_mesh

from sit_composer.algorithms.ema import EMAWeights
from sit_composer.autoencoder import load_autoencoder
from sit_composer.callbacks.drawing import Drawing
from sit_composer.choices import Sampling
from sit_composer.config.schema import FSDPConfig
from sit_composer.training.model import ComposerSiT
from sit_composer.training.sharding import parallelism, prefetch
from sit_composer.transport import Transport
from tests.helpers.networks import NEWER, SPEC, batch, small_network


def shard(model: ComposerSiT, fsdp: FSDPConfig) -> None:
    """Shards a model over one rank, as the Trainer does."""
    config = parallelism(fsdp, model.precision)["fsdp"]
    config.device_mesh = init_device_mesh("cpu", (1,))
    parallelize_composer_model(model, None, config, Precision.FP32)


@pytest.mark.parametrize("mixed_precision", ["DEFAULT", "PURE", "FULL"])
def test_the_network_sees_exact_times_and_latents_in_bfloat16_too(mixed_precision):
    """Composer 0.32's own policy would round them to bfloat16, but not the target."""
    dist.initialize_dist("cpu")
    model, data = ComposerSiT(small_network(), Transport(), SPEC, precision="bf16"), batch()
    replicated = model(data)
    shard(model, FSDPConfig(mixed_precision=mixed_precision))
    seen = {}
    model.network.t_embedder.register_forward_pre_hook(lambda _, args: seen.update(t=args[0]))
    model.network.x_embedder.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    model.network.blocks[0].attn.register_forward_pre_hook(lambda m, _: seen.update(weight=m.qkv.weight))
    sharded = model(data)
    assert seen["t"].dtype == seen["x"].dtype == torch.float32
    assert seen["weight"].dtype == (torch.float32 if mixed_precision == "FULL" else torch.bfloat16)
    torch.testing.assert_close(sharded, replicated, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_newer_blocks_are_sharded_and_their_angles_stay_exact(precision):
    dist.initialize_dist("cpu")
    model, data = ComposerSiT(small_network(**NEWER), Transport(), SPEC, precision=precision), batch()
    names, replicated = list(model.state_dict()), model(data)
    shard(model, FSDPConfig())
    seen = []
    model.network.blocks[1].attn.register_forward_pre_hook(lambda _, args: seen.extend(args[1]))
    sharded = model(data)
    sharded.mean().backward()
    exact = precision == "fp32"
    torch.testing.assert_close(sharded, replicated, rtol=1e-6 if exact else 2e-2, atol=1e-6 if exact else 1e-2)
    assert [angles.dtype for angles in seen] == [torch.float32] * 2
    assert list(model.state_dict()) == names
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_images_are_generated_from_weights_gathered_in_bfloat16():
    """Composer calls callbacks without autocast, so they would meet float32."""
    dist.initialize_dist("cpu")
    model = ComposerSiT(small_network(in_channels=1), Transport(), SPEC, precision="bf16")
    weights, state = EMAWeights(), SimpleNamespace(model=model, device=SimpleNamespace(name="cpu"))
    drawing = Drawing([0, 1, 2], Sampling(cfg_scale=1.5, num_steps=5), load_autoencoder(None, 1, "cpu"), weights, 2)
    weights.start(state)
    exact = drawing(state, lambda images: images)  # replicated weights stay float32
    shard(model, FSDPConfig())
    weights.start(state)
    for _ in range(2):  # again, now that gathered weights were left
        rounded = drawing(state, lambda images: images)
        difference = (rounded.int() - exact.int()).abs()
        assert rounded.dtype == torch.uint8
        assert difference.float().mean() < 1
        assert difference.max() > 0  # it was bfloat16
    assert not weights.swapped


def test_each_block_is_gathered_while_the_one_before_computes():
    dist.initialize_dist("cpu")
    model = ComposerSiT(small_network(depth=3), Transport(), SPEC)
    shard(model, FSDPConfig())
    prefetch(model.network)
    gathered = []
    for number, block in enumerate(model.network.blocks):
        group = block._get_fsdp_state()._fsdp_param_group
        group.unshard = lambda async_op=False, number=number, unshard=group.unshard: (
            gathered.append(number),
            unshard(async_op),
        )
        block.attn.register_forward_hook(lambda *_, number=number: gathered.append(f"computed {number}"))
    model(batch())
    first = [gathered.index(number) for number in range(3)]
    assert first[1] < gathered.index("computed 0")
    assert first[2] < gathered.index("computed 1")


def test_a_block_is_the_unit_of_sharding():
    model = ComposerSiT(small_network(), Transport(), SPEC)
    assert parallelism(None) is None
    config = parallelism(FSDPConfig(data_parallel_replicate_degree=4))["fsdp"]
    assert config.data_parallel_replicate_degree == 4
    assert [m for m in model.network.modules() if model.network.fsdp_wrap_fn(m)] == list(model.network.blocks)
