"""Compares generated images with real ones: see `sit_composer.evaluate`."""

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sit_composer.bars import progress
from sit_composer.choices import METRICS
from sit_composer.errors import UserError
from sit_composer.evaluation.features import OUTPUTS, Extractor, load_extractor
from sit_composer.evaluation.metrics import STATISTICS
from sit_composer.evaluation.picture_sets import PictureSet, open_set
from sit_composer.evaluation.results import compute, markdown, print_notes, save_statistics
from sit_composer.outputs import versions, write_json


def run(args: argparse.Namespace) -> None:
    """Prints the metrics, and writes them with everything that they depend on to ``args.out``, if given."""
    with cache_folder(args.cache) as cache:
        samples = open_set(args.samples, cache=cache)
        reference = open_set(args.reference, args.image_size, cache)
        if args.save_statistics and reference.batches is None:
            raise UserError(f"--save-statistics: {reference.path} has nothing but statistics already")
        comparison = Comparison(args, samples, reference)
        fake = extract(samples, comparison.extractor, args.batch_size, comparison.chosen)
        comparison.check_fit(fake)  # before the reference's images are read
        comparison.read_reference(bool(args.save_statistics))
        result = comparison.result(samples, fake)
    if args.save_statistics:
        save_statistics(Path(args.save_statistics), comparison.real, comparison.extractor.identity)
    if args.out:
        write_json(result, Path(args.out))
    print_notes([result], result["samples"]["path"])
    print(markdown(result))


@contextmanager
def cache_folder(cache: str | None) -> Iterator[str]:
    """The folder for copies of remote shards: the given one, or one that is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="sit-", ignore_cleanup_errors=True) as temporary:
        try:
            os.makedirs(cache or temporary, exist_ok=True)
        except OSError as error:
            raise UserError(f"--cache: {cache} can't be made ({error.strerror})") from error
        yield cache or temporary


class Comparison:
    """A reference, an extractor, and the metrics by which generated images are compared with it.

    Its options are --features, --metrics, --batch-size and --image-size of `sit_composer.evaluate`. ``samples`` are
    the first that are compared; others must be as many.
    """

    def __init__(self, args: argparse.Namespace, samples: PictureSet, reference: PictureSet) -> None:
        self.args = args
        self.reference = reference
        self.chosen = Choice(args.by_name, samples, reference, "," in args.features)
        self.extractor = load_extractor(args.features)
        self.notes = check_statistics(reference, self.extractor)
        self.real: dict[str, np.ndarray] = {}  # the reference's features

    def check_fit(self, fake: dict[str, np.ndarray]) -> None:
        """Raises UserError if the reference's statistics, or its features, have another number of features."""
        stored, name = self.reference.statistics, self.extractor.name
        for output, (mu, _) in STATISTICS.items():
            if output in fake and mu in stored and stored[mu].shape != fake[output].shape[1:]:
                got, expected = f"{stored[mu].size} {output} numbers", f"the {fake[output].shape[1]} of {name}"
                advice = "use the extractor of these statistics"
                raise UserError(f"{self.reference.path}: {mu}: got {got}, expected {expected}; {advice}")
        for output in self.real.keys() & fake.keys():
            if (got := self.real[output].shape[1]) != (expected := fake[output].shape[1]):
                what = f"{name} gives {got} {output} an image, expected {expected}, as of the samples"
                raise UserError(f"{self.reference.path}: {what}; --image-size crops the reference to their size")

    def read_reference(self, statistics: bool = False) -> None:
        """Reads the reference's images, if the metrics, or ``statistics`` to save, need them."""
        images = any(METRICS[name].reference == "images" for name in self.chosen.names)
        if self.reference.batches and not self.real and (images or statistics or not self.reference.statistics):
            outputs = ("features", "spatial", "second")
            self.real = extract(self.reference, self.extractor, self.args.batch_size, self.chosen, outputs)

    def result(self, samples: PictureSet, fake: dict[str, np.ndarray]) -> dict[str, Any]:
        """The metrics of images with these features, and everything that they depend on; the reference is read."""
        self.check_fit(fake)
        chosen, extractor, reference, stored = self.chosen, self.extractor, self.reference, self.reference.statistics
        notes, described = list(self.notes), dict[str, dict[str, Any]]()
        if self.real and reference.size != samples.size:
            sizes = [" × ".join(map(str, images.size)) for images in (samples, reference)]
            notes.append(f"the samples are {sizes[0]}, and the reference's images {sizes[1]}")
        notes += [*samples.notes(), *reference.notes()]
        for name, part in (("fid", extractor), ("fd", extractor.second)):
            if part is None or (output := METRICS[name].output) not in fake:
                continue
            dimension = fake[output].shape[1]
            described[output] = {"name": part.name, "of": part.identity, "dimension": dimension}
            for images in (samples,) if stored and name == "fid" else (samples, reference):
                if name in chosen.names and images.count <= dimension:
                    what = f"{images.count} images for {dimension} features: the covariance is singular, and the"
                    advice = f"use more than {dimension} (published numbers use 50,000)"
                    notes.append(f"{images.path}: {what} Fréchet distance biased; {advice}")
        if extractor.name == "dinov2":
            notes.append("the features are DINOv2's: FDD compares with published FDD (FD-DINOv2), not with FID")
        elif "inception" not in (extractor.name, extractor.second and extractor.second.name):
            notes.append("the features are not Inception's: no number here compares with published ones")
        values, settings = compute(chosen.names, fake, self.real, stored)
        origin = "stored" if stored else "computed"
        return {
            "metrics": values,
            "left_out": chosen.left_out,
            "warnings": notes,
            "settings": settings,
            "samples": {**samples.describe(), "sampling": samples.settings},
            "reference": {**reference.describe(), "image_size": self.args.image_size, "statistics": origin},
            **described,
            "versions": versions("sit-composer", "torch", "torch-fidelity", "numpy"),
        }


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

    def __init__(self, by_name: list[str], samples: PictureSet, reference: PictureSet, second: bool) -> None:
        self.by_name = by_name
        possible = [name for name, metric in METRICS.items() if second or metric.output != "second"]
        self.names = [name for name in possible if not by_name or name in by_name]
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


class Collected:
    """The features of images that come in batches: those outputs that the chosen metrics need."""

    def __init__(self, path: str, extractor: Extractor, chosen: Choice, outputs: tuple[str, ...] = OUTPUTS) -> None:
        self.path = path  # of the images
        self.extractor = extractor if "fd" in chosen.names else replace(extractor, second=None)
        self.chosen = chosen
        self.outputs = outputs
        self.size: list[int] | None = None  # (H, W) of the images
        self.done = 0  # images
        self._parts: dict[str, list[np.ndarray]] = {}

    def add(self, batch: Tensor) -> None:
        """Extracts the features of images, uint8 (n, 3, H, W). The first ones show which metrics are possible."""
        out, name = self.extractor(batch), self.extractor.name
        if not self.done:
            self.size = list(batch.shape[-2:])
            for metric_name, metric in METRICS.items():
                if metric.output not in out:
                    self.chosen.drop(metric_name, f"it needs {metric.output}, which {name} doesn't give")
        needed = {"features", *(METRICS[metric].output for metric in self.chosen.names)}
        for output in [output for output in self.outputs if output in needed]:
            bad = ~np.isfinite(out[output]).all(axis=1)
            name = self.extractor.second.name if output == "second" else self.extractor.name
            if bad.any():
                raise UserError(f"{name}: {output} of image {self.done + bad.argmax()} of {self.path} are not finite")
            before = self._parts.setdefault(output, [])
            if before and before[0].shape[1] != out[output].shape[1]:
                raise UserError(f"{name}: {output} have another length from image {self.done} of {self.path} on")
            before.append(out[output])
        self.done += len(batch)

    def arrays(self) -> dict[str, np.ndarray]:
        """Float32 (N, D)."""
        return {output: np.concatenate(arrays) for output, arrays in self._parts.items()}


def extract(
    images: PictureSet, extractor: Extractor, batch_size: int, chosen: Choice, outputs: tuple[str, ...] = OUTPUTS
) -> dict[str, np.ndarray]:
    """Those outputs that the chosen metrics need: float32 arrays (N, D). Notes the images' size."""
    collected = Collected(images.path, extractor, chosen, outputs)
    title = f"features of {Path(images.path).name}"
    with progress(images.count, unit="img", desc=title) as bar:
        for batch in images.batches(batch_size):
            collected.add(batch)
            bar.update(len(batch))
    if collected.done != images.count:
        raise UserError(f"{images.path}: read {collected.done} images, expected {images.count}")
    images.size = collected.size
    return collected.arrays()
