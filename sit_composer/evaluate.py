"""Compares images with real ones:   python -m sit_composer.evaluate SAMPLES --reference REFERENCE

SAMPLES and REFERENCE are each one of
  * an ADM batch: FILE.npz with arr_0, uint8 (N, H, W, 3);
  * a folder that sit_composer.sample wrote;
  * a folder of images or, if it holds none itself, of folders of them, such as one per class;
  * a folder of MDS shards of pixels, also a remote one: s3://BUCKET/PREFIX, or another URI that streaming takes, with
    credentials as for training. The shards are copied to a temporary folder, or to --cache DIR, where they stay.
REFERENCE may also be stored statistics: FILE.npz with mu and sigma, for sFID mu_s and sigma_s. An ADM reference batch
holds both: the Fréchet distances use its statistics, the other metrics its images.

--features inception, the default, is torch-fidelity's FID InceptionV3, which published numbers use. Its weights (95 MB)
come over the network, once. --features dinov2 is DINOv2's ViT-L/14, whose Fréchet distance is called FDD; its weights
come from the Hub, once, or from a file: dinov2:FILE, of Meta's dinov2_vitl14_pretrain.pth or timm's model.safetensors.
Without a network, or for other features, give --features FILE: a TorchScript module from uint8
(N, 3, H, W) to features (N, D), to (features, logits), or to a dict of features, spatial and logits; sFID needs
spatial, the Inception Score logits. Loading FILE runs the code in it: use only a file whose author you trust.
Of two, as in --features inception,dinov2, the second one adds its Fréchet distance.

The last line printed is a Markdown row for a table of results.
"""

import argparse
import os
import sys

from sit_composer.bounds import choose
from sit_composer.choices import COUNT, METRICS, check_features, dinov2_file
from sit_composer.cli import hand_over, is_remote, make_parser, number, require, run_command
from sit_composer.errors import UserError
from sit_composer.outputs import check_output


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("python -m sit_composer.evaluate", __doc__)
    parser.add_argument("samples", metavar="SAMPLES", help="the images to evaluate")
    add_options(parser)
    parser.add_argument("--out", metavar="FILE.json", help="write the result, and everything that it depends on")
    parser.add_argument("--batch-size", type=number(COUNT), default=64, metavar="N", help="images per batch (64)")
    parser.add_argument("--save-statistics", metavar="FILE.npz", help="keep the reference's, to use as --reference")
    args = parser.parse_args(argv)
    check_set(args.samples)
    check(args, args.samples)
    check_output("--out", args.out, ".json", "metrics")
    check_output("--save-statistics", args.save_statistics, ".npz", "mu", "sigma", "features")
    return args


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a comparison with a reference."""
    option = parser.add_argument
    option("--reference", required=True, help="the real images, or their statistics")
    option("--features", default="inception", metavar="A[,B]", help="inception, dinov2[:FILE] or FILE (inception)")
    option("--metrics", metavar="A,B,…", help=f"of {','.join(METRICS)} (all that are possible)")
    option("--image-size", type=number(COUNT), metavar="N", help="crop the reference's images to it, as ADM does")
    option("--cache", metavar="DIR", help="keep the copies of remote shards here (a temporary folder)")


def check(args: argparse.Namespace, samples: str | None = None) -> None:
    """Checks these options; ``samples`` are the images that are compared, unless they are yet to be generated."""
    if args.cache is not None and not any(map(is_remote, filter(None, (samples, args.reference)))):
        where = "neither SAMPLES nor --reference is a URI" if samples else "--reference is no URI"
        raise UserError(f"argument --cache: is for remote shards, and {where}")
    check_set(args.reference)
    extractors = args.features.split(",")
    if len(extractors) > 2 or len(set(extractors)) < len(extractors):
        raise UserError(f"--features: got {args.features}, expected one extractor, or two different ones")
    for features in extractors:
        check_features("--features", features)
        if dinov2_file(features) is not None:
            require("--features dinov2", "timm")
    args.by_name = [] if args.metrics is None else [name.strip() for name in args.metrics.split(",")]
    for name in args.by_name:
        choose("--metrics", name, tuple(METRICS))
    if "fd" in args.by_name and len(extractors) < 2:
        raise UserError("--metrics fd: is of a second extractor, as in --features inception,dinov2")


def check_set(path: str) -> None:
    if not is_remote(path) and not os.path.exists(path):
        raise UserError(f"{path}: no such file or folder")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake that it names."""
    return run_command(lambda: hand_over("sit_composer.evaluation.judge", parse(argv), "torch", "streaming"))


if __name__ == "__main__":
    sys.exit(main())
