"""What a network is, and what a checkpoint holds of it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sit_composer.autoencoder import AutoencoderSpec
from sit_composer.checkpoint.safe_load import CheckpointError
from sit_composer.sit import SiT
from sit_composer.transport import Transport

WEIGHTS = ("ema", "training")
CONFIG = "config.json"  # an exported folder's record
FORMAT = {"format": "sit_composer", "version": 1}  # of CONFIG
EXPORTED = {"training": "model.safetensors", "ema": "ema.safetensors"}


class NoSuchWeights(CheckpointError):
    """The checkpoint is sound, and holds the other kind of weights only."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights with the published names, and what they are."""

    weights: dict[str, Tensor]  # on the CPU
    which: str  # "ema" or "training"
    record: dict[str, Any]  # RunRecord's: model, transport, autoencoder, classes
    step: int  # batches trained; 0 where the file doesn't tell, as in the released ones
    path: str  # the file that they came from
    epoch: int = 0  # whole epochs trained; 0 where the file doesn't tell
    samples: int = 0  # samples trained on; 0 where the file doesn't tell
    source: str = ""  # where the user has it: the path, or the URI that it was downloaded from


def digest(place: str) -> str:
    """The sha256 of a checkpoint's file; of a sharded one's folder, that of its files' names and sha256s."""
    if not Path(place).is_dir():
        with open(place, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    lines = [f"{file.name} {digest(str(file))}\n" for file in sorted(Path(place).iterdir())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _check_record(file: Path, record: dict[str, Any]) -> None:
    """Checks that the record can be used.

    Raises:
        CheckpointError: naming what in it can't.
    """
    makers = {"model": _without_memory, "transport": Transport, "autoencoder": AutoencoderSpec}
    for name, maker in makers.items():
        try:
            maker(**record[name])
        except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise CheckpointError(f"{file}: {name}: {reason}") from None
    classes, count = record.get("classes"), record["model"]["num_classes"]
    if not isinstance(classes, list) or len(classes) != count:
        raise CheckpointError(f"{file}: classes: it takes {count} names, as many as model.num_classes")


def _check_fit(file: Path, model: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Checks that the network's tensors are there, all of them, in their shapes, and nothing else is."""
    try:
        expected = {name: tuple(tensor.shape) for name, tensor in _without_memory(**model).state_dict().items()}
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{file}: not the weights of a SiT: {error}") from None
    for name in weights.keys() - expected.keys():
        raise CheckpointError(f"{file}: not the weights of a SiT: it has {name}, which a SiT has not")
    for name, shape in expected.items():
        if name not in weights:
            raise CheckpointError(f"{file}: not the weights of a SiT: {name} is missing")
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(f"{file}: {name} is {tuple(weights[name].shape)}; it takes {shape}")


def _without_memory(**model: Any) -> SiT:
    with torch.device("meta"):
        return SiT(**model)


def describe(checkpoint: Any) -> dict[str, Any]:
    """What identifies a checkpoint's weights."""
    return {
        "path": checkpoint.source,
        "step": checkpoint.step,
        "sha256": digest(checkpoint.path),
        "weights": checkpoint.which,
    }
