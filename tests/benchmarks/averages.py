"""Fréchet distances by the length of the average:   python tests/benchmarks/averages.py --out DIR --data DIR

Trains `yamls/fashion_mnist.yaml` once with several averages and a checkpoint every 100 batches, makes more averages
afterwards by `sit_composer.posthoc_ema`, and compares 1,000 images of each with real ones, from the same noise.
--data is a folder that `tests/benchmarks/time_sampling.py --out DIR --prepare` has filled. Prints a Markdown table. If
interrupted, rerun the same command: training resumes, and images that exist are kept.
"""

import argparse
import json
import sys
from pathlib import Path

from sit_composer import evaluate, posthoc_ema, sample, train
from sit_composer.choices import POWER_STD
from sit_composer.cli import number

ROOT = Path(__file__).parents[2]
STDS = (0.03, 0.05, 0.075, 0.1, 0.15, 0.2)
AVERAGES = ("ema.decay=0.99", "ema.decays=[0.995, 0.999]", "ema.power=[0.05, 0.1]")
TRACKED = ("training", "ema:0.99", "ema:0.995", "ema:0.999", "ema:power0.05", "ema:power0.1")
SAMPLING = ["--num-images", "1000", "--cfg-scale", "1", "--sampling-method", "heun", "--num-steps", "9"]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or that of a command that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where checkpoints, images and measurements go")
    add("--data", type=Path, required=True, metavar="DIR", help="shards, classifier and reference")
    add("--stds", type=number(POWER_STD), nargs="+", default=STDS, help="of the averages made afterwards (six)")
    add("--batches", type=int, default=1200, metavar="N", help="of training (1200)")
    add("--every", type=int, default=100, metavar="N", help="batches between checkpoints (100)")
    args = parser.parse_args(argv)
    run, made = args.out / "checkpoints", args.out / "averages"
    keys = {
        "run_name": "averages",
        "data.local": args.data / "train",
        "frechet": "null",
        "trainer.save_folder": run,
        "trainer.max_duration": f"{args.batches}ba",
        "trainer.save_interval": f"{args.every}ba",
        "trainer.save_num_checkpoints_to_keep": -1,
    }
    call(train.main, ROOT / "yamls" / "fashion_mnist.yaml", *AVERAGES, *(f"{k}={v}" for k, v in keys.items()))
    call(posthoc_ema.main, run, "--out", made, "--std", *args.stds)
    rows = [(f"`{name}`, during training", "–", distance(args, run, name)) for name in TRACKED]
    for std in sorted(args.stds):
        folder = made / f"power{std}-{args.batches}"
        off = json.loads((folder / "trainer_state.json").read_text())["profile_off_by"]
        rows.append((f"std {std:g}, made afterwards", f"{off:.1%}", distance(args, folder, f"ema:power{std}")))
    print("| weights | profile off by | Fréchet distance |\n| --- | ---: | ---: |")
    for title, off, value in rows:
        print(f"| {title} | {off} | {value:.1f} |")
    return 0


def call(command, *arguments: object) -> None:
    """Runs a command in this process; ends with its exit code if it fails."""
    if code := command([str(argument) for argument in arguments]):
        sys.exit(code)


def distance(args: argparse.Namespace, checkpoint: Path, weights: str) -> float:
    """The Fréchet distance of 1,000 images from these weights."""
    name = f"{checkpoint.name}-{weights.replace(':', '-')}"
    images, result = args.out / "images" / name, args.out / "results" / f"{name}.json"
    call(sample.main, checkpoint, "--out", images, "--weights", weights, "--batch-size", 250, *SAMPLING)
    places = ["--reference", args.data / "reference.npz", "--features", args.data / "classifier.pt"]
    call(evaluate.main, images, *places, "--metrics", "fid", "--out", result)
    return json.loads(result.read_text())["metrics"]["fid"]


if __name__ == "__main__":
    sys.exit(main())
