"""The images that evaluation compares: a folder, an ADM npz, shards, or only the statistics of some."""

import hashlib
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from sit_composer.cli import is_remote
from sit_composer.data.folders import in_words
from sit_composer.data.image_files import enlargement, images_below
from sit_composer.data.loader import build_loader
from sit_composer.data.pictures import center_crop, decode_image
from sit_composer.data.spec import INDEX_NAME
from sit_composer.data.stream import load_spec, read_text
from sit_composer.errors import UserError, check_version
from sit_composer.evaluation.metrics import STATISTICS
from sit_composer.gallery import SETTINGS, VERSION

OURS = re.compile(r"\d{6,}\.png")  # the images that sit_composer.sample writes


@dataclass
class PictureSet:
    """Images, statistics of their features, or both."""

    path: str
    count: int | None = None  # of images; None if there are statistics only
    batches: Callable[[int], Iterator[Tensor]] | None = None  # batch size -> uint8 tensors (n, 3, H, W)
    statistics: dict[str, np.ndarray] = field(default_factory=dict)  # mu, sigma, mu_s, sigma_s
    of: str | None = None  # the identity of the statistics' extractor, if known
    settings: dict | None = None  # sampling.json's, without the labels
    size: list[int] | None = None  # (H, W), known once images were read
    left_out: Counter[str] = field(default_factory=Counter)  # files of a folder, by reason
    small: Counter[str] = field(default_factory=Counter)  # images, by reason; known once they were read

    def describe(self) -> dict[str, Any]:
        counts = {"left_out": dict(self.left_out), "small": dict(self.small)}
        return {"path": self.path, "count": self.count, "size": self.size, **counts}

    def notes(self) -> list[str]:
        """What a reader should know of the images."""
        counts = {"left out": self.left_out, "small images": self.small}
        return [f"{self.path}: {name}: {in_words(count)}" for name, count in counts.items() if count]


def open_set(path: str, image_size: int | None = None, cache: str | None = None) -> PictureSet:
    """Finds out what is at ``path``, and how many images; none is read yet. UserError if it can't be evaluated.

    The path is of a file or a folder, or the URI of a folder of shards (s3://, gs://, …). The images are cropped to
    ``image_size``. Copies of remote shards are in the folder ``cache``, each set's in a folder of its own.
    """
    if is_remote(path):
        uri = path.rstrip("/")
        name = f"{uri.rpartition('/')[2]}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"
        return open_shards(path, image_size, os.path.join(cache, name))
    if os.path.isfile(path):
        return open_npz(path, image_size)
    folder, counted = Path(path), Counter[str]()
    if (folder / INDEX_NAME).exists():
        return open_shards(path, image_size)
    if (settings := read_settings(folder)) is not None:  # its grid.png is no sample
        files = [file for file in folder.iterdir() if OURS.fullmatch(file.name)]
        others = {file.name for file in folder.iterdir() if not OURS.fullmatch(file.name)} - {SETTINGS, "grid.png"}
        counted.update({"not of the generated images": len(others)} if others else {})
        labels = settings.pop("labels", None)
        if labels is not None and len(files) != len(labels):
            raise UserError(f"{path}: holds {len(files)} of the {len(labels)} images; generate the others first")
    else:
        files = list_images(path, counted)
    if not files:
        rest = f" (left out: {in_words(counted)})" if counted else ""
        raise UserError(f"{path}: no images here, nor in folders here{rest}, nor shards with an {INDEX_NAME}")
    files.sort()
    small = Counter[str]()
    batches = partial(read_files, files, image_size=image_size, small=small)
    return PictureSet(path, len(files), batches, settings=settings, left_out=counted, small=small)


def list_images(path: str, left_out: Counter[str]) -> list[Path]:
    """The images in a folder or, if there are none, in all folders inside it."""
    *inside, (_, images) = images_below(path, left_out)
    others = [image for _, found in inside for image in found]
    if images and others:
        left_out["an image in a folder beside the images"] += len(others)
    return [Path(image.path) for image in images or others]


def read_settings(folder: Path) -> dict | None:
    """The content of the folder's sampling.json, or None without one."""
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if isinstance(settings, dict):
        check_version(settings.get("version"), VERSION, str(path))
        return settings
    raise UserError(f"{path}: sit_composer.sample didn't write it")


def read_files(files: list[Path], batch_size: int, image_size: int | None, small: Counter[str]) -> Iterator[Tensor]:
    def read(file: Path) -> tuple[Tensor, str | None]:
        try:
            image = decode_image(file.read_bytes(), 3)
        except Exception as error:
            raise UserError(f"{file}: not an image that can be read ({error})") from None
        return crop(image, image_size)

    first = None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(files), batch_size):
            names = files[start : start + batch_size]
            batch, reasons = zip(*pool.map(read, names), strict=True)
            small.update(filter(None, reasons))
            first = first or batch[0].shape
            for name, image in zip(names, batch, strict=True):
                if image.shape != first:
                    got, expected = (f"{shape[1]} × {shape[2]}" for shape in (image.shape, first))
                    advice = "--image-size crops the reference's images to one size"
                    raise UserError(f"{name}: got {got}, expected {expected} as {files[0]}; {advice}")
            yield torch.stack(batch)


def crop(image: Tensor, size: int | None) -> tuple[Tensor, str | None]:
    """An image, cropped if there is a size, and why it counts as small."""
    height, width = image.shape[-2:]
    return center_crop(image, size) if size else image, enlargement(width, height, size)


def open_shards(path: str, image_size: int | None, cache: str | None = None) -> PictureSet:
    """Shards in the folder ``path`` or, given a ``cache`` for their copies, at that URI."""
    remote, local = (path, cache) if cache else (None, path)
    spec = load_spec(remote, local)
    if remote:
        read_text(remote.rstrip("/"), local, INDEX_NAME)  # a missing index is an error now, not after an hour
    if spec.kind != "pixels":
        raise UserError(f"{path}: got shards of {spec.kind}, expected the shards of pixels that they were made from")
    if spec.image_size is None and image_size is None:
        raise UserError(f"{path}: its images differ in size; crop them by --image-size (only the reference's)")

    def batches(batch_size: int) -> Iterator[Tensor]:
        options: dict[str, Any] = {"image_size": image_size, "shuffle": False, "drop_last": False}
        for batch in build_loader(remote, local, spec=spec, batch_size=batch_size, **options):
            yield batch["image"].contiguous().expand(-1, 3, -1, -1)

    return PictureSet(path, spec.samples, batches, left_out=Counter(spec.left_out), small=Counter(spec.small))


def open_npz(path: str, image_size: int | None) -> PictureSet:
    """An ADM batch, statistics, or both. Images are read in batches, as 50,000 of 256 × 256 are 10 GB."""
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
    check_arrays(path, statistics)
    if shape is None:
        if "mu" not in statistics:
            raise UserError(f"{path}: got {', '.join(sorted(names)) or 'nothing'}, expected arr_0, or mu and sigma")
        return PictureSet(path, statistics=statistics, of=of)
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or 0 in shape or fortran:
        order = " in Fortran's order" if fortran else ""
        raise UserError(f"{path}: arr_0: got {dtype} {shape}{order}, expected uint8 (N, H, W, 3) in C's order")
    of = of or ("inception" if statistics else None)  # which an ADM reference batch doesn't name
    settings = settings_beside(Path(path), shape[0])
    small = Counter[str]()
    batches = partial(read_npz, path, shape, image_size=image_size, small=small)
    return PictureSet(path, shape[0], batches, statistics, of, settings, small=small)


def check_arrays(path: str, statistics: dict[str, np.ndarray]) -> None:
    """Raises UserError for statistics that are incomplete, of wrong shapes or not finite."""
    for mu, sigma in STATISTICS.values():
        arrays = [statistics[name] for name in (mu, sigma) if name in statistics]
        shapes = [array.shape for array in arrays]
        if len(arrays) == 1:
            raise UserError(f"{path}: has only one of {mu} and {sigma}")
        if arrays and (len(shapes[0]) != 1 or shapes[1] != shapes[0] * 2):
            raise UserError(f"{path}: {mu} and {sigma}: got {shapes[0]} and {shapes[1]}, expected (D,) and (D, D)")
        if not all(array.dtype.kind == "f" and np.isfinite(array).all() for array in arrays):
            raise UserError(f"{path}: {mu} or {sigma} has numbers that are not finite")


def read_npz(
    path: str, shape: tuple[int, ...], batch_size: int, image_size: int | None, small: Counter[str]
) -> Iterator[Tensor]:
    """The images of arr_0, uint8 (N, H, W, 3), in batches."""
    with zipfile.ZipFile(path) as file, file.open("arr_0.npy") as member:
        read_header(member)
        for start in range(0, shape[0], batch_size):
            n = min(batch_size, shape[0] - start)
            try:
                content = bytearray(member.read(n * shape[1] * shape[2] * 3))
                images = torch.frombuffer(content, dtype=torch.uint8).view(n, *shape[1:]).permute(0, 3, 1, 2)
            except Exception as error:
                raise UserError(f"{path}: cut short or damaged at image {start} ({error})") from None
            images, reasons = zip(*(crop(image, image_size) for image in images), strict=True)
            small.update(filter(None, reasons))
            yield torch.stack(images)


def read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype in an npy file's header; the array follows."""
    return (npy.read_array_header_1_0 if npy.read_magic(member) == (1, 0) else npy.read_array_header_2_0)(member)


def settings_beside(npz: Path, count: int) -> dict | None:
    """The sampling.json in the npz's folder, or in the folder of the same name, if it is of as many images."""
    for folder in (npz.with_suffix(""), npz.parent):
        settings = read_settings(folder)
        if settings is not None and len(settings.pop("labels", None) or []) == count:
            return settings
    return None
