"""Compares generated images with real ones: see `sit_composer.evaluate`."""

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sit_composer.choices import METRICS
from sit_composer.errors import UserError
from sit_composer.evaluation.features import OUTPUTS, Extractor, load_extractor
from sit_composer.evaluation.metrics import STATISTICS
from sit_composer.evaluation.picture_sets import PictureSet, open_set
from sit_composer.evaluation.results import compute, report, save_statistics
from sit_composer.outputs import versions, write_json


def run(args: argparse.Namespace) -> None:
    """Prints the metrics, and writes them with everything that they depend on to ``args.out``, if given."""
    with tempfile.TemporaryDirectory(prefix="sit-", ignore_cleanup_errors=True) as temporary:
        cache = args.cache or temporary
        try:
            os.makedirs(cache, exist_ok=True)
        except OSError as error:
            raise UserError(f"--cache: {cache} can't be made ({error.strerror})") from error
        judge(args, open_set(args.samples, cache=cache), open_set(args.reference, args.image_size, cache))


def judge(args: argparse.Namespace, samples: PictureSet, reference: PictureSet) -> None:
    """Does what `run` says, with sets that are open."""
    chosen = Choice(args.by_name, samples, reference)
    if args.save_statistics and reference.batches is None:
        raise UserError(f"--save-statistics: {reference.path} has nothing but statistics already")
    extractor = load_extractor(args.features)
    notes, stored = check_statistics(reference, extractor), reference.statistics
    fake = extract(samples, extractor, args.batch_size, chosen)
    for output, (mu, _) in STATISTICS.items():
        if output in fake and mu in stored and stored[mu].shape != fake[output].shape[1:]:
            got, expected = f"{stored[mu].size} {output} numbers", f"the {fake[output].shape[1]} of {extractor.name}"
            advice = "use the extractor of these statistics"
            raise UserError(f"{reference.path}: {mu}: got {got}, expected {expected}; {advice}")
    real = {}
    needs_images = not stored or any(METRICS[name].reference == "images" for name in chosen.names)
    if reference.batches and (needs_images or args.save_statistics):
        real = extract(reference, extractor, args.batch_size, chosen, ("features", "spatial"))
        if reference.size != samples.size:
            sizes = [" × ".join(map(str, images.size)) for images in (samples, reference)]
            notes.append(f"the samples are {sizes[0]}, and the reference's images {sizes[1]}")
    notes += [*samples.notes(), *reference.notes()]
    dimension = fake["features"].shape[1]
    for images in (samples,) if stored else (samples, reference):
        if "fid" in chosen.names and images.count <= dimension:
            what = f"{images.count} images for {dimension} features: the covariance is singular, and the Fréchet"
            advice = f"use more than {dimension} (published numbers use 50,000)"
            notes.append(f"{images.path}: {what} distance biased; {advice}")
    if extractor.name != "inception":
        notes.append("the features are not Inception's: no number here compares with published ones")

    values, settings = compute(chosen.names, fake, real, stored)
    if args.save_statistics:
        save_statistics(Path(args.save_statistics), real, extractor.identity)
    origin = "stored" if stored else "computed"
    result = {
        "metrics": values,
        "left_out": chosen.left_out,
        "warnings": notes,
        "settings": settings,
        "samples": {**samples.describe(), "sampling": samples.settings},
        "reference": {**reference.describe(), "image_size": args.image_size, "statistics": origin},
        "features": {"name": extractor.name, "of": extractor.identity, "dimension": dimension},
        "versions": versions("sit-composer", "torch", "torch-fidelity", "numpy"),
    }
    if args.out:
        write_json(result, Path(args.out))
    report(result)


def check_statistics(reference: PictureSet, extractor: Extractor) -> list[str]:
    """Drops stored statistics of another extractor, and returns a warning, if there are images instead."""
    if not reference.statistics or reference.of in (None, extractor.identity):
        return []
    if reference.batches is None:
        expected = f"expected {extractor.identity} (--features)"
        raise UserError(f"{reference.path}: got statistics of {reference.of}, {expected}")
    reference.statistics = {}
    return [f"{reference.path}: its statistics are of {reference.of}; its images were used instead"]


class Choice:
    """The metrics that the sets allow. Another one is an error if asked for by name, else it is left out."""

    def __init__(self, by_name: list[str], samples: PictureSet, reference: PictureSet) -> None:
        self.by_name = by_name
        self.names = [name for name in METRICS if not by_name or name in by_name]
        self.left_out: dict[str, str] = {}
        if samples.batches is None:
            raise UserError(f"{samples.path}: holds statistics only, expected images for SAMPLES")
        if reference.statistics and "mu_s" not in reference.statistics:
            self.drop("sfid", f"it needs mu_s and sigma_s, which {reference.path} has not")
        for name, metric in METRICS.items():
            if metric.reference == "images" and reference.batches is None:
                self.drop(name, f"it needs the reference's images, and {reference.path} has statistics only")
            for images in (samples, reference) if metric.reference else (samples,):
                if images.batches and images.count < metric.least:
                    self.drop(name, f"it needs at least {metric.least} images; {images.path} has {images.count}")
        if not self.names:
            raise UserError("; ".join(f"{name}: {reason}" for name, reason in self.left_out.items()))

    def drop(self, name: str, reason: str) -> None:
        if name in self.names:
            if name in self.by_name:
                raise UserError(f"--metrics {name}: {reason}")
            self.names.remove(name)
            self.left_out[name] = reason


def extract(
    images: PictureSet, extractor: Extractor, batch_size: int, chosen: Choice, outputs: tuple[str, ...] = OUTPUTS
) -> dict[str, np.ndarray]:
    """Those outputs that the chosen metrics need: float32 arrays (N, D). Notes the images' size."""
    parts: dict[str, list[np.ndarray]] = {}
    done, title = 0, f"features of {Path(images.path).name}"
    with tqdm(total=images.count, unit="img", desc=title, disable=None) as bar:
        for batch in images.batches(batch_size):
            out = extractor(batch)
            if not done:
                images.size = list(batch.shape[-2:])
                for name, metric in METRICS.items():
                    if metric.output not in out:
                        chosen.drop(name, f"it needs {metric.output}, which {extractor.name} doesn't give")
            needed = {"features", *(METRICS[name].output for name in chosen.names)}
            for output in [output for output in outputs if output in needed]:
                bad = ~np.isfinite(out[output]).all(axis=1)
                if bad.any():
                    where = f"{output} of image {done + bad.argmax()} of {images.path}"
                    raise UserError(f"{extractor.name}: {where} are not finite")
                before = parts.setdefault(output, [])
                if before and before[0].shape[1] != out[output].shape[1]:
                    what = f"{output} have another length from image {done} of {images.path} on"
                    raise UserError(f"{extractor.name}: {what}")
                before.append(out[output])
            done += len(batch)
            bar.update(len(batch))
    if done != images.count:
        raise UserError(f"{images.path}: read {done} images, expected {images.count}")
    return {output: np.concatenate(arrays) for output, arrays in parts.items()}
