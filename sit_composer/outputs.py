"""The files that commands write: checks before the work, and writing a whole file or nothing."""

import io
import json
import os
import platform
import re
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sit_composer.errors import UserError


def check_output(option: str, path: str | None, suffix: str, *names: str) -> None:
    """Raises UserError if the file of an option, if given, can't be written, or exists and another program wrote it.

    Its name must end in ``suffix``. An existing file is replaced only if it has the keys, arrays or texts ``names``.
    """
    if path is None:
        return
    check_local(option, path)
    file = Path(path)
    if not path.endswith(suffix) or not file.name or file.is_dir():
        raise UserError(f"{option}: got {path}, expected a file name{f' that ends in {suffix}' if suffix else ''}")
    above = next(parent for parent in file.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{option}: {path} can't be written in {above}")
    if file.exists() and not _holds(file, suffix, set(names)):
        raise UserError(f"{option}: {path} exists, and this command didn't write it; delete it, or choose another")


def check_local(option: str, path: str) -> None:
    """Raises UserError for a URI, which would become a folder of that name."""
    if re.match(r"[a-z][a-z\d.-]+:/", path):  # with one /, as in a Path
        raise UserError(f"{option}: got {path}, expected a path on disk; copy the result there afterwards")


def _holds(file: Path, suffix: str, names: set[str]) -> bool:
    """Whether a file is a JSON object with these keys, or an npz with exactly these arrays and perhaps NAME_s."""
    try:
        if suffix == ".json":
            content = json.loads(file.read_text())
            return isinstance(content, dict) and names <= content.keys()
        if suffix == ".html":
            return all(name in file.read_text() for name in names)
        with zipfile.ZipFile(file) as archive:
            return {name.removesuffix(".npy").removesuffix("_s") for name in archive.namelist()} == names
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def write_json(content: dict[str, Any], path: Path) -> None:
    """Writes a JSON object, one line per key."""
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
    write_bytes(f"{{\n{lines}\n}}\n".encode(), path)


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(buffer.getvalue(), path)


def write_bytes(content: bytes, path: Path) -> None:
    """Writes a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


@contextmanager
def mode_of_umask(file: Path) -> Iterator[None]:
    """Gives the file that the body writes the mode of any new file; safetensors makes it readable to its owner only."""
    file.touch()
    mode = file.stat().st_mode
    yield
    file.chmod(mode)


def commit() -> str | None:
    """The commit of this code, with + behind it where files were changed since; None if it isn't a clone of git."""
    clone = Path(__file__).parents[1]
    command = ["git", "-C", str(clone), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        if (clone / ".git").exists():
            return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return None


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of packages, for results."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
