"""Measures a training step beside the authors' loop:   python tests/benchmarks/step.py [PATH_OF_SIT]

PATH_OF_SIT is a clone of the authors' repository (it needs timm); without it, ours is compared with a
plain loop around our network. The steps of all sides take turns, on one batch of latents: theirs in float32, with
AdamW and the average as `train.py` there makes them; ours in Composer's Trainer; and the limit, which is the step's own
matrix products and attention alone, forward and backward, in our precision. Prints a Markdown table of medians; a ratio
is the median over the turns. `--memory` adds the peak memory of each side, in a process of its own; `--losses N`
instead trains both sides for N steps on the same times, noise and labels, and `--profile` says where the time goes.
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
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sit_composer import randomness
from sit_composer.algorithms.ema import EMA
from sit_composer.autoencoder import AutoencoderSpec
from sit_composer.sit import Attention, SiT, build_sit
from sit_composer.training.model import ComposerSiT
from sit_composer.training.trainer import Trainer
from sit_composer.transport import Transport

LATENTS = AutoencoderSpec(name="-", scale=1.0, shift=0.0, channels=4, downsample=8)
DECAY, DEVICE = 0.9999, "cuda" if torch.cuda.is_available() else "cpu"
Step = Callable[[], Tensor]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sit", nargs="?", type=Path, metavar="PATH_OF_SIT", help="a clone of willisma/SiT")
    parser.add_argument("--model", default="SiT-S/2", help="for latents of 4x32x32 (%(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16], help="images in a step (%(default)s)")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], help="ours (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each side (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="our blocks, compiled; prints when that pays")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory")
    parser.add_argument("--losses", type=int, metavar="N", help="compare the losses of N steps instead")
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes instead")
    parser.add_argument("--alone", choices=["theirs", "ours"], help=argparse.SUPPRESS)  # `peak`'s own process
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    if args.alone:
        return print_peak(args)
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
        print("| batch | ours in | theirs, ms | ours, ms | ratio | limit, ms | of the limit | Composer's own |", end="")
        print(" peak MiB, theirs | ours |" if args.memory else "")
        print("| ---: | --- |" + " ---: |" * (8 if args.memory else 6))
        rows = (compare(args, *case) for case in cases)
    for row in rows:
        print(row, flush=True)
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


# --- The sides ---


class Theirs:
    """The authors' loop, from their own files, or a plain one. ``step()`` returns its loss."""

    def __init__(self, network: SiT, args: argparse.Namespace, batch: dict[str, Tensor]):
        self.network, self.x1, self.labels = network, batch["moments"].chunk(2, 1)[0], batch["label"]
        self.transport = Transport()
        self.loss = lambda: self.transport.training_loss(self.network, self.x1, y=self.labels)
        if args.sit:
            models, create_transport = load_peer(args.sit)
            self.network = models.SiT_models[args.model](input_size=network.input_size, num_classes=1000)
            self.network.load_state_dict(network.state_dict())
            self.transport = create_transport()
            self.loss = lambda: self.transport.training_losses(self.network, self.x1, {"y": self.labels})["loss"]
        self.network.to(DEVICE).train()
        self.average = deepcopy(self.network).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, weight_decay=0)

    def step(self) -> Tensor:
        loss = self.loss().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for kept, p in zip(self.average.parameters(), self.network.parameters(), strict=True):
                kept.mul_(DECAY).add_(p, alpha=1 - DECAY)
        return loss


def load_peer(path: Path) -> tuple:
    """Their modules ``models``, and their ``create_transport``."""
    sys.path.insert(0, str(path))
    try:
        import models  # theirs
        from transport import create_transport
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"error: {path}: {error}; a clone of willisma/SiT is expected, and pip install -e '.[bench]'"
        ) from None
    finally:
        sys.path.remove(str(path))
    return models, create_transport


class Turns:
    """A dataloader that runs other sides' steps between ours, and times them all, in seconds."""

    def __init__(self, batch: dict[str, Tensor], others: dict[str, Step], rounds: int):
        self.batch, self.others, self.rounds = batch, others, rounds
        self.seconds: dict[str, list[float]] = {name: [] for name in [*others, "ours"]}
        self.first = 0.0  # seconds of our first step

    def __len__(self) -> int:
        return 3 + self.rounds  # one more than there are, so that the last one is timed to its end

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in range(2 + self.rounds):
            for name, side in self.others.items():
                self.seconds[name].append(timed(side))
            start = time.perf_counter()
            yield self.batch
            synchronize()  # when the Trainer asks for its next batch, the step and all callbacks are done
            self.seconds["ours"].append(time.perf_counter() - start)
        self.first = self.seconds["ours"][0]
        for times in self.seconds.values():
            del times[:2]  # warms up


def trainer(network: SiT, turns: Turns, precision: str, compiled: bool = False, callbacks: tuple = ()) -> Trainer:
    """Composer's Trainer, as `sit_composer.train` makes it; it trains the network itself."""
    ema = EMA(DECAY)
    if compiled:
        for block in network.blocks:
            block.compile(fullgraph=True, dynamic=False)
    trained = [p for p in network.parameters() if p.requires_grad]
    return Trainer(
        model=ComposerSiT(network, Transport(), LATENTS, precision=precision),
        optimizers=torch.optim.AdamW(trained, lr=1e-4, weight_decay=0, fused=True),
        train_dataloader=turns,
        algorithms=[ema],
        callbacks=[ema.weights, *callbacks],
        device_train_microbatch_size=len(turns.batch["label"]),
        max_duration="1ep",
        precision="fp32",
        progress_bar=False,
    )


def limit(network: SiT, samples: int, dtype: torch.dtype) -> Step:
    """The step's matrix products and attention alone: three products a linear map, and attention both ways."""
    calls: list[tuple[nn.Module, Tensor]] = []
    inner = [module for module in network.modules() if isinstance(module, nn.Linear | Attention)]
    hooks = [m.register_forward_hook(lambda module, args, _: calls.append((module, args[0]))) for m in inner]
    size = (samples, network.in_channels, network.input_size, network.input_size)
    with torch.no_grad():
        network(torch.zeros(size), torch.zeros(samples), torch.zeros(samples, dtype=torch.long))
    for hook in hooks:
        hook.remove()
    parts = [(attention if isinstance(m, Attention) else products)(m, x.shape, dtype) for m, x in calls]

    def step() -> Tensor:
        for part in parts:
            part()
        return torch.zeros(())

    return step


def products(layer: nn.Linear, shape: torch.Size, dtype: torch.dtype) -> Callable[[], object]:
    """A linear map's output, and the gradients of its input and its weight."""
    w = torch.randn_like(layer.weight, dtype=dtype, device=DEVICE)
    x = torch.randn(shape.numel() // shape[-1], shape[-1], dtype=dtype, device=DEVICE)
    g = torch.randn(len(x), len(w), dtype=dtype, device=DEVICE)
    return lambda: (x @ w.t(), g @ w, g.t() @ x)


def attention(layer: Attention, shape: torch.Size, dtype: torch.dtype) -> Callable[[], object]:
    """Attention and its gradients, without the linear maps around it."""
    n, tokens, d = shape
    made = torch.randn(4, n, tokens, layer.num_heads, d // layer.num_heads, dtype=dtype, device=DEVICE).transpose(2, 3)
    q, k, v = (part.requires_grad_() for part in made[:3].unbind())
    return lambda: torch.autograd.grad(scaled_dot_product_attention(q, k, v), (q, k, v), made[3])


def make_batch(samples: int) -> dict[str, Tensor]:
    """Random latents (as moments without deviation), labels and keys, on the device."""
    latents = torch.randn(samples, 4, 32, 32)
    batch = {"moments": torch.cat([latents, torch.zeros_like(latents)], 1), "key": torch.randint(2**62, (samples,))}
    batch |= {"label": torch.arange(samples), "index": torch.arange(samples)}
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


# --- What is measured ---


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(step: Callable[[], object]) -> float:
    """Its seconds."""
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def compare(args: argparse.Namespace, samples: int, precision: str) -> str:
    """A row: the sides' times, in turns, and what follows from them."""
    network, batch = build_sit(args.model), make_batch(samples)
    nn.init.normal_(network.final_layer.linear.weight, std=0.02)  # so that no gradient is zero
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    others = {"theirs": Theirs(network, args, batch).step, "limit": limit(network, samples, dtype)}
    turns = Turns(batch, others, args.rounds)
    trainer(deepcopy(network), turns, precision).fit()
    theirs, bound, ours = (turns.seconds[name] for name in ("theirs", "limit", "ours"))
    own = overhead(samples) / statistics.median(ours)
    cells = [f"{samples}", precision, spread(theirs), spread(ours), f"{paired(theirs, ours):.2f}", spread(bound)]
    cells += [f"{paired(bound, ours):.0%}", f"{own:.2%}"]
    if args.memory:
        cells += [f"{peak(args, side, samples, precision):.0f}" for side in ("theirs", "ours")]
    rows = [f"| {' | '.join(cells)} |"]
    if args.compile:
        compiled = Turns(batch, others, args.rounds)
        trainer(network, compiled, precision, compiled=True).fit()
        theirs, bound, faster = (compiled.seconds[name] for name in ("theirs", "limit", "ours"))
        gain = statistics.median(ours) - statistics.median(faster)
        pays = f"{compiled.first / gain:.0f} steps" if gain > 0 else "never"
        cells = [f"{samples}", f"{precision}, compiled (pays after {pays})", spread(theirs), spread(faster)]
        cells += [f"{paired(theirs, faster):.2f}", spread(bound), f"{paired(bound, faster):.0%}", ""]
        rows.append(f"| {' | '.join(cells + ['', ''] * args.memory)} |")
    return "\n".join(rows)


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

    turns = Turns(batch, {"bare": step}, steps)
    trainer(network, turns, "fp32").fit()
    return statistics.median(turns.seconds["ours"]) - statistics.median(turns.seconds["bare"])


def peak(args: argparse.Namespace, side: str, samples: int, precision: str) -> float:
    """The peak MiB of three steps of one side, weights, optimizer and average included, in a process of its own."""
    command = [sys.executable, __file__, *([str(args.sit)] if args.sit else []), "--alone", side, "--model", args.model]
    command += ["--batch", str(samples), "--precision", precision]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(args: argparse.Namespace) -> int:
    """Trains one side alone and prints the most memory that it held above what the libraries took."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    network, batch = build_sit(args.model), make_batch(*args.batch)
    if args.alone == "theirs":
        step = Theirs(network, args, batch).step
        for _ in range(3):
            step()
    else:
        trainer(network, Turns(batch, {}, 1), *args.precision).fit()
    print(torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else memory("VmHWM") - before)
    return 0


def memory(name: str) -> float:
    """A figure of this process, in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def compare_losses(args: argparse.Namespace, samples: int, precision: str) -> str:
    """A row: the largest relative difference of the losses of N steps on the same times, noise and dropped labels."""
    network, batch = build_sit(args.model), make_batch(samples)
    nn.init.normal_(network.final_layer.linear.weight, std=0.02)
    theirs = Theirs(deepcopy(network), args, batch)
    theirs.network.y_embedder.dropout_prob = 0.0  # instead, the labels are dropped as our keys say
    keys = batch["key"]
    t, x0 = randomness.uniform(keys, randomness.TIME), randomness.normal(keys, randomness.X0, (4, 32, 32))
    theirs.labels = torch.where(randomness.uniform(keys, randomness.DROP) < 0.1, 1000, batch["label"])
    theirs.transport.sample = lambda x1: (t, x0, x1)
    theirs.transport.draw = lambda x1: (t, x0)  # of the plain loop
    pairs: list[list[float]] = [[], []]
    turns = Turns(batch, {"theirs": lambda: pairs[0].append(theirs.step().item())}, args.losses - 2)
    made = trainer(deepcopy(network), turns, precision)
    step = made._train_batch

    def recorded(scaled: bool) -> None:
        step(scaled)
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
    network, turns = build_sit(args.model), Turns(make_batch(samples), {}, 3)
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
