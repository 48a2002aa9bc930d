"""Between images and the network's latents: diffusers' `AutoencoderKL`, or the identity (pixels).

Images are float (N, C, H, W) in [-1, 1]. Moments are (N, 2c, h, w): the posterior's mean, then its standard
deviation. Latents, the network's samples, are z = (mean + std · noise - shift) · scale.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sit_composer.choices import LATENT_MEAN, LATENT_STD
from sit_composer.errors import UserError, first_line, one_line

SLICE_SIZE = 8  # images
Device: TypeAlias = torch.device | str
BETTER = {torch.float16: "use bfloat16 or float32", torch.bfloat16: "use float32"}


@dataclass(frozen=True)
class AutoencoderSpec:
    """What a network's latents mean. Shards and checkpoints hold it, so that a mismatch is noticed."""

    name: str | None  # a hub name or a path; None is the identity
    channels: int  # of a latent
    downsample: int = 1  # pixels per latent pixel, along a side
    scale: float = 1.0
    shift: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Samples latents from moments (N, 2c, h, w) with noise (N, c, h, w) ~ N(0, I)."""
        mean, std = moments.chunk(2, dim=1)
        return (mean + std * noise - self.shift) * self.scale

    def doubt(self, mean: float, std: float, what: str = "latents") -> str | None:
        """What is wrong with latents of this mean and deviation, after shift and scale; None if they are plausible."""
        if not LATENT_STD.admit(std):
            found = f"the {what} have a standard deviation of {std:.3g} after scale {self.scale}"
            return f"{found}, expected about 1: the scale is wrong, or already applied to the moments"
        if not LATENT_MEAN.admit(mean):
            return f"the {what} have a mean of {mean:.3g} after shift and scale, expected about 0"
        return None


class PixelAutoencoder:
    """The identity: latents are the images themselves."""

    def __init__(self, channels: int):
        self.spec = AutoencoderSpec(name=None, channels=channels)

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class KLAutoencoder:
    """A frozen `AutoencoderKL`. It is not a submodule of anything that is trained, sharded or checkpointed.

    Its weights are read from safetensors only, so that no code in them runs.

    Args:
        name: a hub name, such as stabilityai/sd-vae-ft-ema, or a folder that `save_pretrained` wrote; or the name or
            folder of a pipeline, such as SDXL's, SD3's or FLUX's, which has it in its folder ``vae``.
        device, dtype: where and how it computes; inputs and outputs are converted.
        slice_size: images that it computes at a time, which bounds the memory for any number of images.

    Raises UserError if no complete AutoencoderKL can be loaded; or for float16, if its activations overflow, as its
    config.json says with ``force_upcast: true`` (SDXL's). An old config without that key is accepted.
    """

    def __init__(
        self, name: str, device: Device = "cpu", dtype: torch.dtype = torch.float32, slice_size: int = SLICE_SIZE
    ):
        from diffusers import AutoencoderKL  # takes seconds to import, and pixels don't need it

        # By default, pickles are read if there are no safetensors. Low memory usage needs accelerate.
        options = {"torch_dtype": dtype, "use_safetensors": True, "low_cpu_mem_usage": False}
        try:
            where = find_subfolder(name)
            vae, loading = AutoencoderKL.from_pretrained(name, subfolder=where, output_loading_info=True, **options)
        except Exception as error:  # diffusers raises a dozen kinds
            reason = first_line(error)
            raise UserError(f"autoencoder.name: can't load an AutoencoderKL from {name!r}: {reason}") from error
        config = vae.config
        for fault in ("missing", "unexpected"):  # diffusers makes the former up at random, and ignores the latter
            if keys := sorted(loading[f"{fault}_keys"]):
                raise UserError(f"autoencoder.name: the weights of {name!r} have {len(keys)} {fault}, as {keys[0]}")
        if config.latents_mean is not None or config.latents_std is not None:
            what = "latents_mean or latents_std, numbers per channel"
            raise UserError(f"autoencoder.name: {name!r} has {what}; expected one scaling_factor and one shift_factor")
        defaulted = config.get("_use_default_values", ())  # the keys that are not in its file
        if dtype == torch.float16 and config.force_upcast and "force_upcast" not in defaulted:
            raise UserError(f"{name}: its config.json has force_upcast, as it overflows in float16; {BETTER[dtype]}")
        self.vae, self.slice_size = vae.to(device).eval().requires_grad_(False), slice_size
        self.picture_channels: int = config.in_channels
        self.spec = AutoencoderSpec(
            name=name,
            channels=config.latent_channels,
            downsample=2 ** (len(config.block_out_channels) - 1),
            scale=config.scaling_factor,
            shift=config.shift_factor or 0.0,
        )

    def moments(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of images (N, C, H, W): float32 (N, 2c, h, w); UserError if not finite."""

        def moments(part: Tensor) -> Tensor:
            posterior = self.vae.encode(part).latent_dist
            return torch.cat([posterior.mean, posterior.std], dim=1)

        return self._in_slices(moments, images, "encodes images")

    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """Latents (N, c, h, w) of images, sampled with noise."""
        return self.spec.latents(self.moments(images), noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, C, H, W), float32, of latents (N, c, h, w); UserError if not finite, as after an overflow."""
        latents = latents / self.spec.scale + self.spec.shift
        return self._in_slices(lambda part: self.vae.decode(part).sample, latents, "decodes latents")

    @torch.no_grad()
    def _in_slices(self, function: Callable[[Tensor], Tensor], batch: Tensor, action: str) -> Tensor:
        parts = []
        with torch.autocast(self.vae.device.type, enabled=False):  # the training step's autocast is for the network
            for part in batch.split(self.slice_size):
                parts.append(function(part.to(self.vae.device, self.vae.dtype)).float())
                if not parts[-1].isfinite().all():
                    reason = f"{action} in {str(self.vae.dtype).removeprefix('torch.')} to NaN or infinite values"
                    advice = BETTER.get(self.vae.dtype, "its weights or its input are broken")
                    raise UserError(f"{self.spec.name}: {reason}; {advice}")
        return torch.cat(parts)


def find_subfolder(name: str) -> str | None:
    """Where a folder or hub repository has an AutoencoderKL: at the top (None) or in ``vae``; or raises ValueError."""
    from diffusers import AutoencoderKL  # takes seconds to import, and pixels don't need it

    reasons = []
    for subfolder in (None, "vae"):
        try:
            kind = AutoencoderKL.load_config(name, subfolder=subfolder).get("_class_name")
            if kind == "AutoencoderKL":
                return subfolder
            reasons.append(f"its config.json is of {kind or 'no class'}")
        except OSError as error:
            reasons.append(one_line(error))
    raise ValueError(f"{reasons[0]} (and in its folder vae: {reasons[1]})")


Autoencoder = PixelAutoencoder | KLAutoencoder


def load_autoencoder(
    name: str | None,
    channels: int,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    slice_size: int = SLICE_SIZE,
) -> Autoencoder:
    """The `KLAutoencoder` of that name; for None, the identity on images of so many channels."""
    return PixelAutoencoder(channels) if name is None else KLAutoencoder(name, device, dtype, slice_size)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8 levels, rounded to the nearest."""
    return (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def from_uint8(levels: Tensor) -> Tensor:
    """uint8 levels as float32 images in [-1, 1]."""
    return levels.contiguous().float() / 127.5 - 1  # a loader's are (N, H, W, C) in memory
