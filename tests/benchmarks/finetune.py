"""Counts the steps that fine-tuning saves, on digits:   python tests/benchmarks/finetune.py --out DIR

A small network learns the digits 0 to 7. Then one learns 8 and 9 from its weights, and one from scratch, with the same
settings, each with several seeds. A support vector machine that learned scikit-learn's real digits reads what they
generate after some steps. Prints a Markdown table of the share that it reads as the requested digit: the seeds' mean,
and their lowest and highest. Rerun the same command to continue. With
--prepare, only the images are written: DIR/old and DIR/new, with a folder per digit.
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).parents[2]))  # of the package `tests`, which is not installed

from tests.helpers.judge_digits import judge
from tests.helpers.paths import ROOT

NEW = (8, 9)
NETWORK = ("model.hidden_size=64", "model.depth=3", "model.num_heads=2")  # the quickstart's, made small
STARTS = ("scratch", "old")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for images, shards, runs and samples")
    parser.add_argument("--prepare", action="store_true", help="only write the images")
    parser.add_argument("--old-steps", type=int, default=800, help="of the network that learns 0 to 7 (%(default)s)")
    parser.add_argument("--every", type=int, default=40, help="steps between two readings (%(default)s)")
    parser.add_argument("--steps", type=int, default=240, help="of the networks that learn 8 and 9 (%(default)s)")
    parser.add_argument("--per-class", type=int, default=100, metavar="N", help="generated images (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of those networks (%(default)s)")
    args = parser.parse_args(argv)
    write_images(args.out)
    if not args.prepare:
        compare(args)
    return 0


def write_images(out: Path) -> None:
    """Writes the digits as PNGs, below a folder per digit."""
    digits = load_digits()
    for i, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        file = out / ("new" if digit in NEW else "old") / str(digit) / f"{i:04}.png"
        if file.exists():  # a conversion would see that its source has changed
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * (255 / 16)).round().astype("uint8")).save(file)


def compare(args: argparse.Namespace) -> None:
    """Trains the networks and prints the table."""
    from convert import to_mds  # the libraries take seconds

    for name in ("old", "new"):
        run(to_mds.main, str(args.out / name), "--out", str(args.out / "shards" / name), "--workers", "0")
    train(args.out, "old", "old", "model.num_classes=8", f"trainer.max_duration={args.old_steps}ba")
    often = (f"trainer.save_interval={args.every}ba", "trainer.save_num_checkpoints_to_keep=-1")
    for seed, start in itertools.product(range(args.seeds), STARTS):
        weights = f"init_from={args.out}/runs/old/checkpoints" if start == "old" else "init_from=null"
        length = f"trainer.max_duration={args.steps}ba"
        train(args.out, f"from_{start}-{seed}", "new", "model.num_classes=2", f"seed={seed}", weights, length, *often)
    print(
        f"| steps | from scratch | from the weights of 0 to 7, after {args.old_steps} steps |\n| ---: | ---: | ---: |"
    )
    for step in range(args.every, args.steps + 1, args.every):
        cells = []
        for start in STARTS:
            shares = [read(args, f"from_{start}-{seed}", step) for seed in range(args.seeds)]
            cells.append(f"{np.mean(shares):.1f} % ({min(shares):g} to {max(shares):g})")
        print(f"| {step} | {' | '.join(cells)} |", flush=True)


def train(out: Path, name: str, shards: str, *overrides: str) -> None:
    from sit_composer import train

    folders = (f"data.local={out}/shards/{shards}", f"trainer.save_folder={out}/runs/{name}/checkpoints")
    same = ("scheduler={constant: {}}", "ema.decay=0.9", "callbacks={}", "trainer.save_interval=100ba")
    run(train.main, str(ROOT / "yamls" / "quickstart.yaml"), f"run_name={name}", *NETWORK, *folders, *same, *overrides)


def read(args: argparse.Namespace, name: str, step: int) -> float:
    """The percentage of generated digits that are read as the requested ones."""
    from sit_composer import sample

    (checkpoint,) = (args.out / "runs" / name / "checkpoints").glob(f"ep*-ba{step}-rank0.pt")
    out = args.out / "samples" / f"{name}-{step}"
    options = ("--classes", "8,9", "--per-class", str(args.per_class), "--cfg-scale", "1.5", "--batch-size", "100")
    solver = ("--sampling-method", "heun", "--num-steps", "25")
    run(sample.main, str(checkpoint), "--out", str(out), "--npz", f"{out}.npz", *options, *solver)
    with np.load(f"{out}.npz") as samples:
        return judge(samples["arr_0"], samples["labels"] + NEW[0])[1]


def run(main, *arguments: str) -> None:
    if code := main(list(arguments)):
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
