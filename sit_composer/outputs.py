"""Whether a command may write a file: known before its work, and not after it; and never over what isn't its own."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sit_composer.errors import UserError


def check_output(option: str, path: str | None, suffix: str, is_own: Callable[[Path], bool]) -> None:
    """Checks that an option's file, if it is given, can be written.

    Args:
        option: its name, as on the command line.
        path: what it got.
        suffix: of the file's name; "" for any.
        is_own: tells of a file that is there already whether such a command made it; it is replaced then.

    Raises:
        UserError: if it can't, or is somebody else's.
    """
    if path is None:
        return
    file = Path(path)
    if not path.endswith(suffix) or not file.name or file.is_dir():
        ending = f" that ends in {suffix}" if suffix else ""
        raise UserError(f"{option}: got {path}; it takes a file's name{ending}")
    above = next(parent for parent in file.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{option}: {path} can't be written in {above}")
    if file.exists() and not is_own(file):
        raise UserError(f"{option}: {path} is there, and not what this command writes; delete it, or choose another")


def holds_key(key: str) -> Callable[[Path], bool]:
    """Tells whether a file is a JSON object with that key."""

    def look(file: Path) -> bool:
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError):
            return False
        return isinstance(content, dict) and key in content

    return look


def holds_arrays(*names: str) -> Callable[[Path], bool]:
    """Tells whether a file is an npz of arrays of those names, and of no others; NAME_s may lie beside NAME."""

    def look(file: Path) -> bool:
        try:
            with zipfile.ZipFile(file) as archive:
                held = {name.removesuffix(".npy") for name in archive.namelist()}
        except (OSError, zipfile.BadZipFile):
            return False
        return {name.removesuffix("_s") for name in held} == set(names)

    return look


def write_json(content: dict[str, Any], path: Path) -> None:
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
    _write(path, f"{{\n{lines}\n}}\n".encode())


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes an npz, all of it or nothing."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    _write(path, buffer.getvalue())


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
