"""Images to latents, as conversion does it: in batches and bfloat16, beside the loop that one writes first."""

import statistics
import tempfile
from functools import cache, partial

import torch

from sit_composer.costs.estimate import STABLE_DIFFUSION
from tests.benchmarks.gpu.harness import Result, Rows, Setting, has, need, seconds_of

TINY = {
    "block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4, "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
FIRST = "one at a time, float32"
CASES = {  # dtype, images at a time
    FIRST: (torch.float32, 1),
    "one at a time, bfloat16": (torch.bfloat16, 1),
    **{f"batches of {n}, bfloat16": (torch.bfloat16, n) for n in (8, 32, 128)},
}


def rows(setting: Setting) -> Rows:
    if has("diffusers"):
        from diffusers import AutoencoderKL  # noqa: F401 - takes seconds, which aren't a row's

    rates: dict[str, float] = {}
    return {name: (20, partial(measure, setting, rates, name, *case)) for name, case in CASES.items()}


@cache
def saved(tiny: bool) -> tempfile.TemporaryDirectory:
    """A folder with an autoencoder of random weights."""
    from diffusers import AutoencoderKL  # optional

    torch.manual_seed(0)
    folder = tempfile.TemporaryDirectory()
    AutoencoderKL(**(TINY if tiny else STABLE_DIFFUSION)).save_pretrained(folder.name)
    return folder


def measure(setting: Setting, rates: dict[str, float], name: str, dtype: torch.dtype, batch: int) -> Result:
    need("diffusers")
    from sit_composer.autoencoder import DiffusersAutoencoder  # optional: diffusers

    autoencoder = DiffusersAutoencoder(saved(setting.tiny).name, setting.device, dtype, slice_size=batch)
    side, count = (16, batch) if setting.tiny else (256, max(batch, 16))
    images = torch.rand(count, 3, side, side, device=setting.device) * 2 - 1
    times = seconds_of(lambda: autoencoder.moments(images), setting.device, 2 if setting.tiny else 5)
    rates[name] = count / statistics.median(times)
    ratio = rates[name] / rates[FIRST] if FIRST in rates else None
    return {"batch": batch, "images_per_second": rates[name], "ratio": ratio}
