"""DINOv2's features of images, for FDD: the Fréchet distance of Stein et al. 2023 (arXiv 2306.04675)."""

import math
from collections.abc import Callable

import timm
import torch
from timm.models import load_state_dict
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn.functional import interpolate

from sit_composer.errors import UserError, one_line
from sit_composer.teacher import digest_of

SIDE, PATCH = 224, 14  # pixels of the images, and of a patch
GRID = 37  # patches along a side of the images that it was trained on last
SIZES = {384: "small", 768: "base", 1024: "large", 1536: "giant"}  # by width
PUBLISHED = "large"  # the size that FDD is measured with
HUB = f"timm/vit_{PUBLISHED}_patch14_dinov2.lvd142m"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def load_dinov2(file: str | None, device: str) -> tuple[str, str, Callable[[Tensor], Tensor]]:
    """The size of a DINOv2, a digest of its weights, and the network from uint8 (N, 3, H, W) to features (N, D).

    The weights are those of a file: Meta's ``dinov2_vitl14_pretrain.pth``, or ``model.safetensors`` of timm's
    repository; None takes the latter from the Hub. Reading them runs no code. Raises UserError if they can't be loaded.
    """
    option = f"--features dinov2{f':{file}' if file else ''}"
    try:
        if file is None:
            size = PUBLISHED
            network = timm.create_model(f"vit_{size}_patch14_dinov2.lvd142m", pretrained=True, num_classes=0)
        else:
            weights = load_state_dict(file)
            size = SIZES[weights["cls_token"].shape[-1]]
            if weights["pos_embed"].shape[1] != 1 + GRID**2 or "register_tokens" in weights:
                got = f"registers or {weights['pos_embed'].shape[1]} positions"
                raise ValueError(f"got {got}, expected {1 + GRID**2} positions and no registers")
            network = timm.create_model(f"vit_{size}_patch14_dinov2", num_classes=0)
            network.load_state_dict(checkpoint_filter_fn(weights, network))
    except Exception as error:  # of the Hub, its HTTP client, torch or safetensors
        where = f"its weights come from the Hub once ({HUB})" if file is None else "expected DINOv2's weights"
        advice = "; or give --features dinov2:FILE, of Meta's dinov2_vitl14_pretrain.pth" if file is None else ""
        reason = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"{option}: {where}, and they can't be loaded: {reason[:300]}{advice}") from None
    digest = digest_of(network)  # before the positions are resized
    return size, digest, DINOv2(network).to(device).eval().requires_grad_(False)


class DINOv2(nn.Module):
    """From uint8 images (N, 3, H, W) to the normalized class token (N, D), as the paper's code computes it.

    Images are resized to 224 pixels, bicubic with antialiasing, to whole levels, as by PIL (within one level of it).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        positions = resize_positions(network.pos_embed)
        network.set_input_size((SIDE, SIDE))
        network.pos_embed = nn.Parameter(positions)  # instead of timm's own
        self.network = network
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        levels = interpolate(images.float(), (SIDE, SIDE), mode="bicubic", antialias=True).round().clamp(0, 255)
        return self.network((levels / 255 - self.mean) / self.std)


def resize_positions(positions: Tensor) -> Tensor:
    """The class token's and the patches' positions (1, 1 + N, D), for images of 224 pixels.

    As in `interpolate_pos_encoding` of Meta's code: bicubic without antialiasing, and by a factor that an offset of
    0.1 changes a little. timm and transformers resize otherwise.
    """
    token, patches = positions.detach()[:, :1], positions.detach()[:, 1:]
    before, after = math.isqrt(patches.shape[1]), SIDE // PATCH
    grid = patches.reshape(1, before, before, -1).permute(0, 3, 1, 2)
    factor = (after + 0.1) / before
    grid = interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat((token, grid.flatten(2).transpose(1, 2)), dim=1)
