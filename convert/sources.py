"""Finds out what SOURCE is, and yields its pictures with their labels, always in the same order.

`describe` settles the format from names alone and needs only the standard library, so that a mistyped command fails at
once; `open_source` reads. Tables (Parquet, Arrow, Hugging Face data sets) are read in `arrow_source.py`.
"""

import glob
import io
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

FORMATS = ("parquet", "arrow", "hf", "imagefolder", "digits")
TABLES = ("parquet", "arrow", "hf")  # those with columns
SUFFIXES = dict.fromkeys((".parquet", ".pq"), "parquet")
SUFFIXES |= dict.fromkeys((".arrow", ".feather", ".ipc"), "arrow")
SUFFIXES |= dict.fromkeys(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"), "imagefolder"
)
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
SPLIT = re.compile(r"(?:^|[/_.-])(train|test|validation|valid|val|dev)(?=[/_.-])")


class InputError(Exception):
    """What is wrong with the source, where, and what to do: one line for the user."""


class Sample(NamedTuple):
    """One picture of a source. ``where`` names its file, and its row (counted from 0) if the file is a table."""

    where: str
    image: bytes | Path | None  # the picture file's bytes, or where they lie; None if the row has none
    label: int


@dataclass
class Source:
    """An opened source: ``classes`` are those of all its rows; ``rows`` is None where counting would mean reading."""

    classes: list[str]
    rows: int | None
    samples: Iterator[Sample]


def describe(
    source: str,
    format: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    split: str | None = None,
    config: str | None = None,
) -> dict[str, Any]:
    """Settles what a source is: its format, its absolute path or its name, and the columns and split to take.

    Raises:
        InputError: if there is no such source, its format is in doubt, or an option does not apply to it.
    """
    format = format or _infer_format(source)
    path = Path(source).expanduser()
    if format == "digits" and source != "digits":
        raise InputError(f"--format digits takes the word 'digits' as its source, not {source!r}")
    if format == "imagefolder" and not path.is_dir():
        raise InputError(f"{source} is not a folder of pictures: no such folder")
    if format in ("parquet", "arrow"):
        list_files(source, format)
    if format != "hf" and (split or config):
        raise InputError(f"--split and --config are for Hugging Face data sets; {source} is taken as {format}")
    if format not in TABLES and (image_column or label_column not in (None, "none")):
        raise InputError(f"columns are for tables; {source} is taken as {format}, whose only choice is no labels")

    name = source if format == "digits" or (format == "hf" and not path.exists()) else os.path.abspath(path)
    description: dict[str, Any] = {"format": format, "path": name}
    if format in TABLES:
        description["image_column"] = image_column or "image"
        description["label_column"] = label_column or "label"
    if label_column == "none":
        description["label_column"] = None
    if format == "hf":
        alone = (path / "state.json").is_file()  # save_to_disk of one Dataset, not of a DatasetDict
        if alone and split:
            raise InputError(f"{source} holds one data set without splits: leave out --split")
        description |= {"split": None if alone else split or "train", "config": config}
    return description


def open_source(description: dict[str, Any]) -> Source:
    """Opens what `describe` found. Labels are read through and checked here, before any picture is.

    Raises:
        InputError: if it cannot be read, lacks a column, or has labels that are not classes. Iterating may raise too.
    """
    format, path = description["format"], description["path"]
    if format in TABLES:
        import arrow_source

        return arrow_source.open_tables(description)
    labelled = "label_column" not in description
    if format == "digits":
        return _digits(labelled)
    return _image_folder(Path(path)) if labelled else _loose_pictures(Path(path))


def list_files(source: str, format: str) -> list[Path]:
    """The table files that a path or a glob names, sorted.

    Raises:
        InputError: if there are none, or if they are of several splits.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        # cache-*.arrow are what `datasets` leaves of transformed copies beside the data that it saved.
        files = [f for f in _walk(path) if SUFFIXES.get(f.suffix.lower()) == format]
        files = [f for f in files if not f.name.startswith(("_", "cache-"))]
        splits = {m[1] for f in files if (m := SPLIT.search(f.relative_to(path).as_posix()))}
        if len(splits) > 1:
            these = ", ".join(sorted(splits))
            raise InputError(
                f"{source} holds files of several splits ({these}): give a glob such as '{source}/**/train*'"
            )
    else:
        files = [path] if path.is_file() else _glob(source)
    if not files:
        raise InputError(f"{source} holds no {format} file" if path.exists() else f"{source}: no such file or folder")
    return files


def _infer_format(source: str) -> str:
    path = Path(source).expanduser()
    if source == "digits":
        if path.exists():
            raise InputError("'digits' is both scikit-learn's digits and a path here: say --format digits, or ./digits")
        return "digits"
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return "hf"  # `datasets` saved it
    if not path.exists() and not glob.has_magic(source):
        if HUB_NAME.fullmatch(source) and path.suffix.lower() not in SUFFIXES:
            return "hf"
        raise InputError(f"{source}: no such file or folder")
    if path.is_file() and SUFFIXES.get(path.suffix.lower()) == "imagefolder":
        raise InputError(f"{source} is a single picture: give the folder that holds a folder for each class")
    files = _walk(path) if path.is_dir() else [path] if path.is_file() else _glob(source)
    found = Counter(SUFFIXES[f.suffix.lower()] for f in files if f.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"{source}: found no Parquet file, Arrow file or picture")
    if len(found) > 1:
        these = " and ".join(f"{name} ({count} files)" for name, count in sorted(found.items()))
        raise InputError(f"{source} could be {these}: say which with --format")
    return next(iter(found))


def _walk(folder: Path) -> list[Path]:
    """All files below a folder, sorted, but for hidden ones."""
    files = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _glob(pattern: str) -> list[Path]:
    return sorted(f for f in map(Path, glob.glob(os.path.expanduser(pattern), recursive=True)) if f.is_file())


def _digits(labelled: bool) -> Source:
    """scikit-learn's 1,797 digits, 8×8 grey with values 0 to 16, as 8-bit PNG."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()

    def samples() -> Iterator[Sample]:
        for row, (picture, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            png = io.BytesIO()
            Image.fromarray(np.round(picture * (255 / 16)).astype(np.uint8)).save(png, "PNG")
            yield Sample(f"digits row {row}", png.getvalue(), int(label) if labelled else 0)

    classes = [str(name) for name in digits.target_names] if labelled else ["all"]
    return Source(classes, len(digits.target), samples())


def _image_folder(root: Path) -> Source:
    """ROOT/CLASS/PICTURE; classes in the order of their names."""
    folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
    pictures: list[tuple[Path, int]] = []
    for label, folder in enumerate(folders):
        for file in sorted(folder.iterdir()):
            if file.is_dir() and not file.name.startswith("."):
                raise InputError(
                    f"{file} is a folder inside a class: give the folder whose own folders hold the pictures"
                )
            if SUFFIXES.get(file.suffix.lower()) == "imagefolder" and not file.name.startswith("."):
                pictures.append((file, label))
    if not pictures:
        raise InputError(f"{root} holds no ROOT/CLASS/PICTURE; for pictures without classes say --label-column none")
    samples = (Sample(str(file), file, label) for file, label in pictures)
    return Source([folder.name for folder in folders], len(pictures), samples)


def _loose_pictures(root: Path) -> Source:
    """All pictures below a folder, unlabelled."""
    pictures = [file for file in _walk(root) if SUFFIXES.get(file.suffix.lower()) == "imagefolder"]
    return Source(["all"], len(pictures), (Sample(str(file), file, 0) for file in pictures))
