"""Whether a config fits the shards that it names."""

import os
from pathlib import Path

from sit_composer.config.schema import Config, ConfigError, DataConfig
from sit_composer.data.spec import SPEC_NAME, DataSpec


def local_spec(data: DataConfig, section: str = "data") -> DataSpec | None:
    """The spec of shards that are all in a local folder; None if they have a remote, which only `data.py` can read.

    Raises:
        ConfigError: if there is none, or it is malformed.
    """
    if data.remote is not None:
        return None
    path = Path(data.local, SPEC_NAME)
    try:
        return DataSpec.from_json(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{section}.local: no shards in {data.local!r} ({path.name}: {reason}); convert/to_mds.py makes them, and "
            f"{section}.remote names where they are if not here"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{section}.local: {error}") from None


def check_data(config: Config, spec: DataSpec, section: str = "data") -> None:
    """Checks that the network can be trained on such shards.

    Raises:
        ConfigError: naming the key, what it got and what the shards hold.
    """
    data: DataConfig = getattr(config, section)
    model, where = config.model, data.remote or data.local
    if spec.num_classes > model.num_classes:
        raise ConfigError(f"model.num_classes: got {model.num_classes}; {where} has {spec.num_classes} classes")
    if spec.num_classes < model.num_classes and section == "data":
        raise ConfigError(
            f"model.num_classes: got {model.num_classes}; {where} has only {spec.num_classes} classes, so that the "
            "others would never be trained"
        )
    if spec.samples < data.global_batch_size and section == "data":
        raise ConfigError(
            f"{section}.global_batch_size: got {data.global_batch_size}; {where} has {spec.samples} samples"
        )
    if spec.kind == "latents":
        theirs = spec.autoencoder or {}
        if not _same_place(config.autoencoder.name, theirs["name"]):
            raise ConfigError(
                f"autoencoder.name: got {config.autoencoder.name}; {where} was made with {theirs.get('name')}"
            )
        if data.image_size not in (None, spec.image_size):
            raise ConfigError(
                f"{section}.image_size: got {data.image_size}; {where} holds latents of {spec.image_size}"
            )
        check_latents(config, spec.channels, theirs["downsample"], spec.image_size, section)
    elif data.image_size is None and spec.image_size is not None and config.autoencoder.name is None:
        check_latents(config, spec.channels, 1, spec.image_size, section)  # enlarged only if data.image_size says so
    elif config.autoencoder.name is None:
        check_latents(config, spec.channels, 1, data.image_size or model.input_size, section)


def _same_place(name: str | None, other: str) -> bool:
    """Whether two names are of one autoencoder: one on the Hub, or one folder, from here or from the root."""
    return name == other or (
        name is not None and os.path.isdir(name) and os.path.realpath(name) == os.path.realpath(other)
    )


def check_latents(config: Config, channels: int, downsample: int, image_size: int, section: str = "data") -> None:
    """Checks that pictures of image_size become latents that the network takes."""
    model = config.model
    if model.in_channels != channels:
        raise ConfigError(f"model.in_channels: got {model.in_channels}; the data has {channels}")
    if image_size % downsample:
        raise ConfigError(
            f"{section}.image_size: got {image_size}; the autoencoder makes one of {downsample} pixels along a side, "
            f"so it takes a multiple of {downsample}"
        )
    if model.input_size != image_size // downsample:
        raise ConfigError(
            f"model.input_size: got {model.input_size}; pictures of {image_size} become latents of "
            f"{image_size // downsample}"
        )
