"""Compares releases of torch:   python tests/benchmarks/torches.py .venv .venv-2.11.0 .venv-2.14.1

Each of these environments, as `make install TORCH=VERSION` makes them, runs the same work in turn, each time in a
process of its own: the plain loop of step.py on SiT-S/2, in float32 and in bfloat16, and guided sampling by Heun's
method. Prints a Markdown table of the medians, and each over the first's. The weights are random.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ("step, float32", "step, bfloat16", "sampling, float32", "sampling, bfloat16")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", metavar="ENVIRONMENT", type=Path)
    parser.add_argument("--model", default="SiT-S/2", help="for 256x256 images (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--here", action="store_true", help="only this environment; prints its images/s as JSON")
    args = parser.parse_args(argv)
    if args.here:
        print(json.dumps(measure(args.model)))
        return 0
    command = ["tests/benchmarks/torches.py", "--here", "--model", args.model]
    rates: dict[Path, list[dict]] = {place: [] for place in args.environments}
    for _ in range(args.rounds):
        for place, found in rates.items():
            done = subprocess.run([place / "bin" / "python", *command], cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{place}: {done.stderr}")
            found.append(json.loads(done.stdout))
    first = next(iter(rates.values()))
    print(f"| {args.model}, images/s | " + " | ".join(f"torch {found[0]['torch']}" for found in rates.values()) + " |")
    print("| --- |" + " ---: |" * len(rates))
    for work in WORK:
        medians = [statistics.median(round[work] for round in found) for found in (first, *rates.values())]
        cells = [f"{rate:.2f} ({rate / medians[0]:.2f})" for rate in medians[1:]]
        print(f"| {work} | " + " | ".join(cells) + " |")
    return 0


def measure(model: str) -> dict[str, float | str]:
    """Images per second of each kind of work, and torch's release."""
    import torch  # as in the environment that is measured

    from sit_composer.guidance import Guidance
    from sit_composer.samplers import sample_ode
    from sit_composer.sit import build_sit
    from sit_composer.transport import Transport

    torch.manual_seed(0)
    network, transport = build_sit(model).train(), Transport()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4, weight_decay=0)
    x, y = torch.randn(4, 4, 32, 32), torch.arange(4)

    def step() -> None:
        optimizer.zero_grad()
        transport.training_loss(network, x, y=y).mean().backward()
        optimizer.step()

    def draw() -> None:
        sample_ode(transport, Guidance(network, 1.5), x, sampling_method="heun", num_steps=3, y=y)

    def rate(work: Callable[[], None], low: bool) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            work()
            start, count = time.perf_counter(), 0
            while count < 2 or time.perf_counter() - start < 4:
                work()
                count += 1
        return count * len(x) / (time.perf_counter() - start)

    rates = [rate(work, low) for work in (step, draw) for low in (False, True)]
    return {"torch": torch.__version__.partition("+")[0], **dict(zip(WORK, rates, strict=True))}


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    sys.exit(main())
