"""A small AutoencoderKL."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL


def write_autoencoder(folder: Path) -> str:
    """Makes one with random weights, and saves it as the real ones are."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, scaling_factor=0.3, shift_factor=0.05,
    )  # fmt: skip
    vae.save_pretrained(folder)
    return str(folder)
