"""Measures loaders side by side:   python tests/benchmarks/loader.py --workers 2

Writes latents of 256x256 images (float16, 8x32x32, and those of the mirror image) and JPEGs of 256x256. Reads them in
turn, one epoch at a time, shuffled, in batches: with `sit_composer.data`, a plain StreamingDataset, webdataset,
litdata, an Arrow file by `datasets`, and as the limit a gather from one memory-mapped file; for JPEGs, decoding alone,
and decoding into shared memory in which batches lie, without flips, shards, keys, labels or a reader.
Only ours verifies shards, and has flips and keys that are functions of seed, epoch and sample. Prints a Markdown table:
the median of the rounds and their range; CPU time of all processes; and ours over each.
"""

import argparse
import io
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from torch.utils.data import DataLoader

from sit_composer.choices import COUNT, FROM_ZERO
from sit_composer.cli import number
from sit_composer.data.loader import build_loader
from sit_composer.data.pictures import decode_image, decode_into
from sit_composer.data.spec import SPEC_NAME, DataSpec
from sit_composer.data.stream import load_spec

try:
    import webdataset
except ImportError:
    webdataset = None
try:
    import litdata
except ImportError:
    litdata = None

SIDE = 256
SHAPE = (8, 32, 32)
COLUMNS = {
    "latents": {"moments": "ndarray:float16:8,32,32", "moments_flip": "ndarray:float16:8,32,32", "label": "int"},
    "pixels": {"image": "bytes", "label": "int"},
}
SPECS = {
    "latents": {
        "channels": 4,
        "autoencoder": {"name": "-", "scale": 1.0, "shift": 0.0, "channels": 4, "downsample": 8},
    },
    "pixels": {"channels": 3},
}
Row = dict[str, Any]
Side = Callable[[], int]  # reads an epoch, and returns how many samples came


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=number(FROM_ZERO), default=8000, help="samples (%(default)s)")
    parser.add_argument("--pixels", type=number(FROM_ZERO), default=2000, help="samples (%(default)s)")
    parser.add_argument("--workers", type=number(FROM_ZERO), default=0, help="processes that read (%(default)s)")
    parser.add_argument("--batch-size", type=number(COUNT), default=64, help="(%(default)s)")
    parser.add_argument("--rounds", type=number(COUNT), default=5, help="epochs of each side (%(default)s)")
    parser.add_argument("--limits", action="store_true", help="only ours and the limits")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{len(os.sched_getaffinity(0))} cores ({model()}), commit {commit()}, torch {torch.__version__}\n")
    print(f"| data, {args.workers} workers | samples/s (range) | CPU µs a sample | ours / this |")
    print("| --- | ---: | ---: | ---: |")
    for kind, count in (("latents", args.latents), ("pixels", args.pixels)):
        if count:
            with tempfile.TemporaryDirectory() as folder:
                compare(kind, count, Path(folder), args)
    return 0


def model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "?")


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def compare(kind: str, count: int, folder: Path, args: argparse.Namespace) -> None:
    """Prints a row for each loader."""
    rows = list(make_rows(kind, count))
    sides: dict[str, Side] = {}
    for make in (ours, into, limit) if args.limits else (ours, stock, web, lit, arrow, into, limit):
        if (side := make(kind, rows, folder, args)) is None:
            continue
        if isinstance(side, str):
            print(f"| {kind}, {side} | | | |")
        else:
            sides[make.__doc__ or ""] = side
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(1 + args.rounds):  # the first warms up
        for name, side in sides.items():
            start, used = time.perf_counter(), cpu_seconds()
            if (came := side()) != count:
                raise SystemExit(f"{name}: got {came} samples, expected {count}")
            if turn:
                seen[name].append((count / (time.perf_counter() - start), (cpu_seconds() - used) / count * 1e6))
    speeds = {name: statistics.median(speed for speed, _ in values) for name, values in seen.items()}
    for name, values in seen.items():
        low, high = min(values)[0], max(values)[0]
        cpu = statistics.median(cpu for _, cpu in values)
        ratio = speeds["sit_composer"] / speeds[name]
        print(f"| {kind}, {name} | {speeds[name]:.0f} ({low:.0f} – {high:.0f}) | {cpu:.0f} | {ratio:.2f} |", flush=True)


def cpu_seconds() -> float:
    """CPU time of this process and its children, of which the ended ones count too."""
    own = os.times()
    living = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(own[:4]) + sum(times.user + times.system for times in living)


# --- The samples ---


def make_rows(kind: str, count: int) -> Iterator[Row]:
    """Random latents, or JPEGs of photographs' crops."""
    random = np.random.default_rng(0)
    for index in range(count):
        yield {**(latents if kind == "latents" else picture)(random), "label": index % 1000}


def latents(random: np.random.Generator) -> Row:
    moments = random.standard_normal((2, *SHAPE), dtype=np.float32).astype(np.float16)
    return {"moments": moments[0], "moments_flip": moments[1]}


def picture(random: np.random.Generator) -> Row:
    photograph = load_sample_images().images[random.integers(2)]
    top, left = (int(random.integers(0, side - SIDE)) for side in photograph.shape[:2])
    file = io.BytesIO()
    Image.fromarray(photograph[top : top + SIDE, left : left + SIDE]).save(file, "JPEG", quality=95)
    return {"image": file.getvalue()}


def write(kind: str, rows: Iterable[Row], count: int, folder: Path, size_limit: int = 1 << 26) -> None:
    """MDS shards and their spec."""
    with MDSWriter(out=str(folder), columns=COLUMNS[kind], hashes=["xxh64"], size_limit=size_limit) as writer:
        for row in rows:
            writer.write(row)
    counts = [len(range(label, count, 1000)) for label in range(1000)]
    classes = {"num_classes": 1000, "classes": [str(label) for label in range(1000)], "class_counts": counts}
    spec = DataSpec(kind=kind, image_size=SIDE, samples=count, **classes, **SPECS[kind])
    (folder / SPEC_NAME).write_text(spec.to_json())


def plain_sample(row: Row) -> dict[str, Any]:
    """What a plain loader makes of a row."""
    flip = bool(torch.rand(()) < 0.5)
    if "image" in row:
        image = torch.from_numpy(np.array(Image.open(io.BytesIO(row["image"])).convert("RGB"))).permute(2, 0, 1)
        sample = {"image": image.flip(-1) if flip else image}
    else:
        moments = np.frombuffer(row["moments_flip" if flip else "moments"], np.float16).reshape(SHAPE)
        sample = {"moments": torch.from_numpy(moments.copy())}
    return {**sample, "label": int(row["label"])}


def counting(loader: Iterable[Row]) -> Side:
    return lambda: sum(len(batch["label"]) for batch in loader)


# --- The loaders ---


def ours(kind: str, rows: list[Row], folder: Path, args: argparse.Namespace) -> Side:
    """sit_composer"""
    path = str(folder / "ours")
    write(kind, rows, len(rows), Path(path))
    options = {"batch_size": args.batch_size, "num_workers": args.workers, "flip": True, "drop_last": False}
    return counting(build_loader(None, path, spec=load_spec(None, path), **options))


class Plain(StreamingDataset):
    """The plain data set."""

    def __getitem__(self, index: int) -> Row:
        return plain_sample(super().__getitem__(index))


def torch_loader(dataset: Any, args: argparse.Namespace, kind: Any = DataLoader, **options: Any) -> Side:
    options |= {"batch_size": args.batch_size, "num_workers": args.workers, "persistent_workers": args.workers > 0}
    return counting(kind(dataset, **options))


def stock(kind: str, rows: list[Row], folder: Path, args: argparse.Namespace) -> Side:
    """StreamingDataset"""
    shutil.copytree(folder / "ours", folder / "stock", copy_function=os.link)  # memory is shared by the folder's name
    dataset = Plain(local=str(folder / "stock"), batch_size=args.batch_size, shuffle=True)
    return torch_loader(dataset, args, StreamingDataLoader)


def web(kind: str, rows: list[Row], folder: Path, args: argparse.Namespace) -> Side | str:
    """webdataset"""
    if webdataset is None:
        return "webdataset: not installed (pip install -e '.[bench]')"
    paths = [str(folder / f"{part}.tar") for part in range(4)]
    for part, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for index in range(part, len(rows), 4):
                for name, value in rows[index].items():
                    data = str(value).encode() if name == "label" else bytes(value)
                    info = tarfile.TarInfo(f"{index:06}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    made = webdataset.WebDataset(paths, shardshuffle=4, empty_check=False).shuffle(1000).map(plain_sample)
    return torch_loader(made, args)


def lit(kind: str, rows: list[Row], folder: Path, args: argparse.Namespace) -> Side | str:
    """litdata"""
    if litdata is None:
        return "litdata: not installed (pip install -e '.[bench]')"
    (folder / "lit").mkdir()
    writer = litdata.streaming.cache.BinaryWriter(str(folder / "lit"), chunk_bytes=1 << 26)
    for index, row in enumerate(rows):
        packed = {name: value if name == "label" else bytes(value) for name, value in row.items()}
        writer.add_item(index, packed)
    writer.done()
    writer.merge()

    class Lit(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> Row:
            return plain_sample(super().__getitem__(index))

    return torch_loader(Lit(str(folder / "lit"), shuffle=True), args, litdata.StreamingDataLoader)


class Rows(torch.utils.data.Dataset):
    """Rows of an Arrow file, which is mapped."""

    def __init__(self, table: datasets.Dataset) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Row:
        return plain_sample(self.table[index])


def arrow(kind: str, rows: list[Row], folder: Path, args: argparse.Namespace) -> Side:
    """Arrow, `datasets`"""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns = {name: v if name == "label" else [bytes(value) for value in v] for name, v in columns.items()}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder / "arrow"))
    return torch_loader(Rows(datasets.load_from_disk(str(folder / "arrow"))), args, shuffle=True)


def into(kind: str, rows: list[Row], folder: Path, args: argparse.Namespace) -> Side | None:
    """decoding from memory into batches"""
    return decoding(rows, args, args.batch_size) if kind == "pixels" else None


def limit(kind: str, rows: list[Row], folder: Path, args: argparse.Namespace) -> Side:
    """the limit: a gather in process, or decoding from memory"""
    if kind == "pixels":
        return decoding(rows, args, 0)
    np.save(folder / "all.npy", np.stack([row["moments"] for row in rows]))
    moments = np.load(folder / "all.npy", mmap_mode="r")

    def gather() -> int:
        order = np.random.permutation(len(rows))
        return sum(len(moments[order[at : at + args.batch_size]]) for at in range(0, len(rows), args.batch_size))

    return gather


_files: list[bytes] = []
_batches: list[np.ndarray] = []  # memory of three, which the first epoch takes


def decoding(rows: list[Row], args: argparse.Namespace, batch: int) -> Side:
    files = [row["image"] for row in rows]
    if args.workers < 2:
        return lambda: decode_all(files, batch)
    pool = Pool(args.workers, _keep, (files,))
    return lambda: sum(pool.map(_decode_part, [(n, args.workers, batch) for n in range(args.workers)], 1))


def _keep(files: list[bytes]) -> None:
    torch.set_num_threads(1)
    _files[:] = files


def _decode_part(part: tuple[int, int, int]) -> int:
    return decode_all(_files[part[0] :: part[1]], part[2])


def decode_all(files: list[bytes], batch: int) -> int:
    """Decodes all, as the loader does: into nothing, or into memory that three batches share in turn."""
    if batch and not _batches:
        _batches.append(torch.empty(3 * batch, SIDE, SIDE, 3, dtype=torch.uint8).share_memory_().numpy())
    for place, data in enumerate(files):
        if batch:
            decode_into(_batches[0][place % (3 * batch)], data)
        else:
            decode_image(data, 3)
    return len(files)


if __name__ == "__main__":
    sys.exit(main())
