"""Compares generated images with real ones: see `sit_composer.evaluate`."""

import argparse
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sit_composer.choices import LEAST, METRICS, NEEDS_PICTURES, OUTPUT
from sit_composer.errors import UserError
from sit_composer.evaluation.features import Extractor, load_extractor
from sit_composer.evaluation.metrics import STATISTICS
from sit_composer.evaluation.picture_sets import PictureSet, is_remote, open_set
from sit_composer.evaluation.results import compute, describe, save_statistics, versions, write
from sit_composer.outputs import check_output, holds_arrays, holds_key


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The result: metrics, and what they depend on; written to ``args.out`` if that is given.

    Raises:
        UserError: for what cannot be read, or a metric asked for that cannot be had.
    """
    check_output("--out", args.out, ".json", holds_key("metrics"))
    check_output("--save-statistics", args.save_statistics, ".npz", holds_arrays("mu", "sigma", "features"))
    with ExitStack() as stack:
        cache = args.cache
        if cache is not None:
            try:
                os.makedirs(cache, exist_ok=True)
            except OSError as error:
                raise UserError(f"--cache: {cache} can't be made ({error.strerror})") from error
        elif is_remote(args.samples) or is_remote(args.reference):
            cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="sit-", ignore_cleanup_errors=True))
        return judge(args, open_set(args.samples, cache=cache), open_set(args.reference, args.image_size, cache))


def judge(args: argparse.Namespace, samples: PictureSet, reference: PictureSet) -> dict[str, Any]:
    """The result of `run`, of sets that are open."""
    chosen = Choice(args.by_name)
    chosen.check_sets(samples, reference)
    if args.save_statistics and reference.batches is None:
        raise UserError(f"--save-statistics: {reference.path} has nothing but statistics already")
    extractor = load_extractor(args.features)
    notes = check_statistics(reference, extractor)

    fake = extract(samples, extractor, args.batch_size, chosen)
    dimension = fake["features"].shape[1]
    stored = reference.statistics
    for output, (mu, _) in STATISTICS.items():
        if output in fake and mu in stored and stored[mu].shape != fake[output].shape[1:]:
            numbers = f"{stored[mu].size} {output} numbers, and {extractor.name} gives {fake[output].shape[1]}"
            raise UserError(f"{reference.path}: {mu} is of {numbers}: take the extractor that it was made with")
    real = {}
    if reference.batches and (not stored or set(chosen.names) & set(NEEDS_PICTURES) or args.save_statistics):
        real = extract(reference, extractor, args.batch_size, chosen, ("features", "spatial"))
        if reference.size != samples.size:
            sizes = [" × ".join(map(str, pictures.size)) for pictures in (samples, reference)]
            notes.append(f"the samples are {sizes[0]}, and the reference's pictures {sizes[1]}")
    for pictures in (samples,) if stored else (samples, reference):
        if "fid" in chosen.names and pictures.count <= dimension:
            notes.append(
                f"{pictures.path}: {pictures.count} pictures for {dimension} features: the covariance is singular, and "
                f"the Fréchet distance biased; take more than {dimension} (published numbers are of 50,000)"
            )
    if extractor.name != "inception":
        notes.append("the features are not Inception's: no number here compares with published ones")

    values, settings = compute(chosen.names, fake, real, stored)
    if args.save_statistics:
        save_statistics(Path(args.save_statistics), real, extractor.identity)
    result = {
        "metrics": values,
        "left_out": chosen.left_out,
        "warnings": notes,
        "settings": settings,
        "samples": {**describe(samples), "sampling": samples.settings},
        "reference": describe(reference)
        | {"image_size": args.image_size, "statistics": "stored" if stored else "computed"},
        "features": {"name": extractor.name, "of": extractor.identity, "dimension": dimension},
        "versions": versions(),
    }
    if args.out:
        write(result, Path(args.out))
    return result


def check_statistics(reference: PictureSet, extractor: Extractor) -> list[str]:
    """Forgets stored statistics of another extractor if there are pictures instead, and then says so.

    Raises:
        UserError: if there are none.
    """
    if not reference.statistics or reference.of in (None, extractor.identity):
        return []
    if reference.batches is None:
        raise UserError(f"{reference.path}: statistics of {reference.of}; --features has {extractor.identity}")
    reference.statistics = {}
    return [f"{reference.path}: its statistics are of {reference.of}; its pictures were taken instead"]


class Choice:
    """The metrics still to compute. One that can't be had is refused if asked for by name, else left out."""

    def __init__(self, by_name: list[str]) -> None:
        self.by_name = by_name
        self.names = [name for name in METRICS if not by_name or name in by_name]
        self.left_out: dict[str, str] = {}

    def drop(self, name: str, reason: str) -> None:
        if name in self.names:
            if name in self.by_name:
                raise UserError(f"--metrics {name}: {reason}")
            self.names.remove(name)
            self.left_out[name] = reason

    def check_sets(self, samples: PictureSet, reference: PictureSet) -> None:
        """Drops what the sets don't allow; an error if nothing remains."""
        if samples.batches is None:
            raise UserError(f"{samples.path}: holds statistics only; SAMPLES takes pictures")
        if reference.statistics and "mu_s" not in reference.statistics:
            self.drop("sfid", f"it needs mu_s and sigma_s, which {reference.path} has not")
        for name in METRICS:
            sets = [samples] if name == "is" else [samples, reference]
            if name in NEEDS_PICTURES and reference.batches is None:
                self.drop(name, f"it needs the reference's pictures, and {reference.path} has statistics only")
                sets = [samples]
            for pictures in sets:
                if pictures.batches and pictures.count < LEAST[name]:
                    self.drop(name, f"it needs {LEAST[name]} pictures or more; {pictures.path} has {pictures.count}")
        if not self.names:
            raise UserError("; ".join(f"{name}: {reason}" for name, reason in self.left_out.items()))


def extract(
    pictures: PictureSet,
    extractor: Extractor,
    batch_size: int,
    chosen: Choice,
    outputs: tuple = ("features", "spatial", "logits"),
) -> dict[str, Any]:
    """Those outputs that the chosen metrics need: float32 arrays (N, D). Notes the pictures' size.

    Raises:
        UserError: if pictures or extractor fail, an output is not finite, or lacks for a metric asked for by name.
    """
    parts: dict[str, list[Any]] = {}
    done = 0
    what = f"features of {Path(pictures.path).name}"
    with tqdm(total=pictures.count, unit="img", desc=what, disable=None) as bar:
        for batch in pictures.batches(batch_size):
            out = extractor(batch)
            if not done:
                pictures.size = list(batch.shape[-2:])
                for name, output in OUTPUT.items():
                    if output not in out:
                        chosen.drop(name, f"it needs {output}, which {extractor.name} doesn't give")
            needed = {"features"} | {OUTPUT[name] for name in chosen.names if name in OUTPUT}
            for name in [name for name in outputs if name in needed]:
                bad = ~np.isfinite(out[name]).all(axis=1)
                if bad.any():
                    raise UserError(
                        f"{extractor.name}: {name} of picture {done + bad.argmax()} of {pictures.path} are not finite"
                    )
                if parts.get(name) and parts[name][0].shape[1] != out[name].shape[1]:
                    raise UserError(
                        f"{extractor.name}: {name} are of another length from picture {done} of {pictures.path} on"
                    )
                parts.setdefault(name, []).append(out[name])
            done += len(batch)
            bar.update(len(batch))
    if done != pictures.count:
        raise UserError(f"{pictures.path}: {done} pictures were read of {pictures.count}")
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}
