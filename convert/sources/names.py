"""Formats and splits, as the names of a source's files tell; and the names of classes. Nothing heavy is imported."""

import codecs
import os
import re
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from convert.sources.parts import InputError
from sit_composer.data.folders import suffix_of

SUFFIXES = {
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".feather", ".ipc"),
    "webdataset": (".tar", ".tgz", ".tar.gz"),
}
SCHEME = "s3://"
MAGIC = re.compile(r"[*?[]")  # of a glob
SPLIT = re.compile(r"(?:^split=|/split=|^|[/_.-])(train|test|validation|valid|val|dev)(?=[/_.-])")
COLUMN = re.compile(r"(?<![^/])(?!split=)[^/=]+=[^/]*/")  # a folder that holds a column, as in label=0/
PRIVATE = re.compile(r"(?<![^/])(_[^/=]*/|(_|cache-)[^/]*$)")  # a file or folder of a program, as Delta's _delta_log
WHOLE = re.compile(r"[+-]?\d{1,20}", re.ASCII)


def class_name(name: object) -> str:
    """A class's name, or a label in text, as every source gives it."""
    return str(name).removeprefix("\ufeff").strip()


def numbered_names(names: Iterable[object], where: str) -> list[str]:
    """The names of classes that the source has numbered."""
    found = list(map(class_name, names))
    if "" in found:
        raise InputError(f"{where}: a class has an empty name, expected a name for each")
    if doubled := [name for name, count in Counter(found).items() if count > 1]:
        raise InputError(f"{where}: two classes have the name {doubled[0]!r}, expected different names")
    return found


def class_names(names: Iterable[str], where: str) -> list[str]:
    """The names of classes in the order of their labels: sorted, or by size if all are whole numbers."""
    found = numbered_names(names, where)
    if not all(map(WHOLE.fullmatch, found)):
        return sorted(found)
    ordered = sorted(found, key=lambda name: (int(name), name))
    if ordered and int(ordered[0]) < 0:
        raise InputError(f"{where}: label {ordered[0]} is not a class, expected whole numbers from 0, or names")
    return ordered


def label_text(data: bytes, where: str) -> str:
    """The label in a text file, or its text."""
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return class_name(data.decode("utf-16" if utf16 else "utf-8"))
    except UnicodeDecodeError:
        raise InputError(f"{where}: got {data[:20]!r}, expected text in UTF-8") from None


def format_of(name: str) -> str | None:
    """The format of a file, by its name."""
    file = os.path.basename(name).lower().lstrip(".")  # a name that is a suffix alone has none
    found = next((format for format, suffixes in SUFFIXES.items() if file.endswith(suffixes)), None)
    if found or "." not in file:
        return found
    from sit_composer.data.image_files import suffixes  # loads Pillow, which other names don't need

    return "imagefolder" if suffix_of(file) in suffixes() else None


def infer_format(source: str, names: Iterable[str]) -> str:
    """The one format of a source's files, by their names. Raises InputError if there is none, or more than one."""
    names = list(names)
    found = Counter(format for name in names if (format := format_of(name)))
    if not found and not source.startswith(SCHEME):
        from sit_composer.data.image_files import is_image  # loads Pillow, which other names don't need

        found.update("imagefolder" for name in names if is_image(name))
    if not found:
        raise InputError(f"{source}: found no Parquet file, Arrow file, tar or image")
    if len(found) > 1:
        these = " and ".join(f"{name} ({count} files)" for name, count in sorted(found.items()))
        raise InputError(f"{source}: could be {these}; choose with --format")
    return next(iter(found))


def of_one_split(source: str, folder: str, names: Iterable[str], format: str) -> list[str]:
    """The files of a folder that are data of a format, sorted. Raises InputError unless they are of one split."""
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
