"""Shards of scikit-learn's digits, and loaders of them."""

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from streaming import MDSWriter

from sit_composer.data.loader import build_loader
from sit_composer.data.spec import DataSpec
from sit_composer.data.stream import load_spec
from tests.helpers.images import png

SAMPLES = 200
DIGITS = load_digits()
LOADERS = []


def digit(index: int) -> np.ndarray:
    return np.round(DIGITS.images[index] * (255 / 16)).astype(np.uint8)


def write(folder: Path, columns: dict, rows: list[dict], spec: dict, **options) -> Path:
    options = {"hashes": ["xxh64"], "size_limit": 4096} | options
    with MDSWriter(out=str(folder), columns=columns, **options) as writer:
        for row in rows:
            writer.write(row)
    classes = {"num_classes": 10, "classes": [str(i) for i in range(10)], "class_counts": [len(rows) // 10] * 10}
    spec = {"image_size": 8, "samples": len(rows), **classes} | spec
    (folder / "spec.json").write_text(DataSpec(**spec).to_json())
    return folder


def write_digits(folder: Path, first: int = 0, **options) -> Path:
    indices = range(first, first + SAMPLES)
    rows = [{"image": png(digit(i)), "label": int(DIGITS.target[i])} for i in indices]
    return write(folder, {"image": "bytes", "label": "int"}, rows, {"kind": "pixels", "channels": 1}, **options)


def loader(remote, local, **options):
    options = {"batch_size": 16, "seed": 1, "drop_last": False, "download_retry": 1} | options
    remote = remote and str(remote)
    LOADERS.append(build_loader(remote, str(local), spec=load_spec(remote, str(local)), **options))
    return LOADERS[-1]


def gather(batches) -> dict[str, torch.Tensor]:
    batches = list(batches)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
