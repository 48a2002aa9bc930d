"""Trains a small AutoencoderKL: the body of `sit_composer.tiny_autoencoder`."""

import argparse
import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import trange

from sit_composer.autoencoder import from_uint8
from sit_composer.data.loader import build_loader
from sit_composer.data.stream import load_spec
from sit_composer.errors import UserError
from sit_composer.outputs import mode_of_umask

BATCH, RATE = 64, 2e-3
KL = 1e-3  # weight of the divergence from N(0, 1), against squared errors; both are summed over an image
WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(args: argparse.Namespace) -> None:
    """Trains on all images of the shards, and of their mirror images, and writes the folder; raises UserError."""
    images = from_uint8(read_images(args.shards))  # (N, C, S, S)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    vae = make_autoencoder(images.shape[1], images.shape[-1]).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, args.steps)
    for _ in trange(args.steps, desc="training", unit="step", disable=None):
        batch = images[torch.randint(len(images), (BATCH,))].to(device)
        batch[::2] = batch[::2].flip(-1)
        posterior = vae.encode(batch).latent_dist
        error = (vae.decode(posterior.sample()).sample - batch).square().sum(dim=(1, 2, 3))
        loss = (error + KL * posterior.kl()).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    error, deviation = measure(vae.eval(), images[: 16 * BATCH].to(device))
    vae.register_to_config(scaling_factor=1 / deviation)
    save(vae, args.out)
    print(f"{args.out}: the mean error of a pixel is {error:.1f} of 255 levels; scale {1 / deviation:.3f}")


def read_images(shards: str) -> Tensor:
    """All images of a folder of shards, uint8 (N, C, S, S)."""
    spec = load_spec(None, shards)
    if spec.kind != "pixels" or spec.image_size is None or spec.image_size % 2:
        raise UserError(f"{shards}: expected shards of images of one size, an even number of pixels")
    loader = build_loader(None, shards, spec=spec, batch_size=BATCH, shuffle=False, drop_last=False)
    return torch.cat([batch["image"] for batch in loader])


def make_autoencoder(channels: int, size: int) -> AutoencoderKL:
    """An untrained one, which halves the side."""
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=size,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def measure(vae: AutoencoderKL, images: Tensor) -> tuple[float, float]:
    """The mean error of a pixel, in levels, after coding and decoding; and the standard deviation of latents."""
    posterior = vae.encode(images).latent_dist
    error = (vae.decode(posterior.mean).sample.clamp(-1, 1) - images).abs().mean()
    return 127.5 * error.item(), posterior.sample().std().item()


def save(vae: AutoencoderKL, out: Path) -> None:
    """Writes the folder, whole or not at all."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        with mode_of_umask(temporary / WEIGHTS):
            vae.save_pretrained(temporary)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
