"""Reads checkpoints without running code that might be in them.

A pickle can call any function. Torch's restricted unpickler makes tensors and the few other types allowed below.
"""

import argparse
import datetime
import io
import re
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors

from sit_composer.errors import UserError, first_line

METADATA = ".metadata"  # of a sharded checkpoint: the places of the tensors
# In checkpoints beside tensors and Python's own containers: times, versions and numpy's random state (Composer), and
# the command line's arguments (the authors). All of these are only data.
DATA_ONLY = [
    argparse.Namespace,
    datetime.timedelta,
    torch.torch_version.TorchVersion,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
]


class CheckpointError(UserError):
    """A checkpoint can't be used."""


def load_file(file: Path | str | io.BytesIO, mmap: bool = True) -> Any:
    """The content of a file that torch.save or safetensors wrote, on the CPU.

    CheckpointError if it is neither, is damaged, or could run code.
    """
    path = None if isinstance(file, io.BytesIO) else Path(file)
    try:
        if path is not None and _is_safetensors(path):
            return load_safetensors(path)
        mmap = mmap and zipfile.is_zipfile(file)  # torch's format before 1.6, which is still read, can't be mapped
        with torch.serialization.safe_globals(DATA_ONLY), warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # the unpickler raises any kind for a damaged file
        raise CheckpointError(f"{path or 'a value'}: {_reason(path, error)}") from None


def _is_safetensors(path: Path) -> bool:
    """Whether a file has safetensors' name, or its head: the length of the JSON that follows."""
    with open(path, "rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _reason(path: Path | None, error: Exception) -> str:
    """Why what should be a checkpoint can't be read, and what to do if something else came in its place."""
    head = b"-"
    with suppress(OSError):
        if path is not None:
            with open(path, "rb") as file:
                head = file.read(200).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"version https://git-lfs"):
        return "not a checkpoint, but a Git LFS pointer to one; fetch it by `git lfs pull`"
    if head.startswith(b"<"):
        return "not a checkpoint, but a web page; download the file itself"
    if not head:
        return "not a checkpoint, but an empty file"
    if code := re.search(r"GLOBAL (\S+)", str(error)):
        return f"not a checkpoint that can be read without running code in it: it asks for {code[1]}"
    if isinstance(error, SafetensorError | FileNotFoundError):
        return f"missing or damaged: {first_line(error)}"
    told = f": {first_line(error)}" if isinstance(error, OSError | RuntimeError) else ""
    told = "" if "weights_only" in told else told  # torch advises to run what is in the file
    return f"not a checkpoint, or a damaged one{told}"
