"""Reads checkpoints without running code that might be in them.

A pickle can call any function. A checkpoint of one file is read by torch's restricted unpickler, which makes tensors
and the few other types that are allowed below. The tensors and values of a sharded one are read in the same way, and
its `.metadata`, the places of the tensors, by an unpickler with a list of its own: torch would allow anything in it.
"""

import argparse
import datetime
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

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
METADATA_ONLY = {
    (thing.__module__, thing.__qualname__): thing
    for thing in (
        metadata.Metadata, metadata.TensorStorageMetadata, metadata.BytesStorageMetadata, metadata.TensorProperties,
        metadata.ChunkStorageMetadata, metadata.MetadataIndex, metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo, torch.Size, torch.serialization._get_layout, PosixPath,
    )
}  # fmt: skip


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
    return f"not a checkpoint, or a damaged one{told}"


class MetadataUnpickler(pickle.Unpickler):
    """Makes the objects of a sharded checkpoint's `.metadata`, and refuses others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in METADATA_ONLY:
            return METADATA_ONLY[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_metadata(content: bytes, where: str) -> metadata.Metadata:
    """The `.metadata` of a sharded checkpoint; CheckpointError if damaged, or with code or files outside its folder."""
    try:
        found = MetadataUnpickler(io.BytesIO(content)).load()
        names = {info.relative_path for info in found.storage_data.values()}
    except Exception as error:  # pickle raises any kind for a damaged file
        raise CheckpointError(f"{where}: not a sharded checkpoint's metadata: {error}") from None
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{where}: names {name!r}, a file outside the checkpoint's folder")
    return found


def sharded_files(found: metadata.Metadata) -> dict[str, int]:
    """The files that a sharded checkpoint must have, and the least size of each in bytes."""
    sizes: dict[str, int] = {}
    for info in found.storage_data.values():
        sizes[info.relative_path] = max(sizes.get(info.relative_path, 0), info.offset + info.length)
    return sizes


class SafeReader(dcp.FileSystemReader):
    """Reads a sharded checkpoint's folder."""

    def read_metadata(self) -> metadata.Metadata:
        file = Path(self.path) / METADATA
        found = load_metadata(file.read_bytes(), str(file))
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class SafePlanner(DefaultLoadPlanner):
    """Loads values by the restricted unpickler. The state of Composer's callbacks may be missing, not that of ours."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: metadata.Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        ours = ("state.callbacks.EMAWeights.", "state.callbacks.RunRecord.")
        for name in set(self.state_dict) - set(metadata.state_dict_metadata):
            if name.startswith("state.callbacks.") and not name.startswith(ours):
                del self.state_dict[name]

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        set_element(self.original_state_dict, self.mappings[name], load_file(value, mmap=False))


def load_sharded(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Any]:
    """The wanted entries of a sharded checkpoint, on the CPU, by their full names; CheckpointError if it is damaged."""
    reader, content = SafeReader(folder), {}
    try:
        for name, entry in reader.read_metadata().state_dict_metadata.items():
            if wanted(name):
                is_tensor = isinstance(entry, metadata.TensorStorageMetadata)
                content[name] = torch.empty(entry.size, dtype=entry.properties.dtype) if is_tensor else None
        dcp.load(content, storage_reader=reader, planner=SafePlanner(), no_dist=True)
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:  # torch has its own kinds for damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise CheckpointError(f"{folder}: missing or damaged: {reason}") from None
    return content
