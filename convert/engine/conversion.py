"""The body of `to_mds.py`: checks output and source, converts the parts that are not done, publishes, and reports."""

import argparse
import os
import signal
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from convert.engine.decoders import Decoders
from convert.engine.output import Output, OutputError
from convert.engine.pipeline import Job, Tally, convert_parts
from convert.engine.plan import Plan, identity
from convert.engine.progress import Progress
from convert.engine.vae import VaeConfig, find_config
from convert.kinds import MEASURE, BadPicture
from convert.kinds.pixels import Pixels
from convert.sources.class_names import name_classes
from convert.sources.parts import MAX_CLASSES, InputError
from convert.sources.registry import plan_source, read_part
from sit_composer.cli import load
from sit_composer.data.folders import in_words
from sit_composer.data.spec import SPEC_NAME, DataSpec
from sit_composer.errors import one_line
from sit_composer.storage import StorageError

FAILED = 1  # exit code for a failing disk or network
ENOUGH = 1000  # images of a part, to doubt the statistics that were given
SMALL = 2000  # images; for fewer, starting processes would take longer than the work
Records = Generator[dict[str, Any], None, None]  # of parts


def run(args: argparse.Namespace) -> int:
    """Converts the source that the options describe. Returns the exit code; UserError if the command is mistaken."""
    source = args.described
    with Output(args.out) as output:
        if source["format"] == "imagefolder" and output.path:
            root = Path(source["path"]).resolve()
            if root in output.path.parents:  # shards inside a folder of images would be one of its classes next time
                raise OutputError(f"{args.out}: is inside the source, {root}; choose another --out")
        output.is_done(source, args.overwrite)  # a wrong folder, address or credential is reported before reading
        try:
            return _convert(args, source, output)
        except (StorageError, OSError) as error:
            print("error:", one_line(error), file=sys.stderr)
        except MemoryError as error:
            print("error:", str(error) or "out of memory: rerun with fewer --workers", file=sys.stderr)
        return FAILED


def _convert(args: argparse.Namespace, source: dict[str, Any], output: Output) -> int:
    vae = find_config(args.vae) if args.latents else None
    if vae and args.image_size:
        vae.check_size(args.image_size)
    if vae:
        if args.statistics not in (None, MEASURE):
            args.statistics = _torch_kinds()[2].read_statistics(args.statistics, vae.layout.channels)
        source["device"] = device = _torch_kinds()[1].default_device()  # another kind of processor gives other bits
        source["encode_dtype"] = args.encode_dtype or ("bfloat16" if device == "cuda" else "float32")
    reading = plan_source(source, args.limit)
    if reading.files:
        source["files"] = identity(reading.files)
    if vae:
        source |= vae.identity()
    if args.features:
        features = args.features, args.features_grid, source["encode_dtype"]
        source["teacher_digest"] = _torch_kinds()[1].open_teacher(*features).digest
    names = None
    if args.class_names:
        classes, source["class_ids"], names = name_classes(args.class_names, args.names, reading.classes)
        reading = replace(reading, classes=classes)
    plan = Plan(source, reading, names)
    if output.is_done(source, args.overwrite):
        print(f"already converted: {args.out} holds this source, nothing to do")
        return 0
    records = output.begin(plan, args.overwrite)
    kind, options = _kind(args, plan, vae)
    made = kind(**options)
    with _signals_wait():
        load("torch", "streaming")
        from convert.engine.shards import PartWriter  # streaming takes seconds: all checks come before

    job = Job(plan, made, output, args.skip_bad, PartWriter)
    _spec(job, Tally(Counter([0])))  # what it would refuse after the work
    parts, done = len(reading.parts), Tally.of(records.values()).images
    if records:
        print(f"resumes: {len(records)} of {parts} parts, {done} images, are done", file=sys.stderr)
    progress = Progress(plan.rows, done, args.log)
    try:
        progress.log("start", source=source, out=args.out, parts=parts, finished=len(records))
        todo = [number for number in range(parts) if number not in records]
        convert = partial(_on_ray, options=options) if args.engine == "ray" else partial(_here, workers=args.workers)
        with closing(convert(job, todo=todo, progress=progress)) as results:  # before the output is released
            for record in results:
                records[record["part"]] = record
                if record.get("sums") and sum(record["counts"].values()) >= ENOUGH and args.statistics != MEASURE:
                    made.check_part(record["sums"])  # wrong statistics are refused before hours of work
                progress.log("part", part=record["part"], pictures=sum(record["counts"].values()))
        ordered = [records[number] for number in sorted(records)]
        spec = _spec(job, Tally.of(ordered))
        output.publish(spec, ordered)
        progress.log("end", samples=spec.samples, skipped=spec.skipped, left_out=spec.left_out, **progress.rates())
    except BaseException as error:
        progress.log("error", error=one_line(error))
        raise
    finally:
        progress.close()
    _report(spec, ordered, progress.rates())
    print(args.out)
    return 0


def _kind(args: argparse.Namespace, plan: Plan, vae: VaeConfig | None) -> tuple[type, dict[str, Any]]:
    """The class of what is made of images, and its arguments."""
    if vae is None and args.image_size is None:
        return Pixels, {"check": args.check or "decode"}
    cropping, latents, _ = _torch_kinds()
    if vae is None:
        return cropping.CroppedPixels, {"image_size": args.image_size, "quality": args.quality}
    vae.check_size(size := args.image_size or _first_size(plan, args.skip_bad))
    return latents.Latents, {
        "vae": args.vae,
        "image_size": size,
        "crop": args.image_size is not None,
        "dtype": plan.source["encode_dtype"],
        "batch_size": args.batch_size,
        "cores": 1 if args.engine == "ray" else len(os.sched_getaffinity(0)),  # ray starts an actor per core
        "statistics": args.statistics,
        "features": (args.features, args.features_grid) if args.features else None,
    }


def _first_size(plan: Plan, skip_bad: bool) -> int:
    """The side of the source's first image, which must be a square; all others must have the same size."""
    for sample in chain.from_iterable(read_part(plan.source, plan.reading, part) for part in plan.reading.parts):
        try:
            h, w = _torch_kinds()[0].levels(sample.image, 3, None)[0].shape[-2:]
        except BadPicture as error:
            if skip_bad:
                continue
            raise InputError(f"{sample.where}: {error}; --skip-bad leaves out such images") from None
        if h != w:
            raise InputError(f"{sample.where}: the image is {w}x{h}, expected a square; crop with --image-size")
        return w
    raise InputError(f"{plan.source['path']}: none of its images can be used")


def _here(job: Job, workers: int | None, todo: list[int], progress: Progress) -> Records:
    """Converts in this process, with others that decode."""
    if workers is None:
        workers = 0 if (job.plan.rows or SMALL + 1) <= SMALL else len(os.sched_getaffinity(0))
    with Decoders(workers, job.kind.preload) as decoders:
        yield from convert_parts(job, todo, decoders, progress.add)


def _on_ray(job: Job, options: dict[str, Any], todo: list[int], progress: Progress) -> Records:
    from convert.engine.ray import convert_on_ray  # an optional dependency

    with closing(convert_on_ray(job, options, todo)) as results:
        for record in results:
            size = sum(shard["raw_data"]["bytes"] for shard in record["shards"])
            progress.add(Tally.of([record]).images, size, record["skipped"], record["reasons"])
            yield record


def _spec(job: Job, tally: Tally) -> DataSpec:
    """The spec of all parts, as its readers read it. Raises InputError if there is nothing in them, if labels are not
    classes, or if the spec would not be accepted."""
    path, classes = job.plan.source["path"], job.plan.names or job.plan.reading.classes
    if not tally.images:
        raise InputError(f"{path}: empty, expected images")
    if not tally.counts:
        raise InputError(f"{path}: none of {tally.skipped} images can be used; the first: {tally.reasons[0]}")
    if classes is None:  # integers whose largest was not known before
        least, largest = min(tally.counts), max(tally.counts)
        if least < 0 or largest >= MAX_CLASSES:
            raise InputError(f"{path}: got labels from {least} to {largest}, expected 0 to {MAX_CLASSES - 1}")
        classes = [str(label) for label in range(largest + 1)]
    if doubled := [name for name, count in Counter(classes).items() if count > 1]:
        raise InputError(f"{path}: has {len(doubled)} names of several classes, as {doubled[0]!r}; use --class-names")
    spec = DataSpec(
        **job.kind.spec(not tally.colour, tally.sizes, tally.sums),
        num_classes=len(classes),
        classes=classes,
        class_counts=[tally.counts[label] for label in range(len(classes))],
        samples=tally.counts.total(),
        skipped=tally.skipped,
        source=job.plan.source,
        left_out=dict(Counter(job.plan.reading.left_out) + tally.left_out),
        small=dict(tally.small),
    )
    try:
        return DataSpec.from_json(spec.to_json(), SPEC_NAME)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def _report(spec: DataSpec, records: list[dict[str, Any]], rates: dict[str, Any]) -> None:
    if spec.skipped:
        shown = "\n  ".join([reason for record in records for reason in record["reasons"]][:5])
        print(f"skipped {spec.skipped} image{'' if spec.skipped == 1 else 's'}; the first:\n  {shown}", file=sys.stderr)
    if spec.left_out:
        print(f"left out: {in_words(spec.left_out)}", file=sys.stderr)
    if spec.small:
        print(f"small images: {in_words(spec.small)}", file=sys.stderr)
    if empty := [name for name, count in zip(spec.classes, spec.class_counts, strict=True) if not count]:
        which = ", ".join(empty[:10]) + (", …" if len(empty) > 10 else "")
        print(f"warning: {len(empty)} of {spec.num_classes} classes have no image: {which}", file=sys.stderr)
    sizes = [shard["raw_data"]["bytes"] for record in records for shard in record["shards"]]
    shards = f"{len(sizes)} shard{'' if len(sizes) == 1 else 's'}, {sum(sizes) / 1e6:.1f} MB"
    speed = f"{rates['seconds']:.1f} s, {rates['pictures'] / max(rates['seconds'], 1e-9):.0f} images/s"
    print(f"{spec.samples} images, {spec.num_classes} classes, {spec.skipped} skipped; {shards}; {speed}")


def _torch_kinds() -> tuple[ModuleType, ModuleType, ModuleType]:
    with _signals_wait():
        from convert.kinds import cropping, latents, statistics  # torch
    return cropping, latents, statistics


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Blocks signals during an import of torch, which swallows an interrupt of its own import of numpy."""
    # This works while there is one thread only: another, such as a progress bar's, would take the signal.
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
