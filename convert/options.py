"""The command line of `to_mds.py`. Only the standard library is imported."""

import argparse
from typing import Any

from convert.sources.registry import FORMATS, InputError

DTYPES = ("float32", "bfloat16", "float16")


def parse(argv: list[str] | None, doc: str) -> argparse.Namespace:
    """Parses the command line; ``doc`` is what --help begins with."""
    parser = argparse.ArgumentParser("to_mds.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="SOURCE", type=_given, help="what to convert")
    add("--out", metavar="URI", type=_given, required=True, help="where to")
    add("--format", choices=FORMATS, help="what SOURCE is (default: by its files' names)")
    add("--image-column", metavar="NAME", help="of a table; dots go into structs (default: image)")
    add("--label-column", metavar="NAME", help="of a table (default: label); 'none' for pictures without labels")
    add("--split", metavar="NAME", help="of a Hugging Face data set (default: train)")
    add("--config", metavar="NAME", help="of a Hugging Face data set that has several")
    add("--limit", metavar="N", type=_positive, help="convert the first N pictures of the source")
    add("--skip-bad", action="store_true", help="leave out pictures that do not decode or encode, and count them")
    add("--image-size", metavar="N", type=_positive, help="crop pictures to N x N pixels, as training does")
    add("--quality", metavar="Q", type=_quality, help="keep cropped pictures as JPEG, 1 to 100 (default: as PNG)")
    add("--latents", action="store_true", help="keep the pictures' latents, and those of their mirror images")
    add("--vae", metavar="NAME", type=_given, help="whose latents: an AutoencoderKL's name on the Hub, or its folder")
    add("--encode-dtype", choices=DTYPES, help="in which it computes (default: bfloat16 on a GPU, else float32)")
    add("--batch-size", metavar="N", type=_positive, help="pictures it encodes at a time (default: 32, fewer on a CPU)")
    add(
        "--check",
        choices=("decode", "header"),
        help="of pictures that keep their bytes: decode each (the default), or "
        "only read its header, a hundred times as fast",
    )
    add("--workers", metavar="N", type=_count, help="processes that decode; 0: none but this (default: one a core)")
    add(
        "--engine",
        choices=("ray",),
        help="convert on a Ray cluster, of this machine or RAY_ADDRESS's, with an actor a GPU",
    )
    add("--streaming", action="store_true", help="read a Hugging Face data set without keeping a copy of it")
    add("--log", metavar="FILE", help="add a line of JSON for each event")
    add("--overwrite", action="store_true", help="replace what another conversion has made or begun there")
    return parser.parse_args(argv)


def what_is_made(args: argparse.Namespace) -> dict[str, Any]:
    """What the options make of pictures, as the spec's source records it: those that were given.

    Raises:
        InputError: for options that don't go together.
    """
    if args.latents != (args.vae is not None):
        raise InputError("--latents and --vae go together: the latents are that autoencoder's")
    for name in ("encode_dtype", "batch_size"):
        if getattr(args, name) is not None and not args.latents:
            raise InputError(f"--{name.replace('_', '-')} is for --latents")
    if args.quality is not None and (args.latents or args.image_size is None):
        raise InputError("--quality is of the pictures that --image-size makes, and not for --latents")
    if args.check is not None and (args.latents or args.image_size is not None):
        raise InputError("--check is of pictures that keep their bytes; with --image-size or --latents each is decoded")
    if args.engine == "ray" and args.workers is not None:
        raise InputError("--workers is of the one process that converts without --engine ray, which has actors")
    names = ("image_size", "quality", "vae", "encode_dtype", "batch_size")
    made = {name: value for name in names if (value := getattr(args, name)) is not None}
    return made | ({"check": "header"} if args.check == "header" else {})  # which decides what is left out


def _quality(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 100")
    return int(text)


def _given(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
