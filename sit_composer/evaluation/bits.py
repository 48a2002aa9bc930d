"""Bits per dimension of real images: see `sit_composer.bits_per_dim`."""

import argparse
import math
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sit_composer.autoencoder import AutoencoderSpec, DiffusersAutoencoder, from_uint8
from sit_composer.bars import progress
from sit_composer.checkpoint.load import load_checkpoint
from sit_composer.checkpoint.record import Record
from sit_composer.choices import EXACT_DIMS
from sit_composer.data.loader import build_loader
from sit_composer.data.spec import DataSpec
from sit_composer.data.stream import load_spec
from sit_composer.errors import UserError
from sit_composer.likelihood import bits_per_dim, dequantize, log_likelihood
from sit_composer.outputs import versions, write_json
from sit_composer.samplers import Counted
from sit_composer.sit import SiT


def run(args: argparse.Namespace) -> None:
    """Prints the bits per dimension, and writes them with everything that they depend on to ``args.out``, if given."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = load_spec(None, args.data)
    checkpoint = load_checkpoint(args.checkpoint, args.weights)
    record, solve = checkpoint.record, args.solve
    if checkpoint.which != args.weights:
        print(f"note: --weights {args.weights} is {checkpoint.which}", file=sys.stderr)
    dims = math.prod(record.latent_shape)
    if solve.exact and dims > EXACT_DIMS:
        raise UserError(f"--exact: got a network of {dims} dimensions, expected at most {EXACT_DIMS}; use --probes")
    check_fit(args, record, spec)
    encoder = None
    if spec.kind == "pixels":
        autoencoder = checkpoint.load_autoencoder(device)
        if isinstance(autoencoder, DiffusersAutoencoder):
            encoder, spec = autoencoder, replace(spec, channels=autoencoder.picture_channels)
    indices = choose_indices(args, spec)
    size = record.image_size if spec.kind == "pixels" else None
    images = build_loader(None, args.data, spec=spec, batch_size=args.batch_size, image_size=size, shuffle=False)
    network, log_p, evaluations = checkpoint.build_network(device), [], 0  # of the field, summed over the images
    with progress(len(indices), unit="img", desc="log p") as bar:
        for start in range(0, len(indices), args.batch_size):
            batch = indices[start : start + args.batch_size]
            samples = [images.dataset[i] for i in batch]  # by index: a loader pads an epoch, and has its own order
            values, used = log_p_of(args, samples, record, network, encoder)
            log_p += values
            evaluations += used * len(batch)
            bar.update(len(batch))

    pixels = record.autoencoder.name is None
    bits = bits_per_dim(torch.tensor(log_p, dtype=torch.float64), dims, 127.5 if pixels else 1.0).tolist()
    result = {
        "bits_per_dim": statistics.fmean(bits),
        "standard_error": statistics.stdev(bits) / math.sqrt(len(bits)) if len(bits) > 1 else None,
        "nats": statistics.fmean(log_p),
        "dims": dims,
        "of": "8-bit pictures" if pixels else "latents, not pictures",
        "data": {"path": args.data, "count": len(bits), "of": spec.samples, "kind": spec.kind, "image_size": size},
        "settings": {
            "mode": "ODE",
            **asdict(solve),
            "interval": record.build_transport().interval(eval=True),
            "dequantization": "uniform, (l + u - 1/2) / 127.5 - 1" if pixels else None,
            "batch_size": args.batch_size,
        },
        "evaluations": evaluations / len(bits),
        "checkpoint": checkpoint.describe(),
        **record.settings(),
        "versions": versions("sit-composer", "torch", "torchdiffeq", "numpy"),
        "pictures": indices,
        "log_p": log_p,
    }
    if args.out:
        write_json(result, Path(args.out))
    print(summary(result))


def choose_indices(args: argparse.Namespace, spec: DataSpec) -> list[int]:
    """The images of --num-images, or all."""
    if args.num_images is None:
        return list(range(spec.samples))
    if args.num_images > spec.samples:
        raise UserError(f"--num-images: got {args.num_images}, expected at most the {spec.samples} of {args.data}")
    # At random, not the first ones: shards often have one class after another.
    return sorted(np.random.default_rng(args.seed).choice(spec.samples, args.num_images, replace=False).tolist())


def check_fit(args: argparse.Namespace, record: Record, spec: DataSpec) -> None:
    """Checks that the shards hold what the network was trained on; raises UserError naming both."""
    ours, theirs = record.classes, spec.classes
    numbers = [str(label) for label in range(len(ours))]  # as names, they say only how many classes there are
    autoencoder, channels = record.autoencoder, record.latent_shape[0]
    # As in training, images are cropped for an encoder. Pixels are not resized: new levels would not be the data's.
    cropped = spec.kind == "pixels" and (autoencoder.name is not None or spec.image_size is None)
    if len(ours) != len(theirs):
        wrong = f"{len(theirs)} classes, expected {len(ours)}"
    elif ours != theirs and numbers not in (ours, theirs):
        a, b = next(pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1])
        wrong = f"the class {b!r}, expected {a!r}"
    elif spec.kind == "latents" and AutoencoderSpec(**spec.autoencoder) != autoencoder:
        expected = "pixels" if autoencoder.name is None else f"latents of {autoencoder}"
        wrong = f"latents of {AutoencoderSpec(**spec.autoencoder)}, expected {expected}"
    elif autoencoder.name is None and spec.channels != channels:
        wrong = f"images of {spec.channels} channels, expected {channels}"
    elif spec.image_size != record.image_size and not cropped:
        wrong = f"{spec.kind} of images of size {spec.image_size}, expected {record.image_size}"
    else:
        return
    raise UserError(f"{args.data}: got {wrong} as for {args.checkpoint}")


def log_p_of(
    args: argparse.Namespace, samples: list[dict], record: Record, network: SiT, encoder: DiffusersAutoencoder | None
) -> tuple[list[float], int]:
    """log p of samples of `data.SitDataset` given their labels, in nats, and the evaluations that the solver took."""
    generators, spec = [np.random.default_rng((args.seed, sample["index"])) for sample in samples], record.autoencoder
    given = torch.stack([sample["moments" if "moments" in sample else "image"] for sample in samples])
    if spec.name is None:
        noise = np.stack([g.random(given.shape[1:], dtype=np.float32) for g in generators])
        x = dequantize(given, torch.from_numpy(noise))
    else:
        moments = given.float() if encoder is None else encoder.moments(from_uint8(given))
        shape = (spec.channels, *moments.shape[2:])
        noise = np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators])
        x = spec.latents(moments, torch.from_numpy(noise).to(moments.device))
    if x.shape[1:] != record.latent_shape:
        raise UserError(f"{args.data}: got samples of {tuple(x.shape[1:])}, expected {record.latent_shape}")
    solve, probes = args.solve, None
    if not solve.exact:
        signs = [g.integers(0, 2, (solve.probes, *x.shape[1:]), dtype=np.int8) * 2 - 1 for g in generators]
        probes = torch.from_numpy(np.stack(signs, axis=1))  # (probes, N, C, H, W)
    options = {name: value for name, value in asdict(solve).items() if value is not None and name != "seed"}
    model, device = Counted(network), next(network.parameters()).device
    labels = torch.tensor([sample["label"] for sample in samples], device=device)
    values = log_likelihood(record.build_transport(), model, x.to(device), noise=probes, y=labels, **options)
    if not values.isfinite().all():
        raise UserError("--sampling-method: log p is NaN or infinite; try more steps, or another solver")
    return values.tolist(), model.evaluations


def summary(result: dict[str, Any]) -> str:
    """The result in one line."""
    data, settings, error = result["data"], result["settings"], result["standard_error"]
    value = f"{result['bits_per_dim']:.4f}" + ("" if error is None else f" ± {error:.4f}")
    probes = settings["probes"]
    trace = "exact trace" if settings["exact"] else "1 probe" if probes == 1 else f"{probes} probes"
    cost = f"{settings['sampling_method']}, {result['evaluations']:.0f} evaluations, {trace}"
    return f"{value} bits/dim of {result['of']} ({data['count']} of {data['of']}; {cost})"
