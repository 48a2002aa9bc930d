"""Measures how the loader's times grow, and plots them:   python tests/benchmarks/growth_loader.py --out FOLDER

epoch: reading all of 4,096 latents (float16, 8x32x32) in batches of 64, shuffled, without workers: against the number
  of shards of 64 samples, which grows the data; and against the samples of a shard, which does not.
workers: an epoch of latents and one of JPEGs of 256x256, by 0, 1 and 2 workers.
start: from nothing but imports to the first batch, against the number of shards of 64 small samples. The shards' files
  are links to one, each with its entry in the index; they lie in the folder itself, or in another one as a remote.

Writes growth_loader.json after each row, and skips rows that are there; then growth_loader.png, and a Markdown table.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot
from streaming import MDSWriter

sys.path.insert(0, str(Path(__file__).parents[2]))  # of the package `tests`, which is not installed

from sit_composer.data.loader import SitLoader, build_loader
from sit_composer.data.spec import INDEX_NAME, SPEC_NAME
from sit_composer.data.stream import load_spec
from tests.benchmarks.growth import measure, slope
from tests.benchmarks.loader import make_rows, write

SAMPLES, PIXELS, BATCH, SMALL = 4096, 1024, 64, (2, 4, 4)
SHARDS = [1, 10, 100, 1000, 5000, 20000]
ROWS = {
    "epoch, shards of 64 samples": [1, 4, 16, 64],
    "epoch, samples of a shard": [16, 64, 256, 1024, 4096],
    "latents, workers": [0, 1, 2],
    "JPEGs, workers": [0, 1, 2],
    "start, shards in the folder": SHARDS,
    "start, shards in a remote": SHARDS,
}
Action = Callable[[], object]
numbers = itertools.count()


def read(loader: SitLoader, count: int) -> None:
    if (came := sum(len(batch["label"]) for batch in loader)) != count:
        raise SystemExit(f"got {came} samples, expected {count}")


@contextmanager
def epoch(kind: str, count: int, each: int, workers: int, folder: Path) -> Iterator[Action]:
    """Reads ``count`` samples in shards of ``each``."""
    row = next(make_rows(kind, 1))
    bytes_each = sum(memoryview(value).nbytes for name, value in row.items() if name != "label")
    rows = itertools.islice(itertools.cycle(make_rows(kind, min(count, 256))), count)
    rows = ({**row, "label": index % 1000} for index, row in enumerate(rows))
    write(kind, rows, count, folder, size_limit=each * (bytes_each + 12) + 1024)
    options = {"batch_size": BATCH, "num_workers": workers, "drop_last": False, "flip": True}
    loader = build_loader(None, str(folder), spec=load_spec(None, str(folder)), **options)
    yield lambda: read(loader, count)
    loader.stop()


def write_small(shards: int, folder: Path) -> None:
    """So many shards of small latents, of which all files but the first are links to it."""
    columns = {name: f"ndarray:float16:{','.join(map(str, SMALL))}" for name in ("moments", "moments_flip")}
    with MDSWriter(out=str(folder), columns={**columns, "label": "int"}, hashes=["xxh64"]) as writer:
        for index in range(BATCH):
            moments = np.full(SMALL, index, np.float16)
            writer.write({"moments": moments, "moments_flip": moments, "label": index})
    index = json.loads((folder / INDEX_NAME).read_text())
    first = index["shards"][0]
    for number in range(1, shards):
        name = f"shard.{number:05}.mds"
        os.link(folder / first["raw_data"]["basename"], folder / name)
        index["shards"].append({**first, "raw_data": {**first["raw_data"], "basename": name}})
    (folder / INDEX_NAME).write_text(json.dumps(index))
    autoencoder = {"name": "-", "scale": 1.0, "shift": 0.0, "channels": 1, "downsample": 8}
    spec = {"version": 1, "kind": "latents", "channels": 1, "image_size": 32, "samples": BATCH * shards}
    spec |= {"num_classes": 64, "classes": [str(label) for label in range(64)], "class_counts": [shards] * 64}
    (folder / SPEC_NAME).write_text(json.dumps({**spec, "autoencoder": autoencoder}))


@contextmanager
def start(shards: int, remote: bool, folder: Path) -> Iterator[Action]:
    """Builds a loader and reads a batch, in a folder of another name or an empty cache each time."""
    (folder / "data").mkdir()
    write_small(shards, folder / "data")

    def once() -> None:
        local = folder / f"{next(numbers)}"
        if not remote:
            local.symlink_to(folder / "data")
        place = str(folder / "data") if remote else None, str(local)
        loader = build_loader(*place, spec=load_spec(*place), batch_size=BATCH)
        next(iter(loader))
        loader.stop()

    yield once


def action(kind: str, size: int, folder: Path) -> AbstractContextManager[Action]:
    what, against = kind.split(", ")
    if what == "start":
        return start(size, against == "shards in a remote", folder)
    if what == "JPEGs":
        return epoch("pixels", PIXELS, 256, size, folder)
    if what == "latents":
        return epoch("latents", SAMPLES, 256, size, folder)
    return epoch("latents", *((SAMPLES, size) if "samples" in against[:7] else (64 * size, 64)), 0, folder)


@contextmanager
def row(kind: str, size: int, folder: Path) -> Iterator[tuple[int, Action]]:
    """A point of a row: its size, and what is timed."""
    with action(kind, size, folder) as timed:
        yield size, timed


def plot(measured: dict[str, list[list[float]]], file: Path) -> None:
    matplotlib.use("Agg")
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for axis, (kind, points) in zip(axes.flat, measured.items(), strict=False):
        x, y = np.array(points).T
        what, against = kind.split(", ")
        if against == "workers":
            axis.bar(x.astype(int).astype(str), 1000 * y, color="tab:blue")
        else:
            axis.loglog(x, 1000 * y, "o-", color="tab:blue")
            axis.loglog(x, 1000 * y[-1] * x / x[-1], ":", color="gray")  # proportional
            axis.set_ylim(1000 * y.min() / 2, 1000 * y.max() * 2)
        axis.set(title=what, xlabel=against, ylabel="ms")
    figure.savefig(file, dpi=80)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    folder, measured = measure(argv, __doc__, "growth_loader", ROWS, row)
    plot(measured, folder / "growth_loader.png")
    print("| what | sizes | milliseconds | slope of the last two |\n| --- | --- | --- | ---: |")
    for kind, points in measured.items():
        times = ", ".join(f"{1000 * seconds:.3g}" for _, seconds in points)
        sizes = ", ".join(f"{size:,}" for size, _ in points)
        last = "" if kind.endswith("workers") or len(points) < 2 else f"{slope(points[-2:]):.2f}"
        print(f"| {kind} | {sizes} | {times} | {last} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
