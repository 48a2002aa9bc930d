"""Which weights are in a checkpoint, and what they mean.

A run's checkpoint holds the training weights as Composer's ``state.model``, and their average in the state of the
callback `EMAWeights`; `RunRecord`'s says what network they fit. Weights are asked for by name, "ema" or "training".
"""

import datetime
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sit_composer.errors import UserError
from sit_composer.names import choose

WEIGHTS = ("ema", "training")
PREFIX = "network."  # of ComposerSiT's parameters
# What Composer's checkpoints hold beside tensors and Python's own containers: times, versions, numpy's random state.
CONTAINERS = [
    datetime.timedelta,
    torch.torch_version.TorchVersion,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    np._core.multiarray._reconstruct,
]


class CheckpointError(UserError):
    """Why a checkpoint can't be used."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights with the published names, and what they are."""

    weights: dict[str, Tensor]  # on the CPU
    which: str  # "ema" or "training"
    record: dict[str, Any]  # RunRecord's: model, transport, autoencoder, classes
    step: int  # batches trained
    path: str  # the file that they came from


def load_checkpoint(path: str, weights: str = "ema") -> Checkpoint:
    """Reads the weights of that name from a run's checkpoint file, or from the latest in its folder.

    Nothing in the file is run: it is unpickled as tensors and plain containers only.

    Raises:
        CheckpointError: if it is no checkpoint, or has no such weights.
    """
    choose("weights", weights, WEIGHTS)
    file = Path(path, "latest-rank0.pt") if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise CheckpointError(f"{path}: no checkpoint here{'' if file == Path(path) else f' ({file.name} is missing)'}")
    file = file.resolve() if file.is_symlink() else file  # what is recorded should not be "latest"
    state = _read(file).get("state")
    try:
        callbacks = state["callbacks"]
        record = callbacks["RunRecord"]["record"]
        step = int(state["timestamp"]["Timestamp"]["batch"])
        training = {name.removeprefix(PREFIX): tensor for name, tensor in state["model"].items()}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: not a checkpoint of sit_composer's (it has no {error})") from None
    if weights == "training":
        return Checkpoint(training, weights, record, step, str(file))
    if "EMAWeights" not in callbacks:
        raise CheckpointError(
            f"{file}: no EMA weights, as it was trained with `ema: null`; ask for the training weights"
        )
    average = {name.removeprefix(PREFIX): t for name, t in callbacks["EMAWeights"]["params"].items()}
    return Checkpoint({**training, **average}, weights, record, step, str(file))  # frozen ones are in training alone


def _read(file: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(CONTAINERS):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{file}: not a checkpoint that can be read without running code in it: {reason}"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(f"{file}: not a checkpoint: {str(error).strip().splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a checkpoint of sit_composer's (it holds a {type(content).__name__})")
    return content
