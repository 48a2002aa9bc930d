"""Measures a training step beside the authors' loop:   python tests/benchmarks/step.py [PATH_OF_SIT]

PATH_OF_SIT is a clone of the authors' repository (it needs timm); without it, ours is compared with a plain loop around
our network. The sides have a process each, and their steps take turns, on one batch of latents: theirs in float32, with
AdamW and the average as `train.py` there makes them; ours in Composer's Trainer, with the allocation of memory that our
launcher chooses; and the limit, which is the step's own matrix products and attention alone, forward and backward, in
our precision: with our linear maps, and with torch's (`sit_composer/linear.py`). Prints a Markdown table of medians; a
ratio is the median over the turns. Memory is the peak of a side's process, weights, optimizer and average included,
above what the libraries took. `--losses N` instead trains both sides for N steps on the same times, noise and labels,
and `--profile` says where the time goes.
"""

import argparse
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # of the package `tests`, which is not installed
from sit_composer import randomness
from sit_composer.choices import COUNT, VARIANTS
from sit_composer.cli import number
from sit_composer.launch import MALLOC
from sit_composer.sit import SiT
from sit_composer.training.model import ComposerSiT
from sit_composer.transport import Transport
from tests.benchmarks.step_sides import DECAY, DEVICE, LATENTS, Theirs, make_batch, make_network, trainer


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("sit", nargs="?", type=Path, metavar="PATH_OF_SIT", help="a clone of willisma/SiT")
    option("--model", choices=VARIANTS, default="SiT-S/2", metavar="NAME", help="for latents of 4x32x32 (%(default)s)")
    option("--batch", type=number(COUNT), nargs="+", default=[4, 16], help="images in a step (%(default)s)")
    option("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="ours (%(default)s)")
    option("--rounds", type=number(COUNT), default=9, help="timed steps of each side (%(default)s)")
    option("--compile", action="store_true", help="also our blocks, compiled; prints when that pays")
    option("--losses", type=number(COUNT), metavar="N", help="compare the losses of N steps instead")
    option("--profile", action="store_true", help="print where a step's time goes instead")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    print(f"{machine()}\n")
    cases = [(batch, precision) for batch in args.batch for precision in args.precision]
    if args.losses:
        print("| batch | precision | steps | largest difference of losses |\n| --- | --- | ---: | ---: |")
        rows = (compare_losses(args, *case) for case in cases)
    elif args.profile:
        print(f"| part of a step | {' | '.join(f'batch {b}, {p}' for b, p in cases)} |")
        print("| --- |" + " ---: |" * len(cases))
        rows = iter(profile_rows([profile(args, *case) for case in cases]))
    else:
        print(
            "| batch | ours in | theirs, ms | ours, ms | ratio | limit, ms | of it | limit of nn.Linear, ms | of it "
            "| peak MiB, theirs | ours |"
        )
        print("| ---: | --- |" + " ---: |" * 9)
        rows = (row for case in cases for row in compare(args, *case))
    for row in rows:
        print(row, flush=True)
    if not (args.losses or args.profile):
        print(f"\nComposer's own: {overhead(args.batch[0]) * 1e3:.2f} ms a step")
    return 0


def machine() -> str:
    """Processor, threads, torch and commit, in a line."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.split(": ")[1] for line in cpu.splitlines() if line.startswith("model name")), platform.machine())
    fast = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in cpu] or ["no bf16"]
    gpu = f"{torch.cuda.get_device_name()}, " if DEVICE == "cuda" else ""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cores = f"{os.cpu_count()} cores ({', '.join(fast)}), {torch.get_num_threads()} threads"
    return f"{gpu}{name}, {cores}, torch {torch.__version__}, commit {commit}"


class Side:
    """A process of `step_sides.py`, which makes a step when it is asked to."""

    def __init__(self, name: str, args: argparse.Namespace, samples: int, precision: str, *options: str):
        command = [sys.executable, "-m", "tests.benchmarks.step_sides", name, "--model", args.model, *options]
        command += ["--batch", f"{samples}", "--precision", precision, *(["--sit", f"{args.sit}"] if args.sit else [])]
        environment = os.environ | ({"GLIBC_TUNABLES": MALLOC} if name == "ours" else {})
        pipes = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "text": True,
            "cwd": Path(__file__).parents[2],
            "env": environment,
        }
        self.process = subprocess.Popen(command, **pipes)
        if self.process.stdout.readline() != "ready\n":
            raise SystemExit(self.process.wait())  # it has said why
        self.first = self.step()  # which compiles
        self.step()
        self.seconds: list[float] = []

    def step(self) -> float:
        """A step's seconds."""
        print(file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def end(self) -> str:
        """Its peak of memory, in MiB."""
        self.process.stdin.close()
        peak = float(self.process.stdout.readline())
        self.process.wait()
        return f"{peak:.0f}"


def compare(args: argparse.Namespace, samples: int, precision: str) -> Iterator[str]:
    """A row, or two with --compile: the sides' times, in turns, and what follows from them."""
    names = ("theirs", "limit", "plain", "ours")
    theirs, *limits, first = sides = [Side(name, args, samples, precision) for name in names]
    ours = [first]
    if args.compile:
        ours.append(Side("ours", args, samples, precision, "--compile"))
        sides.append(ours[1])
    for _ in range(args.rounds):
        for side in sides:
            side.seconds.append(side.step())
    memory = {side: side.end() for side in sides}
    for side in ours:
        what = precision
        if side is not first:
            gain = statistics.median(first.seconds) - statistics.median(side.seconds)
            what += f", compiled (pays after {side.first / gain:.0f} steps)" if gain > 0 else ", compiled (never pays)"
        cells = [f"{samples}", what, spread(theirs.seconds), spread(side.seconds)]
        cells += [f"{paired(theirs.seconds, side.seconds):.2f}"]
        cells += [cell for x in limits for cell in (spread(x.seconds), f"{paired(x.seconds, side.seconds):.0%}")]
        cells += [memory[theirs], memory[side]]
        yield f"| {' | '.join(cells)} |"


def spread(seconds: list[float]) -> str:
    """Median, and the quarter and three quarters of the times, in ms."""
    low, middle, high = statistics.quantiles([s * 1e3 for s in seconds], n=4) if len(seconds) > 1 else seconds * 3
    return f"{middle:.0f} ({low:.0f} – {high:.0f})"


def paired(slow: list[float], fast: list[float]) -> float:
    """The median over turns of how often the fast side fits into the slow one."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def overhead(samples: int, steps: int = 200) -> float:
    """The seconds that Composer adds to a step, from a network so small that it has nearly no others."""
    network, batch = SiT(input_size=32, patch_size=32, hidden_size=16, depth=0, num_heads=1), make_batch(samples)
    network, bare = deepcopy(network), ComposerSiT(network, Transport(), LATENTS).train()
    trained = [p for p in bare.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0, fused=True)

    def step() -> None:
        loss = bare.loss(bare(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, trained, 1 - DECAY)

    turns = Turns(batch, step, steps)
    trainer(network, turns, "fp32").fit()
    return statistics.median(turns.ours[2:]) - statistics.median(turns.other[2:])


class Turns:
    """A dataloader of one batch, which makes another side's step before each of ours; both sides' seconds."""

    def __init__(self, batch: dict[str, Tensor], other: Callable[[], object], steps: int):
        self.batch, self.make_step, self.steps = batch, other, steps
        self.ours: list[float] = []
        self.other: list[float] = []

    def __len__(self) -> int:
        return self.steps + 1  # one more than there are, so that the last one is timed to its end

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in range(self.steps):
            start = time.perf_counter()
            self.make_step()
            between = time.perf_counter()
            yield self.batch
            self.other.append(between - start)
            self.ours.append(time.perf_counter() - between)


def compare_losses(args: argparse.Namespace, samples: int, precision: str) -> str:
    """A row: the largest relative difference of the losses of N steps on the same times, noise and dropped labels."""
    network, batch = make_network(args.model), make_batch(samples)
    theirs = Theirs(deepcopy(network), batch, args.sit, args.model)
    theirs.network.y_embedder.dropout_prob = 0.0  # instead, the labels are dropped as our keys say
    keys = batch["key"]
    pairs: list[list[float]] = [[], []]

    def draw(x1: Tensor) -> tuple[Tensor, Tensor]:
        return randomness.uniform(keys, randomness.TIME), randomness.normal(keys, randomness.X0, (4, 32, 32))

    theirs.transport.sample = lambda x1: (*draw(x1), x1)
    theirs.transport.draw = draw  # of the plain loop

    def step() -> None:
        keys.add_(1)  # other times, noise and dropped labels
        theirs.labels = torch.where(randomness.uniform(keys, randomness.DROP) < 0.1, 1000, batch["label"])
        pairs[0].append(theirs.step().item())

    made = trainer(deepcopy(network), Turns(batch, step, args.losses), precision)
    train_batch = made._train_batch

    def recorded(scaled: bool) -> None:
        train_batch(scaled)
        pairs[1].append(made.state.total_loss_dict["loss/train/total"].item())

    made._train_batch = recorded
    made.fit()
    worst = max(abs(a - b) / a for a, b in zip(*pairs, strict=True))
    return f"| {samples} | {precision} | {len(pairs[0])} | {worst:.1e} (from {pairs[0][0]:.4f} to {pairs[0][-1]:.4f}) |"


PARTS = {  # of operators' names, the first that fits
    "matrix products": ("mm", "convolution"),
    "attention": ("scaled_dot_product",),
    "GELU and SiLU": ("gelu", "silu"),
    "layer norms": ("layer_norm",),
    "AdamW": ("adamw",),
    "average": ("lerp",),
    "copies and casts": ("copy_", "cat", "fill_", "zero_"),
    "sums (gradients of biases, shifts, scales, gates)": ("sum",),
    "modulation, gates, residuals": ("mul", "add", "sub"),
}


def profile(args: argparse.Namespace, samples: int, precision: str) -> dict[str, float]:
    """The share of each part in three of our steps."""
    network, turns = make_network(args.model), Turns(make_batch(samples), lambda: None, 3)
    made = trainer(network, turns, precision)
    made.fit(duration="1ba")  # warms up
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        made.fit(duration="3ba")
    shares = dict.fromkeys([*PARTS, "the rest"], 0.0)
    events = recorded.key_averages()
    for event in events:
        part = next((part for part, names in PARTS.items() if any(n in event.key for n in names)), "the rest")
        shares[part if event.key.startswith("aten::") else "the rest"] += event.self_cpu_time_total
    return {part: share / sum(shares.values()) for part, share in shares.items()}


def profile_rows(columns: list[dict[str, float]]) -> list[str]:
    return [f"| {part} | {' | '.join(f'{column[part]:.1%}' for column in columns)} |" for part in columns[0]]


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    sys.exit(main())
