"""Sampling beside the authors' sampler:   python tests/benchmarks/sampling.py PATH

PATH is a clone of github.com/willisma/SiT (its models.py needs timm). Both sides take the same weights, noise and
labels, and the authors' guidance of three channels with --cfg-scale; a row per solver prints how far the latents are
apart, the field's evaluations, and the seconds, measured in turn. The weights are random: time doesn't depend on them.
With --bf16 it compares our own float32 with bfloat16 instead, and needs no PATH.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sit_composer.choices import COUNT, SIZES, VARIANTS
from sit_composer.cli import number
from sit_composer.guidance import Guidance
from sit_composer.precision import cast_once
from sit_composer.samplers import Counted, sample_ode, sample_sde
from sit_composer.sit import SiT, build_sit
from sit_composer.transport import Transport

ROOT = Path(__file__).parents[2]
SOLVERS = {  # title: mode, options; few evaluations each, as an evaluation costs the same early and late
    "ODE euler": ("ODE", {"sampling_method": "euler", "num_steps": 7}),
    "ODE heun": ("ODE", {"sampling_method": "heun2", "num_steps": 4}),
    "ODE dopri5": ("ODE", {"sampling_method": "dopri5", "atol": 1e-2, "rtol": 1e-1}),
    "SDE Euler": ("SDE", {"sampling_method": "Euler", "num_steps": 7}),
    "SDE Heun": ("SDE", {"sampling_method": "Heun", "num_steps": 4}),
}
Side = Callable[[], tuple[Tensor, int]]  # samples, and returns the latents and the calls of the network


def main(argv: list[str] | None = None) -> int:
    """Prints the table and returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("path", nargs="?", type=Path, metavar="PATH", help="the authors' repository")
    option("--model", choices=VARIANTS, default="SiT-S/2", metavar="NAME", help="(%(default)s)")
    option("--input-size", type=int, default=32, help="the latents' side (%(default)s)")
    option("--batch-size", type=number(COUNT), default=2, help="images; guidance doubles them (%(default)s)")
    option("--cfg-scale", type=float, default=4.0, help="1 is no guidance (%(default)s)")
    option("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS), metavar="NAME", help="(all)")
    option("--rounds", type=number(COUNT), default=5, help="the medians of them are printed (%(default)s)")
    option("--processor-time", action="store_true", help="all threads' seconds, if other work runs beside")
    option("--bf16", action="store_true", help="compare float32 with bfloat16, both ours")
    args = parser.parse_args(argv)
    if (args.path is None) != args.bf16:
        parser.error("expected PATH, or --bf16")
    if args.path is not None and not (args.path / "transport").is_dir():
        parser.error(f"argument PATH: {args.path} is no clone of the authors' repository: it has no transport/")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = make_network(args.model, args.input_size).to(device)
    other = cast_once(copy.deepcopy(network), "bf16") if args.bf16 else their_network(args, network)
    names = ("float32", "bfloat16") if args.bf16 else ("theirs", "ours")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    print(
        f"{args.model}, latents of {args.input_size}², {args.batch_size} images, cfg_scale {args.cfg_scale:g}, ", end=""
    )
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit.stdout.strip()}\n")
    print(f"| solver | network calls, {names[0]} / {names[1]} | largest difference | {names[0]}, s (range) |", end="")
    print(f" {names[1]}, s (range) | ratio |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for title in args.solvers:
        if args.bf16:
            sides = [partial(ours, args, title, network), partial(ours, args, title, other, "bf16")]
        else:
            sides = [partial(theirs, args, title, other), partial(ours, args, title, network)]
        print(
            row(title, sides, args.rounds, time.process_time if args.processor_time else time.perf_counter), flush=True
        )
    return 0


def make_network(name: str, input_size: int) -> SiT:
    """A network of random weights in evaluation mode; a new one's output would be zero."""
    torch.manual_seed(0)
    network = build_sit(name, input_size=input_size).eval()
    for parameter in network.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return network.requires_grad_(False)


def their_network(args: argparse.Namespace, network: SiT) -> torch.nn.Module:
    """The authors' network with the same weights."""
    sys.path.insert(0, str(args.path))
    from models import SiT as Theirs  # of the path on the command line

    size, patch = args.model.removeprefix("SiT-").split("/")
    width, depth, heads = SIZES[size]
    made = Theirs(args.input_size, int(patch), hidden_size=width, depth=depth, num_heads=heads)
    made.load_state_dict(network.state_dict())
    return made.to(network.pos_embed.device).eval().requires_grad_(False)


def make_inputs(args: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    """Noise (N, 4, H, W) and labels (N,); the global seed is set, for the SDE's noise."""
    torch.manual_seed(1)
    z = torch.randn(args.batch_size, 4, args.input_size, args.input_size, device=device)
    return z, torch.arange(args.batch_size, device=device) * 7 % 1000


def theirs(args: argparse.Namespace, title: str, network: torch.nn.Module) -> tuple[Tensor, int]:
    """As the authors' sample.py and sample_ddp.py do: a guided batch is integrated twice, with and without labels."""
    from transport import Sampler, create_transport  # of the path on the command line

    mode, options = SOLVERS[title]
    z, y = make_inputs(args, network.pos_embed.device)
    model, extra = Counted(network.forward), {}
    if args.cfg_scale != 1:
        z, y = torch.cat([z, z]), torch.cat([y, torch.full_like(y, 1000)])
        model, extra = Counted(network.forward_with_cfg), {"cfg_scale": args.cfg_scale}
    sampler = Sampler(create_transport())
    form = {} if mode == "ODE" else {"diffusion_form": "sigma"}
    sample = (sampler.sample_ode if mode == "ODE" else sampler.sample_sde)(**options, **form)
    with torch.no_grad():
        return sample(z, model, y=y, **extra)[-1][: args.batch_size], model.evaluations


def ours(args: argparse.Namespace, title: str, network: SiT, precision: str = "fp32") -> tuple[Tensor, int]:
    """What `generate` does, with the authors' noise in place of each image's own."""
    mode, options = SOLVERS[title]
    z, y = make_inputs(args, network.pos_embed.device)
    guidance = Guidance(network, args.cfg_scale, channels=3, precision=precision)
    model, y = Counted(guidance), guidance.embed(y)
    if mode == "ODE":
        return sample_ode(Transport(), model, z, y=y, **options), model.evaluations
    rows = len(z) if args.cfg_scale == 1 else 2 * len(z)  # theirs draw noise for both halves, and keep the first

    def draw() -> Tensor:
        return torch.randn(rows, *z.shape[1:]).to(z)[: len(z)]

    return sample_sde(Transport(), model, z, y=y, draw=draw, **options), model.evaluations


def row(title: str, sides: list[Side], rounds: int, clock: Callable[[], float]) -> str:
    """A row of the table; the first round also warms up, and isn't counted."""
    made = [side() for side in sides]
    difference = (made[0][0] - made[1][0]).abs().max() / made[0][0].abs().max()
    columns = zip(*[[seconds(side, clock) for side in sides] for _ in range(rounds)], strict=True)
    times = [(statistics.median(column), min(column), max(column)) for column in columns]
    cells = [f"{middle:.2f} ({least:.2f} – {most:.2f})" for middle, least, most in times]
    calls = " / ".join(str(calls) for _, calls in made)
    return f"| {title} | {calls} | {difference:.1e} | {' | '.join(cells)} | {times[0][0] / times[1][0]:.2f} |"


def seconds(side: Side, clock: Callable[[], float]) -> float:
    """The seconds that a side takes."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = clock()
    side()
    synchronize()
    return clock() - start


if __name__ == "__main__":
    sys.exit(main())
