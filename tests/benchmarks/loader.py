"""Measures the loader in samples per second:   python tests/benchmarks/loader.py

Writes latents of 256x256 images (float16, 8x32x32, and those of the mirror image) and JPEGs of 256x256 to MDS shards.
Reads them with a plain StreamingDataset and with `sit_composer.data`, in turn, one epoch at a time, shuffled and
batched. The plain one verifies no shard, and its flips are not a function of seed, epoch and sample. Prints a Markdown
table of the medians, and ours over the plain one's.
"""

import argparse
import io
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

from sit_composer.data.loader import build_loader
from sit_composer.data.spec import SPEC_NAME, DataSpec
from sit_composer.data.stream import load_spec

SIDE = 256
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


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=8000, help="samples (%(default)s)")
    parser.add_argument("--pixels", type=int, default=2000, help="samples (%(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each side (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"| data, {args.workers} workers | StreamingDataset, samples/s | sit_composer | ratio |")
    print("| --- | ---: | ---: | ---: |")
    for kind, count in (("latents", args.latents), ("pixels", args.pixels)):
        if count:
            with tempfile.TemporaryDirectory() as folder:
                theirs, ours = compare(kind, count, Path(folder), args.workers, args.rounds)
            print(f"| {kind} | {theirs:.0f} | {ours:.0f} | {ours / theirs:.2f} |", flush=True)
    return 0


def compare(kind: str, count: int, folder: Path, workers: int, rounds: int) -> tuple[float, float]:
    """Samples per second, as the medians of the rounds: StreamingDataset's, and ours."""
    write(kind, count, folder / "shards")
    sides = []
    for number, loader in enumerate((plain, safe)):  # each has a folder of its own, as both share memory by its name
        shutil.copytree(folder / "shards", folder / str(number), copy_function=os.link)
        sides.append(loader(kind, folder / str(number), workers))
    times = [[epoch(side, count) for side in sides] for _ in range(1 + rounds)][1:]  # the first warms up
    return tuple(count / statistics.median(column) for column in zip(*times, strict=True))


def write(kind: str, count: int, folder: Path) -> None:
    """Shards of random latents, or of JPEGs of photographs' crops."""
    random = np.random.default_rng(0)
    with MDSWriter(out=str(folder), columns=COLUMNS[kind], hashes=["xxh64"]) as writer:
        for index in range(count):
            writer.write({**(latents if kind == "latents" else picture)(random), "label": index % 1000})
    counts = [len(range(label, count, 1000)) for label in range(1000)]
    classes = {"num_classes": 1000, "classes": [str(label) for label in range(1000)], "class_counts": counts}
    spec = DataSpec(kind=kind, image_size=SIDE, samples=count, **classes, **SPECS[kind])
    (folder / SPEC_NAME).write_text(spec.to_json())


def latents(random: np.random.Generator) -> dict[str, Any]:
    moments = random.standard_normal((2, 8, 32, 32)).astype(np.float16)
    return {"moments": moments[0], "moments_flip": moments[1]}


def picture(random: np.random.Generator) -> dict[str, Any]:
    photograph = load_sample_images().images[random.integers(2)]
    top, left = (int(random.integers(0, side - SIDE)) for side in photograph.shape[:2])
    file = io.BytesIO()
    Image.fromarray(photograph[top : top + SIDE, left : left + SIDE]).save(file, "JPEG", quality=95)
    return {"image": file.getvalue()}


class Plain(StreamingDataset):
    """The plain data set."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        flip = bool(torch.rand(()) < 0.5)
        if "image" in row:
            image = torch.from_numpy(np.array(Image.open(io.BytesIO(row["image"])).convert("RGB"))).permute(2, 0, 1)
            sample = {"image": image.flip(-1) if flip else image}
        else:
            sample = {"moments": torch.from_numpy(row["moments_flip" if flip else "moments"].copy())}
        return {**sample, "label": row["label"]}


def plain(kind: str, folder: Path, workers: int) -> Iterable[dict[str, torch.Tensor]]:
    dataset = Plain(local=str(folder), batch_size=256, shuffle=True)
    return StreamingDataLoader(dataset, batch_size=256, num_workers=workers, persistent_workers=workers > 0)


def safe(kind: str, folder: Path, workers: int) -> Iterable[dict[str, torch.Tensor]]:
    spec = load_spec(None, str(folder))
    return build_loader(None, str(folder), spec=spec, batch_size=256, flip=True, num_workers=workers, drop_last=False)


def epoch(loader: Iterable[dict[str, torch.Tensor]], count: int) -> float:
    """The seconds of an epoch. Exits if samples are missing."""
    start = time.perf_counter()
    came = sum(len(batch["label"]) for batch in loader)
    seconds = time.perf_counter() - start
    if came != count:
        raise SystemExit(f"got {came} samples, expected {count}")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
