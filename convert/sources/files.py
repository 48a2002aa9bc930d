"""The files of a source: their names, and their state. For local files only the standard library is imported."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from convert.sources.names import SCHEME, check_same, of_one_split, when
from convert.sources.parts import InputError, no_such_file


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
    path = Path(source).expanduser()
    if path.is_dir():
        return of_one_split(source, str(path), walk(path), format)
    files = [str(path)] if path.is_file() else expand(source)
    if not files:
        raise no_such_file(source)
    return files


def walk(folder: Path) -> Iterator[str]:
    """All files below a folder, in any order, without hidden ones."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(root, name) for name in names if not name.startswith("."))


def expand(pattern: str) -> list[str]:
    """The files that a glob matches, sorted. Its first folders, if they exist, are meant as they are spelled."""
    path = Path(pattern).expanduser()
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
