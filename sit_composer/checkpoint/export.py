"""Writes a checkpoint's weights as other programs read them: see `sit_composer.export`."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sit_composer.checkpoint.load import find_checkpoint, load_checkpoint
from sit_composer.checkpoint.record import CONFIG, EXPORTED, FORMAT, Checkpoint, NoSuchWeights, digest
from sit_composer.choices import Sampling
from sit_composer.errors import UserError

STATE = "trainer_state.json"
Writer = Callable[[Path], None]  # writes the file of that path


def export(path: str, out: Path, hub: bool = False) -> None:
    """Writes out/checkpoint-STEP, and out/hub-STEP if asked for.

    Raises:
        UserError: for what is no checkpoint, or a folder that is there and is something else.
    """
    place = str(find_checkpoint(path))  # both kinds from the same file, though a run may be writing the next
    held: dict[str, Checkpoint] = {}
    for which in EXPORTED:
        try:
            held[which] = load_checkpoint(place, which)
        except NoSuchWeights as error:
            absent = error
    if not held:
        raise absent
    for which in EXPORTED.keys() - held.keys():
        print(f"{place}: it has no {which} weights; exporting the others")
    step = next(iter(held.values())).step

    files = {EXPORTED[which]: _safetensors(checkpoint) for which, checkpoint in held.items()}
    if "ema" in held:
        files["ema.pt"] = _state_dict(held["ema"])
    write_folder(out / f"checkpoint-{step}", held, {which: EXPORTED[which] for which in held}, files)
    if hub:
        which = "ema" if "ema" in held else "training"
        files = {"model.safetensors": _safetensors(held[which])}
        files["README.md"] = lambda file: file.write_text(model_card(held[which]), "utf-8")
        write_folder(out / f"hub-{step}", {which: held[which]}, {which: "model.safetensors"}, files)


def write_folder(
    folder: Path, held: dict[str, "Checkpoint"], weights: dict[str, str], files: dict[str, Writer]
) -> None:
    """Writes files, config.json and trainer_state.json as a folder: all of it or nothing, and over nothing.

    Args:
        folder: what it will be.
        held: the checkpoints that it is made of, "ema" or "training" or both.
        weights: which file has which of them.
        files: name -> what writes it.

    Raises:
        UserError: if the folder is there and is something else, or can't be written.
    """
    first = next(iter(held.values()))
    trained = {name: getattr(first, name) for name in ("step", "epoch", "samples")}
    config = _json({**FORMAT, "weights": weights, "trained": trained, **first.record})
    files = {**files, CONFIG: lambda file: file.write_text(config, "utf-8")}
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        source = {Path(path).name: digest(path) for path in sorted({checkpoint.path for checkpoint in held.values()})}
        if folder.exists():
            if not _is_this(folder, config, source, set(files)):
                raise UserError(f"--out: {folder} is there, and is not this export; choose another, or move it away")
            print(f"{folder}: already exported")
            return
        temporary.mkdir(parents=True)
        for name, write in files.items():
            write(temporary / name)
        hashes = {name: digest(str(temporary / name)) for name in files}
        (temporary / STATE).write_text(_json({**trained, "source": source, "sha256": hashes}), "utf-8")
        temporary.rename(folder)  # fails if the folder has come to be, with something in it
    except (OSError, SafetensorError, RuntimeError) as error:  # a full disk is torch.save's RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"--out: can't write {folder}: {reason}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(folder)


def _is_this(folder: Path, config: str, source: dict[str, str], files: set[str]) -> bool:
    """Whether the folder holds an export of the same source, undamaged."""
    try:
        state = json.loads((folder / STATE).read_text("utf-8"))
        hashes = state["sha256"]
        return (
            state["source"] == source
            and hashes.keys() == files
            and hashes["config.json"] == hashlib.sha256(config.encode()).hexdigest()
            and all(digest(str(folder / name)) == known for name, known in hashes.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _safetensors(checkpoint: "Checkpoint") -> Writer:
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.weights.items()}
    return lambda file: save_file(tensors, file, metadata={"format": "pt"})


def _state_dict(checkpoint: "Checkpoint") -> Writer:
    """A bare state dict, cloned, so that nothing of a larger storage that a tensor lies in is saved with it."""
    return lambda file: torch.save({n: t.detach().clone() for n, t in checkpoint.weights.items()}, file)


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def model_card(checkpoint: "Checkpoint") -> str:
    """The README.md of a model on the Hugging Face Hub: what it is, and how to draw from it."""
    record = checkpoint.record
    model, transport, autoencoder = record["model"], record["transport"], record["autoencoder"]
    guided = model["class_dropout_prob"] > 0
    settings = {**asdict(Sampling()), "cfg_scale": 4.0 if guided else 1.0}
    side, channels = model["input_size"], model["in_channels"]
    pictures = side * autoencoder["downsample"]
    latents = (
        f"latents of `{autoencoder['name']}`, which are {side}×{side} of {channels} channels"
        if autoencoder["name"]
        else f"the pixels themselves, {channels} a colour channel each"
        if channels > 1
        else "the pixels themselves, in grey"
    )
    guidance = (
        "It was trained with a null class, so that it can be guided."
        if guided
        else "It was trained without a null class, and can't be guided: leave `cfg_scale` at 1."
    )
    sigma = (
        "`learn_sigma` is true: the last layer has the released networks' second half of output channels, which are "
        "never trained; the network leaves them out of what it returns. In the authors' code, build it with "
        "`learn_sigma=True`.\n\n"
        if model["learn_sigma"]
        else ""
    )
    which = "the exponential moving average" if checkpoint.which == "ema" else "the training weights, not an average"
    return f"""---
# Choose a license, and name it here:   license: …
library_name: sit_composer
tags:
- sit
- class-conditional-image-generation
---

# SiT, {pictures}×{pictures} pictures of {model["num_classes"]} classes

A Scalable Interpolant Transformer ([arXiv 2401.08740](https://arxiv.org/abs/2401.08740)), trained for
{checkpoint.step} steps. `model.safetensors` holds {which}, with the names of the authors' state dicts.
`config.json` tells all that belongs to them.

It works on {latents}. The path is {transport["path_type"]}, and the network
predicts the {transport["prediction"]}. {guidance}

{sigma}## Sampling

```bash
huggingface-cli download OWNER/NAME --local-dir NAME
python -m sit_composer.sample NAME --out samples --num-images 16
```

The settings that it takes where none are given:

```json
{_json(settings).strip()}
```

From Python, the network alone:

```python
import torch

from sit_composer.sit import SiT

network = SiT.from_pretrained("OWNER/NAME")
x, t = torch.randn(2, {channels}, {side}, {side}), torch.tensor([0.0, 0.5])  # noise is at 0, data at 1
labels = torch.tensor([0, {model["num_classes"] - 1}])
with torch.no_grad():
    {transport["prediction"]} = network(x, t, labels)
```
"""
