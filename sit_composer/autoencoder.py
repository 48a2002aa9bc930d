"""What lies between pictures and the network's latents: diffusers' `AutoencoderKL`, or nothing at all (pixels).

Pictures are float (N, C, H, W) in [-1, 1]. Moments are (N, 2c, h, w): the posterior's mean, then its standard
deviation. Latents, what SiT is trained on, are z = (mean + std · noise - shift) · scale.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sit_composer.errors import UserError


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

    Args:
        name: a hub name, such as stabilityai/sd-vae-ft-ema, or a folder that `save_pretrained` wrote.
        device, dtype: where and how it computes; what goes in and out is converted.

    Raises:
        UserError: if no AutoencoderKL can be loaded from there.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        from diffusers import AutoencoderKL  # seconds to import, and pixels don't need it

        try:
            vae = AutoencoderKL.from_pretrained(name)
        except Exception as error:  # diffusers raises a dozen kinds
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"autoencoder.name: can't load an AutoencoderKL from {name!r}: {reason}") from error
        self.vae = vae.to(device, dtype).eval().requires_grad_(False)
        self.picture_channels: int = vae.config.in_channels
        self.spec = AutoencoderSpec(
            name=name,
            channels=vae.config.latent_channels,
            downsample=2 ** (len(vae.config.block_out_channels) - 1),
            scale=vae.config.scaling_factor,
            shift=vae.config.shift_factor or 0.0,
        )

    @torch.no_grad()
    def moments(self, pictures: Tensor) -> Tensor:
        """Mean and standard deviation of pictures (N, C, H, W): float32 (N, 2c, h, w)."""
        with torch.autocast(self.vae.device.type, enabled=False):  # the training step's is the network's alone
            posterior = self.vae.encode(pictures.to(self.vae.device, self.vae.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float()

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (N, c, h, w) of pictures, sampled with noise, or with torch's own."""
        moments = self.moments(pictures)
        if noise is None:
            noise = torch.randn_like(moments[:, : self.spec.channels])
        return self.spec.latents(moments, noise)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (N, C, H, W), float32, of latents (N, c, h, w)."""
        latents = (latents / self.spec.scale + self.spec.shift).to(self.vae.device, self.vae.dtype)
        with torch.autocast(self.vae.device.type, enabled=False):
            return self.vae.decode(latents).sample.float()


Autoencoder = PixelAutoencoder | KLAutoencoder


def load_autoencoder(name: str | None, channels: int, device: torch.device | str = "cpu") -> Autoencoder:
    """The autoencoder of that name on that device, in float32; None is the identity on so many channels."""
    return PixelAutoencoder(channels) if name is None else KLAutoencoder(name, device)


def to_uint8(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] as uint8 levels, rounded to the nearest."""
    return (pictures.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def from_uint8(levels: Tensor) -> Tensor:
    """uint8 levels as float32 pictures in [-1, 1]."""
    return levels.float() / 127.5 - 1
