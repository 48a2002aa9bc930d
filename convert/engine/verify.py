"""The body of `verify_mds.py`: checks a finished conversion, one shard at a time."""

import argparse
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from streaming.base.format import Reader
from tqdm import tqdm

from convert.kinds.checks import LatentCheck, PixelCheck
from convert.sources.registry import InputError, plan_source, read_part
from sit_composer.cli import is_remote
from sit_composer.data.folders import in_words
from sit_composer.data.spec import INDEX_NAME, SPEC_NAME, DataSpec
from sit_composer.data.stream import DataError, load_spec, read_text, safe_shards, shard_fault, shard_files
from sit_composer.errors import UserError, one_line
from sit_composer.storage import open_store

SHARD = re.compile(r"(again-)?shard\.[\d.]+\.mds")
FAULTS_SHOWN = 20


def run(args: argparse.Namespace) -> int:
    """Prints the report, and returns the exit code."""
    verification = Verification(args)
    for line in verification.report():
        print(line)
    faults = verification.faults
    more = f", of which {FAULTS_SHOWN} are shown" if faults > FAULTS_SHOWN else ""
    print(f"{args.uri}: " + (f"{faults} fault{'' if faults == 1 else 's'}{more}" if faults else "all is well"))
    return 1 if faults else 0


class Verification:
    """The checks of a folder of shards, and the number of their ``faults``. ``args`` is the command line."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.uri, self.faults = args, args.uri, 0
        self.store = open_store(args.uri) if is_remote(args.uri) else None
        self.files = set(self.store.listing() if self.store else os.listdir(args.uri))
        if self.store and not self.files:
            raise UserError(f"{self.uri}: no object below it")

    def fault(self, line: object) -> None:
        """Prints a line for one of the first faults, and counts it."""
        self.faults += 1
        if self.faults <= FAULTS_SHOWN:
            print("fault:", " ".join(str(line).split()))

    def report(self) -> list[str]:
        """Adds the faults, and returns the lines of the report."""
        for name in (INDEX_NAME, SPEC_NAME):
            if name not in self.files:
                self.fault(f"{self.uri}/{name} is missing: the conversion was not finished")
        if self.faults:
            return []
        remote, local = (self.uri, "") if self.store else (None, self.uri)
        try:
            spec = load_spec(remote, local)
            shards = safe_shards(*read_text(remote, local, INDEX_NAME), local, spec)
        except DataError as error:
            self.fault(error)
            return []
        self._check_counts(spec, shards)
        if spec.kind != "latents" and self.args.vae:
            raise UserError(f"--vae: only for latents; {self.uri} holds images")
        grid = bool(self.args.grid)
        latents = spec.kind == "latents"
        content = LatentCheck(spec, self.fault, self.args.vae, grid) if latents else PixelCheck(spec, self.fault, grid)
        counts = self._read_all(shards, spec, content)
        size, per_class = sum(shard.raw_data.bytes for shard in shards) / 1e6, spec.class_counts
        each = f"{min(per_class)} to {max(per_class)} samples" if per_class else "none"
        total = f"{len(shards)} shard{'' if len(shards) == 1 else 's'}, {size:.1f} MB"
        classes = f"{spec.num_classes} classes of {each}"
        of = spec.features
        report = [f"features of {of['teacher']}: {of['grid']}x{of['grid']} tokens of {of['width']}"] if of else []
        report += [f"{spec.samples} samples ({spec.kind}) in {total}; {classes}; {spec.skipped} skipped"]
        report += [f"left out: {in_words(spec.left_out)}"] if spec.left_out else []
        report += [f"small images: {in_words(spec.small)}"] if spec.small else []
        if counts is not None:
            self._compare(counts, spec.class_counts, spec, SPEC_NAME)
            report += content.finish()
            if self.args.source:
                report.append(self._check_source(spec))
        if self.args.grid and content.write_grid(self.args.grid):
            report.append(f"{self.args.grid}: written")
        return report

    def _check_counts(self, spec: DataSpec, shards: list[Reader]) -> None:
        """Compares the index with the folder and the spec."""
        listed = {shard.raw_data.basename for shard in shards}
        for name in filter(SHARD.fullmatch, sorted(self.files - listed)):
            self.fault(f"{self.uri}/{name} is not in {INDEX_NAME}: delete it, or convert again")
        samples, counted = sum(shard.samples for shard in shards), sum(spec.class_counts)
        if not samples:
            self.fault(f"{self.uri}/{INDEX_NAME} lists no sample")
        if samples != spec.samples or counted != spec.samples:
            self.fault(f"{INDEX_NAME} lists {samples} samples; {SPEC_NAME} says {spec.samples}, and {counted} by class")
        if len(set(spec.classes)) < len(spec.classes):
            self.fault(f"{SPEC_NAME} names a class twice")

    def _read_all(self, shards: list[Reader], spec: DataSpec, content: PixelCheck | LatentCheck) -> list[int] | None:
        """Checks each shard and its samples; returns the samples per class, or None if a shard can't be read."""
        total, sample = sum(shard.samples for shard in shards), self.args.sample
        chosen = range(total) if sample is None or sample >= total else {i * total // sample for i in range(sample)}
        counts, first, whole = Counter[int](), 0, True
        size = sum(shard.raw_data.bytes for shard in shards)
        with tqdm(total=size, unit="B", unit_scale=True, disable=None) as progress:
            for number, shard in enumerate(shards):
                progress.set_postfix_str(f"{number + 1} of {len(shards)} shards")
                try:
                    rows = self._rows(shard)
                except ValueError as error:  # also StorageError
                    self.fault(error)
                    rows, whole = [], False
                placed = [(f"{shard.raw_data.basename} sample {i}", row) for i, row in enumerate(rows)]
                for where, row in placed:
                    if not 0 <= row["label"] < spec.num_classes:
                        self.fault(f"{where}: the label is {row['label']}, but there are {spec.num_classes} classes")
                counts.update(int(row["label"]) for row in rows)
                content.check([one for i, one in enumerate(placed, first) if i in chosen])
                first += shard.samples
                progress.update(shard.raw_data.bytes)
        return [counts[label] for label in range(spec.num_classes)] if whole else None

    def _rows(self, shard: Reader) -> list[dict[str, Any]]:
        """The samples of a shard. Raises ValueError if it is wrong, StorageError if it cannot be fetched."""
        name = shard.raw_data.basename
        if len(shard_files(shard)) != 1:
            raise ValueError(f"{self.uri}/{name} is compressed, which to_mds.py doesn't do")
        if name not in self.files:
            raise ValueError(f"{self.uri}/{name} is missing")
        if not shard.raw_data.hashes:
            self.fault(f"{self.uri}/{name} has no hash in the index: changes in it cannot be detected")
        with tempfile.TemporaryDirectory(prefix="verify_mds-") if self.store else nullcontext(self.uri) as folder:
            if self.store:
                self.store.download(name, Path(folder, name))
            if fault := shard_fault(shard, folder):
                raise ValueError(fault.replace(folder, self.uri, 1))
            data = Path(folder, name).read_bytes()
        try:
            return list(_decoded(shard, data))
        except Exception as error:  # its decoders raise many kinds
            raise ValueError(f"{self.uri}/{name} is no MDS shard of these columns ({error})") from error

    def _compare(self, counts: list[int], others: Iterable[int], spec: DataSpec, where: str) -> None:
        for label, (ours, theirs) in enumerate(zip(counts, others, strict=True)):
            if ours != theirs:
                name = f"class {label} ({spec.classes[label]})"
                self.fault(f"{name} has {ours} samples in the shards; {where} says {theirs}")

    def _check_source(self, spec: DataSpec) -> str:
        """Counts the source's images per class, as they are now."""
        try:
            plan = plan_source(spec.source, spec.source.get("limit"))
            counts, left_out = [0] * spec.num_classes, Counter(plan.left_out)
            ids = spec.source.get("class_ids", spec.classes)
            numbers = [str(number) for number in range(len(ids))]  # as --class-names finds them
            classes = plan.classes or ids
            known = numbers if ids != spec.classes and classes == numbers else ids
            if set(classes) != set(known):
                self.fault(f"the source's classes are {classes[:5]} …; {SPEC_NAME} says {spec.classes[:5]} …")
                return f"source: {spec.source['path']} has other classes"
            labels = {name: label for label, name in enumerate(known)}  # earlier versions had another order
            for sample in chain.from_iterable(read_part(spec.source, plan, part) for part in plan.parts):
                if not 0 <= sample.label < spec.num_classes:
                    raise InputError(f"{sample.where}: the label is {sample.label}")
                counts[labels[classes[sample.label]]] += 1
                left_out.update(sample.left_out)
        except (InputError, OSError, IndexError) as error:
            raise UserError(f"--source: cannot read it again: {one_line(error)}") from None
        total, fewer = sum(counts), any(a > b for a, b in zip(spec.class_counts, counts, strict=True))
        if not spec.skipped:
            self._compare(spec.class_counts, counts, spec, "the source")
        elif total - spec.samples != spec.skipped or fewer:
            self.fault(f"the source has {total} images; {SPEC_NAME} says {spec.samples}, and {spec.skipped} skipped")
        rest = f"; left out: {in_words(left_out)}" if left_out else ""
        return f"source: {total} images in {spec.source['path']}, {spec.skipped} skipped{rest}"


def _decoded(shard: Reader, data: bytes) -> Iterator[dict[str, Any]]:
    """The samples of a shard, which begins with their number, the place of each, and the place of the end."""
    (count,) = np.frombuffer(data, np.uint32, 1)
    if count != shard.samples:
        raise ValueError(f"it has {count} samples; the index says {shard.samples}")
    bounds = np.frombuffer(data, np.uint32, count + 1, 4).tolist()
    if bounds != sorted(bounds) or bounds[-1] != len(data):
        raise ValueError("its table of samples is broken")
    for begin, end in pairwise(bounds):
        yield shard.decode_sample(data[begin:end])
