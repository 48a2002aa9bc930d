"""Bits per dimension of real images: see `sit_composer.bits_per_dim`."""

import argparse
import json
import math
import platform
import statistics
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sit_composer.autoencoder import AutoencoderSpec, from_uint8, load_autoencoder
from sit_composer.checkpoint.load import build_network, load_checkpoint
from sit_composer.checkpoint.record import describe
from sit_composer.choices import EXACT_DIMS, Solve
from sit_composer.data.loader import build_loader
from sit_composer.data.spec import DataSpec
from sit_composer.data.stream import load_spec
from sit_composer.errors import UserError
from sit_composer.likelihood import bits_per_dim, dequantize, log_likelihood
from sit_composer.outputs import write_json
from sit_composer.samplers import Counted
from sit_composer.transport import Transport


def run(args: argparse.Namespace, solve: Solve) -> dict[str, Any]:
    """The result: bits a dimension, and what they depend on; written to ``args.out`` if that is given.

    Raises:
        UserError: for a checkpoint or data that can't be used, or don't fit each other.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = load_spec(None, args.data)
    checkpoint = load_checkpoint(args.checkpoint, args.weights)
    record = checkpoint.record
    side, channels = record["model"]["input_size"], record["model"]["in_channels"]
    dims = channels * side**2
    if solve.exact and dims > EXACT_DIMS:
        raise UserError(f"--exact: the network has {dims} dimensions; it takes {EXACT_DIMS} at most: use --probes")
    check_fit(args, record, spec)
    encoder = None
    if spec.kind == "pixels" and record["autoencoder"]["name"] is not None:
        encoder = load_autoencoder(record["autoencoder"]["name"], channels, device)
        if encoder.spec.as_dict() != record["autoencoder"]:
            raise UserError(
                f"{args.checkpoint}: trained on latents of {record['autoencoder']}, and the autoencoder of that name "
                f"is now {encoder.spec.as_dict()}"
            )
        spec = DataSpec(**vars(spec) | {"channels": encoder.picture_channels})
    if args.num_images is not None and args.num_images > spec.samples:
        raise UserError(f"--num-images: got {args.num_images}; {args.data} has {spec.samples}")
    # Drawn, and not the first ones: shards often have one class after another.
    indices = range(spec.samples)
    if args.num_images is not None:
        drawn = np.random.default_rng(args.seed).choice(spec.samples, args.num_images, replace=False)
        indices = sorted(drawn.tolist())

    size = side * record["autoencoder"]["downsample"] if spec.kind == "pixels" else None
    pictures = build_loader(None, args.data, spec=spec, batch_size=args.batch_size, image_size=size, shuffle=False)
    network, transport = build_network(checkpoint, device), Transport(**record["transport"])
    log_p: list[float] = []
    evaluations = 0  # summed over the pictures
    with tqdm(total=len(indices), unit="img", desc="log p", disable=None) as bar:
        for start in range(0, len(indices), args.batch_size):
            numbers = indices[start : start + args.batch_size]
            samples = [pictures.dataset[i] for i in numbers]  # by number: a loader pads an epoch, and has its own order
            generators = [np.random.default_rng((solve.seed, i)) for i in numbers]
            x = network_input(samples, generators, record, encoder).to(device)
            if x.shape[1:] != (channels, side, side):
                raise UserError(f"{args.data}: makes {tuple(x.shape[1:])}; the network takes {(channels, side, side)}")
            labels = torch.tensor([sample["label"] for sample in samples], device=device)
            values, used = log_p_of(transport, network, x, labels, generators, solve)
            log_p += values
            evaluations += used * len(numbers)
            bar.update(len(numbers))

    levels = 127.5 if record["autoencoder"]["name"] is None else 1.0
    bits = bits_per_dim(torch.tensor(log_p, dtype=torch.float64), dims, levels).tolist()
    result = {
        "bits_per_dim": statistics.fmean(bits),
        "standard_error": statistics.stdev(bits) / math.sqrt(len(bits)) if len(bits) > 1 else None,
        "nats": statistics.fmean(log_p),
        "dims": dims,
        "of": "8-bit pictures" if levels == 127.5 else "latents, not pictures",
        "data": {"path": args.data, "count": len(bits), "of": spec.samples, "kind": spec.kind, "image_size": size},
        "settings": {
            "mode": args.mode,
            **asdict(solve),
            "interval": transport.interval(eval=True),
            "dequantization": "uniform, (l + u - 1/2) / 127.5 - 1" if levels == 127.5 else None,
            "batch_size": args.batch_size,
        },
        "evaluations": evaluations / len(bits),
        "checkpoint": describe(checkpoint),
        **{name: record[name] for name in ("model", "transport", "autoencoder")},
        "versions": versions(),
        "pictures": list(indices),
        "log_p": log_p,
    }
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(result, Path(args.out))
    return result


def check_fit(args: argparse.Namespace, record: dict[str, Any], spec: DataSpec) -> None:
    """Checks that the shards hold what the network was trained on.

    Raises:
        UserError: naming both.
    """
    ours, theirs = record["classes"], spec.classes
    numbers = [str(label) for label in range(len(ours))]  # as names they tell no more than how many there are
    if len(ours) != len(theirs) or (ours != theirs and numbers not in (ours, theirs)):
        differ = next((pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]), None)
        detail = f": for {differ[0]!r} there is {differ[1]!r}" if differ and len(ours) == len(theirs) else ""
        raise UserError(f"{args.data}: has {len(theirs)} classes, and {args.checkpoint} is of {len(ours)}{detail}")
    autoencoder, model = record["autoencoder"], record["model"]
    if spec.kind == "latents" and spec.autoencoder != autoencoder:
        wanted = "pixels" if autoencoder["name"] is None else f"latents of {json.dumps(autoencoder)}"
        raise UserError(
            f"{args.data}: latents of {json.dumps(spec.autoencoder)}; {args.checkpoint} was trained on {wanted}"
        )
    if autoencoder["name"] is None and spec.channels != model["in_channels"]:
        raise UserError(
            f"{args.data}: pictures of {spec.channels} channels; {args.checkpoint} is of {model['in_channels']}"
        )
    side = model["input_size"] * autoencoder["downsample"]
    # As in training, pictures are cropped for an encoder; levels that resizing made are not the data's.
    cropped = spec.kind == "pixels" and (autoencoder["name"] is not None or spec.image_size is None)
    if spec.image_size != side and not cropped:
        raise UserError(
            f"{args.data}: {spec.kind} of pictures of {spec.image_size}; {args.checkpoint} is of pictures of {side}"
        )


def network_input(samples: list[dict[str, Any]], generators: list[Any], record: dict[str, Any], encoder: Any) -> Any:
    """What the network models (N, C, H, W), of samples of `data.SitDataset`, with noise of each picture's generator."""
    spec = AutoencoderSpec(**record["autoencoder"])
    if spec.name is None:
        levels = torch.stack([sample["image"] for sample in samples])
        noise = [g.random(levels.shape[1:], dtype=np.float32) for g in generators]
        return dequantize(levels, torch.from_numpy(np.stack(noise)))
    if encoder is not None:
        moments = encoder.moments(from_uint8(torch.stack([sample["image"] for sample in samples])))
    else:
        moments = torch.stack([sample["moments"] for sample in samples]).float()
    shape = (spec.channels, *moments.shape[2:])
    noise = np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators])
    return spec.latents(moments, torch.from_numpy(noise).to(moments.device))


def log_p_of(
    transport: Any, network: Any, x: Any, labels: Any, generators: list[Any], solve: Solve
) -> tuple[list[float], int]:
    """log p of each x (N, C, H, W) given its label, in nats, and the evaluations of the field that the solver took.

    Raises:
        UserError: if the solver gives up, or numbers that aren't finite.
    """
    noise = None
    if not solve.exact:
        signs = [g.integers(0, 2, (solve.probes, *x.shape[1:]), dtype=np.int8) * 2 - 1 for g in generators]
        noise = torch.from_numpy(np.stack(signs, axis=1))  # (probes, N, C, H, W)
    names = ("num_steps", "atol", "rtol", "probes")
    options = {name: getattr(solve, name) for name in names if getattr(solve, name) is not None}
    model = Counted(network)
    try:
        values = log_likelihood(
            transport,
            model,
            x,
            sampling_method=solve.sampling_method,
            exact=solve.exact,
            noise=noise,
            y=labels,
            **options,
        )
    except AssertionError as error:  # torchdiffeq's
        raise UserError(f"the solver gave up ({error}); try a larger --atol or --rtol") from error
    if not values.isfinite().all():
        raise UserError("log p is NaN or infinite; try more steps, or another solver")
    return values.tolist(), model.evaluations


def versions() -> dict[str, str]:
    packages = ("sit-composer", "torch", "torchdiffeq", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
