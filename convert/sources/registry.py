"""Finds out what SOURCE is, and yields its pictures with their labels, always in the same order.

`describe` settles the format from names alone, and for what is local it needs only the standard library, so that a
mistyped command fails at once. `plan_source` reads footers and labels, and divides the source into parts; `read_part`
reads one of them, in this process or on another machine. Each kind of source has a module with a function for each.
"""

import glob
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from convert.sources.files import expand, list_files, walk
from convert.sources.names import SCHEME, format_of, infer_format
from convert.sources.parts import InputError, Part, Sample, SourcePlan, no_such_file

FORMATS = ("parquet", "arrow", "webdataset", "hf", "imagefolder", "digits")
TABLES = ("parquet", "arrow", "hf")  # those with columns
REMOTE = ("parquet", "arrow", "webdataset")  # those that are read from s3://, too
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
    """Settles what a source is: its format, its absolute path or its name, and the columns and split to take.

    Raises:
        InputError: if there is no such source, its format is in doubt, or an option does not apply to it.
    """
    is_remote = source.startswith(SCHEME)
    source = SCHEME + source.removeprefix(SCHEME).rstrip("/") if is_remote else source
    format = format or (_infer_remote_format(source) if is_remote else _infer_format(source))
    path = Path(source).expanduser()
    if is_remote and format not in REMOTE:
        raise InputError(f"{source} is taken as {format}, which is not read from s3://, only {', '.join(REMOTE)} are")
    if format == "digits" and source != "digits":
        raise InputError(f"--format digits takes the word 'digits' as its source, not {source!r}")
    if format == "imagefolder" and not path.is_dir():
        raise InputError(f"{source} is not a folder of pictures: no such folder")
    if format in REMOTE and not is_remote:
        list_files(source, format)
    if format != "hf" and (split or config):
        raise InputError(f"--split and --config are for Hugging Face data sets; {source} is taken as {format}")
    if format != "hf" and streaming:
        raise InputError(f"--streaming is for Hugging Face data sets (--format hf); {source} is taken as {format}")
    if format not in (*TABLES, "webdataset") and (image_column or label_column not in (None, "none")):
        raise InputError(f"columns are for tables; {source} is taken as {format}, whose only choice is no labels")

    is_name = is_remote or format == "digits" or (format == "hf" and not path.exists())
    name = source if is_name else os.path.abspath(path)
    description: dict[str, Any] = {"format": format, "path": name}
    if format in TABLES:
        description["image_column"] = image_column or "image"
        description["label_column"] = label_column or "label"
    if format == "webdataset":  # None: by its extension
        description |= {"image_column": image_column, "label_column": label_column or "cls"}
    if label_column == "none":
        description["label_column"] = None
    if format == "hf":
        alone = (path / "state.json").is_file()  # save_to_disk of one Dataset, not of a DatasetDict
        if config and (alone or (path / "dataset_dict.json").is_file()):
            raise InputError(f"{source} is saved on a disk, without configs: leave out --config")
        if alone and split:
            raise InputError(f"{source} holds one data set without splits: leave out --split")
        if streaming and (alone or (path / "dataset_dict.json").is_file()):
            raise InputError(f"{source} is saved on a disk, and never read whole: leave out --streaming")
        description |= {"split": None if alone else split or "train", "config": config}
        description |= {"streaming": True} if streaming else {}
    return description


def plan_source(description: dict[str, Any], limit: int | None = None) -> SourcePlan:
    """Reads footers and labels of what `describe` found; the same plan each time, if the source is the same.

    Args:
        description: what `describe` returned.
        limit: the parts are those of the first so many pictures only.

    Raises:
        InputError: if it cannot be read, lacks a column, or has labels that are not classes.
    """
    return _module(description, "plan")(description, limit)


def read_part(description: dict[str, Any], plan: SourcePlan, part: Part) -> Iterator[Sample]:
    """The pictures of one part of a plan, in order. Nothing is kept between calls but what is read from.

    No more is in memory than a few rows of a table (of a Parquet file: a page of each column), or one picture.

    Raises:
        InputError: if it cannot be read, or a file has changed since the plan was made.
    """
    rows = 0
    for sample in _module(description, "read")(description, plan, part):
        rows += 1
        yield sample
    if part.rows not in (None, rows):
        file = plan.files[part.file]["name"]
        raise InputError(f"{file} changed since the conversion began: {part.rows} pictures then, {rows} now")


def check_part(description: dict[str, Any], plan: SourcePlan, part: Part) -> None:
    """Sees, behind a part's last picture, that none of them has changed since the plan was made.

    Only pictures in folders can have: the others were looked at when the last was read.

    Raises:
        InputError: if one has.
    """
    if description["format"] == "imagefolder":
        from convert.sources import folder as folder_source

        folder_source.check_folder(description, plan, part)


def _module(description: dict[str, Any], verb: str) -> Callable[..., Any]:
    """The function of a format's module; only then is the module imported, and what it imports."""
    format = description["format"]
    if format in ("parquet", "arrow"):
        from convert.sources import arrow as arrow_source

        return {"plan": arrow_source.plan_tables, "read": arrow_source.read_tables}[verb]
    if format == "webdataset":
        from convert.sources import tar as tar_source

        return {"plan": tar_source.plan_tars, "read": tar_source.read_tars}[verb]
    if format == "hf":
        from convert.sources import hf as hf_source

        return {"plan": hf_source.plan_data_set, "read": hf_source.read_data_set}[verb]
    if format == "digits":
        from convert.sources import digits

        return {"plan": digits.plan_digits, "read": digits.read_digits}[verb]
    from convert.sources import folder as folder_source

    return {"plan": folder_source.plan_folder, "read": folder_source.read_folder}[verb]


def _infer_remote_format(source: str) -> str:
    if format := format_of(source):
        return format
    from convert.sources import s3 as remote

    return infer_format(source, remote.list_remote(source))


def _infer_format(source: str) -> str:
    path = Path(source).expanduser()
    if source == "digits":
        if path.exists():
            raise InputError("'digits' is both scikit-learn's digits and a path here: say --format digits, or ./digits")
        return "digits"
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return "hf"  # `datasets` saved it
    if not path.exists() and not glob.has_magic(source):
        if HUB_NAME.fullmatch(source) and format_of(source) is None:
            return "hf"
        raise no_such_file(source)
    if path.is_file() and format_of(source) == "imagefolder":
        raise InputError(f"{source} is a single picture: give the folder that holds a folder for each class")
    return infer_format(source, walk(path) if path.is_dir() else [source] if path.is_file() else expand(source))
