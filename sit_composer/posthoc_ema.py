"""Makes averages of any length after training:   python -m sit_composer.posthoc_ema RUN --std 0.1 0.15 --out DIR

RUN is the folder of a run's checkpoints, on disk or in s3://, or several checkpoints of one run. The run must have kept
power-function averages in two of them or more: train with `ema.power=[0.05, 0.1]`, a trainer.save_interval, and without
a trainer.save_num_checkpoints_to_keep. An average's std is relative to the batches trained so far: it is about as long
as an exponential one with decay 1 - 1 / (std · batches). DIR/powerSTD-STEP/ gets an exported folder for each std, which
every command takes as CHECKPOINT.

"profile off by" says how well the averages at hand combine to the one asked for; with more checkpoints they do better.
The checkpoints are read one by one, and an object store's are deleted again. Memory is needed for one average of a
checkpoint, and one for each std.
"""

import argparse
import os
import sys

from sit_composer.choices import COUNT, POWER_STD
from sit_composer.cli import hand_over, is_remote, make_parser, number, run_command
from sit_composer.errors import UserError
from sit_composer.outputs import check_output


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("python -m sit_composer.posthoc_ema", __doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="RUN", help="a run's folder, or some of its checkpoints")
    std = number(POWER_STD)
    parser.add_argument("--std", type=std, nargs="+", required=True, help="relative stds of the averages to make")
    parser.add_argument("--at", type=number(COUNT), metavar="BATCH", help="of the checkpoint that they end at (newest)")
    parser.add_argument("--out", required=True, metavar="DIR", help="parent of the written folders")
    args = parser.parse_args(argv)
    for path in args.checkpoints:
        if not is_remote(path) and not os.path.exists(path):
            raise UserError(f"{path}: no checkpoint here")
    check_output("--out", os.path.join(args.out, "power…-…"), "")
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 if everything is written, 2 for a mistake that it names."""
    return run_command(lambda: hand_over("sit_composer.checkpoint.posthoc", parse(argv), "torch"))


if __name__ == "__main__":
    sys.exit(main())
