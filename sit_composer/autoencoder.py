"""What lies between pictures and the network's latents: diffusers' `AutoencoderKL`, or nothing at all (pixels).

Pictures are float (N, C, H, W) in [-1, 1]. Moments are (N, 2c, h, w): the posterior's mean, then its standard
deviation. Latents, what SiT is trained on, are z = (mean + std · noise - shift) · scale.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sit_composer.errors import UserError

SLICE_SIZE = 8  # pictures
DEFAULTED = "_use_default_values"  # where diffusers lists the config's keys that are not in its file
BETTER = {
    torch.float16: "take bfloat16 or float32",
    torch.bfloat16: "take float32",
    torch.float32: "its weights or what it was given are broken",
}


@dataclass(frozen=True)
class AutoencoderSpec:
    """What a network's latents mean. It travels with shards and checkpoints, so that a mismatch is seen."""

    name: str | None  # a hub name or a path; None is the identity
    channels: int  # of a latent
    downsample: int = 1  # pixels a latent pixel, along a side
    scale: float = 1.0
    shift: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Samples latents from moments (N, 2c, h, w) with noise (N, c, h, w) ~ N(0, I)."""
        mean, std = moments.chunk(2, dim=1)
        return (mean + std * noise - self.shift) * self.scale


class PixelAutoencoder:
    """The identity: latents are the pictures themselves."""

    def __init__(self, channels: int):
        self.spec = AutoencoderSpec(name=None, channels=channels)

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        return pictures

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class KLAutoencoder:
    """A frozen `AutoencoderKL`. It is no submodule of anything that is trained, sharded or checkpointed.

    Its weights are read from safetensors alone, so that nothing that is in them runs.

    Args:
        name: a hub name, such as stabilityai/sd-vae-ft-ema, or a folder that `save_pretrained` wrote; or those of a
            pipeline, such as SDXL's, SD3's or FLUX's, whose folder ``vae`` holds it.
        device, dtype: where and how it computes; what goes in and out is converted.
        slice_size: pictures that it computes at a time, which bounds the memory for any number of pictures.

    Raises:
        UserError: if no whole AutoencoderKL can be loaded from there; or for float16, if its own config.json says
            ``force_upcast: true``, as SDXL's does, whose activations overflow in it. (That key is younger than SD's
            autoencoders, and true by default: an old config that has not got it is believed to do with float16.)
    """

    def __init__(
        self,
        name: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        slice_size: int = SLICE_SIZE,
    ):
        from diffusers import AutoencoderKL  # seconds to import, and pixels don't need it

        try:
            subfolder = find_subfolder(name)
            vae, loading = AutoencoderKL.from_pretrained(
                name,
                subfolder=subfolder,
                torch_dtype=dtype,
                use_safetensors=True,  # the default falls back to pickles
                low_cpu_mem_usage=False,  # needs accelerate
                output_loading_info=True,
            )
        except Exception as error:  # diffusers raises a dozen kinds
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"autoencoder.name: can't load an AutoencoderKL from {name!r}: {reason}") from error
        config = vae.config
        for fault in ("missing", "unexpected"):  # diffusers draws the former at random, and forgets the latter
            if keys := sorted(loading[f"{fault}_keys"]):
                raise UserError(f"autoencoder.name: the weights of {name!r} have {len(keys)} {fault}, as {keys[0]}")
        if config.latents_mean is not None or config.latents_std is not None:
            raise UserError(
                f"autoencoder.name: {name!r} has latents_mean or latents_std, numbers for each channel; it takes one "
                "with one scaling_factor and one shift_factor"
            )
        if dtype == torch.float16 and config.force_upcast and "force_upcast" not in config.get(DEFAULTED, ()):
            raise UserError(f"{name}: its config.json says force_upcast, as it overflows in float16; {BETTER[dtype]}")
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.slice_size = slice_size
        self.picture_channels: int = config.in_channels
        self.spec = AutoencoderSpec(
            name=name,
            channels=config.latent_channels,
            downsample=2 ** (len(config.block_out_channels) - 1),
            scale=config.scaling_factor,
            shift=config.shift_factor or 0.0,
        )

    def moments(self, pictures: Tensor) -> Tensor:
        """Mean and standard deviation of pictures (N, C, H, W): float32 (N, 2c, h, w).

        Raises:
            UserError: if they are not finite.
        """

        def moments(part: Tensor) -> Tensor:
            posterior = self.vae.encode(part).latent_dist
            return torch.cat([posterior.mean, posterior.std], dim=1)

        return self._in_slices(moments, pictures, "encodes pictures")

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (N, c, h, w) of pictures, sampled with noise, or with torch's own."""
        moments = self.moments(pictures)
        if noise is None:
            noise = torch.randn_like(moments[:, : self.spec.channels])
        return self.spec.latents(moments, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (N, C, H, W), float32, of latents (N, c, h, w).

        Raises:
            UserError: if they are not finite, as where a float16 overflows.
        """
        latents = latents / self.spec.scale + self.spec.shift
        return self._in_slices(lambda part: self.vae.decode(part).sample, latents, "decodes latents")

    @torch.no_grad()
    def _in_slices(self, function: Callable[[Tensor], Tensor], batch: Tensor, what: str) -> Tensor:
        parts = []
        with torch.autocast(self.vae.device.type, enabled=False):  # the training step's is the network's alone
            for part in batch.split(self.slice_size):
                parts.append(function(part.to(self.vae.device, self.vae.dtype)).float())
                if not parts[-1].isfinite().all():
                    dtype = str(self.vae.dtype).removeprefix("torch.")
                    raise UserError(
                        f"{self.spec.name}: {what} in {dtype} to NaN or infinite values; {BETTER[self.vae.dtype]}"
                    )
        return torch.cat(parts)


def find_subfolder(name: str) -> str | None:
    """Where an AutoencoderKL lies in a folder or hub repository: None is at the top, ``vae`` a pipeline's.

    Raises:
        ValueError: if in neither place.
    """
    from diffusers import AutoencoderKL

    reasons = []
    for subfolder in (None, "vae"):
        try:
            kind = AutoencoderKL.load_config(name, subfolder=subfolder).get("_class_name")
        except OSError as error:
            reasons.append(" ".join(str(error).split()))
            continue
        if kind == "AutoencoderKL":
            return subfolder
        reasons.append(f"its config.json is of {kind or 'no class'}")
    raise ValueError(f"{reasons[0]} (and in its folder vae: {reasons[1]})")


Autoencoder = PixelAutoencoder | KLAutoencoder


def load_autoencoder(
    name: str | None,
    channels: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    slice_size: int = SLICE_SIZE,
) -> Autoencoder:
    """The autoencoder of that name, as `KLAutoencoder` takes it; None is the identity on so many channels."""
    return PixelAutoencoder(channels) if name is None else KLAutoencoder(name, device, dtype, slice_size)


def to_uint8(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] as uint8 levels, rounded to the nearest."""
    return (pictures.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def from_uint8(levels: Tensor) -> Tensor:
    """uint8 levels as float32 pictures in [-1, 1]."""
    return levels.float() / 127.5 - 1
