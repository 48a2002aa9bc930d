"""Measures the cost of a training step beyond the network:   python tests/benchmarks/step.py

Trains one network on one batch of latents in two ways, in turn: with a plain loop (posterior, noise, times, loss,
AdamW, and the average, one parameter at a time), and with Composer's Trainer, `ComposerSiT` and `EMA`, where noise,
times and label dropout depend on each sample's key. Uses a GPU in bfloat16, if there is one. Prints a Markdown table
of the medians, and ours over the loop's.
"""

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from copy import deepcopy

import torch
from composer import Trainer
from torch import Tensor

from sit_composer.algorithms.ema import EMA
from sit_composer.autoencoder import AutoencoderSpec
from sit_composer.sit import SiT, build_sit
from sit_composer.training.model import ComposerSiT
from sit_composer.transport import Transport

VAE = AutoencoderSpec(name="-", scale=0.18215, shift=0.0, channels=4, downsample=8)
DECAY = 0.9999


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-XL/2" if gpu else "SiT-S/8", help="for 256x256 images (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32 if gpu else 8, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="per side and round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="the median of them is printed (%(default)s)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = "cuda" if gpu else "cpu"
    network, batch = build_sit(args.model), make_batch(args.batch_size, device)
    sides = [loop(network, batch, device), trainer(deepcopy(network), batch, device, args.steps)]
    for side in sides:
        side(args.steps)  # warms up
    times = [[seconds(side, args.steps) for side in sides] for _ in range(args.rounds)]
    theirs, ours = (args.batch_size * args.steps / statistics.median(column) for column in zip(*times, strict=True))
    print("| network, batch | loop, images/s | sit_composer | ratio |")
    print("| --- | ---: | ---: | ---: |")
    print(f"| {args.model}, {args.batch_size} | {theirs:.1f} | {ours:.1f} | {ours / theirs:.2f} |")
    return 0


def make_batch(size: int, device: str) -> dict[str, Tensor]:
    """Random moments, labels and keys, on the device."""
    moments = torch.randn(size, 8, 32, 32).half().abs()  # so that standard deviations are positive
    batch = {"moments": moments, "label": torch.arange(size), "index": torch.arange(size)}
    return {name: tensor.to(device) for name, tensor in {**batch, "key": torch.randint(2**62, (size,))}.items()}


def loop(network: SiT, batch: dict[str, Tensor], device: str) -> Callable[[int], None]:
    """The plain loop."""
    network.to(device).train()
    average = deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4, weight_decay=0)
    transport = Transport()

    def step() -> None:
        mean, std = batch["moments"].float().chunk(2, 1)
        x1 = (mean + std * torch.randn_like(mean)) * VAE.scale
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = transport.training_loss(network, x1, y=batch["label"]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for kept, p in zip(average.parameters(), network.parameters(), strict=True):
                kept.mul_(DECAY).add_(p, alpha=1 - DECAY)

    return lambda steps: [step() for _ in range(steps)] and None


def trainer(network: SiT, batch: dict[str, Tensor], device: str, steps: int) -> Callable[[int], None]:
    """Composer's Trainer, as `sit_composer.train` makes it."""
    ema, trained = EMA(DECAY), [p for p in network.parameters() if p.requires_grad]
    made = Trainer(
        model=ComposerSiT(network, Transport(), VAE),
        optimizers=torch.optim.AdamW(trained, lr=1e-4, weight_decay=0, fused=device == "cuda" or None),
        train_dataloader=[batch] * steps,
        algorithms=[ema],
        callbacks=[ema.weights],
        device_train_microbatch_size=len(batch["label"]),
        max_duration="0ba",
        precision="amp_bf16" if device == "cuda" else "fp32",
        progress_bar=False,
    )
    return lambda steps: made.fit(duration=f"{steps}ba")


def seconds(side: Callable[[int], None], steps: int) -> float:
    """The seconds of that many steps."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    side(steps)
    synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    sys.exit(main())
