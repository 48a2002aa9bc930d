"""Which weights are in a checkpoint, and what they mean.

Three kinds are read, all without running code that might be in them:

- A run's. Composer's ``state.model`` holds the training weights, the state of the callback `EMAWeights` their average,
  and `RunRecord`'s says what network they fit.
- The authors' ``.pt``, as released or as their ``train.py`` writes it. The network is told from the tensors' shapes.
- A folder that `sit_composer.export` wrote: safetensors, and the record as ``config.json``.

Weights are asked for by name, "ema" or "training".
"""

import atexit
import json
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors

from sit_composer.checkpoint.folder import CHECKPOINT, fetch_checkpoint, newest
from sit_composer.checkpoint.record import (
    CONFIG,
    EXPORTED,
    FORMAT,
    WEIGHTS,
    Checkpoint,
    NoSuchWeights,
    _check_fit,
    _check_record,
)
from sit_composer.checkpoint.released import _are_weights, _from_authors
from sit_composer.checkpoint.safe_load import METADATA, CheckpointError, load_file, load_sharded
from sit_composer.choices import choose
from sit_composer.sit import SiT
from sit_composer.storage import LocalFolder, S3Folder

PREFIX = "network."  # of ComposerSiT's parameters


def load_checkpoint(path: str, weights: str = "ema") -> Checkpoint:
    """Reads the weights of that name.

    Args:
        path: a run's folder (its newest checkpoint) or one checkpoint, a file or a folder of shards; the authors'
            ``.pt``; an exported folder; each on disk or in S3.
        weights: "ema" or "training".

    Raises:
        NoSuchWeights: if it has only the others.
        CheckpointError: if it is no checkpoint, is damaged, or holds values that aren't finite.
    """
    choose("weights", weights, WEIGHTS)
    place = find_checkpoint(path)
    if _is_sharded(place):
        checkpoint = _from_run(place, _read_run(place, weights), weights)
    elif place.is_dir():
        checkpoint = _from_export(place, weights)
    else:
        content = _read(place)
        if "state" not in content and any(_are_weights(c) for c in (content, content.get("model"), content.get("ema"))):
            checkpoint = _from_authors(place, content, weights)
        else:
            checkpoint = _from_run(place, content, weights)
    for name, tensor in checkpoint.weights.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{checkpoint.path}: {name} has values that are NaN or infinite; take a checkpoint from before that"
            )
    return replace(checkpoint, source=path if "://" in path else checkpoint.path)


def find_checkpoint(path: str) -> Path:
    """What is read for a path: a file, the folder of a sharded checkpoint, or an exported folder.

    Of a run's folder it is the newest complete checkpoint. What is in object storage is downloaded to a temporary
    folder, which goes with the process.

    Raises:
        CheckpointError: if there is nothing, or nothing that can be read.
    """
    if path.startswith("s3://"):
        return _download(path)
    if "://" in path:
        raise CheckpointError(f"{path}: checkpoints are read from local paths and s3://; download it first")
    place = Path(path)
    if not place.exists():
        raise CheckpointError(f"{path}: no checkpoint here")
    if place.is_dir() and not (place / CONFIG).is_file() and not _is_sharded(place):
        name = newest(LocalFolder(path))
        if name is None:
            raise CheckpointError(f"{path}: no complete checkpoint here")
        return place / name
    place = place.resolve() if place.is_symlink() else place  # never by the name of "latest", which may move on
    if place.name in ("ema.pt", *EXPORTED.values()) and (place.parent / CONFIG).is_file():
        raise CheckpointError(f"{place}: part of an exported folder; give the folder, whose {CONFIG} belongs to it")
    return place


def _download(uri: str) -> Path:
    """Downloads a run's newest checkpoint, one of its checkpoints, an exported folder or a .pt file from S3."""
    parent, _, last = uri.rstrip("/").rpartition("/")
    place = Path(tempfile.mkdtemp(prefix="sit_composer-checkpoint-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    if CHECKPOINT.fullmatch(last):
        fetch_checkpoint(S3Folder(parent), last, place)
        return place / last
    if last.endswith(".pt"):
        S3Folder(parent).download(last, place / last)
        return place / last
    folder = S3Folder(uri)
    exported = [name for name in folder.listing() if name in (CONFIG, *EXPORTED.values())]
    if CONFIG in exported:
        for name in exported:
            folder.download(name, place / name)
        return place
    name = newest(folder)
    if name is None:
        raise CheckpointError(f"{uri}: no complete checkpoint here")
    fetch_checkpoint(folder, name, place)
    return place / name


def fetch(folder_or_hub_id: str) -> str:
    """The path itself if something is there, or else that of a snapshot of the Hugging Face Hub's model of that name.

    Raises:
        CheckpointError: if there is none of that name, or the Hub can't be reached.
    """
    if Path(folder_or_hub_id).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", folder_or_hub_id):
        return folder_or_hub_id
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(folder_or_hub_id, allow_patterns=[CONFIG, *EXPORTED.values()])
    except Exception as error:  # huggingface_hub's, its HTTP client's or the system's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder_or_hub_id}: no such folder, and not from the Hub either: {reason}") from error


def _from_run(file: Path, content: dict[str, Any], which: str) -> Checkpoint:
    state = content.get("state", {})
    try:
        callbacks = state["callbacks"]
        record = json.loads(callbacks["RunRecord"]["record"])
        time = state["timestamp"]["Timestamp"]
        step, epoch, samples = int(time["batch"]), int(time["epoch"]), int(time["sample"])
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in state["model"].items()}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a checkpoint of sit_composer's (it has no {error})") from None
    if which == "ema":
        if "EMAWeights" not in callbacks:
            raise NoSuchWeights(
                f"{file}: no EMA weights, as it was trained with `ema: null`; ask for the training weights"
            )
        average = {name.removeprefix(PREFIX): t for name, t in callbacks["EMAWeights"]["params"].items()}
        weights = {**weights, **average}  # frozen ones are in training alone
    return Checkpoint(weights, which, record, step, str(file), epoch, samples)


def _read(file: Path) -> dict[str, Any]:
    content = load_file(file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a checkpoint of sit_composer's (it holds a {type(content).__name__})")
    return content


def _read_run(folder: Path, which: str) -> dict[str, Any]:
    """What `_from_run` needs of a sharded checkpoint, as a file would have it."""
    places = {
        "state.model.": ("model",),
        "state.timestamp.Timestamp.": ("timestamp", "Timestamp"),
        "state.callbacks.RunRecord.": ("callbacks", "RunRecord"),
    }
    if which == "ema":
        places["state.callbacks.EMAWeights.params."] = ("callbacks", "EMAWeights", "params")
    state: dict[str, Any] = {}
    for name, value in load_sharded(folder, lambda name: name.startswith(tuple(places))).items():
        prefix = next(prefix for prefix in places if name.startswith(prefix))
        level = state
        for step in places[prefix]:
            level = level.setdefault(step, {})
        level[name.removeprefix(prefix)] = value
    return {"state": state}


def _is_sharded(path: Path) -> bool:
    return path.is_dir() and ((path / METADATA).exists() or any(path.glob("*.distcp")))


def _from_export(folder: Path, which: str) -> Checkpoint:
    config = folder / CONFIG
    try:
        record = json.loads(config.read_text("utf-8"))
        found = {name: record.pop(name, None) for name in FORMAT}
        if found["format"] != FORMAT["format"]:
            raise ValueError("sit_composer.export didn't write it")
        if found != FORMAT:
            raise ValueError(f"of version {found['version']}; this program reads version {FORMAT['version']}")
        files, trained = record.pop("weights"), record.pop("trained")
        step, epoch, samples = (int(trained[name]) for name in ("step", "epoch", "samples"))
        if which not in files:
            raise NoSuchWeights(f"{folder}: no {which} weights; ask for the {', '.join(files)} ones")
        if files[which] not in EXPORTED.values():  # nothing outside of the folder, and nothing pickled
            raise ValueError(f"{which} weights in {files[which]!r}; they are in {' or '.join(EXPORTED.values())}")
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{config}: not an export's: {error}") from None
    _check_record(config, record)
    file = folder / files[which]
    try:
        weights = load_safetensors(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: missing or damaged: {str(error).splitlines()[0]}") from None
    _check_fit(file, record["model"], weights)
    return Checkpoint(weights, which, record, step, str(file), epoch, samples)


def build_network(checkpoint: Any, device: str) -> Any:
    """The network that a checkpoint's weights fit, ready to be evaluated."""

    network = SiT(**checkpoint.record["model"])
    network.load_state_dict(checkpoint.weights)
    return network.to(device).eval().requires_grad_(False)
