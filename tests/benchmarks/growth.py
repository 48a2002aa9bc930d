"""Measures how times grow, and plots them:   python tests/benchmarks/growth.py --out FOLDER [--seconds 2]

step: a training step of the network, Transport's loss and AdamW, on one thread and random latents, against the batch,
  the width, the depth and the tokens of an image; the others stay at 8 images, width 192, depth 4 and 64 tokens.
checkpoint: writing and reading a file of weights, two moments and an average, against the parameters.
newest: finding the checkpoint to resume from in a run's folder of so many, on disk and in an S3 on loopback.

Writes growth.json after each row, and skips rows that are there; then growth.png, and prints a Markdown table of the
slopes: the exponent of a straight line through the logarithms of all points, and of the last two alone.
"""

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # of the package `tests`, which is not installed

from sit_composer.checkpoint.folder import newest
from sit_composer.checkpoint.safe_load import load_file
from sit_composer.sit import SiT
from sit_composer.storage import open_run_folder
from sit_composer.transport import Transport
from tests.helpers.s3 import SeaweedFS

BASE = {"batch": 8, "width": 192, "depth": 4, "tokens": 64}
ROWS = {
    "step, batch": [2, 4, 8, 16, 32],
    "step, width": [96, 192, 384, 768],
    "step, depth": [1, 2, 4, 8, 16],
    "step, tokens": [16, 64, 256, 1024],
    "checkpoint written, parameters": [96, 192, 384, 768],
    "checkpoint read, parameters": [96, 192, 384, 768],
    "newest on disk, checkpoints": [1, 10, 100, 1000],
    "newest in S3, checkpoints": [1, 10, 100, 1000],
}


def network(width: int, depth: int, tokens: int) -> SiT:
    side = round(tokens**0.5)
    return SiT(input_size=side, patch_size=1, hidden_size=width, depth=depth, num_heads=width // 48)


def seconds_of(action: Callable[[], object], seconds: float) -> float:
    """The median time of an action, after it was called once."""
    action()
    times, start = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        times.append(-time.perf_counter())
        action()
        times[-1] += time.perf_counter()
    return median(times)


@contextmanager
def step(name: str, size: int, folder: Path) -> Iterator[tuple[int, Callable[[], object]]]:
    sizes = BASE | {name: size}
    model = network(sizes["width"], sizes["depth"], sizes["tokens"])
    transport, optimizer = Transport(), torch.optim.AdamW(model.parameters(), lr=1e-4)
    side = round(sizes["tokens"] ** 0.5)
    latents = torch.randn(sizes["batch"], 4, side, side)
    labels = torch.arange(sizes["batch"])

    def once() -> None:
        transport.training_loss(model, latents, y=labels).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    yield size, once


@contextmanager
def checkpoint(name: str, width: int, folder: Path) -> Iterator[tuple[int, Callable[[], object]]]:
    """A file as Composer writes it for one rank, and as it is read to resume: each tensor once."""
    weights, file = network(width, 4, 64).state_dict(), folder / f"{width}.pt"
    state = [weights, *({key: value.clone() for key, value in weights.items()} for _ in range(3))]
    torch.save(state, file)

    def read() -> None:
        for mine, stored in zip(state, load_file(file), strict=True):
            for key, value in mine.items():
                value.copy_(stored[key])

    yield sum(value.numel() for value in weights.values()), read if name == "read" else lambda: torch.save(state, file)


@contextmanager
def checkpoints(uri: str, number: int) -> Iterator[tuple[int, Callable[[], object]]]:
    folder, content = open_run_folder(uri), io.BytesIO()
    torch.save({"a": torch.zeros(1)}, content)
    for k in range(1, number + 1):
        folder.write(f"ep0-ba{k}-rank0.pt", content.getvalue())

    def find() -> None:
        assert newest(folder) == f"ep0-ba{number}-rank0.pt"

    yield number, find


@contextmanager
def row(kind: str, size: int, folder: Path) -> Iterator[tuple[int, Callable[[], object]]]:
    what, name = kind.split(", ")
    if what == "step":
        with step(name, size, folder) as found:
            yield found
    elif what.startswith("checkpoint"):
        with checkpoint("read" if "read" in what else "written", size, folder) as found:
            yield found
    elif what == "newest on disk":
        with checkpoints(str(folder / str(size)), size) as found:
            yield found
    else:
        server = SeaweedFS(folder)
        os.environ.update(
            AWS_ACCESS_KEY_ID="testkey", AWS_SECRET_ACCESS_KEY="testsecret", AWS_DEFAULT_REGION="us-east-1"
        )
        try:
            server.start()
            os.environ["S3_ENDPOINT_URL"] = server.url
            with checkpoints(f"s3://sit/{size}", size) as found:
                yield found
        finally:
            server.stop()


def slope(points: list[list[float]]) -> float:
    """The exponent of a power law through points."""
    x, y = np.log(points).T
    return float(np.polyfit(x, y, 1)[0])


def plot(measured: dict[str, list[list[float]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(13, 6), layout="constrained")
    for axis, (kind, points) in zip(axes.flat, measured.items(), strict=False):
        x, y = np.array(points).T
        axis.loglog(x, 1000 * y, "o-", color="tab:blue")
        axis.loglog(x, 1000 * y[0] * x / x[0], ":", color="gray", label="proportional")
        axis.xaxis.set_minor_formatter("")
        axis.set(title=f"{kind.split(', ')[0]}: slope {slope(points):.2f}", xlabel=kind.split(", ")[1], ylabel="ms")
    axes.flat[0].legend()
    figure.savefig(file, dpi=80)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of growth.json and growth.png")
    parser.add_argument("--seconds", type=float, default=2, help="for each point (%(default)s)")
    parser.add_argument("--points", type=int, help="of each row, only the first so many")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "growth.json"
    measured = json.loads(file.read_text()) if file.exists() else {}
    for kind, sizes in ROWS.items():
        if kind in measured:
            continue
        points = []
        for size in sizes[: args.points]:
            with tempfile.TemporaryDirectory() as folder, row(kind, size, Path(folder)) as (x, action):
                points.append([x, seconds_of(action, args.seconds)])
        measured[kind] = points
        file.write_text(json.dumps(measured, indent=1))
    plot(measured, args.out / "growth.png")
    print("| what | from | to | milliseconds | slope | of the last two |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for kind, points in measured.items():
        times = f"{1000 * points[0][1]:.3g} – {1000 * points[-1][1]:.3g}"
        print(
            f"| {kind} | {points[0][0]} | {points[-1][0]} | {times} | {slope(points):.2f} | {slope(points[-2:]):.2f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
