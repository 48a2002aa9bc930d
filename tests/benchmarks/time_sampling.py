"""Compares distributions of training times by Fréchet distance:   python tests/benchmarks/time_sampling.py --out DIR

Trains `yamls/fashion_mnist.yaml` with each distribution and several seeds. Prints a Markdown table and, with --plot,
plots the distances. The images are Fashion-MNIST's 60,000 (Debian's dataset-fashion-mnist, or any folder of its four
files). The features come from a small classifier that is trained on them first, because FID's Inception needs a
download; the numbers can't be compared with published FIDs.

For one seed, all arms start from the same weights and see the same images and noise in the same order: only the times
differ. Every measurement uses the same noise. If interrupted, rerun the same command; it skips finished runs.
"""

import argparse
import gzip
import io
import json
import math
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from sit_composer.config.load import load_config
from sit_composer.errors import UserError

ROOT = Path(__file__).parents[2]
DEBIAN = "/usr/share/datasets/fashion-mnist"
YAML = ROOT / "yamls" / "fashion_mnist.yaml"
SHIFT = math.sqrt(28 * 28 / 4096)  # RAE's, which moves the times of few dimensions towards the data (arXiv 2510.11690)
ARMS = {  # file name: title, overrides
    "uniform": ("uniform", []),
    "logit-normal": ("logit-normal(0, 1)", ["transport.time_sampling=logit-normal"]),
    "shifted": (f"uniform, shift {SHIFT:.4f}", [f"transport.time_shift={SHIFT:.4f}"]),
}
Arms = dict[str, tuple[str, list[str]]]
Curve = dict[int, float]  # step -> Fréchet distance


def main(argv: list[str] | None = None, arms: Arms = ARMS, what: str = "training times", doc: str | None = None) -> int:
    """Compares arms of another benchmark too, which ``what`` and ``doc`` describe.

    Returns the exit code: 0, or 2 for a mistake or a command that failed, which it names.
    """
    parser = argparse.ArgumentParser(description=doc or __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where data, runs and measurements go")
    add("--source", type=Path, default=DEBIAN, metavar="DIR", help="the four IDX files, gzipped (%(default)s)")
    add("--yaml", type=Path, default=YAML, metavar="FILE", help="the run that is varied (yamls/fashion_mnist.yaml)")
    add("--arms", nargs="+", choices=arms, default=list(arms), help=f"{what}; the first sets the goal (all)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(0 1 2)")
    add("--plot", type=Path, metavar="FILE.png", help="draw the distances")
    add("--prepare", action="store_true", help="make shards, classifier and reference, and train nothing")
    args = parser.parse_args(argv)
    try:
        prepare(args.source, args.out)
        if args.prepare:
            return 0
        for seed in args.seeds:
            for arm in args.arms:
                train(args.yaml, args.out, arm, seed, arms[arm][1])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    curves = {arm: [read_curve(args.out, arm, seed) for seed in args.seeds] for arm in args.arms}
    print("\n".join(table(curves, arms, what)))
    if args.plot:
        plot(curves, args.plot, {arm: arms[arm][0] for arm in curves}, what, threshold(curves))
    return 0


# Data, a network to see it with, and runs


def prepare(source: Path, out: Path) -> None:
    """Makes shards, ``classifier.pt`` and ``reference.npz`` in ``out``, where they are missing."""
    out.mkdir(parents=True, exist_ok=True)
    for name, prefix, limit in (("train", "train", []), ("test", "t10k", ["--limit", "1000"])):
        parquet = out / f"{name}.parquet"
        if not parquet.exists():
            write_parquet(*read_pictures(source, prefix), parquet)
        run(sys.executable, ROOT / "convert/to_mds.py", parquet, "--out", out / name, *limit)
    classifier = out / "classifier.pt"
    if not classifier.exists():
        train_classifier(*read_pictures(source, "train"), classifier)
    if not (out / "reference.npz").exists():
        share = accuracy(classifier, *read_pictures(source, "t10k"))
        print(
            f"the classifier reads {100 * share:.1f} % of the test images right; 1,000 of them as samples:",
            flush=True,
        )
        places = [out / "test", "--reference", out / "train", "--features", classifier]
        options = ["--metrics", "fid", "--save-statistics", out / "reference.npz"]
        run(sys.executable, "-m", "sit_composer.evaluate", *places, *options)


def train(config: Path, out: Path, arm: str, seed: int, changes: list[str]) -> None:
    """Trains one arm with one seed, or what is left of it."""
    name = f"{arm}-{seed}"
    duration = load_config(str(config), changes).trainer["max_duration"]
    if (out / "runs" / name / "frechet.json").exists() and f"{max(read_curve(out, arm, seed))}ba" == duration:
        return
    places = {
        "data.local": out / "train",
        "frechet.reference": out / "reference.npz",
        "frechet.features": out / "classifier.pt",
        "trainer.save_folder": out / "runs" / name,
    }
    print(name, flush=True)
    overrides = [f"run_name={name}", f"seed={seed}", *changes, *(f"{k}={v}" for k, v in places.items())]
    run(Path(sys.executable).parent / "composer", "-n", "1", ROOT / "sit_composer/train.py", config, *overrides)


def run(*command: object) -> None:
    """Runs a command, which prints its own errors.

    Raises:
        UserError: if it fails.
    """
    done = subprocess.run(list(map(str, command)))
    if done.returncode != 0:
        raise UserError(f"{' '.join(map(str, command))}: failed with exit code {done.returncode}")


def read_curve(out: Path, arm: str, seed: int) -> Curve:
    """The distances that a run measured."""
    content = json.loads((out / "runs" / f"{arm}-{seed}" / "frechet.json").read_text())
    return {int(step): distance for step, distance in content["frechet_distance"].items()}


def read_pictures(source: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 28, 28) and labels uint8 (N,)."""
    return (
        read_idx(source / f"{prefix}-images-idx3-ubyte.gz"),
        read_idx(source / f"{prefix}-labels-idx1-ubyte.gz"),
    )


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of a gzipped IDX file: 0, 0, 8 (bytes), the number of dimensions, each of them, the values.

    Raises:
        UserError: if it isn't there, or isn't one.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --source is the folder of Fashion-MNIST's four .gz files") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: can't be read ({error})") from None
    start = 4 + 4 * content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0  # of the values
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if not shape or len(content) != start + math.prod(shape):
        raise UserError(f"{path}: not an IDX file of bytes")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def write_parquet(pictures: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """A column of PNGs and a column of labels."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    pngs = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        pngs.append(buffer.getvalue())
    part = path.with_suffix(".part")
    pq.write_table(pa.table({"image": pngs, "label": labels.astype(np.int64)}), part)
    part.rename(path)


def train_classifier(pictures: np.ndarray, labels: np.ndarray, path: Path, epochs: int = 3) -> None:
    """Saves a TorchScript module: uint8 images (N, 3, 28, 28) -> (features (N, 64), logits (N, 10))."""
    import torch
    from torch import nn

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            convolutions = [
                nn.Conv2d(1, 16, 5, stride=2, padding=2),
                nn.ReLU(),
                nn.Conv2d(16, 32, 3, stride=2, padding=1),
            ]
            self.body = nn.Sequential(*convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU())
            self.head = nn.Linear(64, 10)

        def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            features = self.body(pictures[:, :1].float() / 255)
            return features, self.head(features)

    torch.manual_seed(0)
    network = Classifier()
    x, y = torch.from_numpy(pictures.copy())[:, None], torch.from_numpy(labels.astype(np.int64))
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(epochs):
        for indices in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[indices])[1], y[indices]).backward()
            optimizer.step()
    part = path.with_suffix(".part")
    torch.jit.script(network.eval()).save(str(part))
    part.rename(path)


def accuracy(classifier: Path, pictures: np.ndarray, labels: np.ndarray) -> float:
    """The share of the images that the saved classifier reads right."""
    import torch

    network = torch.jit.load(str(classifier))
    with torch.no_grad():
        logits = network(torch.from_numpy(pictures.copy())[:, None].expand(-1, 3, -1, -1))[1]
    return float((logits.argmax(1).numpy() == labels).mean())


# What the runs say


def steps_to(curve: Curve, distance: float) -> float:
    """The step at which a curve first comes down to a distance, on straight lines between measurements.

    Infinite if it doesn't; the first step measured if it is there already, though it may have been sooner.
    """
    before: tuple[int, float] | None = None
    for step, value in sorted(curve.items()):
        if value <= distance:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - distance) / (before[1] - value)
        before = step, value
    return math.inf


def last(curve: Curve) -> float:
    return curve[max(curve)]


def threshold(curves: dict[str, list[Curve]]) -> float:
    """The distance that the first arm has come to by its end with every seed."""
    return max(last(curve) for curve in next(iter(curves.values())))


def table(curves: dict[str, list[Curve]], arms: Arms = ARMS, what: str = "training times") -> list[str]:
    """A Markdown row for each arm: mean (range) over seeds of its last distance; median (range) of the steps to the
    goal, and of those as a share of the first arm's with the same seed."""
    goal, (name, first) = threshold(curves), next(iter(curves.items()))
    lines = [
        f"| {what} | distance after {max(first[0])} steps | steps to {goal:.1f} | of {arms[name][0]}'s steps |",
        "| --- | ---: | ---: | ---: |",
    ]
    for arm, runs in curves.items():
        ends, steps = [last(curve) for curve in runs], [steps_to(curve, goal) for curve in runs]
        shares = [a / steps_to(b, goal) for a, b in zip(steps, first, strict=True)]
        cells = (
            spread(mean(ends), ends, ".1f"),
            spread(median(steps), steps, ".0f"),
            spread(median(shares), shares, ".2f"),
        )
        lines.append(f"| {arms[arm][0]} | {' | '.join(cells)} |")
    return lines


def spread(middle: float, values: list[float], form: str) -> str:
    """A number with the range of those that it stands for; what wasn't reached is infinite."""
    shown = ["never" if math.isinf(v) else f"{v:{form}}" for v in (middle, min(values), max(values))]
    return shown[0] if len(set(shown)) == 1 else f"{shown[0]} ({shown[1]} – {shown[2]})"


def plot(curves: dict[str, list[Curve]], path: Path, titles: dict[str, str], what: str, goal: float) -> None:
    """Distance against steps: each arm's mean, and between its smallest and its largest a band; and the goal."""
    with plotted(path, xlabel="training steps", ylabel="Fréchet distance") as axes:
        for arm, runs in curves.items():
            steps = sorted(set(runs[0]).intersection(*runs))
            values = np.array([[curve[step] for step in steps] for curve in runs])
            (line,) = axes.plot(steps, values.mean(0), marker=".", label=titles[arm])
            axes.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
        axes.axhline(goal, color="grey", linewidth=0.8, linestyle="--")
        axes.legend(title=f"{what} (mean and range of the seeds)")


@contextmanager
def plotted(path: Path, **labels: str) -> Iterator[Any]:
    """Axes with a logarithmic ordinate, which are saved as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator
    from PIL import Image

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    yield axes
    axes.set(yscale="log", **labels)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(64).save(path, optimize=True)  # a third of the bytes


if __name__ == "__main__":
    sys.exit(main())
