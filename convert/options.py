"""The command line of `to_mds.py`. Only the standard library is imported."""

import argparse
import hashlib
from pathlib import Path
from typing import Any

from convert.engine.plan import digest
from convert.engine.vae import check_vae
from convert.kinds import MEASURE
from convert.sources.class_names import read_class_names
from convert.sources.registry import FORMATS, InputError
from sit_composer.bounds import Bounds
from sit_composer.choices import COUNT, FROM_ZERO, teacher_name
from sit_composer.cli import make_parser, number, require

DTYPES = ("float32", "bfloat16", "float16")
QUALITY = Bounds(1, 100, whole=True)  # of a JPEG


def parse(argv: list[str] | None, doc: str) -> argparse.Namespace:
    """Parses the command line; --help begins with ``doc``."""
    parser = make_parser("python convert/to_mds.py", doc)
    add = parser.add_argument
    add("source", metavar="SOURCE", type=_given, help="what to convert")
    add("--out", metavar="URI", type=_given, required=True, help="where to write the shards")
    add("--format", choices=FORMATS, help="the format of SOURCE (default: by the names of its files)")
    add("--image-column", metavar="NAME", help="of a table; dots go into structs (default: image)")
    add("--label-column", metavar="NAME", help="of a table (default: label); 'none' for images without labels")
    add("--class-names", metavar="FILE", type=_given, help="names of classes: lines `ID NAME`, or JSON; or 'imagenet'")
    add("--split", metavar="NAME", help="of a Hugging Face data set (default: train)")
    add("--config", metavar="NAME", help="of a Hugging Face data set that has several")
    add("--limit", metavar="N", type=number(COUNT), help="convert the first N images of the source")
    add("--skip-bad", action="store_true", help="leave out images that do not decode or encode, and count them")
    add("--image-size", metavar="N", type=number(COUNT), help="crop images to N x N pixels, as training does")
    add("--quality", metavar="Q", type=number(QUALITY), help="store cropped images as JPEG, 1 to 100 (default: as PNG)")
    add("--latents", action="store_true", help="store latents of the images and of their mirror images instead")
    add("--vae", metavar="NAME", type=_given, help="the autoencoder: its name on the Hub, or a folder")
    what = "standardize latents by each channel's mean and deviation: 'measure' those of the data, or read them in FILE"
    add("--statistics", metavar="FILE", type=_given, help=f"{what} (default: as the autoencoder's config says)")
    what = "store a teacher's features of the images and of their mirror images, for alignment"
    add("--features", metavar="TEACHER", type=_given, help=f"{what}: timm:NAME or transformers:NAME, or a folder there")
    add("--features-grid", metavar="N", type=number(COUNT), help="its tokens along a side (default: image size / 16)")
    add("--encode-dtype", choices=DTYPES, help="their dtype (default: bfloat16 on a GPU, else float32)")
    add("--batch-size", metavar="N", type=number(COUNT), help="images encoded at a time (default: 32, fewer on a CPU)")
    check = "for images that keep their bytes: decode each (default), or only read its header, many times as fast"
    add("--check", choices=("decode", "header"), help=check)
    workers = "processes that decode; 0: only this one (default: one per core)"
    add("--workers", metavar="N", type=number(FROM_ZERO), help=workers)
    engine = "convert on a Ray cluster, of this machine or at RAY_ADDRESS, with one actor per GPU"
    add("--engine", choices=("ray",), help=engine)
    add("--streaming", action="store_true", help="read a Hugging Face data set without keeping a copy of it")
    add("--log", metavar="FILE", help="append one line of JSON per event")
    add("--overwrite", action="store_true", help="replace another conversion, finished or begun, at --out")
    return parser.parse_args(argv)


def what_is_made(args: argparse.Namespace) -> dict[str, Any]:
    """The options that decide what is made of images, of those given, as the spec's source records them."""
    if args.latents != (args.vae is not None):
        raise InputError("--latents and --vae: each needs the other")
    for name in ("encode_dtype", "batch_size", "statistics", "features"):
        if getattr(args, name) is not None and not args.latents:
            raise InputError(f"--{name.replace('_', '-')}: only for --latents")
    if args.quality is not None and (args.latents or args.image_size is None):
        raise InputError("--quality: only for images that --image-size crops, not for --latents")
    if args.check is not None and (args.latents or args.image_size is not None):
        raise InputError("--check: only for images that keep their bytes; --image-size and --latents decode each")
    if args.engine == "ray":
        require("--engine ray", "ray")
        if args.workers is not None:
            raise InputError("--workers: only for conversions without --engine ray, which starts actors")
    if args.class_names and args.label_column == "none":
        raise InputError("--class-names: only for labelled images, not with --label-column none")
    if args.latents:
        check_vae(args.vae, args.image_size)
    _check_features(args)
    names = ("image_size", "quality", "vae", "encode_dtype", "batch_size", "features", "features_grid")
    made = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.statistics not in (None, MEASURE):
        made["statistics"] = f"{args.statistics} {_hash_of(args.statistics)}"
    elif args.statistics:
        made["statistics"] = MEASURE
    if args.class_names:
        args.names = read_class_names(args.class_names)
        made["class_names"] = f"{args.class_names} {digest({id_: name.name for id_, name in args.names.items()})}"
    return made | ({"check": "header"} if args.check == "header" else {})  # it decides which images are left out


def _check_features(args: argparse.Namespace) -> None:
    """Checks the teacher's name, and gives its grid a value: with SiT's patches of 2 latents, a token is 16 pixels."""
    if args.features is None:
        if args.features_grid is not None:
            raise InputError("--features-grid: only for --features")
        return
    args.features = teacher_name(args.features, "--features")
    if args.features_grid is None:
        if args.image_size is None or args.image_size % 16:
            size = "none" if args.image_size is None else str(args.image_size)
            expected = "expected a multiple of 16; or give --features-grid, the network's tokens along a side"
            raise InputError(f"--image-size: got {size}, {expected}")
        args.features_grid = args.image_size // 16


def _hash_of(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError as error:
        expected = f"expected a file of statistics, or {MEASURE!r}"
        raise InputError(f"--statistics: {path}: {error.strerror}; {expected}") from None


def _given(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text
