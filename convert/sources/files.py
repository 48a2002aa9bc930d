"""The files of a source: which they are, and whether they are still the same. Only the standard library is imported."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.sources.names import SCHEME, of_one_split, when
from convert.sources.parts import InputError, no_such_file


def list_files(source: str, format: str) -> list[str]:
    """The files of a format that a path or a glob names, sorted.

    Raises:
        InputError: if there are none, or if they are of several splits.
    """
    if source.startswith(SCHEME):
        from convert.sources import s3 as remote

        return remote.list_files_of(source, format)
    path = Path(source).expanduser()
    if path.is_dir():
        return of_one_split(source, str(path), walk(path), format)
    files = [str(path)] if path.is_file() else expand(source)
    if not files:
        raise no_such_file(source)
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
        from convert.sources import s3 as remote

        return remote.fingerprint(name)
    try:
        state = os.stat(name)
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    return {"name": name, "bytes": state.st_size, "modified": when(state.st_mtime_ns)}
