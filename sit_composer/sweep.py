"""Measures a grid of settings:   python -m sit_composer.sweep CHECKPOINT --reference FILE --num-images N --out DIR …

--weights, --sampling-method, --num-steps, --cfg-scale, --time-shift and --seed each take a list, such as
--cfg-scale 1,1.25,1.5. For each combination of them, a cell, N images are generated as sit_composer.sample does, the
classes equally often, and compared with the reference as sit_composer.evaluate does: the numbers are those of the two
commands. All other options are theirs. Features are kept in memory, and images only with --keep-images.

Writes DIR/sweep.md, a table; DIR/sweep.png, a plot; and DIR/sweep.json, each cell's result as of evaluate --out. All
are written after each cell. After an interruption, rerun the same command; it continues with the missing cells. With
more values, it adds cells. On several GPUs: composer -n N -m sit_composer.sweep CHECKPOINT …
"""

import argparse
import itertools
from argparse import Namespace
from pathlib import Path

from sit_composer import evaluate, sample
from sit_composer.choices import ADAPTIVE_METHODS
from sit_composer.cli import check_checkpoint, hand_over, idle_options, leave, run_command
from sit_composer.errors import UserError
from sit_composer.sample import AXES


def parse(argv: list[str] | None) -> Namespace:
    """The options; ``cells`` are those of `sit_composer.sample` for each combination, in order."""
    parser = sample.make_options("python -m sit_composer.sweep", __doc__, several=True)
    evaluate.add_options(parser)
    parser.add_argument("--keep-images", action="store_true", help="keep each cell's images, in DIR/images")
    args = parser.parse_args(argv)
    if args.num_images is None and args.classes is None:
        raise UserError("--num-images: no value, expected the number of images per cell")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"--out: {args.out} is a file, expected a folder")
    evaluate.check(args)
    args.cells = make_cells(parser, args)
    return args


def make_cells(parser: argparse.ArgumentParser, args: Namespace) -> list[Namespace]:
    """The options of each combination. One that has no effect in some cells is left out there; in all, refused."""
    cells, idle = [], []
    for values in itertools.product(*(getattr(args, name) or [None] for name in AXES)):
        cell = Namespace(**{**vars(args), **dict(zip(AXES, values, strict=True))})
        found = idle_options(cell, *sample.rules(cell))
        idle.append(found)
        if cell.sampling_method in ADAPTIVE_METHODS:
            found = {**found, "num_steps": "with an adaptive solver"}  # with which sit_composer.sample only notes it
        for name in found:
            setattr(cell, name, None)
        cells.append(sample.settle(cell))
    for name, reason in idle[0].items():
        if all(name in found for found in idle):
            parser.error(f"argument --{name.replace('_', '-')}: has no effect {reason}")
    return cells


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 if all cells are measured, 2 for a mistake that it names."""
    module = "sit_composer.evaluation.sweeping"
    return run_command(
        lambda: hand_over(module, check_checkpoint(parse(argv)), "torch", "streaming"), "stopped; rerun to continue"
    )


if __name__ == "__main__":
    leave(main)
