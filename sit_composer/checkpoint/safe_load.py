"""Reads checkpoints without running code that might be in them.

A pickle can call any function. Torch's restricted unpickler makes tensors and the few other types allowed below.
"""

import argparse
import datetime
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
    """The content of a file that torch.save wrote, on the CPU; CheckpointError if it is none, or could run code."""
    name = "a value" if isinstance(file, io.BytesIO) else file
    try:
        with torch.serialization.safe_globals(DATA_ONLY):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        reason = "not a checkpoint that can be read without running code in it"
        raise CheckpointError(f"{name}: {reason}: {first_line(error)}") from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(f"{name}: not a checkpoint: {first_line(error)}") from None
