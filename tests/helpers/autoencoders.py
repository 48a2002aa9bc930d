"""Small autoencoders of random weights, saved as the real ones are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderRAE

BLOCKS = {
    "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4,
}  # fmt: skip


def write_autoencoder(folder: Path) -> str:
    """Makes an AutoencoderKL, and saves it."""
    torch.manual_seed(0)
    vae = AutoencoderKL(**BLOCKS, latent_channels=4, scaling_factor=0.3, shift_factor=0.05)
    vae.save_pretrained(folder)
    return str(folder)


def per_channel() -> AutoencoderKL:
    """As Playground v2.5's: mean, deviation and a scale."""
    statistics = {"latents_mean": [-0.3, 0.1, 0.0, 0.2], "latents_std": [0.5, 1.5, 0.7, 0.9]}
    return AutoencoderKL(**BLOCKS, latent_channels=4, scaling_factor=0.5, **statistics)


def flux2() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(**BLOCKS, latent_channels=3, sample_size=16)
    vae.bn.running_mean.copy_(torch.randn(12))
    vae.bn.running_var.copy_(torch.rand(12) + 0.5)
    return vae


def dc() -> AutoencoderDC:
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_block_types": "ResBlock", f"{side}_block_out_channels": (4, 8, 8)}
        sides |= {f"{side}_layers_per_block": (1, 1, 1), f"{side}_qkv_multiscales": ((), (), ())}
    shortcuts = {"encoder_out_shortcut": False, "decoder_in_shortcut": False}
    return AutoencoderDC(latent_channels=6, attention_head_dim=4, scaling_factor=0.41407, **sides, **shortcuts)


def rae() -> AutoencoderRAE:
    """A DINOv2 as the encoder, of images resized to 8x8; images of 16x16 come back."""
    decoder = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return AutoencoderRAE(
        encoder_hidden_size=64, encoder_patch_size=2, encoder_num_hidden_layers=1, encoder_input_size=8, patch_size=4,
        latents_mean=torch.randn(64, 1, 1) * 0.1, latents_std=torch.rand(64, 1, 1) + 0.5,
        **{f"decoder_{name}": value for name, value in decoder.items()},
    )  # fmt: skip


KINDS: dict[str, Callable[[], Any]] = {"per_channel": per_channel, "flux2": flux2, "dc": dc, "rae": rae}


def write_kind(kind: str, folder: Path) -> str:
    """Makes an autoencoder of that kind, and saves it."""
    torch.manual_seed(0)
    KINDS[kind]().save_pretrained(folder)
    return str(folder)
