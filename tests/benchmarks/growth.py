"""Measures how times grow, and plots them:   python tests/benchmarks/growth.py --out FOLDER [--seconds 2]

step: a training step of the network, Transport's loss and AdamW, on one thread and random latents, against the batch,
  the width, the depth and the tokens of an image; the others stay at 8 images, width 192, depth 4 and 64 tokens.
step in ranks: the same step of 8 images in each of several processes, by gloo: DDP, FSDP2, or without communication.
checkpoint: writing and reading a file of weights, two moments and an average, against the parameters.
newest: finding the checkpoint to resume from in a run's folder of so many, on disk and in an S3 on loopback.

Writes growth.json after each row, and skips rows that are there; then growth.png, and prints a Markdown table of the
slopes: the exponent of a straight line through the logarithms of all points, and of the last two alone.
"""

import argparse
import io
import json
import multiprocessing
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
import torch.distributed
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[2]))  # of the package `tests`, which is not installed

from sit_composer.checkpoint.folder import newest
from sit_composer.checkpoint.safe_load import load_file
from sit_composer.sit import SiT
from sit_composer.storage import open_run_folder
from sit_composer.transport import Transport
from tests.helpers.s3 import SeaweedFS

Action = Callable[[], object]
BASE = {"batch": 8, "width": 192, "depth": 4, "tokens": 64}
ROWS = {
    "step, batch": [2, 4, 8, 16, 32],
    "step, width": [96, 192, 384, 768],
    "step, depth": [1, 2, 4, 8, 16],
    "step, tokens": [16, 64, 256, 1024],
    "step without communication, ranks": [1, 2],
    "step in DDP, ranks": [1, 2],
    "step in FSDP2, ranks": [1, 2],
    "checkpoint written, parameters": [96, 192, 384, 768],
    "checkpoint read, parameters": [96, 192, 384, 768],
    "newest on disk, checkpoints": [1, 10, 100, 1000],
    "newest in S3, checkpoints": [1, 10, 100, 1000],
}


def network(width: int, depth: int, tokens: int) -> SiT:
    side = round(tokens**0.5)
    return SiT(input_size=side, patch_size=1, hidden_size=width, depth=depth, num_heads=width // 48)


def seconds_of(action: Action, seconds: float) -> float:
    """The median time of an action, after it was called once."""
    action()
    times, start = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        times.append(-time.perf_counter())
        action()
        times[-1] += time.perf_counter()
    return median(times)


def make_step(sizes: dict[str, int], parallel: Callable[[nn.Module], nn.Module] = lambda model: model) -> Action:
    """A training step; `parallel` wraps the network."""
    model = parallel(network(sizes["width"], sizes["depth"], sizes["tokens"]))
    transport, optimizer = Transport(), torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    side = round(sizes["tokens"] ** 0.5)
    latents = torch.randn(sizes["batch"], 4, side, side)
    labels = torch.arange(sizes["batch"])

    def once() -> None:
        transport.training_loss(model, latents, y=labels).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return once


def sharded(model: nn.Module) -> nn.Module:
    """FSDP2 by blocks. On a CPU, torch 2.7 adds the gradients where it should average them, which costs the same."""
    for block in model.get_submodule("blocks").children():
        fully_shard(block)
    return fully_shard(model)


PARALLEL = {"DDP": DistributedDataParallel, "FSDP2": sharded}


def join(kind: str, rank: int, number: int, folder: Path) -> Action:
    """The step of one rank of `number`."""
    torch.set_num_threads(1)
    if kind not in PARALLEL:
        return make_step(BASE)
    torch.distributed.init_process_group("gloo", f"file://{folder}/ranks", rank=rank, world_size=number)
    return make_step(BASE, PARALLEL[kind])


def follow(kind: str, rank: int, number: int, folder: Path) -> None:
    """A rank other than 0: it steps until it is killed, with rank 0 if they communicate."""
    step = join(kind, rank, number, folder)
    (folder / f"{rank} is ready").touch()
    while True:
        step()


@contextmanager
def ranks(kind: str, number: int, folder: Path) -> Iterator[tuple[int, Action]]:
    """Steps of this process, as rank 0 of `number`."""
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=follow, args=(kind, rank, number, folder)) for rank in range(1, number)]
    for process in others:
        process.start()
    try:
        action = join(kind, 0, number, folder)
        while len(list(folder.glob("* is ready"))) < len(others):
            time.sleep(0.1)
            if not all(process.is_alive() for process in others):
                raise SystemExit("a rank died; its error is above")
        yield number, action
    finally:
        for process in others:
            process.kill()
            process.join()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextmanager
def checkpoint(name: str, width: int, folder: Path) -> Iterator[tuple[int, Action]]:
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
def checkpoints(uri: str, number: int) -> Iterator[tuple[int, Action]]:
    folder, content = open_run_folder(uri), io.BytesIO()
    torch.save({"a": torch.zeros(1)}, content)
    for k in range(1, number + 1):
        folder.write(f"ep0-ba{k}-rank0.pt", content.getvalue())

    def find() -> None:
        assert newest(folder) == f"ep0-ba{number}-rank0.pt"

    yield number, find


@contextmanager
def row(kind: str, size: int, folder: Path) -> Iterator[tuple[int, Action]]:
    what, name = kind.split(", ")
    if what == "step":
        yield size, make_step(BASE | {name: size})
    elif name == "ranks":
        with ranks(what.split()[-1], size, folder) as found:
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

    figure, axes = pyplot.subplots(3, 4, figsize=(13, 9), layout="constrained")
    for axis in axes.flat[len(measured) :]:
        axis.axis("off")
    for axis, (kind, points) in zip(axes.flat, measured.items(), strict=False):
        x, y = np.array(points).T
        axis.loglog(x, 1000 * y, "o-", color="tab:blue")
        axis.loglog(x, 1000 * y[0] * x / x[0], ":", color="gray", label="proportional")
        axis.xaxis.set_minor_formatter("")
        axis.set(title=f"{kind.split(', ')[0]}: slope {slope(points):.2f}", xlabel=kind.split(", ")[1], ylabel="ms")
    axes.flat[0].legend()
    figure.savefig(file, dpi=80)


def measure(argv: list[str] | None, description: str, name: str, rows: dict, row: Callable) -> tuple[Path, dict]:
    """The folder of a command's --out, and the [size, seconds] of each row; those in its NAME.json are not repeated."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help=f"folder of {name}.json and {name}.png")
    parser.add_argument("--seconds", type=float, default=2, help="for each point (%(default)s)")
    parser.add_argument("--points", type=int, help="of each row, only the first so many, at least 2")
    args = parser.parse_args(argv)
    if args.points is not None and args.points < 2:
        parser.error(f"argument --points: got {args.points}, expected at least 2, as a slope needs")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{name}.json"
    measured = json.loads(file.read_text()) if file.exists() else {}
    for kind, sizes in rows.items():
        if kind in measured:
            continue
        points = []
        for size in sizes[: args.points]:
            # A loader's thread may still write there.
            place = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            with place as folder, row(kind, size, Path(folder)) as (x, action):
                points.append([x, seconds_of(action, args.seconds)])
        measured[kind] = points
        file.write_text(json.dumps(measured, indent=1))
    return args.out, measured


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    folder, measured = measure(argv, __doc__, "growth", ROWS, row)
    plot(measured, folder / "growth.png")
    print("| what | from | to | milliseconds | slope | of the last two |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for kind, points in measured.items():
        times = f"{1000 * points[0][1]:.3g} – {1000 * points[-1][1]:.3g}"
        print(
            f"| {kind} | {points[0][0]} | {points[-1][0]} | {times} | {slope(points):.2f} | {slope(points[-2:]):.2f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
