"""The shards' specs against the config, and against each other."""

import dataclasses
import shutil

import pytest

from sit_composer.autoencoder import AutoencoderSpec, DiffusersAutoencoder
from sit_composer.config.load import load_config
from sit_composer.config.schema import Config, ConfigError
from sit_composer.data.spec import DataSpec
from sit_composer.data.stream import DataError
from sit_composer.training.inputs import check_specs, open_autoencoder, open_inputs, read_specs
from tests.helpers.paths import ROOT


@pytest.fixture
def config(digits_shards, tmp_path) -> Config:
    shutil.copytree(digits_shards, tmp_path / "eval")
    places = [f"data.local={digits_shards}", f"eval_data={{local: {tmp_path / 'eval'}, global_batch_size: 9}}"]
    return load_config(str(ROOT / "yamls" / "quickstart.yaml"), places)


def test_each_section_that_is_set_has_its_spec_and_its_loader(config):
    specs = read_specs(config)
    assert {name: spec.samples for name, spec in specs.items()} == {"data": 1797, "eval_data": 1797}
    check_specs(config, specs)
    config.eval_data = None
    inputs = open_inputs(config, "cpu")
    assert list(inputs.specs) == list(inputs.loaders) == ["data"]
    assert (inputs.autoencoder.name, inputs.autoencoder.channels, inputs.encoder) == (None, 1, None)
    batch = next(iter(inputs.loaders["data"]))
    assert batch["image"].shape == (64, 1, 8, 8)


def test_a_missing_spec_is_named(config, tmp_path):
    (tmp_path / "eval" / "spec.json").unlink()
    with pytest.raises(DataError, match=r"eval/spec\.json"):
        read_specs(config)


LATENTS = {"name": "a/vae", "scale": 0.5, "shift": 0.0, "channels": 4, "downsample": 8}


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("eval_data", {"classes": [*"1234567890"]}, r"^eval_data\.local: its classes are not data's"),
        ("data", {"num_classes": 11}, r"^model\.num_classes: got 10"),
        ("eval_data", {"channels": 3}, r"^model\.in_channels: got 1"),
        ("data", {"kind": "latents", "autoencoder": LATENTS}, r"^autoencoder\.name: got None"),
    ],
)
def test_what_does_not_fit_is_named_by_its_key(config, section, change, message):
    specs = read_specs(config)
    specs[section] = dataclasses.replace(specs[section], **change)
    with pytest.raises(ConfigError, match=message):
        check_specs(config, specs)


def test_images_of_a_size_that_the_encoder_would_change_are_refused(config, vae_of_kind):
    config.eval_data, config.autoencoder.name = None, vae_of_kind("rae")
    config.model.in_channels, config.model.input_size, config.data.image_size = 64, 4, 16
    inputs = open_inputs(config, "cpu")
    assert (inputs.autoencoder.channels, inputs.autoencoder.deterministic) == (64, True)
    config.model.input_size, config.data.image_size = 5, 20
    with pytest.raises(ConfigError, match=r"^data\.image_size: got 20, expected 16, the only size of this auto"):
        open_inputs(config, "cpu")


def test_images_are_standardized_as_datas_latents_and_never_as_eval_datas(config, vae_of_kind):
    """One section holds latents whose statistics were measured, the other images, which are encoded in each step."""
    config.autoencoder.name = name = vae_of_kind("dc")
    config.model.in_channels, config.model.input_size, config.data.image_size = 6, 4, 16
    of = {
        **DiffusersAutoencoder(name).spec.as_dict(),
        "scale": 1.0,
        "mean": [0.1] * 6,
        "std": [0.4] * 6,
        "statistics": "data",
    }
    images = read_specs(config)["data"]
    latents = dataclasses.replace(images, kind="latents", channels=6, image_size=16, autoencoder=of)
    latents = DataSpec.from_json(latents.to_json(), "spec.json")
    autoencoder, encoder = open_autoencoder(config, {"data": latents, "eval_data": images}, "cpu")
    assert autoencoder == encoder.spec == AutoencoderSpec(**of)
    with pytest.raises(ConfigError, match=r"^eval_data\.local: got .*mean=.*expected .*scale=0\.41407.*are encoded"):
        open_autoencoder(config, {"data": images, "eval_data": latents}, "cpu")
    latents.autoencoder.pop("statistics")  # so that they would be the autoencoder's own
    with pytest.raises(ConfigError, match=r"^data\.local: got .*mean=.*expected .*scale=0\.41407"):
        open_autoencoder(config, {"data": latents, "eval_data": images}, "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": [0.0] * 4}, "expected 4 numbers each"),
        ({"mean": [0.0] * 3, "std": [1.0] * 3}, "expected 4 numbers each"),
        ({"mean": [0.0] * 4, "std": [1.0, 0.0, 1.0, 1.0]}, r"autoencoder\.std: expected numbers over 0"),
        ({"mean": [0.0, float("nan"), 0.0, 0.0], "std": [1.0] * 4}, "expected finite numbers"),
        ({"deterministic": 1}, r"autoencoder\.deterministic: expected true or false"),
    ],
)
def test_a_spec_with_statistics_that_cannot_be_is_refused(config, change, message):
    spec = read_specs(config)["data"]
    broken = dataclasses.replace(spec, kind="latents", channels=4, autoencoder={**LATENTS, **change})
    with pytest.raises(ValueError, match=message):
        DataSpec.from_json(broken.to_json(), "spec.json")


def test_latents_of_two_scales_do_not_fit_together(config):
    config.autoencoder.name, config.model.in_channels = "a/vae", 4
    specs = {
        name: dataclasses.replace(spec, kind="latents", channels=4, image_size=64, autoencoder=dict(LATENTS))
        for name, spec in read_specs(config).items()
    }
    check_specs(config, specs)
    specs["eval_data"].autoencoder["scale"] = 0.25
    with pytest.raises(ConfigError, match=r"^eval_data\.local: got latents of .*scale=0\.25.* expected data's, "):
        check_specs(config, specs)
