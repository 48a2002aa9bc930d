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
come over the network, once. Without them, or for other features, give --features FILE: a TorchScript module from uint8
(N, 3, H, W) to features (N, D), to (features, logits), or to a dict of features, spatial and logits; sFID needs
spatial, the Inception Score logits. Loading FILE runs the code in it: use only a file whose author you trust.

The last line printed is a Markdown row for a table of results.
"""

import argparse
import os
import sys

from sit_composer.bounds import choose
from sit_composer.choices import COUNT, METRICS
from sit_composer.cli import hand_over, is_remote, make_parser, number, run_command
from sit_composer.errors import UserError
from sit_composer.outputs import check_output


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("python -m sit_composer.evaluate", __doc__)
    count = number(COUNT)
    parser.add_argument("samples", metavar="SAMPLES", help="the images to evaluate")
    parser.add_argument("--reference", required=True, help="the real images, or their statistics")
    parser.add_argument("--features", default="inception", metavar="inception|FILE", help="the extractor (inception)")
    parser.add_argument("--metrics", metavar="A,B,…", help=f"of {','.join(METRICS)} (all that are possible)")
    parser.add_argument("--out", metavar="FILE.json", help="write the result, and everything that it depends on")
    parser.add_argument("--batch-size", type=count, default=64, metavar="N", help="images per batch (64)")
    parser.add_argument("--image-size", type=count, metavar="N", help="crop the reference's images to it, as ADM does")
    parser.add_argument("--cache", metavar="DIR", help="keep the copies of remote shards here (a temporary folder)")
    parser.add_argument("--save-statistics", metavar="FILE.npz", help="keep the reference's, to use as --reference")
    args = parser.parse_args(argv)
    if args.cache is not None and not (is_remote(args.samples) or is_remote(args.reference)):
        parser.error("argument --cache: is for remote shards, and neither SAMPLES nor --reference is a URI")
    for path in (args.samples, args.reference):
        if not is_remote(path) and not os.path.exists(path):
            raise UserError(f"{path}: no such file or folder")
    if args.features != "inception" and not os.path.isfile(args.features):
        raise UserError(f"--features: {args.features} is no file; expected inception, or a TorchScript file")
    args.by_name = [] if args.metrics is None else [name.strip() for name in args.metrics.split(",")]
    for name in args.by_name:
        choose("--metrics", name, tuple(METRICS))
    check_output("--out", args.out, ".json", "metrics")
    check_output("--save-statistics", args.save_statistics, ".npz", "mu", "sigma", "features")
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake that it names."""
    return run_command(lambda: hand_over("sit_composer.evaluation.judge", parse(argv), "torch", "streaming"))


if __name__ == "__main__":
    sys.exit(main())
