"""A folder of drawn pictures: numbered PNGs, a grid of them, an array, and the settings that they were drawn with."""

import argparse
import io
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torchvision.io import encode_png
from tqdm import tqdm

from sit_composer.autoencoder import SLICE_SIZE, load_autoencoder, to_uint8
from sit_composer.checkpoint.load import build_network, load_checkpoint
from sit_composer.checkpoint.record import describe
from sit_composer.choices import Sampling
from sit_composer.errors import UserError
from sit_composer.generate import Work, generate
from sit_composer.guidance import Guidance
from sit_composer.outputs import _write, write_arrays, write_json
from sit_composer.transport import Transport

SETTINGS = "sampling.json"


def claim(out: Path, settings: dict[str, Any], count: int) -> list[int]:
    """Makes the folder ours, and gives the indices of the pictures that it lacks.

    Raises:
        UserError: if it holds something else, which is left as it is.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; it takes a folder")
    if out.is_dir() and [path.name for path in out.iterdir()] not in ([], [SETTINGS]):  # the settings of none are free
        try:
            before = dict(json.loads((out / SETTINGS).read_text()))
        except (OSError, ValueError, TypeError):
            raise UserError(f"--out: {out} holds files that are not samples; choose another folder") from None
        for name, value in settings.items():
            if before.get(name) != json.loads(json.dumps(value)):
                raise UserError(f"--out: {out} holds samples with another {name}; delete it or choose another")
        return [i for i in range(count) if not (out / f"{i:06d}.png").exists()]
    out.mkdir(parents=True, exist_ok=True)
    write_json(settings, out / SETTINGS)
    return list(range(count))


def read_pictures(out: Path, count: int) -> list[Image.Image]:
    """The pictures as PIL images."""
    pictures = []
    for i in range(count):
        with Image.open(out / f"{i:06d}.png") as image:
            pictures.append(image.copy())
    return pictures


def write_png(picture: Tensor, path: Path) -> None:
    """Writes a uint8 (C, H, W) picture, all of it or nothing."""
    _write(path, bytes(encode_png(picture).numpy()))


def write_npz(pictures: list[Image.Image], labels: list[int], path: Path) -> None:
    """Writes the pictures as ADM's evaluation takes them: arr_0, uint8 (N, H, W, 3); the labels lie beside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(path, arr_0=np.stack([np.asarray(p.convert("RGB")) for p in pictures]), labels=np.array(labels))


def write_grid(pictures: list[Image.Image], labels: list[int], path: Path, columns: int = 10, rows: int = 10) -> None:
    """Writes a grid of the pictures, small ones enlarged: a row a class where there are several of every one."""
    classes = sorted(set(labels), key=labels.index)
    each = [[i for i, label in enumerate(labels) if label == c][:columns] for c in classes[:rows]]
    if min(map(len, each)) == 1:  # fill the rows
        shown = range(min(len(labels), rows * columns))
        width = min(math.ceil(math.sqrt(len(shown))), columns)
        each = [shown[i : i + width] for i in shown[::width]]
    side = pictures[0].width
    zoom = max(1, 48 // side)
    step = side * zoom + 2
    grid = Image.new(pictures[0].mode, (max(len(row) for row in each) * step - 2, len(each) * step - 2), "white")
    for y, row in enumerate(each):
        for x, i in enumerate(row):
            grid.paste(pictures[i].resize((side * zoom, side * zoom), Image.NEAREST), (x * step, y * step))
    buffer = io.BytesIO()
    grid.save(buffer, "PNG")
    _write(path, buffer.getvalue())


def run(args: argparse.Namespace) -> None:
    """Draws what is asked for and not there yet; each rank of a launcher its share.

    Raises:
        UserError: for a checkpoint, class or setting that can't be used.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    checkpoint = load_checkpoint(args.checkpoint, args.weights)
    record = checkpoint.record
    network = build_network(checkpoint, device)
    guide = weaker = None
    if args.guide:
        weaker = load_checkpoint(args.guide, args.weights)
        for name in ("input_size", "in_channels", "num_classes"):
            theirs, ours = weaker.record["model"][name], record["model"][name]
            if theirs != ours:
                raise UserError(f"--guide: {args.guide} has {name} {theirs}, and {args.checkpoint} has {ours}")
        for part, names in (("transport", ("path_type", "prediction")), ("autoencoder", record["autoencoder"])):
            for name in names:
                theirs, ours = weaker.record[part].get(name), record[part][name]
                if theirs != ours:
                    raise UserError(f"--guide: {args.guide} has {part}.{name} {theirs}, {args.checkpoint} has {ours}")
        if weaker.record["classes"] != record["classes"]:
            raise UserError(f"--guide: {args.guide} has other classes than {args.checkpoint}, or in another order")
        guide = build_network(weaker, device)
    if args.cfg_scale is None:
        args.cfg_scale = 1.0 if network.null_label is None and guide is None else 4.0
    if args.cfg_channels is None:
        args.cfg_channels = record.get("cfg_channels")  # released weights are guided as released
    for name, default in (("decode_dtype", "float32"), ("decode_batch_size", SLICE_SIZE)):
        value = getattr(args, name)
        if record["autoencoder"]["name"] is not None:
            setattr(args, name, value or default)
        elif value is not None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: got {value}; {args.checkpoint} draws pixels, which nothing decodes")
    sampling = Sampling(**{name: getattr(args, name) for name in Sampling.__dataclass_fields__})
    guidance = Guidance(network, sampling.cfg_scale, sampling.cfg_channels, sampling.cfg_interval, guide)
    labels = choose_labels(args, record["classes"])
    settings = {
        "checkpoint": describe(checkpoint),
        "guide": describe(weaker) if weaker else None,
        **asdict(sampling),
        "labels": labels,
        **{name: record[name] for name in ("model", "transport", "autoencoder")},
        "decode_dtype": args.decode_dtype,
    }
    out = Path(args.out)
    if ranks > 1:
        dist.init_process_group("gloo")
    todo: list[list[int] | UserError | None] = [None]
    if rank == 0:
        try:
            todo = [claim(out, settings, len(labels))]
        except (UserError, OSError) as error:
            todo = [error if isinstance(error, UserError) else UserError(f"--out: {error}")]
    if ranks > 1:
        dist.broadcast_object_list(todo)
    if isinstance(todo[0], UserError):
        raise todo[0]
    missing = todo[0][rank::ranks]
    if args.idle_steps and rank == 0:
        print(f"note: {sampling.sampling_method} chooses its own steps; --num-steps has no effect", file=sys.stderr)
    if todo[0]:
        transport = Transport(**record["transport"])
        known = record["autoencoder"]
        vae = {}
        if known["name"] is not None:
            vae = {"dtype": getattr(torch, args.decode_dtype), "slice_size": args.decode_batch_size}
        autoencoder = load_autoencoder(known["name"], known["channels"], device, **vae)
        if autoencoder.spec.as_dict() != known:
            raise UserError(
                f"{args.checkpoint}: trained on latents of {known}, and the autoencoder of that name is now "
                f"{autoencoder.spec.as_dict()}"
            )
        settings["decode_batch_size"] = args.decode_batch_size
        drawn, before = Work(), Work()
        if rank == 0:
            before = Work.of_earlier(out / SETTINGS, len(labels) - len(todo[0]))
        with tqdm(total=len(missing), unit="img", desc="sampling", disable=True if rank > 0 else None) as bar:
            for start in range(0, len(missing), args.batch_size):
                indices = missing[start : start + args.batch_size]
                latents, used = generate(guidance, transport, [labels[i] for i in indices], indices, sampling)
                for i, picture in zip(indices, to_uint8(autoencoder.decode(latents)).cpu(), strict=True):
                    write_png(picture, out / f"{i:06d}.png")
                bar.update(len(indices))
                drawn += Work(len(indices), **{name: count * len(indices) for name, count in used.items()})
                if rank == 0:  # what is known, should it be stopped
                    write_json({**settings, **(before + drawn).means()}, out / SETTINGS)
        works = [drawn] * ranks
        if ranks > 1:
            # The last that ranks say to each other. The group is not destroyed: while that holds the GIL, Gloo's thread
            # may want it to free what was gathered, and both wait for ever (seen with torch 2.7.0).
            dist.all_gather_object(works, drawn)
        if rank == 0:
            write_json({**settings, **sum(works, before).means()}, out / SETTINGS)
    if rank == 0:
        pictures = read_pictures(out, len(labels))
        if args.npz:
            write_npz(pictures, labels, Path(args.npz))
        write_grid(pictures, labels, out / "grid.png")
        print(out / "grid.png")


def choose_labels(args: argparse.Namespace, classes: list[str]) -> list[int]:
    """The label of each picture to draw, in order of the classes.

    Raises:
        UserError: for a class that there isn't.
    """
    if args.classes is None:
        count = args.num_images or 16
        if args.labels == "random":
            return np.random.default_rng((args.seed, count)).integers(len(classes), size=count).tolist()
        return [i * len(classes) // count for i in range(count)]
    labels = []
    for name in args.classes.split(","):
        name = name.strip()
        label = classes.index(name) if name in classes else int(name) if name.isdecimal() else -1
        if not 0 <= label < len(classes):
            raise UserError(f"--classes: got {name!r}; it takes labels 0 to {len(classes) - 1}, or the classes' names")
        labels += [label] * args.per_class
    return labels
