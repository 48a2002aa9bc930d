"""Compares pictures with real ones:   python -m sit_composer.evaluate SAMPLES --reference REFERENCE

SAMPLES and REFERENCE are each one of
  * an ADM batch: FILE.npz with arr_0, uint8 (N, H, W, 3);
  * a folder that sit_composer.sample wrote;
  * a folder of PNG or JPEG pictures, or of folders of them, one for each class;
  * a folder of MDS shards of pixels, also a remote one: s3://BUCKET/PREFIX, or another URI that streaming takes, with
    credentials as for training. They are copied to a temporary folder meanwhile, or to --cache DIR, and kept there.
REFERENCE may also be stored statistics: FILE.npz with mu and sigma, for sFID mu_s and sigma_s. An ADM reference batch
holds both: the Fréchet distances take its statistics, the other metrics its pictures.

--features inception, the default, is torch-fidelity's FID InceptionV3, which published numbers are of. Its weights (95
MB) come over the network, once. Without it, or for other features, give --features FILE: a TorchScript module from
uint8 (N, 3, H, W) to features (N, D), to (features, logits), or to a dict of features, spatial and logits; sFID needs
spatial, the Inception Score logits. Loading FILE runs the code in it: take it only from someone whom you trust.

The last line printed is a Markdown row for a table of results.
"""

import argparse
import sys

from sit_composer.choices import METRICS
from sit_composer.cli import is_remote
from sit_composer.errors import UserError


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sit_composer.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("samples", metavar="SAMPLES", help="the pictures to judge")
    parser.add_argument("--reference", required=True, help="the real ones, or their statistics")
    parser.add_argument("--features", default="inception", metavar="inception|FILE", help="the extractor (inception)")
    parser.add_argument("--metrics", metavar="A,B,…", help=f"of {','.join(METRICS)} (all that can be had)")
    parser.add_argument("--out", metavar="FILE.json", help="write the result, and all that it depends on")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="pictures at a time (64)")
    parser.add_argument("--image-size", type=int, metavar="N", help="crop the reference's pictures to it, as ADM does")
    parser.add_argument("--cache", metavar="DIR", help="keep the copies of remote shards here (a temporary folder)")
    parser.add_argument("--save-statistics", metavar="FILE.npz", help="keep the reference's, to use as --reference")
    args = parser.parse_args(argv)
    for name in ("batch_size", "image_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"argument --{name.replace('_', '-')}: got {value}; it takes 1 or more")
    if args.cache is not None and not (is_remote(args.samples) or is_remote(args.reference)):
        parser.error("argument --cache: is for remote shards, and neither SAMPLES nor --reference is a URI")
    args.by_name = [] if args.metrics is None else [name.strip() for name in args.metrics.split(",")]
    for name in args.by_name:
        if name not in METRICS:
            parser.error(f"argument --metrics: got {name!r}; it takes {', '.join(METRICS)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake that it names."""
    args = parse(argv)
    try:
        from sit_composer.evaluation.judge import run  # torch: only once the options are right

        result = run(args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, reason in result["left_out"].items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print("\n".join(result["table"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
