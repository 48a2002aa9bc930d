"""A folder of drawn pictures: numbered PNGs, a grid of them, an array, and the settings that they were drawn with."""

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.io import encode_png

from sit_composer.errors import UserError

SETTINGS = "sampling.json"


def claim(out: Path, settings: dict[str, Any], count: int) -> list[int]:
    """Makes the folder ours, and gives the indices of the pictures that it lacks.

    Raises:
        UserError: if it holds something else, which is left as it is.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; it takes a folder")
    if out.is_dir() and [path.name for path in out.iterdir()] not in ([], [SETTINGS]):  # the settings of none are free
        try:
            before = dict(json.loads((out / SETTINGS).read_text()))
        except (OSError, ValueError, TypeError):
            raise UserError(f"--out: {out} holds files that are not samples; choose another folder") from None
        for name, value in settings.items():
            if before.get(name) != json.loads(json.dumps(value)):
                raise UserError(f"--out: {out} holds samples with another {name}; delete it or choose another")
        return [i for i in range(count) if not (out / f"{i:06d}.png").exists()]
    out.mkdir(parents=True, exist_ok=True)
    write_json(settings, out / SETTINGS)
    return list(range(count))


def read_pictures(out: Path, count: int) -> list[Image.Image]:
    """The pictures as PIL images."""
    pictures = []
    for i in range(count):
        with Image.open(out / f"{i:06d}.png") as image:
            pictures.append(image.copy())
    return pictures


def write_png(picture: Tensor, path: Path) -> None:
    """Writes a uint8 (C, H, W) picture, all of it or nothing."""
    _write(path, bytes(encode_png(picture).numpy()))


def write_json(content: dict[str, Any], path: Path) -> None:
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
    _write(path, f"{{\n{lines}\n}}\n".encode())


def write_npz(pictures: list[Image.Image], labels: list[int], path: Path) -> None:
    """Writes the pictures as ADM's evaluation takes them: arr_0, uint8 (N, H, W, 3); the labels lie beside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(path, arr_0=np.stack([np.asarray(p.convert("RGB")) for p in pictures]), labels=np.array(labels))


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes an npz, all of it or nothing."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    _write(path, buffer.getvalue())


def write_grid(pictures: list[Image.Image], labels: list[int], path: Path, columns: int = 10, rows: int = 10) -> None:
    """Writes a grid of the pictures, small ones enlarged: a row a class where there are several of every one."""
    classes = sorted(set(labels), key=labels.index)
    each = [[i for i, label in enumerate(labels) if label == c][:columns] for c in classes[:rows]]
    if min(map(len, each)) == 1:  # fill the rows
        shown = range(min(len(labels), rows * columns))
        width = min(math.ceil(math.sqrt(len(shown))), columns)
        each = [shown[i : i + width] for i in shown[::width]]
    side = pictures[0].width
    zoom = max(1, 48 // side)
    step = side * zoom + 2
    grid = Image.new(pictures[0].mode, (max(len(row) for row in each) * step - 2, len(each) * step - 2), "white")
    for y, row in enumerate(each):
        for x, i in enumerate(row):
            grid.paste(pictures[i].resize((side * zoom, side * zoom), Image.NEAREST), (x * step, y * step))
    buffer = io.BytesIO()
    grid.save(buffer, "PNG")
    _write(path, buffer.getvalue())


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
