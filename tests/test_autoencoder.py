"""Autoencoders as their releases are configured, small and of random weights, saved and loaded as the real ones are."""

import json
import os
import pickle
import shutil

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sit_composer.autoencoder import AutoencoderSpec, DiffusersAutoencoder, load_autoencoder
from sit_composer.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"
RELEASES = {  # the keys of each one's config.json that matter here
    "sd": {"latent_channels": 4, "scaling_factor": 0.18215},
    "sdxl": {"latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True},
    "sd3": {
        "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "flux": {
        "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}  # fmt: skip


def save(folder, **config) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4, **config,
    )  # fmt: skip
    vae.save_pretrained(folder)
    return vae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Gives the folder of a release's autoencoder."""
    root = tmp_path_factory.mktemp("autoencoders")
    for name, config in RELEASES.items():
        save(root / name, **{"force_upcast": False} | config)
    return lambda name: str(root / name)


@pytest.fixture
def copy(folders, tmp_path):
    """Copies SD's, with its config's keys changed (None: left out) and its weights too; gives the folder."""

    def copy(weights=None, **changes) -> str:
        folder = tmp_path / "copy"
        shutil.copytree(folders("sd"), folder)
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        if weights is not None:
            save_file(weights(load_file(folder / WEIGHTS)), folder / WEIGHTS)
        return str(folder)

    return copy


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_is_standardized_as_its_config_says(folders, release):
    config = RELEASES[release]
    autoencoder = load_autoencoder(folders(release), channels=3)
    spec, channels = autoencoder.spec, config["latent_channels"]
    scale, shift = config["scaling_factor"], config.get("shift_factor", 0.0)
    assert spec == AutoencoderSpec(folders(release), channels=channels, downsample=4, scale=scale, shift=shift)
    vae = AutoencoderKL.from_pretrained(folders(release))
    pictures, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, channels, 4, 4)
    with torch.no_grad():
        posterior = vae.encode(pictures).latent_dist
        sampled = posterior.mean + posterior.std * noise
        latents = autoencoder.encode(pictures, noise)
        torch.testing.assert_close(latents, (sampled - shift) * scale)
        torch.testing.assert_close(autoencoder.decode(latents), vae.decode(latents / scale + shift).sample)
        torch.testing.assert_close(autoencoder.decode(latents), vae.decode(sampled).sample, rtol=1e-4, atol=1e-5)


@given(scale=st.floats(0.1, 2), shift=st.floats(-1, 1))
@settings(max_examples=20, deadline=None)
def test_standardization_is_undone(scale, shift):
    spec = AutoencoderSpec("some", channels=3, scale=scale, shift=shift)
    moments = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = spec.latents(moments, torch.zeros(2, 3, 4, 4))
    torch.testing.assert_close(latents / scale + shift, moments[:, :3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("release", ["sdxl", "flux"])
def test_a_pipelines_own_is_found_in_its_folder_vae(folders, tmp_path, release):
    shutil.copytree(folders(release), tmp_path / "vae")
    (tmp_path / "model_index.json").write_text('{"_class_name": "SomePipeline"}')
    found, direct = DiffusersAutoencoder(str(tmp_path)), DiffusersAutoencoder(folders(release))
    assert found.spec.as_dict() == direct.spec.as_dict() | {"name": str(tmp_path)}
    latents = torch.randn(1, found.spec.channels, 4, 4)
    assert torch.equal(found.decode(latents), direct.decode(latents))
    (tmp_path / "config.json").write_text('{"_class_name": "Transformer2DModel"}')  # something else at the top
    assert torch.equal(DiffusersAutoencoder(str(tmp_path)).decode(latents), direct.decode(latents))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_slices_give_what_the_whole_batch_gives(folders, dtype, tolerance):
    """To rounding: a convolution's order of sums depends on the batch."""
    whole = load_autoencoder(folders("flux"), 3, dtype=dtype, slice_size=7)
    slices = load_autoencoder(folders("flux"), 3, dtype=dtype, slice_size=3)
    exact = DiffusersAutoencoder(folders("flux"))
    latents, pictures = torch.randn(7, 16, 4, 4), torch.rand(7, 3, 16, 16) * 2 - 1
    for name, batch in (("decode", latents), ("moments", pictures)):
        outputs = [getattr(autoencoder, name)(batch) for autoencoder in (whole, slices, exact)]
        assert all(output.dtype == torch.float32 for output in outputs)
        torch.testing.assert_close(outputs[0], outputs[1], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(outputs[1], outputs[2], rtol=4 * tolerance, atol=4 * tolerance)
        if dtype != torch.float32:
            assert not torch.equal(outputs[1], outputs[2])


def test_no_more_than_a_slice_is_computed_at_a_time(folders):
    autoencoder = DiffusersAutoencoder(folders("sd"), slice_size=3)
    seen = {"encoder": [], "decoder": []}
    for name, sizes in seen.items():
        getattr(autoencoder.vae, name).register_forward_pre_hook(
            lambda _, args, sizes=sizes: sizes.append(len(args[0]))
        )
    autoencoder.decode(autoencoder.encode(torch.zeros(7, 3, 16, 16), torch.zeros(())))
    assert seen == {"encoder": [3, 3, 1], "decoder": [3, 3, 1]}


def overflowing(weights: dict) -> dict:
    """Decodes to numbers beyond float16's 65,504 on the way, which the last norm makes small again."""
    return weights | {"decoder.conv_in.weight": weights["decoder.conv_in.weight"] * 1e5}


def test_what_overflows_in_float16_is_refused_and_never_a_black_picture(copy):
    folder = copy(overflowing)
    latents = torch.randn(2, 4, 4, 4)
    for dtype in (torch.float32, torch.bfloat16):
        assert DiffusersAutoencoder(folder, dtype=dtype).decode(latents).isfinite().all()
    message = "copy: decodes latents in float16 to NaN or infinite values; use bfloat16 or float32"
    with pytest.raises(UserError, match=message):
        DiffusersAutoencoder(folder, dtype=torch.float16).decode(latents)
    with pytest.raises(UserError, match="encodes images in float32 to NaN or infinite values; its weights or its"):
        DiffusersAutoencoder(folder).moments(torch.full((1, 3, 16, 16), torch.nan))


def test_float16_is_refused_where_the_config_says_that_it_overflows(folders, copy):
    with pytest.raises(UserError, match=r"sdxl: its config\.json has force_upcast, as it overflows in float16; use b"):
        DiffusersAutoencoder(folders("sdxl"), dtype=torch.float16)
    DiffusersAutoencoder(folders("sdxl"), dtype=torch.bfloat16)
    old = DiffusersAutoencoder(copy(force_upcast=None), dtype=torch.float16)  # SD's own, older than the key
    assert old.vae.config.force_upcast
    assert old.vae.dtype == torch.float16


@pytest.mark.parametrize(
    "keys",
    [{"latents_mean": [0.1] * 4}, {"latents_mean": [0.1] * 3, "latents_std": [0.9] * 4}, {"shift_factor": 0.1}],
)
def test_numbers_per_channel_that_leave_a_doubt_are_refused(copy, keys):
    keys = {"latents_std": [0.9] * 4, "latents_mean": [0.1] * 4} | keys if "shift_factor" in keys else keys
    with pytest.raises(UserError, match=r"expected both for each of its 4 channels, and no shift_factor") as error:
        DiffusersAutoencoder(copy(**keys))
    assert "\n" not in str(error.value)


def test_the_default_scale_is_not_applied_to_numbers_per_channel(copy):
    """As in GlmImagePipeline, whose autoencoder has it; a scale that somebody chose is applied."""
    spec = DiffusersAutoencoder(copy(latents_mean=[0.1] * 4, latents_std=[0.9] * 4)).spec
    assert (spec.scale, spec.shift, spec.mean, spec.std) == (1.0, 0.0, (0.1,) * 4, (0.9,) * 4)


IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


def in_sdxl(vae, posterior, z):
    """diffusers' pipeline_stable_diffusion_xl_img2img.py, line 747, and pipeline_stable_diffusion_xl.py, line 1283."""
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, 4, 1, 1) for name in ("mean", "std"))
    back = z * std / vae.config.scaling_factor + mean
    return (posterior.latent_dist.mean - mean) * vae.config.scaling_factor / std, vae.decode(back).sample


def in_flux2(vae, posterior, z):
    """pipeline_flux2.py: _patchify_latents and _encode_vae_image; from line 1018 on."""
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    encoded = posterior.latent_dist.mean.view(2, 3, 4, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 4, 4)
    back = (z * std + mean).reshape(2, 3, 2, 2, 4, 4).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 8, 8)
    return (encoded - mean) / std, vae.decode(back).sample


def in_sana(vae, encoded, z):
    """pipeline_sana.py, line 1021."""
    return encoded.latent * vae.config.scaling_factor, vae.decode(z / vae.config.scaling_factor).sample


def in_rae(vae, encoded, z):
    """It standardizes by itself, and its images are in [0, 1]."""
    return encoded.latent, vae.decode(z).sample * 2 - 1


PIPELINES = {  # with image channels, channels, downsample
    "per_channel": (AutoencoderKL, in_sdxl, (3, 4, 2)), "flux2": (AutoencoderKLFlux2, in_flux2, (3, 12, 4)),
    "dc": (AutoencoderDC, in_sana, (3, 6, 4)), "rae": (None, in_rae, (3, 64, 4)),
}  # fmt: skip


@pytest.mark.parametrize("kind", PIPELINES)
def test_each_class_is_standardized_as_in_its_pipeline(vae_of_kind, kind):
    load, pipeline, sizes = PIPELINES[kind]
    ours = DiffusersAutoencoder(vae_of_kind(kind))
    vae = ours.vae if load is None else load.from_pretrained(vae_of_kind(kind))
    weights, spec = load_file(f"{vae_of_kind(kind)}/{WEIGHTS}"), ours.spec
    assert all(torch.equal(value, weights[name]) for name, value in ours.vae.state_dict().items())
    assert (ours.picture_channels, spec.channels, spec.downsample) == sizes
    assert spec.deterministic == (kind in ("dc", "rae"))
    assert AutoencoderSpec(**json.loads(json.dumps(spec.as_dict()))) == spec
    z = torch.randn(2, spec.channels, 16 // spec.downsample, 16 // spec.downsample)
    with torch.no_grad():
        latents, images = pipeline(vae, vae.encode(IMAGES / 2 + 0.5 if kind == "rae" else IMAGES), z)
    torch.testing.assert_close(ours.encode(IMAGES, torch.zeros_like(z)), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(z), images, rtol=1e-4, atol=1e-5)
    assert ours.moments(IMAGES).shape[1] == spec.stored == spec.channels * (1 if spec.deterministic else 2)


def test_statistics_are_not_rounded_to_the_dtype_that_it_computes_in(vae_of_kind):
    specs = [DiffusersAutoencoder(vae_of_kind("flux2"), dtype=dtype).spec for dtype in (torch.float32, torch.bfloat16)]
    assert specs[0] == specs[1]


@given(st.integers(1, 768), st.floats(0.1, 3))
@settings(max_examples=20, deadline=None)
def test_standardization_per_channel_is_undone(channels, scale):
    generator = torch.Generator().manual_seed(channels)
    mean, std = torch.randn(channels, generator=generator), torch.rand(channels, generator=generator) + 0.1
    spec = AutoencoderSpec("some", channels, scale=scale, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    moments = torch.randn(2, 2 * channels, 2, 3, generator=generator)
    latents = spec.latents(moments, torch.ones(()))
    value = moments[:, :channels] + moments[:, channels:]
    expected = (value - mean.view(-1, 1, 1)) / std.view(-1, 1, 1) * scale
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(spec.restore(latents), value, rtol=1e-4, atol=1e-4)


def test_a_spec_without_what_is_new_is_as_before():
    spec = AutoencoderSpec("some", channels=4, downsample=8, scale=0.18215)
    before = '{"name": "some", "channels": 4, "downsample": 8, "scale": 0.18215, "shift": 0.0}'
    assert json.dumps(spec.as_dict()) == before


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if "quant" not in k}, "have 4 missing, as post_quant_conv.bias"),
        (lambda w: w | {"decoder.extra": torch.zeros(1)}, "have 1 unexpected, as decoder.extra"),
    ],
)
def test_weights_that_are_not_the_configs_are_refused(copy, weights, message):
    with pytest.raises(UserError, match=message):
        DiffusersAutoencoder(copy(weights))


def test_the_old_names_of_attention_are_read(folders, copy):
    """SD's weights were saved before diffusers renamed them."""
    names = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}

    def old(weights: dict) -> dict:
        renamed = {}
        for key, value in weights.items():
            new = next((key.replace(a, b) for a, b in names.items() if f"attentions.0.{a}" in key), key)
            renamed[new] = value
        assert renamed.keys() != weights.keys()
        return renamed

    latents = torch.randn(1, 4, 4, 4)
    assert torch.equal(
        DiffusersAutoencoder(copy(old)).decode(latents), DiffusersAutoencoder(folders("sd")).decode(latents)
    )


class Planted:
    def __reduce__(self):
        return (open, (os.environ["PLANTED"], "w"))


@pytest.mark.parametrize("planted", [True, False])
def test_pickled_weights_are_refused_and_nothing_in_them_runs(copy, tmp_path, monkeypatch, planted):
    monkeypatch.setenv("PLANTED", str(tmp_path / "planted"))
    folder = copy()
    weights = load_file(f"{folder}/{WEIGHTS}") | ({"more": Planted()} if planted else {})
    torch.save(weights, f"{folder}/diffusion_pytorch_model.bin", pickle_module=pickle)
    os.unlink(f"{folder}/{WEIGHTS}")
    with pytest.raises(UserError, match=f"can't load an autoencoder from .*{WEIGHTS}") as error:
        DiffusersAutoencoder(folder)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("content", [None, '{"_class_name": "AutoencoderTiny"}', "<html>"])
def test_what_is_no_autoencoder_is_told(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"can't load an autoencoder from .*config\.json.*in its folder vae") as error:
        DiffusersAutoencoder(str(tmp_path))
    assert "\n" not in str(error.value)
