"""Which weights are in a checkpoint, and what they mean.

Three kinds are read, all without running code that might be in them:

- A run's. Composer's ``state.model`` holds the training weights, the state of the callback `EMAWeights` their average,
  and `RunRecord`'s says what network they fit.
- The authors' ``.pt``, as released or as their ``train.py`` writes it. The network is told from the tensors' shapes.
- A folder that `sit_composer.export` wrote: safetensors, and the record as ``config.json``.

Weights are asked for by name, "ema" or "training".
"""

import argparse
import atexit
import hashlib
import json
import math
import re
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from torch import Tensor

from sit_composer.autoencoder import AutoencoderSpec
from sit_composer.names import SIZES, choose
from sit_composer.run_folder import CHECKPOINT, METADATA, fetch_checkpoint, newest
from sit_composer.safe_load import CheckpointError, load_file, load_sharded
from sit_composer.sit import SiT
from sit_composer.storage import LocalFolder, S3Folder
from sit_composer.transport import Transport

WEIGHTS = ("ema", "training")
PREFIX = "network."  # of ComposerSiT's parameters
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


def digest(place: str) -> str:
    """The sha256 of a checkpoint's file; of a sharded one's folder, that of its files' names and sha256s."""
    if not Path(place).is_dir():
        with open(place, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    lines = [f"{file.name} {digest(str(file))}\n" for file in sorted(Path(place).iterdir())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# --- A run's ---


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


# --- The authors' ---


def _are_weights(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("x_embedder.proj.weight"), Tensor)


def _from_authors(file: Path, content: dict[str, Any], which: str) -> Checkpoint:
    """A bare state dict, which is the average, or a dict of model, ema, opt and args.

    A bare one doesn't tell its path and prediction: they are taken for the released ones', Linear and velocity.
    """
    held = {"ema": content} if _are_weights(content) else {"training": content.get("model"), "ema": content.get("ema")}
    weights = held.get(which)
    if not _are_weights(weights):
        other = next(name for name in held if name != which)
        raise NoSuchWeights(f"{file}: no {which} weights, only the {other} ones; ask for those")
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    model = _network_of(file, weights, args)
    _check_fit(file, model, weights)
    if model["in_channels"] != 4:
        raise CheckpointError(
            f"{file}: of {model['in_channels']} channels, where the authors' autoencoder has 4; if sit_composer "
            "exported it, give the exported folder"
        )
    names = ("path_type", "prediction", "loss_weight", "train_eps", "sample_eps")
    transport = {"path_type": "Linear", "prediction": "velocity", "loss_weight": None, "train_eps": None}
    transport = {**transport, "sample_eps": None, **{name: args[name] for name in names if name in args}}
    if transport["prediction"] == "velocity" and transport["path_type"] != "VP":
        transport |= {"train_eps": None, "sample_eps": None}  # their code takes 0 then, whatever the arguments are
    autoencoder = f"stabilityai/sd-vae-ft-{args.get('vae', 'ema')}"
    record = {
        "model": model,
        "transport": transport,
        "autoencoder": AutoencoderSpec(autoencoder, channels=4, downsample=8, scale=0.18215).as_dict(),
        "classes": [str(label) for label in range(model["num_classes"])],
        "cfg_channels": 3,  # how their sampling guides
        "ema_decay": 0.9999,  # train.py's, which it has no option for
    }
    _check_record(file, record)
    try:  # AdamW counts its steps for each parameter
        step = int(next(iter(content["opt"]["state"].values()))["step"])
    except (KeyError, TypeError, StopIteration):
        step = 0
    return Checkpoint(dict(weights), which, record, step, str(file))


def _network_of(file: Path, weights: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the `SiT` that such weights fit, from their shapes.

    Shapes don't tell two things. The heads come from the table of sizes (or ``args.num_heads``, which forks have); and
    the label table's last row is taken for the null class, which the authors' code always has, unless
    ``args.num_classes`` says otherwise.
    """
    try:
        hidden, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        rows = len(weights["y_embedder.embedding_table.weight"])
        num_classes = args.get("num_classes", rows - 1)
        shapes = {
            "input_size": math.isqrt(weights["pos_embed"].shape[1]) * patch,
            "patch_size": patch,
            "in_channels": channels,
            "hidden_size": hidden,
            "depth": depth,
            "mlp_ratio": len(weights["blocks.0.mlp.fc1.weight"]) / hidden,
            "num_classes": num_classes,
            "class_dropout_prob": 0.1 if rows > num_classes else 0.0,
            "learn_sigma": len(weights["final_layer.linear.weight"]) == 2 * channels * patch * patch,
        }
    except KeyError as error:
        raise CheckpointError(f"{file}: not the weights of a SiT: {error} is missing") from None
    except (ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"{file}: not the weights of a SiT: {error}") from None
    heads = {hidden_size: num_heads for hidden_size, _, num_heads in SIZES.values()}
    num_heads = args.get("num_heads", heads.get(hidden))
    if num_heads is None:
        raise CheckpointError(
            f"{file}: the number of attention heads can't be told: the width is {hidden}, and the known sizes have "
            f"{', '.join(map(str, heads))}; add it to the file's args as num_heads"
        )
    return {**shapes, "num_heads": num_heads}


# --- An exported folder ---


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


# --- What came from elsewhere is checked ---


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
