"""Whether a config fits the shards that it names."""

import os
from pathlib import Path

from sit_composer.choices import teacher_name
from sit_composer.config.schema import Config, ConfigError, DataConfig, network_arguments
from sit_composer.data.spec import SPEC_NAME, DataSpec
from sit_composer.errors import first_line


def local_spec(data: DataConfig, section: str = "data") -> DataSpec | None:
    """The spec of shards in a local folder; None if they have a remote, which `data.stream.load_spec` reads."""
    if data.remote is not None:
        return None
    path = Path(data.local, SPEC_NAME)
    try:
        return DataSpec.from_json(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        what = f"no shards in {data.local!r} ({path.name}: {getattr(error, 'strerror', None) or first_line(error)})"
        hint = f"make them by convert/to_mds.py, or set {section}.remote to where they are"
        raise ConfigError(f"{section}.local: {what}; {hint}") from None
    except ValueError as error:
        raise ConfigError(f"{section}.local: {error}") from None


def check_data(config: Config, spec: DataSpec, section: str = "data") -> None:
    """Checks that the network fits a section's shards; `check_latents` does so for an autoencoder's, once loaded."""
    data: DataConfig = getattr(config, section)
    where, batch, name = data.remote or data.local, data.global_batch_size, config.autoencoder.name
    ours, theirs = config.model.num_classes, spec.num_classes
    if theirs > ours or (theirs < ours and section == "data"):  # others would never be trained
        raise ConfigError(f"model.num_classes: got {ours}, expected {theirs}: {where} has {theirs} classes")
    if spec.samples < batch and section == "data":
        expected = f"at most {spec.samples}, the samples of {where}"
        raise ConfigError(f"{section}.global_batch_size: got {batch}, expected {expected}")
    if config.alignment is not None and config.alignment.name == "repa" and section == "data":
        check_features(config, spec)
    if spec.kind == "latents":
        maker = spec.autoencoder["name"]
        # A folder may have two names, relative and absolute.
        if name != maker and not (os.path.isdir(name or "") and os.path.realpath(name) == os.path.realpath(maker)):
            raise ConfigError(f"autoencoder.name: got {name}, expected {maker}, which made the latents of {where}")
        if data.image_size not in (None, spec.image_size):
            expected = f"{spec.image_size}, as for the latents of {where}"
            raise ConfigError(f"{section}.image_size: got {data.image_size}, expected {expected}")
        check_latents(config, spec.channels, spec.autoencoder["downsample"], spec.image_size, section)
    elif name is None:  # images are enlarged only if data.image_size is given
        check_latents(config, spec.channels, 1, data.image_size or spec.image_size or config.model.input_size, section)


def token_grid(config: Config) -> int:
    """The network's tokens along a side of an image."""
    return config.model.input_size // network_arguments(config.model)["patch_size"]


def check_features(config: Config, spec: DataSpec) -> None:
    """Checks that latents have the features of the run's teacher, for the network's tokens; images need none."""
    if spec.kind == "pixels":
        return
    where, grid = config.data.remote or config.data.local, token_grid(config)
    teacher = teacher_name(config.alignment.teacher)
    convert = f"convert with --features {teacher} --features-grid {grid}"
    if spec.features is None:
        raise ConfigError(f"alignment.teacher: {where} has latents without features; {convert}, or train from images")
    if spec.features["teacher"] != teacher:
        expected = f"expected {spec.features['teacher']}, whose features are in {where}"
        raise ConfigError(f"alignment.teacher: got {teacher}, {expected}; or {convert}")
    if (found := spec.features["grid"]) != grid:
        what = f"the features in {where} are of {found}x{found} tokens, expected the network's {grid}x{grid}"
        raise ConfigError(f"alignment.teacher: {what}; {convert}")


def check_classes_agree(specs: dict[str, DataSpec]) -> None:
    """Checks, for the specs of all sections, that labels mean the same in each."""
    for section, spec in specs.items():
        if spec.classes != specs["data"].classes:
            raise ConfigError(f"{section}.local: its classes are not data's, or not in the same order")


def check_latents(config: Config, channels: int, downsample: int, image_size: int, section: str = "data") -> None:
    """Checks that the latents of images of image_size have the network's size and channels."""
    model, side = config.model, image_size // downsample
    if model.in_channels != channels:
        raise ConfigError(f"model.in_channels: got {model.in_channels}, expected {channels}, the channels of the data")
    if image_size % downsample:
        what = f"expected a multiple of {downsample}, the pixels per latent along a side"
        raise ConfigError(f"{section}.image_size: got {image_size}, {what}")
    if model.input_size != side:
        raise ConfigError(f"model.input_size: got {model.input_size}, expected {side} for images of {image_size}")
