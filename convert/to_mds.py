"""Converts labelled pictures to MDS shards for training.

    python convert/to_mds.py SOURCE --out URI

SOURCE is one of
  a Parquet or Arrow file, a folder of them, or a glob in quotes; each also as s3://BUCKET/…
  WebDataset tars, likewise
  a folder of pictures, SOURCE/CLASS/PICTURE
  a Hugging Face data set: a folder that `save_to_disk` wrote, or a name on the Hub
  the word digits: the 1,797 small pictures that scikit-learn ships
URI is a new folder, or s3://BUCKET/PREFIX (credentials as for boto3; S3_ENDPOINT_URL for another store than AWS).

The pictures' own bytes are kept, and each is decoded once to see that it can be. With --image-size they are cropped and
encoded again; with --latents an autoencoder's latents are kept in their place. Labels are integers from 0, class names,
or strings, which are numbered in sorted order. `spec.json` says what is inside, and `index.json`, written last of all,
that it is whole.

A conversion that was stopped, however, goes on when the same command is run again; one that is done says so. The
result is the same to the byte.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A script run by its path finds its own folder first, where this package's modules would shadow others.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from convert.engine.output import Output, OutputError
from convert.engine.pipeline import Decoders, Job, Tally, convert_parts
from convert.engine.plan import Plan, identity, vae_identity
from convert.engine.progress import Progress
from convert.kinds.pixels import BadPicture, Pixels, levels
from convert.options import parse, what_is_made
from convert.sources.parts import MAX_CLASSES
from convert.sources.registry import InputError, describe, plan_source, read_part
from sit_composer.data.spec import DataSpec
from sit_composer.errors import UserError

if TYPE_CHECKING:
    from convert.kinds.latents import Latents

REASONS_SHOWN = 5
SMALL = 2000  # pictures


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 2 for bad input or output, 1 for a failing disk or network."""
    args = parse(argv, __doc__)
    if args.vae and os.path.isdir(args.vae):
        args.vae = os.path.abspath(args.vae)  # as `spec.json` will be read elsewhere
    output = None
    try:
        source = describe(
            args.source, args.format, args.image_column, args.label_column, args.split, args.config, args.streaming
        )
        if args.limit:
            source["limit"] = args.limit
        source |= what_is_made(args)
        output = _open_output(args.out, source)
        if args.latents:
            latents = _latents_module()
            source["device"] = latents.default_device()  # another kind of processor gives other bits
            source["encode_dtype"] = args.encode_dtype or latents.default_dtype()
        return _convert(args, source, output)
    except (InputError, OutputError) as error:
        return _fail(2, error)
    except (UserError, OSError) as error:  # of a disk or a store that fails
        return _fail(1, error)
    except MemoryError:
        return _fail(1, "out of memory: run it again, with fewer --workers")
    except KeyboardInterrupt:
        return _fail(130, "interrupted; run the same command again to go on")
    finally:
        if output is not None:
            output.end()


def _open_output(out: str, source: dict[str, Any]) -> Output:
    try:
        output = Output(out)
        if output.path and source["format"] == "imagefolder":
            # Shards inside a folder of pictures would be one of its classes next time.
            root = Path(source["path"]).resolve()
            if root in output.path.parents:
                raise OutputError(f"{out} is inside the source, {root}: choose another --out")
        return output
    except UserError as error:
        raise OutputError(str(error)) from error


def _convert(args: Any, source: dict[str, Any], output: Output) -> int:
    try:
        output.is_done(source, args.overwrite)  # what is no place for it is said before the source is read
    except UserError as error:  # the store's first answer: an address or a credential is wrong
        raise OutputError(str(error)) from error
    reading = plan_source(source, args.limit)
    if reading.files:
        source["files"] = identity(reading.files)
    if args.latents:
        source |= vae_identity(args.vae)
    plan = Plan(source, reading)
    if output.is_done(source, args.overwrite):
        print(f"already converted: {args.out} holds this source, nothing to do")
        return 0
    records = output.begin(plan, args.overwrite)
    kind, options = _form(args, plan)
    job = Job(plan, kind(**options), output, args.skip_bad)
    tally = Tally()
    for record in records.values():
        tally.merge(record)
    done = sum(tally.counts.values()) + tally.skipped
    if records:
        print(f"goes on: {len(records)} of {len(reading.parts)} parts, {done} pictures, are done", file=sys.stderr)
    with _signals_wait():  # streaming takes seconds: only after all that can be wrong with the command
        from convert.engine import shards  # noqa: F401
    progress = Progress(plan.rows, done, args.log)
    try:
        progress.log("start", source=source, out=args.out, parts=len(reading.parts), finished=len(records))
        todo = [number for number in range(len(reading.parts)) if number not in records]
        if args.engine == "ray":
            try:
                from convert.engine.ray import convert_on_ray
            except ModuleNotFoundError as error:
                raise InputError(f"--engine ray: {error}; pip install 'sit-composer[ray]' brings it") from None
            results, elsewhere = convert_on_ray(job, kind, options, todo), True
        else:
            results, elsewhere = _here(job, args.workers, todo, progress), False
        with closing(results):  # before the output is let go of
            for record in results:
                records[record["part"]] = record
                if elsewhere:
                    progress.part(record)
                progress.log("part", part=record["part"], pictures=sum(record["counts"].values()))
        spec = _spec(job, [records[number] for number in sorted(records)])
        output.publish(spec, [records[number] for number in sorted(records)])
        progress.log("end", samples=spec.samples, skipped=spec.skipped, **progress.rates())
    except BaseException as error:
        progress.log("error", error=" ".join(str(error).split()) or type(error).__name__)
        raise
    finally:
        progress.close()
    _report(spec, records, progress, args.out)
    return 0


def _form(args: Any, plan: Plan) -> "tuple[type[Pixels | Latents], dict[str, Any]]":
    """What becomes of pictures: a class, and its arguments."""
    if not args.latents:
        return Pixels, {"image_size": args.image_size, "quality": args.quality, "check": args.check or "decode"}
    return _latents_module().Latents, {
        "vae": args.vae,
        "image_size": args.image_size or _first_size(plan, args.skip_bad),
        "crop": args.image_size is not None,
        "dtype": plan.source["encode_dtype"],
        "batch_size": args.batch_size,
        "cores": 1 if args.engine == "ray" else len(os.sched_getaffinity(0)),  # ray has an actor for each
    }


def _first_size(plan: Plan, skip_bad: bool) -> int:
    """The side of the source's first picture, which must be a square, as all others then."""
    for part in plan.reading.parts:
        for sample in read_part(plan.source, plan.reading, part):
            try:
                height, width = levels(sample.image, 3, None).shape[-2:]
            except BadPicture as error:
                if skip_bad:
                    continue
                raise InputError(f"{sample.where}: {error}; --skip-bad leaves out such pictures") from None
            if height != width:
                raise InputError(f"{sample.where}: the picture is {width}x{height}; say --image-size to crop them")
            return width
    raise InputError(f"{plan.source['path']}: no picture in it can be used")


def _here(job: Job, workers: int | None, todo: list[int], progress: Progress) -> Iterator[dict[str, Any]]:
    """Converts in this process, with others that decode."""
    if workers is None:
        small = job.plan.rows is not None and job.plan.rows <= SMALL  # to start processes would take longer
        workers = 0 if small else len(os.sched_getaffinity(0))
    with Decoders(workers, job.form.preload) as decoders:
        yield from convert_parts(job, todo, decoders, progress.picture)


def _spec(job: Job, records: list[dict[str, Any]]) -> DataSpec:
    """What the parts are together.

    Raises:
        InputError: if there is nothing in them, or labels are not classes.
    """
    tally = Tally()
    for record in records:
        tally.merge(record)
    path, classes = job.plan.source["path"], job.plan.reading.classes
    if not tally.counts:
        if tally.skipped:
            raise InputError(f"{path}: none of {tally.skipped} pictures can be used; the first: {tally.reasons[0]}")
        raise InputError(f"{path} is empty")
    if classes is None:  # integers, whose number was not known before
        least, largest = min(tally.counts), max(tally.counts)
        if least < 0 or largest >= MAX_CLASSES:
            raise InputError(f"{path}: labels go from {least} to {largest}; they must be from 0 to {MAX_CLASSES - 1}")
        classes = [str(label) for label in range(largest + 1)]
    return DataSpec(
        **job.form.spec(not tally.colour, tally.sizes),
        num_classes=len(classes),
        classes=classes,
        class_counts=[tally.counts.get(label, 0) for label in range(len(classes))],
        samples=sum(tally.counts.values()),
        skipped=tally.skipped,
        source=job.plan.source,
    )


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals wait until the body's imports are done: torch swallows an interrupt of its own import of numpy.

    Only as long as this is the process's one thread: another, as a progress bar has, would take the signal.
    """
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)


def _latents_module() -> Any:
    with _signals_wait():
        from convert.kinds import latents
    return latents


def _report(spec: DataSpec, records: dict[int, dict[str, Any]], progress: Progress, out: str) -> None:
    reasons = [reason for number in sorted(records) for reason in records[number]["reasons"]][:REASONS_SHOWN]
    if spec.skipped:
        shown = "\n  ".join(reasons)
        print(f"skipped {spec.skipped} picture{'s' * (spec.skipped != 1)}; the first:\n  {shown}", file=sys.stderr)
    empty = [name for name, count in zip(spec.classes, spec.class_counts, strict=True) if not count]
    if empty:
        which = ", ".join(empty[:10]) + (", …" if len(empty) > 10 else "")
        print(f"warning: {len(empty)} of {spec.num_classes} classes have no picture: {which}", file=sys.stderr)
    sizes = [shard["raw_data"]["bytes"] for record in records.values() for shard in record["shards"]]
    shards = f"{len(sizes)} shard{'s' * (len(sizes) != 1)}, {sum(sizes) / 1e6:.1f} MB"
    rates = progress.rates()
    speed = f"{rates['seconds']:.1f} s, {rates['pictures'] / max(rates['seconds'], 1e-9):.0f} pictures/s"
    print(f"{spec.samples} pictures, {spec.num_classes} classes, {spec.skipped} skipped; {shards}; {speed}")
    print(out)


def _fail(code: int, message: object) -> int:
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a polite kill clears up too
    sys.exit(main())
