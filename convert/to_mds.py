"""Converts labelled pictures to MDS shards for training.

    python convert/to_mds.py SOURCE --out URI

SOURCE is one of
  a Parquet or Arrow file, a folder of them, or a glob in quotes
  a folder of pictures, SOURCE/CLASS/PICTURE
  a Hugging Face data set: a folder that `save_to_disk` wrote, or a name on the Hub
  the word digits: the 1,797 small pictures that scikit-learn ships
URI is a new folder, or s3://BUCKET/PREFIX (credentials as for boto3; S3_ENDPOINT_URL for another store than AWS).

The pictures' own bytes are kept, and each is decoded once to see that it can be. Labels are integers from 0, class
names, or strings, which are numbered in sorted order. `spec.json` says what is inside, and `index.json`, written last
of all, that it is whole. A run that fails or is interrupted leaves neither.
"""

import argparse
import io
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from output import OutputError, Place, is_done, open_place
from sources import FORMATS, InputError, Source, describe, open_source

from sit_composer.spec import DataSpec

COLUMNS = {"image": "bytes", "label": "int"}
PICTURES = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # other decoders of PIL are not for unknown files
GREY = {"1", "L", "I", "I;16", "I;16B", "I;16L"}  # PIL's modes
REASONS_SHOWN = 5


class BadPicture(Exception):
    """Why a picture cannot be trained on."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 2 for bad input or output, 1 for a failing disk or network."""
    args = _parse(argv)
    try:
        source = describe(args.source, args.format, args.image_column, args.label_column, args.split, args.config)
        if args.limit:
            source["limit"] = args.limit
        place = open_place(args.out)
        _refuse_inside(place, source)
        if is_done(place, source, args.resume, args.overwrite):
            print(f"already converted: {args.out} holds this source, nothing to do")
            return 0
        spec, files = convert(open_source(source), source, place, args.limit, args.skip_bad)
    except (InputError, OutputError) as error:
        return _fail(2, error)
    except OSError as error:
        return _fail(1, error)
    except KeyboardInterrupt:
        return _fail(130, "interrupted; nothing was kept")
    _report(spec, files, args.out)
    return 0


def convert(
    opened: Source, source: dict[str, Any], place: Place, limit: int | None = None, skip_bad: bool = False
) -> tuple[DataSpec, list[int]]:
    """Writes the shards, the spec and the index of a source, or, on any exception, nothing.

    Args:
        opened: the pictures.
        source: where they come from, for the spec.
        place: where they go to.
        limit: stop after so many.
        skip_bad: leave out those that do not decode, instead of stopping.

    Returns:
        The spec, and the shards' sizes in bytes.

    Raises:
        InputError: for a picture that does not decode, or if none is left.
        OutputError, OSError: if it cannot be written or uploaded.
    """
    folder = place.begin()
    try:
        with _writer_class()(COLUMNS, folder, place.remote, place.prefix) as writer:
            spec = _write(writer, opened, source, limit, skip_bad)
            writer.finish_shards()
            place.retire()
            writer.publish(spec)
    except BaseException:
        place.discard()
        raise
    place.end()
    return spec, [shard["raw_data"]["bytes"] for shard in writer.shards]


def _writer_class() -> type:
    """Imports streaming, which takes seconds: only after all that can be wrong with the command.

    torch swallows an interrupt of its own import of numpy and then fails elsewhere: signals wait until all is loaded.
    """
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        from shards import ShardWriter
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
    return ShardWriter


def _write(writer: Any, opened: Source, source: dict[str, Any], limit: int | None, skip_bad: bool) -> DataSpec:
    """Writes the samples of a source that decode, and returns what they are."""
    from tqdm import tqdm

    counts = [0] * len(opened.classes)
    modes: set[bool] = set()
    sizes: set[tuple[int, int]] = set()
    reasons: list[str] = []
    skipped = written = 0
    total = min(opened.rows or limit, limit) if limit else opened.rows
    with tqdm(total=total, unit="picture", disable=None) as progress:  # None: unless stderr is no terminal
        for where, image, label in opened.samples:
            try:
                data, grey, size = _check(image)
            except BadPicture as error:
                if not skip_bad:
                    raise InputError(f"{where}: {error}; --skip-bad leaves out such pictures") from None
                skipped += 1
                reasons += [f"{where}: {error}"] if skipped <= REASONS_SHOWN else []
                continue
            writer.write({"image": data, "label": label})
            counts[label] += 1
            modes.add(grey)
            sizes.add(size)
            written += 1
            progress.update()
            if written == limit:
                break
    if skipped:
        shown = "\n  ".join(reasons)
        print(f"skipped {skipped} pictures (the first {len(reasons)} follow)\n  {shown}", file=sys.stderr)
    if not written:
        raise InputError(
            f"{source['path']}: none of {skipped} pictures decodes" if skipped else f"{source['path']} is empty"
        )
    width, height = sizes.pop()
    return DataSpec(
        kind="pixels",
        channels=1 if modes == {True} else 3,
        image_size=width if width == height and not sizes else None,
        num_classes=len(opened.classes),
        classes=opened.classes,
        class_counts=counts,
        samples=written,
        skipped=skipped,
        source=source,
    )


def _check(image: bytes | Path | None) -> tuple[bytes, bool, tuple[int, int]]:
    """Decodes a picture to its last row. Returns its file's bytes, whether it is grey, and (width, height).

    Raises:
        BadPicture: if it is missing, broken, no picture, or so large (over 89 million pixels) that it may be an attack.
    """
    from PIL import Image, UnidentifiedImageError

    if image is None:
        raise BadPicture("the picture is null")
    try:
        data = image.read_bytes() if isinstance(image, Path) else image
    except (FileNotFoundError, PermissionError) as error:  # another OSError is the disk's fault, not the picture's
        raise BadPicture(f"the picture cannot be read: {error}") from None
    if not data:
        raise BadPicture("the picture has zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=PICTURES) as picture:
                picture.load()
                return data, picture.mode in GREY, picture.size
    except UnidentifiedImageError:
        kinds = ", ".join(PICTURES)
        raise BadPicture(f"not a picture ({kinds}): it starts with {data[:12]!r}") from None
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error and more
        raise BadPicture(f"the picture does not decode: {error}") from None


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


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "to_mds.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="what to convert")
    add("--out", metavar="URI", required=True, help="where to")
    add("--format", choices=FORMATS, help="what SOURCE is (default: by its files' names)")
    add("--image-column", metavar="NAME", help="of a table; dots go into structs (default: image)")
    add("--label-column", metavar="NAME", help="of a table (default: label); 'none' for pictures without labels")
    add("--split", metavar="NAME", help="of a Hugging Face data set (default: train)")
    add("--config", metavar="NAME", help="of a Hugging Face data set that has several")
    add("--limit", metavar="N", type=_positive, help="stop after N pictures")
    add("--skip-bad", action="store_true", help="leave out pictures that do not decode, and count them")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="do nothing if URI already holds the whole conversion of SOURCE with these options (its files are not "
        "compared); start again if an interrupted one lies there",
    )
    existing.add_argument(
        "--overwrite", action="store_true", help="replace an earlier conversion once this one is whole"
    )
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a polite kill clears up too
    sys.exit(main())
