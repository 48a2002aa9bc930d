"""Converts labelled pictures to MDS shards for training.

    python convert/to_mds.py SOURCE --out URI

SOURCE is one of
  a Parquet or Arrow file, a folder of them, or a glob in quotes
  a folder of pictures, SOURCE/CLASS/PICTURE
  a Hugging Face data set: a folder that `save_to_disk` wrote, or a name on the Hub
  the word digits: the 1,797 small pictures that scikit-learn ships
URI is a new folder, or s3://BUCKET/PREFIX (credentials as for boto3; S3_ENDPOINT_URL for another store than AWS).

The pictures' own bytes are kept, and each is decoded once to see that it can be. With --image-size they are cropped and
encoded again; with --latents an autoencoder's latents are kept in their place. Labels are integers from 0, class names,
or strings, which are numbered in sorted order. `spec.json` says what is inside, and `index.json`, written last of all,
that it is whole. A run that fails or is interrupted leaves neither.
"""

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from options import BATCH_SIZE, parse, what_is_made
from output import OutputError, Place, is_done, open_place
from pixels import BadPicture, Pixels
from sources import InputError, Source, describe, open_source

from sit_composer.spec import DataSpec

if TYPE_CHECKING:
    from latents import Latents

REASONS_SHOWN = 5


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 2 for bad input or output, 1 for a failing disk or network."""
    args = parse(argv, __doc__)
    try:
        source = describe(args.source, args.format, args.image_column, args.label_column, args.split, args.config)
        if args.limit:
            source["limit"] = args.limit
        source |= what_is_made(args)
        if args.latents and args.encode_dtype is None:
            source["encode_dtype"] = _latents_module().default_dtype()
        place = open_place(args.out)
        _refuse_inside(place, source)
        if is_done(place, source, args.resume, args.overwrite):
            print(f"already converted: {args.out} holds this source, nothing to do")
            return 0
        if args.latents:
            batch_size = args.batch_size or BATCH_SIZE
            form = _latents_module().Latents(args.vae, args.image_size, source["encode_dtype"], batch_size)
        else:
            form = Pixels(args.image_size, args.quality)
        spec, files = convert(open_source(source), source, place, form, args.limit, args.skip_bad)
    except (InputError, OutputError) as error:
        return _fail(2, error)
    except OSError as error:
        return _fail(1, error)
    except KeyboardInterrupt:
        return _fail(130, "interrupted; nothing was kept")
    _report(spec, files, args.out)
    return 0


def convert(
    opened: Source,
    source: dict[str, Any],
    place: Place,
    form: "Pixels | Latents",
    limit: int | None = None,
    skip_bad: bool = False,
) -> tuple[DataSpec, list[int]]:
    """Writes the shards, the spec and the index of a source, or, on any exception, nothing.

    Args:
        opened: the pictures.
        source: where they come from and what was made of them, for the spec.
        place: where they go to.
        form: what becomes of a picture.
        limit: stop after so many.
        skip_bad: leave out those that do not decode or encode, instead of stopping.

    Returns:
        The spec, and the shards' sizes in bytes.

    Raises:
        InputError: for a picture that does not decode or encode, or if none is left.
        OutputError, OSError: if it cannot be written or uploaded.
    """
    folder = place.begin()
    try:
        with _signals_wait():  # streaming takes seconds: only after all that can be wrong with the command
            from shards import ShardWriter
        with ShardWriter(form.columns, folder, place.remote, place.prefix) as writer:
            spec = _write(writer, opened, source, form, limit, skip_bad)
            writer.finish_shards()
            place.retire()
            writer.publish(spec)
    except BaseException:
        place.discard()
        raise
    place.end()
    return spec, [shard["raw_data"]["bytes"] for shard in writer.shards]


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals wait until the body's imports are done: torch swallows an interrupt of its own import of numpy."""
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)


def _write(
    writer: Any,
    opened: Source,
    source: dict[str, Any],
    form: "Pixels | Latents",
    limit: int | None,
    skip_bad: bool,
) -> DataSpec:
    """Writes the good samples of a source, and returns what they are."""
    from PIL import Image
    from tqdm import tqdm

    counts = [0] * len(opened.classes)
    reasons: list[str] = []
    skipped = written = 0
    total = min(opened.rows or limit, limit) if limit else opened.rows
    samples = islice(opened.samples, None if skip_bad else limit)  # none is read in vain
    progress = tqdm(total=total, unit="picture", disable=None)  # None: unless stderr is no terminal
    with progress, warnings.catch_warnings(), closing(form.rows(samples)) as rows:
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # here, as the filters are all threads'
        for (where, _, label), row in rows:
            if isinstance(row, BadPicture):
                if not skip_bad:
                    raise InputError(f"{where}: {row}; --skip-bad leaves out such pictures")
                skipped += 1
                reasons += [f"{where}: {row}"] if skipped <= REASONS_SHOWN else []
                continue
            writer.write({**row, "label": label})
            counts[label] += 1
            written += 1
            progress.update()
            if written == limit:
                break
    if skipped:
        shown = "\n  ".join(reasons)
        print(f"skipped {skipped} pictures (the first {len(reasons)} follow)\n  {shown}", file=sys.stderr)
    if not written:
        raise InputError(
            f"{source['path']}: none of {skipped} pictures can be used" if skipped else f"{source['path']} is empty"
        )
    return DataSpec(
        **form.spec(),
        num_classes=len(opened.classes),
        classes=opened.classes,
        class_counts=counts,
        samples=written,
        skipped=skipped,
        source=source,
    )


def _latents_module() -> Any:
    with _signals_wait():
        import latents
    return latents


def _refuse_inside(place: Place, source: dict[str, Any]) -> None:
    """Shards inside a folder of pictures would be one of its classes next time."""
    if source["format"] == "imagefolder" and place.remote is None:
        out, root = Path(place.uri).expanduser().resolve(), Path(source["path"]).resolve()
        if root in out.parents:
            raise OutputError(f"{place.uri} is inside the source, {root}: choose another --out")


def _report(spec: DataSpec, files: list[int], out: str) -> None:
    empty = [name for name, count in zip(spec.classes, spec.class_counts, strict=True) if not count]
    if empty:
        which = ", ".join(empty[:10]) + (", …" if len(empty) > 10 else "")
        print(f"warning: {len(empty)} of {spec.num_classes} classes have no picture: {which}", file=sys.stderr)
    shards = f"{len(files)} shard{'s' * (len(files) != 1)}, {sum(files) / 1e6:.1f} MB"
    print(f"{spec.samples} pictures, {spec.num_classes} classes, {spec.skipped} skipped; {shards}")
    print(out)


def _fail(code: int, message: object) -> int:
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a polite kill clears up too
    sys.exit(main())
