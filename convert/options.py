"""The command line of `to_mds.py`. Only the standard library is imported."""

import argparse
from typing import Any

from sources import FORMATS, InputError

DTYPES = ("float32", "bfloat16", "float16")
BATCH_SIZE = 32


def parse(argv: list[str] | None, doc: str) -> argparse.Namespace:
    """Parses the command line; ``doc`` is what --help begins with."""
    parser = argparse.ArgumentParser("to_mds.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="what to convert")
    add("--out", metavar="URI", required=True, help="where to")
    add("--format", choices=FORMATS, help="what SOURCE is (default: by its files' names)")
    add("--image-column", metavar="NAME", help="of a table; dots go into structs (default: image)")
    add("--label-column", metavar="NAME", help="of a table (default: label); 'none' for pictures without labels")
    add("--split", metavar="NAME", help="of a Hugging Face data set (default: train)")
    add("--config", metavar="NAME", help="of a Hugging Face data set that has several")
    add("--limit", metavar="N", type=_positive, help="stop after N pictures")
    add("--skip-bad", action="store_true", help="leave out pictures that do not decode or encode, and count them")
    add("--image-size", metavar="N", type=_positive, help="crop pictures to N x N pixels, as training does")
    add("--quality", metavar="Q", type=_quality, help="keep cropped pictures as JPEG, 1 to 100 (default: as PNG)")
    add("--latents", action="store_true", help="keep the pictures' latents, and those of their mirror images")
    add("--vae", metavar="NAME", help="whose latents: an AutoencoderKL's name on the Hub, or its folder")
    add("--encode-dtype", choices=DTYPES, help="in which it computes (default: bfloat16 on a GPU, else float32)")
    add("--batch-size", metavar="N", type=_positive, help=f"pictures it encodes at a time (default: {BATCH_SIZE})")
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
    names = ("image_size", "quality", "vae", "encode_dtype")
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _quality(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 100")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
