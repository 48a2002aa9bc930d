"""A folder of generated images: numbered PNGs, a grid of them, an array, and the settings they were generated with."""

import argparse
import io
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from sit_composer.autoencoder import SLICE_SIZE, AutoencoderSpec, to_uint8
from sit_composer.bars import progress
from sit_composer.bounds import closest
from sit_composer.captions import draw_samples
from sit_composer.checkpoint.load import load_checkpoint
from sit_composer.checkpoint.record import Checkpoint, Record
from sit_composer.choices import Sampling, dimension_shift
from sit_composer.errors import UserError
from sit_composer.generate import earlier_work, generate, mean_work
from sit_composer.guidance import Guidance
from sit_composer.outputs import write_arrays, write_bytes, write_json
from sit_composer.precision import cast_once, resolve
from sit_composer.sit import SiT

SETTINGS, IMAGE = "sampling.json", "{:06d}.png"
VERSION = 1  # of SETTINGS
NEWER = {"version": VERSION, "time_shift": 1.0, "precision": "fp32"}  # what the settings of earlier versions don't have


class Networks(NamedTuple):
    """What generates images."""

    checkpoint: Checkpoint
    weaker: Checkpoint | None  # that guides it
    network: SiT
    guide: SiT | None  # the weaker one
    precision: str  # fp32 or bf16


def run(args: argparse.Namespace) -> None:
    """Generates the images that are asked for and missing; each rank of a launcher its share."""
    rank, _ = my_rank()
    networks = load_networks(args)
    checkpoint = networks.checkpoint
    complete(args, checkpoint.record)
    guidance, settings = guided(args, networks), settings_of(args, networks)
    labels, out = settings["labels"], Path(args.out)
    missing = claim_for_all(out, settings, len(labels))
    if rank == 0:
        if args.idle_steps:
            print(f"note: {args.sampling_method} chooses its own steps; --num-steps has no effect", file=sys.stderr)
        there = f"; {count} of {len(labels)} images are there" if (count := len(labels) - len(missing)) else ""
        weights = f"{Path(checkpoint.path).name}, step {checkpoint.step:,}, {checkpoint.which}"
        print(f"weights: {weights}{there}", file=sys.stderr)
    if missing:
        settings["decode_batch_size"] = args.decode_batch_size
        generate_missing(args, checkpoint, guidance, settings, missing)
    if rank == 0:
        images = [Image.open(out / IMAGE.format(i)).copy() for i in range(len(labels))]
        if args.npz:  # as ADM's evaluation takes them: uint8 (N, H, W, 3)
            arrays = [np.asarray(image.convert("RGB")) for image in images]
            write_arrays(Path(args.npz), arr_0=np.stack(arrays), labels=np.array(labels))
        write_png(draw_samples(images, labels, checkpoint.record.classes, args.sampling.cfg_scale), out / "grid.png")
        print(out / "grid.png")


def load_networks(args: argparse.Namespace) -> Networks:
    """The network of the weights that are asked for, and that of the guide's, on this rank's device."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    precision = resolve(args.precision, device.partition(":")[0])
    checkpoint = load_checkpoint(args.checkpoint, args.weights)
    weaker = load_checkpoint(args.guide, args.guide_weights) if args.guide else None
    if weaker:
        check_guide(args, checkpoint.record, weaker.record)
    network = cast_once(checkpoint.build_network(device), precision)
    guide = cast_once(weaker.build_network(device), precision) if weaker else None
    return Networks(checkpoint, weaker, network, guide, precision)


def guided(args: argparse.Namespace, networks: Networks) -> Guidance:
    """The guided network. The options are complete."""
    by = args.sampling.cfg_scale, args.sampling.cfg_channels, args.sampling.cfg_interval
    return Guidance(networks.network, *by, networks.guide, networks.precision)


def settings_of(args: argparse.Namespace, networks: Networks) -> dict[str, Any]:
    """Every setting that the images depend on. The options are complete."""
    checkpoint, weaker = networks.checkpoint, networks.weaker
    return {
        "version": VERSION,
        "checkpoint": checkpoint.describe(),
        "guide": weaker.describe() if weaker else None,
        **asdict(args.sampling),
        "labels": choose_labels(args, checkpoint.record.classes),
        **checkpoint.record.settings(),
        "precision": networks.precision,
        "decode_dtype": args.decode_dtype,
    }


def my_rank() -> tuple[int, int]:
    """The launcher's rank and number of ranks."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def check_guide(args: argparse.Namespace, record: Record, weaker: Record) -> None:
    """Raises UserError, naming the difference, if the guide predicts something else than the network."""
    for (name, ours), theirs in zip(field_of(record).items(), field_of(weaker).values(), strict=True):
        if theirs != ours:
            got, expected = (shortened(value) if isinstance(value, tuple) else value for value in (theirs, ours))
            raise UserError(f"--guide: {args.guide} has {name} {got}, expected {expected} as in {args.checkpoint}")
    if weaker.classes != record.classes:
        raise UserError(f"--guide: {args.guide} has other classes than {args.checkpoint}, or in another order")


def field_of(record: Record) -> dict[str, Any]:
    """What networks must share for one to guide the other, besides their classes."""
    return {
        **{name: record.argument(name) for name in ("input_size", "in_channels", "num_classes")},
        **{f"transport.{name}": getattr(record.build_transport(), name) for name in ("path_type", "prediction")},
        **{f"autoencoder.{f.name}": getattr(record.autoencoder, f.name) for f in fields(AutoencoderSpec) if f.compare},
    }


def complete(args: argparse.Namespace, record: Record) -> None:
    """Sets the defaults that depend on the network; raises UserError for options of a decoder if there is none."""
    if args.cfg_scale is None:
        args.cfg_scale = 4.0 if record.has_null_class or args.guide else 1.0
    if args.cfg_channels is None:
        args.cfg_channels = record.cfg_channels
    elif args.cfg_channels > (channels := record.argument("in_channels")):
        raise UserError(f"--cfg-channels: got {args.cfg_channels}, expected at most the {channels} of the network")
    if args.time_shift is None:
        args.time_shift = record.build_transport().sampling_shift
    elif args.time_shift == "auto":
        args.time_shift = dimension_shift(math.prod(record.latent_shape))
    for name, default in (("decode_dtype", "float32"), ("decode_batch_size", SLICE_SIZE)):
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if record.autoencoder.name is not None:
            setattr(args, name, value or default)
        elif value is not None:
            raise UserError(f"{option}: got {value}, but {args.checkpoint} generates pixels, which need no decoder")
    args.sampling = Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling)})


def choose_labels(args: argparse.Namespace, classes: list[str]) -> list[int]:
    """The label of each image, in order of the classes; raises UserError for a class that doesn't exist."""
    if args.classes is None:
        count = args.num_images or 16
        if args.labels == "random":
            return np.random.default_rng((args.seed, count)).integers(len(classes), size=count).tolist()
        return [i * len(classes) // count for i in range(count)]
    labels = []
    for name in split_names(args.classes, set(classes)):
        label = classes.index(name) if name in classes else int(name) if name.isdecimal() else -1
        if not 0 <= label < len(classes):
            close = None if name.isdecimal() else closest(name, classes)
            meant = f"; did you mean {close}, label {classes.index(close)}?" if close else ""
            expected = f"expected labels 0 to {len(classes) - 1}, or the classes' names{meant}"
            raise UserError(f"--classes: got {name!r}, {expected}")
        labels += [label] * args.per_class
    return labels


def split_names(text: str, known: set[str]) -> Iterator[str]:
    """The names in a list. Of those that have commas themselves, known ones are found, the longest first."""
    parts, most = text.split(","), 1 + max(name.count(",") for name in known)
    while parts:
        joined = ((n, ",".join(parts[:n]).strip()) for n in range(min(most, len(parts)), 0, -1))
        count, name = next(((n, name) for n, name in joined if name in known or n == 1))
        yield name
        parts = parts[count:]


def claim_for_all(out: Path, settings: dict[str, Any], count: int) -> list[int]:
    """What `claim` gives on rank 0, on all ranks; they join a process group."""
    rank, ranks = my_rank()
    answer: list[Any] = [None]
    if rank == 0:
        try:
            answer = [claim(out, settings, count)]
        except (UserError, OSError) as error:
            answer = [error if isinstance(error, UserError) else UserError(f"--out: {error}")]
    if ranks > 1:
        dist.init_process_group("gloo")
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]


def claim(out: Path, settings: dict[str, Any], count: int) -> list[int]:
    """Makes the folder for these settings, and gives the missing images' indices; UserError if it holds other files."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file, expected a folder")
    if out.is_dir() and [path.name for path in out.iterdir()] not in ([], [SETTINGS]):  # settings alone are replaced
        try:
            before = dict(json.loads((out / SETTINGS).read_text()))
        except (OSError, ValueError, TypeError):
            raise UserError(f"--out: {out} holds files that are not samples; choose another folder") from None
        for name, value in json.loads(json.dumps(settings)).items():
            if (there := before.get(name, NEWER.get(name))) != value:
                what = f"{shortened(there)}, not {shortened(value)}"
                if name == "labels" and there and len(there) != len(value):
                    what = f"{len(there)} images, not {len(value)}"
                raise UserError(f"--out: {out} holds samples with another {name} ({what}); delete it or choose another")
        return [i for i in range(count) if not (out / IMAGE.format(i)).exists()]
    out.mkdir(parents=True, exist_ok=True)
    write_json(settings, out / SETTINGS)
    return list(range(count))


def generate_missing(
    args: argparse.Namespace, checkpoint: Checkpoint, guidance: Guidance, settings: dict[str, Any], missing: list[int]
) -> None:
    """Generates this rank's share of the missing images, and notes the work of all ranks with the settings."""
    rank, ranks = my_rank()
    out, labels = Path(args.out), settings["labels"]
    before = earlier_work(out / SETTINGS, len(labels) - len(missing)) if rank == 0 else Counter()
    share = missing[rank::ranks]

    def keep(indices: list[int], levels: Tensor, done: Counter[str]) -> None:
        for i, image in zip(indices, levels, strict=True):
            write_png(as_image(image), out / IMAGE.format(i))
        bar.update(len(indices))
        if rank == 0:  # the work so far, in case the command is stopped
            write_json({**settings, **mean_work(before + done)}, out / SETTINGS)

    with progress(len(share), rank == 0, unit="img", desc="sampling") as bar:
        done = generate_share(args, checkpoint, guidance, labels, share, keep)
    works = [done] * ranks
    if ranks > 1:
        # The group is not destroyed: Gloo's thread may need the GIL to free this, and both would wait (torch 2.7.0).
        dist.all_gather_object(works, done)
    if rank == 0:
        write_json({**settings, **mean_work(sum(works, before))}, out / SETTINGS)


def generate_share(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    guidance: Guidance,
    labels: list[int],
    share: list[int],
    keep: Callable[[list[int], Tensor, Counter[str]], None],
) -> Counter[str]:
    """Generates the images of these indices, and returns what they cost; ``labels`` are of all images.

    ``keep`` takes the indices of each batch, its images, uint8 (n, C, H, W) on the CPU, and the cost so far. It is
    called in a thread, which decodes a batch while the next one is generated.
    """
    device, dtype = next(guidance.network.parameters()).device, getattr(torch, args.decode_dtype or "float32")
    transport = checkpoint.record.build_transport()
    autoencoder = checkpoint.load_autoencoder(device, dtype, args.decode_batch_size)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # None is no stream
    done: Counter[str] = Counter()

    def finish(indices: list[int], latents: Tensor, used: dict[str, int]) -> None:
        with torch.cuda.stream(stream):  # latents are complete: `generate` waited for them
            levels = to_uint8(autoencoder.decode(latents)).cpu()
        done.update(images=len(indices), **{name: count * len(indices) for name, count in used.items()})
        keep(indices, levels, done)

    with ThreadPoolExecutor(1) as thread:  # which on leaving, after Ctrl-C too, waits for the batch in the thread
        previous = thread.submit(lambda: None)
        for start in range(0, len(share), args.batch_size):
            indices = share[start : start + args.batch_size]
            latents, used = generate(guidance, transport, [labels[i] for i in indices], indices, args.sampling)
            previous.result()  # raises its error; at most two batches are in memory
            previous = thread.submit(finish, indices, latents, used)
        previous.result()
    return done


def write_png(image: Image.Image, path: Path) -> None:
    write_bytes(png(image), path)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def as_image(levels: Tensor) -> Image.Image:
    """uint8 (C, H, W), grey for one channel, as an image."""
    return Image.fromarray(levels[0].numpy() if len(levels) == 1 else levels.permute(1, 2, 0).contiguous().numpy())
