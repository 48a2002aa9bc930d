"""The files of a source: which they are, and whether they are still the same. Only the standard library is imported."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from parts import InputError, no_such_file

SUFFIXES = dict.fromkeys((".parquet", ".pq"), "parquet")
SUFFIXES |= dict.fromkeys((".arrow", ".feather", ".ipc"), "arrow")
SUFFIXES |= dict.fromkeys((".tar", ".tgz", ".tar.gz"), "webdataset")
SUFFIXES |= dict.fromkeys(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"), "imagefolder"
)
SCHEME = "s3://"
MAGIC = re.compile(r"[*?[]")  # of a glob
SPLIT = re.compile(r"(?:^|[/_.-])(train|test|validation|valid|val|dev)(?=[/_.-])")


def format_of(name: str) -> str | None:
    """The format that a file's name stands for."""
    name = name.lower()
    return SUFFIXES.get(os.path.splitext(name)[1]) or ("webdataset" if name.endswith(".tar.gz") else None)


def infer_format(source: str, names: Iterable[str]) -> str:
    """The one format of a source's files, by their names.

    Raises:
        InputError: if there is none, or more than one.
    """
    found = Counter(format for name in names if (format := format_of(name)))
    if not found:
        raise InputError(f"{source}: found no Parquet file, Arrow file, tar or picture")
    if len(found) > 1:
        these = " and ".join(f"{name} ({count} files)" for name, count in sorted(found.items()))
        raise InputError(f"{source} could be {these}: say which with --format")
    return next(iter(found))


def list_files(source: str, format: str) -> list[str]:
    """The files of a format that a path or a glob names, sorted.

    Raises:
        InputError: if there are none, or if they are of several splits.
    """
    if source.startswith(SCHEME):
        import remote

        return remote.list_files_of(source, format)
    path = Path(source).expanduser()
    if path.is_dir():
        return of_one_split(source, str(path), walk(path), format)
    files = [str(path)] if path.is_file() else expand(source)
    if not files:
        raise no_such_file(source)
    return files


def of_one_split(source: str, folder: str, names: Iterable[str], format: str) -> list[str]:
    """Those of a folder's files that are data of a format.

    Raises:
        InputError: if there are none, or if they are of several splits.
    """
    # cache-*.arrow are what `datasets` leaves of transformed copies beside the data that it saved.
    files = sorted((name for name in names if format_of(name) == format), key=lambda name: name.split("/"))
    files = [name for name in files if not os.path.basename(name).startswith(("_", "cache-"))]
    if not files:
        raise InputError(f"{source} holds no {format} file")
    splits = {match[1] for name in files if (match := SPLIT.search(name.removeprefix(folder).lstrip("/")))}
    if len(splits) > 1:
        these = ", ".join(sorted(splits))
        raise InputError(
            f"{source} holds files of several splits ({these}): give a glob such as '{source}/**/train*', or say "
            "--format hf and --split"
        )
    return files


def walk(folder: Path) -> Iterator[str]:
    """All files below a folder, in any order, but for hidden ones."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(root, name) for name in names if not name.startswith("."))


def expand(pattern: str) -> list[str]:
    """The files that a glob matches, sorted."""
    found = map(Path, glob.glob(os.path.expanduser(pattern), recursive=True))
    return [str(file) for file in sorted({file for file in found if file.is_file()})]


def fingerprint(name: str) -> dict[str, Any]:
    """A file's name, its bytes, and when it was modified.

    Raises:
        InputError: if it is not there.
    """
    if name.startswith(SCHEME):
        import remote

        return remote.fingerprint(name)
    try:
        state = os.stat(name)
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    return {"name": name, "bytes": state.st_size, "modified": when(state.st_mtime_ns)}


def when(nanoseconds: int) -> str:
    """A time since 1970 in ISO 8601, UTC, to the microsecond."""
    return datetime.fromtimestamp(nanoseconds // 1000 / 1_000_000, UTC).isoformat(timespec="microseconds")


def check_same(planned: dict[str, Any], now: dict[str, Any]) -> None:
    """Compares a file with what it was when the conversion was planned.

    Raises:
        InputError: naming the file, if it has changed.
    """
    if now != planned:
        key = next(key for key in {**planned, **now} if planned.get(key) != now.get(key))
        change = f"{key}: {planned.get(key)} then, {now.get(key)} now"
        raise InputError(
            f"{planned['name']} changed since the conversion began ({change}): put it back, or convert it anew"
        )
