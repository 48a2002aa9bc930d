"""The files of a source: their names, and their state. For local files only the standard library is imported."""

import glob
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from convert.sources.names import PRIVATE, SCHEME, check_same, of_one_split, when
from convert.sources.parts import InputError, no_such_file
from sit_composer.data.folders import below, kind_of


def object_store() -> ModuleType:
    """The module that reads s3:// sources."""
    from convert.sources import s3  # pyarrow, which a local source may not need

    return s3


def list_files(source: str, format: str) -> list[str]:
    """The files of a format that a path or a glob names, sorted; all of one split."""
    if source.startswith(SCHEME):
        found, is_folder = object_store().list_remote(source)
        if not found:
            raise InputError(f"{source}: no such object, and none below it")
        return of_one_split(source, source, found, format) if is_folder else found
    path = Path(source)
    if path.is_dir():
        return of_one_split(source, str(path), walk(path), format)
    files = [str(path)] if path.is_file() else expand(source)
    if not files:
        raise no_such_file(source)
    return files


def walk(folder: Path, left_out: Counter[str] | None = None) -> Iterator[str]:
    """All files below a folder, also by links, in any order, without hidden ones."""
    for _, files in below(str(folder), Counter() if left_out is None else left_out):
        yield from (file.path for file in files)


def count_left_out(source: str, format: str, taken: Collection[str]) -> Counter[str]:
    """The files below a folder, local or remote, that are not among those taken, by reason."""
    left_out: Counter[str] = Counter()
    if source.startswith(SCHEME):
        found, is_folder = object_store().list_remote(source)
        names: Iterable[str] = found if is_folder else ()
    else:
        names = walk(Path(source), left_out) if os.path.isdir(source) else ()
    for name in names:
        if name not in taken:
            private = PRIVATE.search(name.removeprefix(source).lstrip("/"))
            left_out["private, a name begins with _ or cache-" if private else f"not {format} ({kind_of(name)})"] += 1
    return left_out


def expand(pattern: str) -> list[str]:
    """The files that a glob matches, sorted. Its first folders, if they exist, are meant as they are spelled."""
    path = Path(pattern)
    folder = next(parent for parent in path.parents if parent.exists())
    found = map(Path, glob.glob(os.path.join(glob.escape(str(folder)), path.relative_to(folder)), recursive=True))
    return [str(file) for file in sorted({file for file in found if file.is_file()})]


def check_unchanged(file: dict[str, Any]) -> None:
    """Raises InputError if a plan's file has changed."""
    check_same(file, fingerprint(file["name"]))


def is_saved(path: str) -> bool:
    """Whether it is a folder that `datasets` saved."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


def fingerprint(name: str) -> dict[str, Any]:
    """A file's name, its bytes, and when it was modified."""
    if name.startswith(SCHEME):
        return object_store().fingerprint(name)
    try:
        state = os.stat(name)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from error
    return {"name": name, "bytes": state.st_size, "modified": when(state.st_mtime_ns)}
