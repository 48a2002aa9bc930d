"""Which weights are in a checkpoint, and what they mean.

Three kinds are read, all without running code that might be in them: a run's, in which ``state.model`` holds the
training weights, and the states of the callbacks `EMAWeights` and `RunRecord` their average and the network's record;
the authors' ``.pt``; and a folder that `sit_composer.export` wrote. Weights are asked for as "training" or "ema"; one
of several averages as "ema:0.999" or "ema:power0.05".
"""

import atexit
import json
import operator
import os
import re
import shutil
import sys
import tempfile
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

from sit_composer.checkpoint.folder import CHECKPOINT, checkpoints, fetch_checkpoint, meant, newest
from sit_composer.checkpoint.record import (
    CONFIG,
    EXPORTED,
    EXPORTED_FILE,
    FORMAT,
    VERSION,
    Checkpoint,
    NoSuchWeights,
    Record,
    check_fit,
)
from sit_composer.checkpoint.released import from_authors, weights_in
from sit_composer.checkpoint.safe_load import METADATA, CheckpointError, load_file
from sit_composer.choices import TRAINING_ONLY, check_weights
from sit_composer.cli import is_remote
from sit_composer.data.spec import DataSpec
from sit_composer.errors import NewerVersion, check_version, first_line
from sit_composer.storage import LocalFolder, RunFolder, open_store

PREFIX = "network."  # of ComposerSiT's parameters
DOWNLOAD = "sit_composer-checkpoint-"  # begins the name of a temporary folder
FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")  # names of weights in one file


def load_checkpoint(path: str, weights: str = "ema", latents: DataSpec | None = None) -> Checkpoint:
    """Reads the weights of that name: "ema", "training", or of several averages "ema:NAME"; "ema" is the first.

    The path is of a run's folder (its newest checkpoint) or one checkpoint, a file or a folder of shards; the authors'
    ``.pt``, or another file of such weights, of the authors' latents unless others are given; an exported folder; each
    on disk or in an object store. Raises NoSuchWeights if it has only others; CheckpointError if it is no checkpoint,
    is damaged, or holds values that aren't finite.
    """
    check_weights("weights", weights)
    place = find_checkpoint(path)
    held: dict[str, Any] = {}
    if _is_sharded(place):
        made = _from_run(place, None, weights)
    elif place.is_dir():
        made = _from_export(place, weights)
    else:
        content = load_file(place)
        if not isinstance(content, dict):
            raise CheckpointError(f"{place}: not a checkpoint of sit_composer's (it holds a {type(content).__name__})")
        held = {} if "state" in content else weights_in(content)
        made = from_authors(place, content, held, weights, latents) if held else _from_run(place, content, weights)
    if latents is not None and not held:
        raise CheckpointError(f"{place}: it names its own latents; leave out --spec, which is for released weights")
    for name, values in made.weights.items():
        if not values.isfinite().all():
            raise CheckpointError(f"{made.path}: {name} has values that are NaN or infinite; use an earlier checkpoint")
    return replace(made, source=path if is_remote(path) else made.path)


def find_checkpoint(path: str) -> Path:
    """What is read for a path: a file, a sharded checkpoint's folder, an exported folder, or a run's newest complete
    checkpoint. From object storage it is copied to a temporary folder. Raises CheckpointError."""
    if path.startswith("hf://"):
        return _from_hub(path)
    if is_remote(path):
        return _download(path)
    place = Path(path)
    if not place.exists():
        raise CheckpointError(f"{path}: no checkpoint here")
    if place.is_dir() and not (place / CONFIG).is_file() and not _is_sharded(place):
        return place / _newest(LocalFolder(path))
    place = place.resolve() if place.is_symlink() else place  # "latest" may be changed to another checkpoint
    if (place.name == "ema.pt" or EXPORTED_FILE.fullmatch(place.name)) and (place.parent / CONFIG).is_file():
        raise CheckpointError(f"{place}: part of an exported folder; give the folder, whose {CONFIG} belongs to it")
    return place


def _newest(folder: RunFolder) -> str:
    name, found = newest(folder), list(checkpoints(folder))
    if name is None:
        raise CheckpointError(f"{folder.uri}: no complete checkpoint here{meant(folder)}")
    later = found[found.index(name) + 1 :] if name in found else []  # else it was deleted just now
    if later and os.environ.get("RANK", "0") == "0":
        print(f"note: {', '.join(later)}: not complete, or damaged; {name} is taken", file=sys.stderr)
    return name


def _download(uri: str) -> Path:
    """Downloads a run's newest checkpoint, one of its checkpoints, an exported folder or a file of weights."""
    parent, _, last = uri.rstrip("/").rpartition("/")
    place = Path(tempfile.mkdtemp(prefix=DOWNLOAD))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    if last.endswith(FILES) and not CHECKPOINT.fullmatch(last):
        open_store(parent).download(last, place / last)
        return place / last
    if not CHECKPOINT.fullmatch(last):
        folder = open_store(uri)
        exported = [name for name in folder.listing() if name == CONFIG or EXPORTED_FILE.fullmatch(name)]
        if CONFIG in exported:
            for name in exported:
                folder.download(name, place / name)
            return place
        parent, last = uri, _newest(folder)
    fetch_checkpoint(open_store(parent), last, place)
    return place / last


def forget_download(checkpoint: Checkpoint) -> None:
    """Deletes the copy of a checkpoint from object storage, which else stays until the process ends."""
    for folder in Path(checkpoint.path).parents:
        if folder.name.startswith(DOWNLOAD) and is_remote(checkpoint.source):
            shutil.rmtree(folder, ignore_errors=True)


def fetch(folder_or_hub_id: str) -> str:
    """The path itself if something is there, else the folder of the Hub's model of that name; or CheckpointError."""
    if Path(folder_or_hub_id).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", folder_or_hub_id):
        return folder_or_hub_id
    try:
        return str(_from_hub(f"hf://{folder_or_hub_id}"))
    except CheckpointError as error:
        reason = f"no such folder, and not from the Hub either: {first_line(error.__cause__ or error)}"
        raise CheckpointError(f"{folder_or_hub_id}: {reason}") from error


def _from_hub(uri: str) -> Path:
    """The local copy of hf://OWNER/NAME, an exported folder, or of hf://OWNER/NAME/FILE, weights or a checkpoint."""
    import huggingface_hub  # only a Hub's name needs it

    owner, model, file = (*uri.removeprefix("hf://").strip("/").split("/", 2), "", "")[:3]
    if not owner or not model:
        raise CheckpointError(f"{uri}: expected hf://OWNER/NAME, or hf://OWNER/NAME/FILE")
    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(f"{owner}/{model}", file))
        files = [CONFIG, "model.safetensors", "ema*.safetensors"]
        return Path(huggingface_hub.snapshot_download(f"{owner}/{model}", allow_patterns=files))
    except Exception as error:  # huggingface_hub's, its HTTP client's or the system's
        raise CheckpointError(f"{uri}: can't be read from the Hub: {first_line(error)}") from error


def _from_run(file: Path, content: dict[str, Any] | None, which: str) -> Checkpoint:
    part = partial(_part, file, content)
    try:
        written = json.loads(part("callbacks", "RunRecord")["record"])
        time = part("timestamp", "Timestamp")
        step, epoch, samples = (int(time[name]) for name in ("batch", "epoch", "sample"))
        held = {name: tensor for name, tensor in part("model").items() if not name.startswith(TRAINING_ONLY)}
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in held.items()}
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a checkpoint of sit_composer's (it has no {error})") from None
    record = Record.from_dict(written, file)
    which = record.name_of(which, file)
    if which != "training":  # an average lacks the weights that are frozen
        path = ["params"] if record.averages is None else ["averages", which.partition(":")[2]]
        try:
            weights |= {name.removeprefix(PREFIX): t for name, t in part("callbacks", "EMAWeights", *path).items()}
        except KeyError:
            reason = "no EMA weights, as it was trained with `ema: null`; ask for the training weights"
            raise NoSuchWeights(f"{file}: {reason}") from None
    return Checkpoint(weights, which, record, step, str(file), epoch, samples)


def _part(place: Path, content: dict[str, Any] | None, *path: str) -> dict[str, Any]:
    """The part of a run's state at a path such as callbacks, RunRecord: of a file's content, or of a sharded folder."""
    if content is not None:
        return reduce(operator.getitem, path, content["state"])
    from sit_composer.checkpoint.sharded import load_sharded  # takes seconds to import

    prefix = f"state.{'.'.join(path)}."
    found = load_sharded(place, lambda name: name.startswith(prefix))
    if not found:
        raise KeyError(".".join(path))
    return {name.removeprefix(prefix): value for name, value in found.items()}


def _is_sharded(path: Path) -> bool:
    return path.is_dir() and ((path / METADATA).exists() or any(path.glob("*.distcp")))


def _from_export(folder: Path, which: str) -> Checkpoint:
    config = folder / CONFIG
    try:
        content = json.loads(config.read_text("utf-8"))
        if content.get("format") != FORMAT["format"]:
            raise ValueError("sit_composer.export didn't write it")
        check_version(content.get("version"), VERSION, str(config))
        files, trained = content["weights"], content["trained"]
        step, epoch, samples = (int(trained[name]) for name in ("step", "epoch", "samples"))
        record = Record.from_dict(content, config)
        which = record.name_of(which, folder)
        if which not in files:
            raise NoSuchWeights(f"{folder}: no {which} weights; ask for the {', '.join(files)} ones")
        if not EXPORTED_FILE.fullmatch(str(files[which])):  # nothing outside the folder, and nothing pickled
            raise ValueError(f"{which} weights: got {files[which]!r}, expected {' or '.join(EXPORTED.values())}")
    except (CheckpointError, NewerVersion):
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{config}: not an export's: {error}") from None
    file = folder / files[which]
    weights = load_file(file)
    check_fit(file, record.model, weights)
    return Checkpoint(weights, which, record, step, str(file), epoch, samples)
