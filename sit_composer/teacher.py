"""A frozen vision transformer of timm or transformers, with whose features of an image's patches a network's tokens are
aligned. Its weights are read without running code in them.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from sit_composer.choices import teacher_name
from sit_composer.cli import require
from sit_composer.errors import UserError, first_line

EXPECTED = "expected a vision transformer, such as timm:vit_base_patch14_dinov2.lvd142m"
PREPROCESSOR = "preprocessor_config.json"  # of transformers: mean and deviation of the images
Features = Callable[[Tensor], Tensor]  # of images (N, 3, H, W): tokens (N, T, D)


class _Model(NamedTuple):
    network: nn.Module
    patch: int  # pixels along a side
    digest: str  # of its weights
    mean: list[float]  # of the images that it was trained on, in [0, 1]
    std: list[float]
    tokens: Features  # of the patches alone, in rows from the top


class Teacher:
    """A frozen vision transformer. It is not a submodule of anything that is trained, sharded or checkpointed.

    Images are resized to ``grid`` of its patches along a side, so that it has as many tokens as the network: for
    DINOv2's patches of 14 pixels and 16 tokens, to 224 pixels; to 448 for 32. That and the steps before (the teacher's
    mean and deviation, then bicubic without antialiasing) are as in `preprocess_raw_image` of REPA (arXiv 2410.06940).

    Args:
        name: ``timm:`` and a model's name, or a folder that timm's `save_for_hf` wrote; or ``transformers:`` and a name
            on the Hub, or a folder that `save_pretrained` wrote, with its preprocessor_config.json.
        grid: tokens along a side of an image.
        device: where it computes.
        dtype: of its matrix products, by autocast; weights and results are float32.

    Raises UserError if it can't be loaded, or has no such tokens.
    """

    def __init__(
        self, name: str, grid: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        library, _, model = teacher_name(name, "teacher").partition(":")
        try:
            loaded = (_from_timm if library == "timm" else _from_transformers)(model, grid)
        except UserError:
            raise
        except Exception as error:  # both raise a dozen kinds
            raise UserError(f"{name}: can't be loaded: {first_line(error).rstrip('.')}; {EXPECTED}") from error
        self.name, self.grid, self.device, self.dtype = name, grid, torch.device(device), dtype
        self.image_size = grid * loaded.patch
        self.digest = loaded.digest
        self.network = loaded.network.eval().requires_grad_(False)
        self._tokens = loaded.tokens
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (loaded.mean, loaded.std))
        try:
            self.network.to(device)
            shape = self.features(torch.zeros(1, 3, self.image_size, self.image_size)).shape
        except torch.OutOfMemoryError:
            raise UserError(f"{name}: doesn't fit into the memory of {device}, expected a smaller teacher") from None
        except Exception as error:
            what = f"can't take images of {self.image_size} pixels, for {grid}x{grid} tokens"
            raise UserError(f"{name}: {what}: {first_line(error)}; choose another teacher") from error
        if len(shape) != 3 or shape[1] != grid**2:
            what = f"images of {self.image_size} pixels have features of {tuple(shape)}"
            raise UserError(f"{name}: {what}, expected (1, {grid**2}, width), one for each patch; {EXPECTED}")
        self.width = shape[2]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Its last tokens of the patches (N, grid², width), float32, of images (N, 1 or 3, H, W) in [-1, 1]."""
        images = (images.to(self.device).expand(-1, 3, -1, -1) / 2 + 0.5 - self.mean) / self.std
        images = interpolate(images, self.image_size, mode="bicubic")
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self._tokens(images).float()

    def as_dict(self) -> dict[str, Any]:
        """What shards say of its features."""
        names = ("digest", "image_size", "grid", "width")
        return {"teacher": self.name, **{name: getattr(self, name) for name in names}}


@lru_cache(1)
def load_teacher(name: str, grid: int, device: str, dtype: torch.dtype) -> Teacher:
    """The `Teacher`, loaded once."""
    return Teacher(name, grid, device, dtype)


def _from_timm(model: str, grid: int) -> _Model:
    require(f"timm:{model}", "timm")
    import timm  # an optional dependency

    where = f"local-dir:{model}" if os.path.isdir(model) else model
    network = timm.create_model(where, pretrained=True, num_classes=0)
    if not hasattr(network, "set_input_size") or not hasattr(network, "num_prefix_tokens"):
        raise ValueError("it has no tokens")
    patch, prefix = network.patch_embed.patch_size[0], network.num_prefix_tokens
    digest = digest_of(network)  # before the positions are resized for this grid
    network.set_input_size(img_size=(grid * patch, grid * patch))  # resizes the positions once
    config = network.pretrained_cfg
    return _Model(
        network,
        patch,
        digest,
        config["mean"],
        config["std"],
        lambda images: network.forward_features(images)[:, prefix:],
    )


def _from_transformers(model: str, grid: int) -> _Model:
    from huggingface_hub import hf_hub_download  # takes long to import, and is needed for this alone
    from transformers import AutoModel  # takes seconds to import

    # None, transformers' default, asks on the terminal whether to run code.
    options = {"trust_remote_code": False, "use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    network, loading = AutoModel.from_pretrained(model, **options)
    network = getattr(network, "vision_model", network)  # CLIP and SigLIP have another one for text
    # transformers makes up what is missing at random. A pooler makes no tokens.
    if missing := sorted(key for key in loading["missing_keys"] if "pooler" not in key):
        raise ValueError(f"its weights lack {len(missing)}, as {missing[0]}")
    file = Path(model, PREPROCESSOR) if os.path.isdir(model) else Path(hf_hub_download(model, PREPROCESSOR))
    images = json.loads(file.read_text("utf-8"))
    by_name = "interpolate_pos_encoding" in inspect.signature(network.forward).parameters
    resized = {"interpolate_pos_encoding": True} if by_name else {}  # DINOv2 does it without

    def tokens(images: Tensor) -> Tensor:
        found = network(images, **resized).last_hidden_state  # after class token and registers, if it has them
        known = found.shape[1] - grid**2 in (0, 1, 1 + getattr(network.config, "num_register_tokens", 0))
        return found[:, -(grid**2) :] if known else found

    patch = network.config.patch_size
    return _Model(network, patch, digest_of(network), images["image_mean"], images["image_std"], tokens)


def digest_of(network: nn.Module) -> str:
    """A hash of the weights, as a name may later mean other ones."""
    digest = hashlib.sha256()
    for name, values in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(values.shape)}".encode())
        digest.update(values.contiguous().numpy().data)
    return digest.hexdigest()[:16]
