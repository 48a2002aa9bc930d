"""Reads sharded checkpoints without running code that might be in them.

The tensors and values are read as those of one file are, and `.metadata`, the places of the tensors, by an unpickler
with a list of its own: torch would allow anything in it. Torch's part takes seconds to import.
"""

import io
import pickle
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from sit_composer.checkpoint.safe_load import METADATA, CheckpointError, load_file

# What some releases of torch keep in a scheduler's state, and others don't: flags that are set during a call alone.
SCHEDULERS_FLAGS = ("._get_lr_called_within_step", "._is_initial")
METADATA_ONLY = {
    (thing.__module__, thing.__qualname__): thing
    for thing in (
        metadata.Metadata, metadata.TensorStorageMetadata, metadata.BytesStorageMetadata, metadata.TensorProperties,
        metadata.ChunkStorageMetadata, metadata.MetadataIndex, metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo, torch.Size, torch.serialization._get_layout, PosixPath,
    )
}  # fmt: skip


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
    """Loads values by the restricted unpickler.

    The state of Composer's callbacks may be missing, not that of ours; and so may what another torch didn't write.
    """

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: metadata.Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        ours = ("state.callbacks.EMAWeights.", "state.callbacks.RunRecord.")
        for name in set(self.state_dict) - set(metadata.state_dict_metadata):
            is_flag = name.startswith("state.schedulers.") and name.endswith(SCHEDULERS_FLAGS)
            if is_flag or (name.startswith("state.callbacks.") and not name.startswith(ours)):
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
