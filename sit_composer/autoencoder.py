"""Between images and the network's latents: an autoencoder of diffusers, or the identity (pixels).

Images are float (N, C, H, W) in [-1, 1]. Moments are (N, 2c, h, w): the posterior's mean, then its standard
deviation; or (N, c, h, w), the latent itself, of a deterministic encoder. Latents, the network's samples, are
standardized: z = (mean + std · noise - shift) · scale, or (mean + std · noise - m) / s · scale with m, s per channel.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from reprlib import repr as shortened
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from sit_composer.autoencoder_config import CLASSES, EXPECTED, read_layout, stored_channels
from sit_composer.choices import LATENT_MEAN, LATENT_STD
from sit_composer.errors import UserError, first_line, one_line

SLICE_SIZE = 8  # images
KL_SCALE = 0.18215  # AutoencoderKL's default scaling_factor
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
    mean: tuple[float, ...] | None = None  # per channel, instead of shift
    std: tuple[float, ...] | None = None  # per channel
    deterministic: bool = False  # an image has one latent, not a distribution
    # "data" or "file", where mean and std come from if not from the autoencoder; they mean the same from anywhere.
    statistics: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("mean", "std"):  # JSON has lists
            values = getattr(self, name)
            object.__setattr__(self, name, values if values is None else tuple(values))

    def __str__(self) -> str:
        fields = {name: shortened(v) if isinstance(v, list) else repr(v) for name, v in self.as_dict().items()}
        return f"({', '.join(f'{name}={value}' for name, value in fields.items())})"

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it: what an autoencoder lacks is left out, as in the files of earlier versions."""
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        added = ("mean", "std", "deterministic", "statistics")
        return {name: value for name, value in lists.items() if value or name not in added}

    @property
    def stored(self) -> int:
        """The channels of moments."""
        return stored_channels(self.channels, self.deterministic)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Samples latents from moments (N, 2c, h, w) with noise (N, c, h, w) ~ N(0, I), unless deterministic."""
        if self.deterministic:
            return self.standardize(moments)
        mean, std = moments.chunk(2, dim=1)
        return self.standardize(mean + std * noise)

    def standardize(self, encoded: Tensor) -> Tensor:
        """What the network learns, (N, c, h, w), of what the autoencoder encodes."""
        if self.mean is None:
            return (encoded - self.shift) * self.scale
        # As in StableDiffusionXLImg2ImgPipeline.prepare_latents; with scale 1 as in Flux2Pipeline._encode_vae_image.
        return (encoded - _per_channel(self.mean, encoded.device)) / _per_channel(self.std, encoded.device) * self.scale

    def restore(self, latents: Tensor) -> Tensor:
        """The inverse of `standardize`: what the autoencoder decodes."""
        if self.mean is None:
            return latents / self.scale + self.shift
        std, mean = _per_channel(self.std, latents.device), _per_channel(self.mean, latents.device)
        return latents / self.scale * std + mean

    def standardized_as(self, other: "AutoencoderSpec") -> "AutoencoderSpec":
        """This one with the other's statistics, if those are not the autoencoder's own."""
        names = ("scale", "shift", "mean", "std", "statistics")
        return replace(self, **{name: getattr(other, name) for name in names}) if other.statistics else self

    def doubt(self, mean: float, std: float, what: str = "latents") -> str | None:
        """What is wrong with latents of this mean and deviation, once standardized; None if they are plausible."""
        if not LATENT_STD.admit(std):
            found = f"the {what} have a standard deviation of {std:.3g} after scale {self.scale}"
            wrong = "scale is wrong" if self.mean is None else "mean and std are of another autoencoder or other data"
            return f"{found}, expected about 1: the {wrong}, or already applied to the moments"
        if not LATENT_MEAN.admit(mean):
            return f"the {what} have a mean of {mean:.3g} once standardized, expected about 0"
        return None


@lru_cache(maxsize=16)  # steps don't copy them to the device again
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(-1, 1, 1)


class PixelAutoencoder:
    """The identity: latents are the images themselves."""

    def __init__(self, channels: int):
        self.spec = AutoencoderSpec(name=None, channels=channels)

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class DiffusersAutoencoder:
    """A frozen autoencoder of diffusers. It is not a submodule of anything that is trained, sharded or checkpointed.

    Its weights are read from safetensors only, so that no code in them runs.

    Args:
        name: a hub name, such as stabilityai/sd-vae-ft-ema, or a folder that `save_pretrained` wrote; or the name or
            folder of a pipeline, such as SDXL's, SD3's or FLUX's, which has it in its folder ``vae``.
        device, dtype: where and how it computes; inputs and outputs are converted.
        slice_size: images that it computes at a time, which bounds the memory for any number of images.
        latents: the spec of its latents elsewhere, whose statistics it uses if they were measured or given.

    Raises UserError if no complete autoencoder of `autoencoder_config.CLASSES` can be loaded; or for float16, if its
    activations overflow, as its config.json says with ``force_upcast: true`` (SDXL's). An old config without that key
    is accepted.
    """

    def __init__(
        self,
        name: str,
        device: Device = "cpu",
        dtype: torch.dtype = torch.float32,
        slice_size: int = SLICE_SIZE,
        latents: AutoencoderSpec | None = None,
    ):
        import diffusers  # takes seconds to import, and pixels don't need it

        # By default, pickles are read if there are no safetensors. Low memory usage needs accelerate.
        options = {"use_safetensors": True, "low_cpu_mem_usage": False}
        try:
            where, kind = find_autoencoder(name)
            with _without_initial_weights(kind):
                load = getattr(diffusers, kind).from_pretrained
                vae, loading = load(name, subfolder=where, output_loading_info=True, **options)
            for fault in ("missing", "unexpected"):  # diffusers makes the former up at random, and ignores the latter
                if keys := sorted(loading[f"{fault}_keys"]):
                    raise UserError(f"autoencoder.name: the weights of {name!r} have {len(keys)} {fault}, as {keys[0]}")
            standardization = _own_standardization(kind, vae)  # of the weights as they are, not rounded to dtype
        except UserError:
            raise
        except Exception as error:  # diffusers raises a dozen kinds
            reason = first_line(error)
            raise UserError(f"autoencoder.name: can't load an autoencoder from {name!r}: {reason}") from error
        defaulted = vae.config.get("_use_default_values", ())  # the keys that are not in its file
        if dtype == torch.float16 and vae.config.get("force_upcast") and "force_upcast" not in defaulted:
            raise UserError(f"{name}: its config.json has force_upcast, as it overflows in float16; {BETTER[dtype]}")
        torch.nn.Module.to(vae, device, dtype)  # diffusers' own `to` warns of modules to keep in float32: of none
        self.vae, self.slice_size = vae.eval().requires_grad_(False), slice_size
        self.kind, self.layout = kind, read_layout(kind, vae.config)
        self.picture_channels: int = self.layout.image_channels
        of = {key: getattr(self.layout, key) for key in ("channels", "downsample", "deterministic")}
        self.spec = AutoencoderSpec(name=name, **of, **standardization)
        if latents is not None:
            self.spec = self.spec.standardized_as(latents)

    def moments(self, images: Tensor) -> Tensor:
        """Moments of images (N, C, H, W): float32, mean and deviation (N, 2c, h, w), or (N, c, h, w) if deterministic;
        UserError if not finite."""

        def moments(part: Tensor) -> Tensor:
            encoded = self.vae.encode(part / 2 + 0.5 if self.kind == "AutoencoderRAE" else part)  # which takes [0, 1]
            if self.layout.deterministic:
                return encoded.latent
            posterior = encoded.latent_dist
            return pixel_unshuffle(torch.cat([posterior.mean, posterior.std], dim=1), self.layout.patch)

        return self._in_slices(moments, images, "encodes images")

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (N, c, h, w) of images, sampled with noise (none if deterministic)."""
        return self.spec.latents(self.moments(images), noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, C, H, W), float32, of latents (N, c, h, w); UserError if not finite, as after an overflow."""

        def images(part: Tensor) -> Tensor:
            decoded = self.vae.decode(pixel_shuffle(part, self.layout.patch)).sample
            return decoded * 2 - 1 if self.kind == "AutoencoderRAE" else decoded

        return self._in_slices(images, self.spec.restore(latents), "decodes latents")

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


def find_autoencoder(name: str) -> tuple[str | None, str]:
    """Where a folder or hub repository has an autoencoder, at the top (None) or in ``vae``, and its class; or raises
    ValueError."""
    import diffusers  # takes seconds to import, and pixels don't need it

    reasons = []
    for subfolder in (None, "vae"):
        try:
            kind = diffusers.AutoencoderKL.load_config(name, subfolder=subfolder).get("_class_name")
            if kind in CLASSES and not hasattr(diffusers, kind):
                installed = f"this is diffusers {diffusers.__version__}"
                raise ValueError(f"{kind} needs a newer one, {installed}; run pip install -U diffusers")
            if kind in CLASSES:
                return subfolder, kind
            reasons.append(f"its config.json is of {kind or 'no class'}")
        except OSError as error:
            reasons.append(one_line(error))
    raise ValueError(f"{reasons[0]} (and in its folder vae: {reasons[1]}); {EXPECTED}")


def _own_standardization(kind: str, vae: Any) -> dict[str, Any]:
    """The scale, shift, mean and std that diffusers' pipelines apply to the latents of an autoencoder."""
    config = vae.config
    if kind == "AutoencoderRAE":  # applies latents_mean, latents_std and scaling_factor itself
        return {}
    if kind == "AutoencoderKLFlux2":  # as Flux2Pipeline._encode_vae_image
        std = (vae.bn.running_var.double() + config.batch_norm_eps).sqrt()
        return {"mean": vae.bn.running_mean.tolist(), "std": std.tolist()}
    scale, shift = config.scaling_factor, config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        return {"scale": scale, "shift": shift}
    if mean is None or std is None or not len(mean) == len(std) == config.latent_channels or shift:
        expected = f"expected both for each of its {config.latent_channels} channels, and no shift_factor"
        raise ValueError(f"its config.json has latents_mean or latents_std; {expected}")
    # GlmImagePipeline doesn't look at scaling_factor, which is the default there; StableDiffusionXLPipeline does, for
    # Playground v2.5's 0.5.
    return {"mean": mean, "std": std, "scale": 1.0 if scale == KL_SCALE else scale}


def _without_initial_weights(kind: str) -> AbstractContextManager:
    """While an autoencoder is loaded: diffusers replaces torch's initializers by ones that return None, which the
    DINOv2 in AutoencoderRAE doesn't bear."""
    if kind != "AutoencoderRAE":
        return nullcontext()
    from transformers.modeling_utils import no_init_weights  # takes seconds to import

    return no_init_weights()


Autoencoder = PixelAutoencoder | DiffusersAutoencoder


def load_autoencoder(
    name: str | None,
    channels: int,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    slice_size: int = SLICE_SIZE,
    latents: AutoencoderSpec | None = None,
) -> Autoencoder:
    """The `DiffusersAutoencoder` of that name; for None, the identity on images of so many channels."""
    return (
        PixelAutoencoder(channels) if name is None else DiffusersAutoencoder(name, device, dtype, slice_size, latents)
    )


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8 levels, rounded to the nearest."""
    return (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def from_uint8(levels: Tensor) -> Tensor:
    """uint8 levels as float32 images in [-1, 1]."""
    return levels.contiguous().float() / 127.5 - 1  # a loader's are (N, H, W, C) in memory
