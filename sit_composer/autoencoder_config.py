"""What the config.json of an autoencoder of diffusers says of its images and latents. Only the standard library is
imported. Defaults are diffusers'; configs of earlier versions lack keys.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """The images that an autoencoder takes, and the latents that it gives."""

    image_channels: int
    channels: int  # of a latent
    downsample: int  # pixels per latent pixel, along a side
    deterministic: bool = False  # an image has one latent, not a distribution
    patch: int = 1  # side of the squares of encoded pixels that make a latent pixel
    image_size: int | None = None  # the side of all images, if there is only one

    def size_fault(self, image_size: int) -> str | None:
        """What is wrong with images of this size, if anything."""
        if self.image_size not in (None, image_size):
            return f"got {image_size}, expected {self.image_size}, the only size of this autoencoder"
        if image_size % self.downsample:
            return f"got {image_size}, expected a multiple of {self.downsample} for this autoencoder"
        return None


def stored_channels(channels: int, deterministic: bool) -> int:
    """The channels of moments: a mean and a deviation for each of the latent's, or the latent itself."""
    return channels * (1 if deterministic else 2)


def read_layout(name: str, config: Config) -> Layout:
    """The layout of the diffusers class of that name, one of `CLASSES`."""
    return CLASSES[name](config)


def _kl(config: Config) -> Layout:
    downsample = 2 ** (len(config.get("block_out_channels", [64])) - 1)
    return Layout(config.get("in_channels", 3), config.get("latent_channels", 4), downsample)


def _flux2(config: Config) -> Layout:
    # As in diffusers' Flux2Pipeline, whose `_patchify_latents` comes before the batch statistics.
    patch = config.get("patch_size", [2, 2])[0]
    channels, downsample = config.get("latent_channels", 32), 2 ** (len(config.get("block_out_channels", [0] * 4)) - 1)
    return Layout(config.get("in_channels", 3), channels * patch**2, downsample * patch, patch=patch)


def _dc(config: Config) -> Layout:
    downsample = 2 ** (len(config.get("encoder_block_out_channels", [0] * 6)) - 1)
    return Layout(config.get("in_channels", 3), config.get("latent_channels", 32), downsample, deterministic=True)


def _rae(config: Config) -> Layout:
    # The encoder resizes images of any size to its own, so that only the decoder's size comes back as it went in.
    side = config.get("encoder_input_size", 224) // config.get("encoder_patch_size", 14)
    channels, patch = config.get("encoder_hidden_size", 768), config.get("patch_size", 16)
    return Layout(config.get("num_channels", 3), channels, patch, deterministic=True, image_size=side * patch)


CLASSES: dict[str, Callable[[Config], Layout]] = {
    "AutoencoderKL": _kl,
    "AutoencoderKLFlux2": _flux2,
    "AutoencoderDC": _dc,
    "AutoencoderRAE": _rae,
}
EXPECTED = f"expected an autoencoder of diffusers ({', '.join(CLASSES)})"
