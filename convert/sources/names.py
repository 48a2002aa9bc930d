"""Formats and splits, as the names of a source's files tell. Only the standard library is imported."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from convert.sources.parts import InputError

SUFFIXES = {
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".feather", ".ipc"),
    "webdataset": (".tar", ".tgz", ".tar.gz"),
    "imagefolder": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
}
SCHEME = "s3://"
MAGIC = re.compile(r"[*?[]")  # of a glob
SPLIT = re.compile(r"(?:^split=|/split=|^|[/_.-])(train|test|validation|valid|val|dev)(?=[/_.-])")
COLUMN = re.compile(r"(?<![^/])(?!split=)[^/=]+=[^/]*/")  # a folder that holds a column, as in label=0/
PRIVATE = re.compile(r"(?<![^/])(_[^/=]*/|(_|cache-)[^/]*$)")  # a file or folder of a program, as Delta's _delta_log


def format_of(name: str) -> str | None:
    """The format of a file, by its name."""
    file = os.path.basename(name).lower().lstrip(".")  # a name that is a suffix alone has none
    return next((format for format, suffixes in SUFFIXES.items() if file.endswith(suffixes)), None)


def infer_format(source: str, names: Iterable[str]) -> str:
    """The one format of a source's files, by their names. Raises InputError if there is none, or more than one."""
    found = Counter(format for name in names if (format := format_of(name)))
    if not found:
        raise InputError(f"{source}: found no Parquet file, Arrow file, tar or image")
    if len(found) > 1:
        these = " and ".join(f"{name} ({count} files)" for name, count in sorted(found.items()))
        raise InputError(f"{source}: could be {these}; choose with --format")
    return next(iter(found))


def of_one_split(source: str, folder: str, names: Iterable[str], format: str) -> list[str]:
    """The files of a folder that are data of a format, sorted. Raises InputError unless they are of one split."""
    # cache-*.arrow are transformed copies that `datasets` leaves beside the data that it saved.
    files = sorted((name for name in names if format_of(name) == format), key=lambda name: name.split("/"))
    inside = {name: name.removeprefix(folder).lstrip("/") for name in files}
    files = [name for name in files if not PRIVATE.search(inside[name])]
    if not files:
        raise InputError(f"{source}: holds no {format} file")
    splits = {match[1] for name in files if (match := SPLIT.search(COLUMN.sub("", inside[name])))}
    if len(splits) > 1:
        these = ", ".join(sorted(splits))
        advice = f"give a glob such as '{source}/**/train*', or --format hf and --split"
        raise InputError(f"{source}: holds files of several splits ({these}); {advice}")
    return files


def when(nanoseconds: int) -> str:
    """A time since 1970 in ISO 8601, UTC, to the microsecond."""
    return datetime.fromtimestamp(nanoseconds // 1000 / 1_000_000, UTC).isoformat(timespec="microseconds")


def check_same(planned: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises InputError naming a file, if it has changed since the conversion was planned."""
    if now != planned:
        key = next(key for key in {**planned, **now} if planned.get(key) != now.get(key))
        change = f"changed since the conversion began ({key}: {planned.get(key)} then, {now.get(key)} now)"
        raise InputError(f"{planned['name']}: {change}; restore it, or --overwrite")
