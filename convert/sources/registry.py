"""Finds out what SOURCE is, and yields its images with their labels, always in the same order.

`describe` settles the format from names alone, with the standard library only for a local source. `plan_source` reads
footers and labels, and divides the source into parts; `read_part` reads one. Each kind of source has these two.
"""

import glob
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from convert.sources.files import count_left_out, expand, is_saved, list_files, object_store, walk
from convert.sources.names import MAGIC, SCHEME, format_of, infer_format
from convert.sources.parts import InputError, Part, Sample, SourcePlan, no_such_file
from sit_composer.cli import announce

LIBRARIES = {"hf": "datasets", "digits": "sklearn"}  # that take seconds to import
FORMATS = ("parquet", "arrow", "webdataset", "hf", "imagefolder", "digits")
MODULES = {"parquet": "arrow", "webdataset": "tar", "imagefolder": "folder"}  # of the others: by the format's name
# Formats with columns, and the defaults of an image's and a label's; None: by its extension.
COLUMNS = dict.fromkeys(("parquet", "arrow", "hf"), ("image", "label")) | {"webdataset": (None, "cls")}
REMOTE = ("parquet", "arrow", "webdataset")  # formats that are also read from s3://
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def describe(
    source: str,
    format: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    split: str | None = None,
    config: str | None = None,
    streaming: bool = False,
) -> dict[str, Any]:
    """Settles what a source is: its format, its absolute path or its name, and the columns and split to read."""
    is_remote = source.startswith(SCHEME)
    source = SCHEME + source.removeprefix(SCHEME).rstrip("/") if is_remote else source
    format = format or _infer_format(source)
    path = Path(source)
    if is_remote and format not in REMOTE:
        raise InputError(f"{source}: is read as {format}, expected {', '.join(REMOTE)} for s3://")
    if format == "digits" and source != "digits":
        raise InputError(f"--format digits: got the source {source!r}, expected the word 'digits'")
    if format == "imagefolder" and not path.is_dir():
        raise InputError(f"{source}: no such folder, expected a folder of images")
    if format in REMOTE and not is_remote:
        list_files(source, format)
    if format != "hf" and (split or config):
        raise InputError(f"--split and --config: only for Hugging Face data sets; {source} is read as {format}")
    if format != "hf" and streaming:
        raise InputError(f"--streaming: only for Hugging Face data sets (--format hf); {source} is read as {format}")
    if format not in COLUMNS and (image_column or label_column not in (None, "none")):
        raise InputError(f"{source}: is read as {format}, columns are for tables; only --label-column none applies")

    is_name = is_remote or format == "digits" or (format == "hf" and not path.exists())
    description: dict[str, Any] = {"format": format, "path": source if is_name else os.path.abspath(path)}
    if format in COLUMNS:
        image, label = COLUMNS[format]
        description |= {"image_column": image_column or image, "label_column": label_column or label}
    if label_column == "none":
        description["label_column"] = None
    if format == "hf":
        description |= _describe_hf(source, path, split, config, streaming)
    return description


def _describe_hf(source: str, path: Path, split: str | None, config: str | None, streaming: bool) -> dict[str, Any]:
    """The split, the config and whether to stream, of a Hugging Face data set."""
    if path.exists() and MAGIC.search(os.path.abspath(path)) and not is_saved(str(path)):
        raise InputError(f"{source}: expected a path without *, ? and [, which `datasets` reads as a glob; use a link")
    alone = (path / "state.json").is_file()  # save_to_disk of one Dataset, not of a DatasetDict
    if config and is_saved(str(path)):
        raise InputError(f"{source}: was saved to disk, without configs; leave out --config")
    if alone and split:
        raise InputError(f"{source}: holds one data set without splits; leave out --split")
    if streaming and is_saved(str(path)):
        raise InputError(f"{source}: was saved to disk, and is never read whole; leave out --streaming")
    return {"split": None if alone else split or "train", "config": config} | ({"streaming": True} if streaming else {})


def plan_source(description: dict[str, Any], limit: int | None = None) -> SourcePlan:
    """Reads footers and labels of a source, for the first ``limit`` images; the same plan each time, if the source is
    the same. Raises InputError if the source cannot be read, lacks a column, or has labels that are not classes."""
    plan = _module(description).plan_source(description, limit)
    if description["format"] not in REMOTE:
        return plan
    taken = {file["name"] for file in plan.files}
    return replace(plan, left_out=count_left_out(description["path"], description["format"], taken))


def read_part(description: dict[str, Any], plan: SourcePlan, part: Part) -> Iterator[Sample]:
    """The images of one part of a plan, in order. At most a few rows of a table, or one image, are in memory. Raises
    InputError if the source cannot be read, or a file has changed since the plan was made."""
    rows = 0
    for sample in _module(description).read_part(description, plan, part):
        rows += 1
        yield sample
    if part.rows not in (None, rows):
        file = plan.files[part.file]["name"]
        raise InputError(f"{file}: changed since the conversion began, {part.rows} images then, {rows} now")


def check_part(description: dict[str, Any], plan: SourcePlan, part: Part) -> None:
    """Checks folders of images, after a part's last image, for changes; `read_part` checks other files itself."""
    if description["format"] == "imagefolder":
        _module(description).check_part(description, plan, part)


def _module(description: dict[str, Any]) -> ModuleType:
    """The module of a source's format. It is imported on demand, with the libraries that it needs."""
    format = description["format"]
    if (library := LIBRARIES.get(format)) and library not in sys.modules:
        announce(library)
    return import_module(f"convert.sources.{MODULES.get(format, format)}")


def _infer_format(source: str) -> str:
    if source.startswith(SCHEME):
        return format_of(source) or infer_format(source, object_store().list_remote(source)[0])
    path = Path(source)
    if source == "digits":
        if path.exists():
            raise InputError("digits: is both scikit-learn's digits and a path here; use --format digits, or ./digits")
        return "digits"
    if is_saved(str(path)):
        return "hf"
    if not path.exists() and not glob.has_magic(source):
        if HUB_NAME.fullmatch(source) and format_of(source) is None:
            return "hf"
        raise no_such_file(source)
    if path.is_file() and format_of(source) == "imagefolder":
        raise InputError(f"{source}: is a single image; give the folder that holds one folder per class")
    return infer_format(source, walk(path) if path.is_dir() else [source] if path.is_file() else expand(source))
