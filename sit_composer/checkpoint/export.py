"""Writes a checkpoint's weights as other programs read them: see `sit_composer.export`."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sit_composer.checkpoint.load import find_checkpoint, load_checkpoint
from sit_composer.checkpoint.record import CONFIG, EXPORTED, FORMAT, Checkpoint, NoSuchWeights, digest
from sit_composer.choices import Sampling
from sit_composer.cli import is_hub_name
from sit_composer.data.spec import DataSpec
from sit_composer.errors import UserError, first_line
from sit_composer.outputs import mode_of_umask

STATE = "trainer_state.json"
Content = str | dict[str, Tensor]  # of a file: text, or tensors

CARD = Path(__file__).with_name("model_card.md").read_text("utf-8")
SHIFT = """
It was trained with a time shift of {:.4g}, by which fixed-step solvers shift their steps, too, unless `--time-shift` is
given. The adaptive default chooses its own.
"""
SIGMA = """`learn_sigma` is true: the last layer has the second half of output channels of the released networks. It is
never trained, and the network drops its output. In the authors' code, build the network with `learn_sigma=True`.

"""


def run(args: argparse.Namespace) -> None:
    """Writes --out's checkpoint-STEP, and hub-STEP if asked for; raises UserError if that is impossible."""
    place = str(find_checkpoint(args.checkpoint))  # the same file for both weights, though a run may write the next
    out, vae_id = Path(args.out), args.vae_id
    latents = read_spec(args.spec) if args.spec is not None else None
    held: dict[str, Checkpoint] = {}
    for which in EXPORTED:
        try:
            held[which] = load_checkpoint(place, which, latents)
        except NoSuchWeights as error:
            absent = error
    if not held:
        raise absent
    for which in EXPORTED.keys() - held.keys():
        print(f"{place}: it has no {which} weights; exporting the others")
    best = held.get("ema") or held["training"]
    if vae_id and best.record.autoencoder.name is None:
        raise UserError(f"--vae-id: got {vae_id}, but {args.checkpoint} generates pixels, and has no autoencoder")
    files = {EXPORTED[which]: checkpoint for which, checkpoint in held.items()}
    write_folder(out / f"checkpoint-{best.step}", files, {"ema.pt": best.weights} if "ema" in held else {})
    if args.hub:
        name = vae_id or best.record.autoencoder.name
        named = replace(best.record, autoencoder=replace(best.record.autoencoder, name=name))
        best = replace(best, record=named)
        write_folder(out / f"hub-{best.step}", {"model.safetensors": best}, {"README.md": model_card(best)})
        if name and not is_hub_name(name):
            what = f"its autoencoder is {name}, a folder here, so that nobody else can decode what it generates"
            advice = "upload the autoencoder too, and name it by --vae-id OWNER/NAME"
            print(f"warning: hub-{best.step}: {what}; {advice}", file=sys.stderr)


def read_spec(path: str) -> DataSpec:
    """The spec of shards of latents; raises UserError if the file is none."""
    try:
        spec = DataSpec.from_json(Path(path).read_text("utf-8"), path)
    except (OSError, ValueError) as error:
        raise UserError(f"--spec: {first_line(error)}") from None
    if spec.kind != "latents":
        raise UserError(f"--spec: {path} is of {spec.kind}, expected one of latents")
    return spec


def write_folder(folder: Path, weights: dict[str, Checkpoint], others: Mapping[str, Content]) -> None:
    """Writes files of weights and others, config.json and trainer_state.json, or nothing; an existing one is kept."""
    held = list(weights.values())
    trained = {name: getattr(held[0], name) for name in ("step", "epoch", "samples")}
    names = {checkpoint.which: name for name, checkpoint in weights.items()}
    config = _json({**FORMAT, "weights": names, "trained": trained, **held[0].record.as_dict()})
    files = {**{name: checkpoint.weights for name, checkpoint in weights.items()}, **others, CONFIG: config}
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        source = {Path(path).name: digest(path) for path in sorted({checkpoint.path for checkpoint in held})}
        if folder.exists():
            if not _is_this(folder, config, source, set(files)):
                raise UserError(f"--out: {folder} exists and is not this export; choose another, or move it away")
            print(f"{folder}: already exported")
            return
        temporary.mkdir(parents=True)
        for name, content in files.items():
            _write(temporary / name, content)
        hashes = {name: digest(temporary / name) for name in files}
        _write(temporary / STATE, _json({**trained, "source": source, "sha256": hashes}))
        temporary.rename(folder)  # fails if the folder exists by now and is not empty
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"--out: can't write {folder}: {reason}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(folder)


def _write(file: Path, content: Content) -> None:
    if isinstance(content, str):
        file.write_text(content, "utf-8")
    elif file.suffix == ".pt":  # cloned, as torch.save writes the whole storage that a tensor is a view of
        torch.save({name: tensor.detach().clone() for name, tensor in content.items()}, file)
    else:
        with mode_of_umask(file):
            save_file({name: tensor.contiguous() for name, tensor in content.items()}, file, metadata={"format": "pt"})


def _is_this(folder: Path, config: str, source: dict[str, str], files: set[str]) -> bool:
    """Whether the folder holds an export of the same source, undamaged."""
    try:
        state = json.loads((folder / STATE).read_text("utf-8"))
        same = state["source"] == source and (folder / CONFIG).read_bytes() == config.encode()
        return same and state["sha256"] == {name: digest(folder / name) for name in files}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def model_card(checkpoint: Checkpoint) -> str:
    """The README.md of a model on the Hugging Face Hub: what it is, and how to sample from it."""
    record = checkpoint.record
    transport = record.build_transport()
    channels, side, _ = record.latent_shape
    latents = f"the pixels themselves, {f'{channels} color channels each' if channels > 1 else 'in grayscale'}"
    if record.autoencoder.name:
        latents = f"latents of `{record.autoencoder.name}`, which are {side}×{side} with {channels} channels"
    guidance, scale = "It was trained without a null class, and can't be guided: leave `cfg_scale` at 1.", 1.0
    if record.has_null_class:
        guidance, scale = "It was trained with a null class, so that it can be guided.", 4.0
    return CARD.format(
        image_size=record.image_size,
        num_classes=len(record.classes),
        classes=", ".join(record.classes[:5]) + (", …" if len(record.classes) > 5 else ""),
        last_label=len(record.classes) - 1,
        step=checkpoint.step,
        which="the exponential moving average" if checkpoint.which == "ema" else "the training weights, not an average",
        latents=latents,
        channels=channels,
        side=side,
        path_type=transport.path_type,
        prediction={"x": "data"}.get(transport.prediction, transport.prediction),
        guidance=guidance,
        shift=SHIFT.format(transport.sampling_shift) if transport.sampling_shift != 1 else "",
        sigma=SIGMA if record.argument("learn_sigma") else "",
        settings=_json({**asdict(Sampling()), "cfg_scale": scale}).strip(),
    )
