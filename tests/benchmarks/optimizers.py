"""Compares a step of Muon with one of AdamW, as training makes them:   python tests/benchmarks/optimizers.py

On one thread, of the same network with the same gradients, in turn: fused AdamW, and Muon whose orthogonalization is in
float32 and in bfloat16. Prints a Markdown table of the median time (and the range), and how much of a training step's
FLOPs the orthogonalization adds at --batch.
"""

import argparse
import copy
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # of the package `tests`, which is not installed

from sit_composer.choices import VARIANTS
from sit_composer.config.schema import OptimizerConfig
from sit_composer.costs.flops import optimizer_flops, sample_flops
from sit_composer.sit import SiT, build_sit
from sit_composer.training.muon import Muon


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=VARIANTS, default="SiT-S/2", metavar="NAME", help="(%(default)s)")
    parser.add_argument("--depth", type=int, help="blocks; by default the model's")
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="(%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = build_sit(args.model, **({"depth": args.depth} if args.depth else {}))
    for p in network.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    sides = {
        "AdamW, fused": lambda one: torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], fused=True),
        "Muon, float32": lambda one: Muon(one, fused=True),
        "Muon, bfloat16": lambda one: Muon(one, fused=True, dtype=torch.bfloat16),
    }
    optimizers = {name: make(with_gradients(network)) for name, make in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(args.rounds + 1):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            if turn:  # the first one warms up
                times[name].append(1000 * (time.perf_counter() - start))
    print(f"| {args.model}, depth {len(network.blocks)} | ms per step | times AdamW's |\n| --- | ---: | ---: |")
    for name, taken in times.items():
        ratio = median(taken) / median(times["AdamW, fused"])
        print(f"| {name} | {median(taken):.0f} ({min(taken):.0f} – {max(taken):.0f}) | {ratio:.1f} |")
    added, step = optimizer_flops(network, OptimizerConfig("muon")), args.batch * sample_flops(network)
    print(f"\nOrthogonalization: {added / 1e9:.4g} GFLOPs, {added / step:.1%} of a step's at batch {args.batch}")
    return 0


def with_gradients(network: SiT) -> SiT:
    """A copy that has the same gradients."""
    other = copy.deepcopy(network)
    for p, q in zip(other.parameters(), network.parameters(), strict=True):
        p.grad = None if q.grad is None else q.grad.clone()
    return other


if __name__ == "__main__":
    sys.exit(main())
