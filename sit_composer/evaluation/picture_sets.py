"""Where evaluation's pictures come from: a folder, an npz of ADM's, shards, or only the statistics of some."""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy

from sit_composer.cli import is_remote
from sit_composer.data.loader import build_loader
from sit_composer.data.pictures import center_crop, decode_image
from sit_composer.data.spec import INDEX_NAME
from sit_composer.data.stream import load_spec, read_text
from sit_composer.errors import UserError
from sit_composer.evaluation.metrics import STATISTICS
from sit_composer.gallery import SETTINGS

SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass
class PictureSet:
    """Pictures, statistics of their features, or both."""

    path: str
    count: int | None = None  # of pictures; None if there are statistics only
    batches: Callable[[int], Iterator[Any]] | None = None  # batch size -> uint8 tensors (n, 3, H, W)
    statistics: dict[str, Any] = field(default_factory=dict)  # mu, sigma, mu_s, sigma_s
    of: str | None = None  # the identity of the extractor that the statistics are of, if known
    settings: dict | None = None  # sampling.json's, without the labels
    size: list[int] | None = None  # (H, W), known once they were read


def open_set(path: str, image_size: int | None = None, cache: str | None = None) -> PictureSet:
    """Finds out what lies at ``path``, and how many pictures; none is read yet.

    Args:
        path: a file, a folder, or the URI of a folder of shards (s3://, gs://, …).
        image_size: crops the pictures to it.
        cache: a folder for the copies of remote shards, each set's in a folder of its own.

    Raises:
        UserError: if that is not any of what this command takes, or can't be reached.
    """
    if is_remote(path):
        name = f"{path.rstrip('/').rpartition('/')[2]}-{hashlib.sha256(path.rstrip('/').encode()).hexdigest()[:8]}"
        return open_shards(path, image_size, os.path.join(cache, name))
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or folder")
    if os.path.isfile(path):
        return open_npz(path, image_size)
    folder = Path(path)
    if (folder / "index.json").exists():
        return open_shards(path, image_size)
    settings = read_settings(folder)
    if settings is not None:  # its grid.png is no sample
        names = [p for p in folder.iterdir() if re.fullmatch(r"\d{6,}\.png", p.name)]
        labels = settings.pop("labels", None)
        if labels is not None and len(names) != len(labels):
            raise UserError(f"{path}: holds {len(names)} of the {len(labels)} pictures asked for; draw the rest first")
    else:
        names = list_pictures(folder) or [
            p for sub in sorted(folder.iterdir()) if sub.is_dir() for p in list_pictures(sub)
        ]
    if not names:
        raise UserError(f"{path}: no PNG or JPEG pictures here, nor in folders here, nor shards with an index.json")
    names.sort()
    return PictureSet(path, len(names), lambda n: read_files(names, n, image_size), settings=settings)


def list_pictures(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()]


def read_settings(folder: Path) -> dict | None:
    """The content of the folder's sampling.json, or None without one."""
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: not what sit_composer.sample writes")
    return settings


def read_files(names: list[Path], batch_size: int, image_size: int | None) -> Iterator[Any]:
    def read(name: Path) -> Any:
        try:
            picture = decode_image(name.read_bytes(), 3)
        except Exception as error:
            raise UserError(f"{name}: not a picture that can be read ({error})") from None
        return center_crop(picture, image_size) if image_size else picture

    first = None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(names), batch_size):
            batch = list(pool.map(read, names[start : start + batch_size]))
            first = batch[0].shape if first is None else first
            for name, picture in zip(names[start : start + batch_size], batch, strict=True):
                if picture.shape != first:
                    sizes = [f"{shape[1]} × {shape[2]}" for shape in (picture.shape, first)]
                    advice = "the reference's can be cropped by --image-size"
                    raise UserError(
                        f"{name}: is {sizes[0]}, and {names[0]} {sizes[1]}; all must have one size ({advice})"
                    )
            yield torch.stack(batch)


def open_shards(path: str, image_size: int | None, cache: str | None = None) -> PictureSet:
    """Shards in the folder ``path`` or, given a ``cache`` for their copies, at that URI."""
    remote, local = (path, cache) if cache else (None, path)
    spec = load_spec(remote, local)
    if remote:
        read_text(remote.rstrip("/"), local, INDEX_NAME)  # it is there, seen before an hour's work and not after it
    if spec.kind != "pixels":
        raise UserError(f"{path}: shards of {spec.kind}; take the shards of pixels that they were made from")
    if spec.image_size is None and image_size is None:
        raise UserError(f"{path}: its pictures differ in size; crop them by --image-size (the reference's only)")

    def batches(batch_size: int) -> Iterator[Any]:
        options = {"image_size": image_size, "shuffle": False, "drop_last": False}
        for batch in build_loader(remote, local, spec=spec, batch_size=batch_size, **options):
            yield batch["image"].expand(-1, 3, -1, -1)

    return PictureSet(path, spec.samples, batches)


def open_npz(path: str, image_size: int | None) -> PictureSet:
    """An ADM batch, statistics, or both; read by batches, as 50,000 pictures of 256 × 256 are 10 GB."""
    try:
        with np.load(path, allow_pickle=False) as content:
            names = set(content.files)
            statistics = {name: content[name] for pair in STATISTICS.values() for name in pair if name in names}
            of = str(content["features"]) if "features" in names else None
        shape = None
        if "arr_0" in names:
            with zipfile.ZipFile(path) as file, file.open("arr_0.npy") as member:
                shape, fortran, dtype = read_header(member)
    except Exception as error:
        raise UserError(f"{path}: not an npz that can be read ({type(error).__name__}: {error})") from None
    for mu, sigma in STATISTICS.values():
        if (mu in statistics) != (sigma in statistics):
            raise UserError(f"{path}: has only one of {mu} and {sigma}")
        if mu in statistics:
            shapes = statistics[mu].shape, statistics[sigma].shape
            if len(shapes[0]) != 1 or shapes[1] != shapes[0] * 2:
                raise UserError(f"{path}: {mu} and {sigma} are {shapes[0]} and {shapes[1]}, not (D,) and (D, D)")
            if not all(a.dtype.kind == "f" and np.isfinite(a).all() for a in (statistics[mu], statistics[sigma])):
                raise UserError(f"{path}: {mu} or {sigma} has numbers that are not finite")
    if shape is None and "mu" not in statistics:
        raise UserError(f"{path}: has neither arr_0 nor mu and sigma, but {', '.join(sorted(names)) or 'nothing'}")
    if shape is None:
        return PictureSet(path, statistics=statistics, of=of)
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or 0 in shape or fortran:
        order = ", in Fortran's order" if fortran else ""
        raise UserError(f"{path}: arr_0 is {dtype} {shape}{order}; it takes uint8 (N, H, W, 3), in C's order")

    def batches(batch_size: int) -> Iterator[Any]:
        with zipfile.ZipFile(path) as file, file.open("arr_0.npy") as member:
            read_header(member)
            for start in range(0, shape[0], batch_size):
                n = min(batch_size, shape[0] - start)
                try:
                    content = bytearray(member.read(n * shape[1] * shape[2] * 3))
                    pictures = torch.frombuffer(content, dtype=torch.uint8).view(n, *shape[1:]).permute(0, 3, 1, 2)
                except Exception as error:
                    raise UserError(f"{path}: cut short or damaged at picture {start} ({error})") from None
                yield torch.stack([center_crop(p, image_size) for p in pictures]) if image_size else pictures

    # An ADM reference batch doesn't say so, but its statistics are Inception's.
    of = of or ("inception" if statistics else None)
    return PictureSet(path, shape[0], batches, statistics, of, settings_beside(Path(path), shape[0]))


def read_header(member: Any) -> tuple[tuple[int, ...], bool, Any]:
    """Shape, Fortran order and dtype of the npy file, of which the array follows."""
    version = npy.read_magic(member)
    return (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(member)


def settings_beside(npz: Path, count: int) -> dict | None:
    """The sampling.json in the npz's folder, or in the folder that is named like it, if of as many pictures."""
    for folder in (npz.with_suffix(""), npz.parent):
        settings = read_settings(folder)
        if settings is not None and len(settings.pop("labels", None) or []) == count:
            return settings
    return None
