import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.parallel import DistributedDataParallel

from sit_composer import randomness
from sit_composer.autoencoder import AutoencoderSpec, DiffusersAutoencoder, from_uint8, load_autoencoder, to_uint8
from sit_composer.randomness import sample_key
from sit_composer.sit import SiTBlock
from sit_composer.training.model import ComposerSiT
from sit_composer.transport import Transport
from tests.helpers.networks import SPEC, batch, small_network


def test_latents_are_mean_plus_deviation_times_noise_shifted_and_scaled():
    model = ComposerSiT(small_network(), Transport(), SPEC)
    data = batch()
    mean, std = data["moments"].float().chunk(2, dim=1)
    noise = randomness.normal(data["key"], randomness.POSTERIOR, (4, 8, 8))
    torch.testing.assert_close(model.latents(data, data["key"]), (mean + std * noise - 0.1) * 0.5)
    assert not torch.equal(model.latents(data, data["key"]), model.latents(data, data["index"]))


def test_pixels_through_the_identity_are_levels_from_minus_one_to_one():
    model = ComposerSiT(small_network(in_channels=1), Transport(), AutoencoderSpec(name=None, channels=1))
    levels = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8) * 4
    x1 = model.latents({"image": levels}, torch.zeros(1, dtype=torch.int64))
    assert x1.dtype == torch.float32
    torch.testing.assert_close(x1, levels / 127.5 - 1)
    assert torch.equal(to_uint8(x1), levels)
    assert torch.equal(to_uint8(from_uint8(torch.arange(256, dtype=torch.uint8))), torch.arange(256))


def test_the_loss_is_the_transports_and_a_mean_over_samples():
    transport = Transport(time_sampling="logit-normal", time_mean=-0.5)
    model = ComposerSiT(small_network(class_dropout_prob=0.5), transport, SPEC)
    data = batch()
    losses = model(data)
    x1, x0 = model.latents(data, data["key"]), randomness.normal(data["key"], randomness.X0, (4, 8, 8))
    t = transport.times(randomness.uniform(data["key"], randomness.TIME))
    labels = torch.where(randomness.uniform(data["key"], randomness.DROP) < 0.5, 10, data["label"])
    assert 0 < (labels == 10).sum() < 6
    out = model.network.eval()(transport.path.interpolate(t, x0, x1)[0], t, labels)
    torch.testing.assert_close(losses, transport.loss(out, t, x0, x1))
    assert losses.shape == (6,)
    assert model.loss(losses, data) == losses.mean()


def test_training_depends_on_keys_and_weights_only():
    """So no rank count, no microbatch and no interruption changes it."""
    model, data, state = ComposerSiT(small_network(), Transport(), SPEC), batch(), torch.get_rng_state()
    whole = model(data)
    assert torch.equal(torch.get_rng_state(), state)
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    parts = [model({k: v[o] for k, v in data.items()}) for o in order.split(2)]
    torch.testing.assert_close(torch.cat(parts), whole[order], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model({**data, "key": data["key"] + 1}), whole)


def test_ddp_sends_nothing_before_a_forward_pass(tmp_path):
    """Not even the rotations, which are buffers, as in LightningDiT's state dict."""
    if torch.distributed.is_initialized():  # by an earlier test's Trainer, in this process
        torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(ComposerSiT(small_network(rotary=True), Transport(), SPEC))
        assert "network.feat_rope.freqs_cos" in ddp.module.state_dict()
        assert not ddp.will_sync_module_buffers()
    finally:
        torch.distributed.destroy_process_group()


def test_in_bfloat16_only_the_network_is():
    exact, model = (ComposerSiT(small_network(), Transport(), SPEC, precision=p) for p in ("fp32", "bf16"))
    model.network.load_state_dict(exact.network.state_dict())
    seen = {}
    model.network.register_forward_pre_hook(lambda _, args: seen.update(x=args[0], t=args[1]))
    model.network.blocks[0].mlp.fc1.register_forward_hook(lambda _, __, out: seen.update(inside=out))
    losses = model(batch())
    losses.mean().backward()
    assert seen["inside"].dtype == torch.bfloat16
    assert seen["x"].dtype == seen["t"].dtype == losses.dtype == torch.float32
    assert not torch.equal(seen["t"], seen["t"].bfloat16().float())
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    torch.testing.assert_close(losses, exact(batch()), rtol=1e-2, atol=0)
    assert not torch.equal(losses, exact(batch()))
    assert model.eval().eval_forward(batch()).dtype == torch.float32


def test_evaluation_depends_on_sample_and_weights_only():
    model = ComposerSiT(small_network(), Transport(), SPEC).eval()
    data = batch()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    whole = model.eval_forward(data)
    assert torch.equal(torch.get_rng_state(), state)  # training's random numbers stay the same
    torch.manual_seed(9)
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    parts = [model.eval_forward({k: v[o] for k, v in data.items()}) for o in order.split(2)]
    torch.testing.assert_close(torch.cat(parts), whole[order], rtol=1e-5, atol=1e-6)
    other = model.eval_forward({**data, "index": data["index"] + 1000})
    assert not torch.allclose(other, whole)


def test_evaluation_estimates_the_training_loss():
    model = ComposerSiT(small_network(), Transport(), SPEC).eval()
    data = batch(2000)
    with torch.no_grad():
        keys = [torch.tensor([sample_key(0, epoch, i) for i in data["index"].tolist()]) for epoch in range(4)]
        trained = torch.cat([model({**data, "key": k}) for k in keys]).mean()
        evaluated = model.eval_forward(data).mean()
    assert evaluated.item() == pytest.approx(trained.item(), rel=0.02)


def test_the_metric_is_the_mean_over_all_samples():
    model = ComposerSiT(small_network(), Transport(), SPEC).eval()
    metric = model.get_metrics(is_train=False)["loss"]
    losses = torch.arange(6.0)
    for part in (losses[:4], losses[4:]):
        model.update_metric({}, part, metric)
    assert metric.compute() == losses.mean()
    assert model.get_metrics(is_train=True) == {}


def test_flops_of_a_step_are_six_per_mac():
    model = ComposerSiT(small_network(), Transport(), SPEC)
    assert model.flops_per_batch(batch(5)) == 6 * 5 * model.network.forward_macs()


def test_blocks_are_what_is_sharded_and_checkpointed():
    model = ComposerSiT(small_network(), Transport(), SPEC)
    assert [m for m in model.modules() if model.network.fsdp_wrap_fn(m)] == list(model.network.blocks)
    torch.manual_seed(2)
    model(batch()).mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    apply_activation_checkpointing(model, check_fn=model.network.activation_checkpointing_fn)
    assert sum(isinstance(m, SiTBlock) for m in model.modules()) == 2
    torch.manual_seed(2)
    model(batch()).mean().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.equal(p.grad, expected[name.replace("_checkpoint_wrapped_module.", "")]), name


def test_an_autoencoder_is_known_by_its_folder(vae_folder):
    autoencoder = load_autoencoder(vae_folder, channels=3)
    assert autoencoder.spec == AutoencoderSpec(name=vae_folder, channels=4, downsample=2, scale=0.3, shift=0.05)
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    moments = autoencoder.moments(pictures)
    assert moments.shape == (2, 8, 8, 8)
    posterior = autoencoder.vae.encode(pictures).latent_dist
    torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.std], dim=1))
    latents = autoencoder.encode(pictures, torch.zeros(2, 4, 8, 8))
    torch.testing.assert_close(autoencoder.decode(latents), autoencoder.vae.decode(posterior.mean).sample)


def test_training_on_moments_equals_training_with_the_encoder_in_the_loop(vae_folder):
    encoder = DiffusersAutoencoder(vae_folder)
    levels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    labels = keys = torch.arange(4)
    network = small_network()
    online = ComposerSiT(network, Transport(), encoder.spec, encoder)
    offline = ComposerSiT(network, Transport(), encoder.spec)
    moments = encoder.moments(from_uint8(levels)).half()  # as shards hold them
    losses = []
    for model, data in ((online, {"image": levels}), (offline, {"moments": moments})):
        losses.append(model.eval()({**data, "label": labels, "key": keys}))
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=1e-4)
    assert not any(name.startswith("encoder") for name in online.state_dict())


def test_autocast_does_not_reach_the_autoencoder(vae_folder):
    autoencoder = DiffusersAutoencoder(vae_folder)
    pictures = torch.rand(1, 3, 16, 16) * 2 - 1
    expected = autoencoder.moments(pictures)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(autoencoder.moments(pictures), expected)
        assert autoencoder.decode(expected[:, :4]).dtype == torch.float32


def test_a_folder_without_an_autoencoder_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"autoencoder\.name: can't load an autoencoder from") as error:
        load_autoencoder(str(tmp_path), channels=3)
    assert "\n" not in str(error.value)
