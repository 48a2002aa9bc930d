"""Fréchet distance against evaluations of the field:   python tests/benchmarks/evaluations.py --run DIR

Samples from one network with guidance, by the authors' defaults (the SDE in 250 steps, and dopri5), by the same
solvers with fewer evaluations, and by Heun's method of third order, uniform or with shifted times and a guidance
interval. Prints a Markdown table and, with --plot, plots it. An evaluation is one of the guided field; it takes two
passes of the network per image where it guides, one where it doesn't, and the table has both. (The authors' SDE calls
its network twice per step. That is not counted.)

The question is whether a fixed setting reaches the defaults' distance with a quarter of their evaluations. The
candidates are the four of third order with 9 and 12 evaluations. The one with the smallest distance on the images of
--choose-on is chosen; the table, in which it is bold, is of the images of other seeds.

The network is `yamls/fashion_mnist.yaml`'s, trained for longer, on Fashion-MNIST (Debian's dataset-fashion-mnist, or
any folder of its four files). The first call makes DIR: data, classifier and run take a quarter of an hour of one CPU
core, and the measurements half an hour. What is measured is kept there: if interrupted, rerun the same command. The
features are the classifier's, and the distances can't be compared with published FIDs.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from sit_composer.autoencoder import to_uint8
from sit_composer.checkpoint.load import load_checkpoint
from sit_composer.checkpoint.record import Checkpoint
from sit_composer.choices import Sampling
from sit_composer.errors import UserError
from sit_composer.evaluation.features import Extractor, load_extractor
from sit_composer.evaluation.metrics import frechet_distance, statistics
from sit_composer.generate import generate, mean_work
from sit_composer.guidance import Guidance
from sit_composer.outputs import write_json

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder stands there instead
from tests.benchmarks.time_sampling import DEBIAN, ROOT, YAML, prepare, run

SHIFT, INTERVAL = 0.5, (0.0, 0.7)
BATCH = 50  # 100 rows with guidance: a third faster than 500, whose activations leave the cache
Measurement = dict[str, float]  # distance, evaluations, passes


@dataclass(frozen=True)
class Point:
    """One way to sample, measured once per seed."""

    curve: str
    name: str
    sampling: Sampling
    default: bool = False  # of the authors
    candidate: bool = False


def points(cfg_scale: float) -> list[Point]:
    """All that is measured, the authors' defaults first."""
    ode, sde = Sampling(cfg_scale=cfg_scale), Sampling("SDE", "Euler", 250, cfg_scale)
    heun, uniform = replace(ode, sampling_method="heun"), replace(ode, sampling_method="heun3")
    moved = replace(uniform, cfg_interval=INTERVAL, time_shift=SHIFT)

    def third(curve: str, name: str, sampling: Sampling) -> list[Point]:
        steps = ((n, replace(sampling, num_steps=n + 1)) for n in (2, 3, 4, 8))
        return [Point(curve, f"{name}, {n} steps", one, candidate=n in (3, 4)) for n, one in steps]

    return [
        Point("SDE, Euler-Maruyama", "SDE, 250 steps (the authors' default)", sde, default=True),
        Point("ODE, dopri5", "dopri5 (the authors' default)", ode, default=True),
        *(Point("SDE, Euler-Maruyama", f"SDE, {n} steps", replace(sde, num_steps=n)) for n in (62, 31)),
        Point("ODE, dopri5", "dopri5, rtol 0.1, atol 0.01", replace(ode, atol=1e-2, rtol=1e-1)),
        *(Point("ODE, Heun", f"heun, {n} steps", replace(heun, num_steps=n + 1)) for n in (4, 6, 8, 12)),
        *third("ODE, Heun of third order", "heun3", uniform),
        *third("the same, shift and interval", "heun3, shift, interval", moved),
    ]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake or a command that failed, which it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="where data, run and measurements are, or go")
    add("--source", type=Path, default=DEBIAN, metavar="DIR", help="the four IDX files, gzipped (%(default)s)")
    add("--yaml", type=Path, default=YAML, metavar="FILE", help="the run (yamls/fashion_mnist.yaml)")
    add("--steps", type=int, default=3600, help="of its training (%(default)s)")
    add("--cfg-scale", type=float, default=1.5, help="for all (%(default)s)")
    add("--images", type=int, default=1000, metavar="N", help="per measurement (%(default)s)")
    add("--choose-on", type=int, default=0, metavar="S", help="the seed of the images to choose on (%(default)s)")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="S", help="one measurement each (1 2 3)")
    add("--plot", type=Path, metavar="FILE.png", help="draw the distances")
    args = parser.parse_args(argv)
    if args.choose_on in args.seeds:
        parser.error(f"argument --seeds: got {args.choose_on}, expected other seeds than --choose-on's")
    try:
        prepare(args.source, args.run)
        train(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    judge = Judge(args.run, args.images)
    ways = points(args.cfg_scale)
    trials = {point: judge(point.sampling, args.choose_on)["distance"] for point in ways if point.candidate}
    chosen = min(trials, key=trials.__getitem__)
    measured = {point: [judge(point.sampling, seed) for seed in args.seeds] for point in ways}
    found = ", ".join(f"{distance:.2f} ({point.name})" for point, distance in trials.items())
    print(f"{args.images} images per measurement. On seed {args.choose_on}: {found}.\n")
    print("\n".join(table(measured, chosen)))
    if args.plot:
        plot(measured, args.plot, f"{args.images:,} images, guidance {args.cfg_scale:g}")
    return 0


def train(args: argparse.Namespace) -> None:
    """Trains the network, or what is left of it; its distance isn't measured meanwhile."""
    places = {
        "data.local": args.run / "train",
        "frechet": "null",
        "trainer.save_folder": args.run / "checkpoints",
        "trainer.max_duration": f"{args.steps}ba",
    }
    if any(places["trainer.save_folder"].glob(f"ep*-ba{args.steps}-rank0.pt")):
        return
    overrides = ["run_name=evaluations", *(f"{key}={value}" for key, value in places.items())]
    run(Path(sys.executable).parent / "composer", "-n", "1", ROOT / "sit_composer/train.py", args.yaml, *overrides)


class Judge:
    """Measures ways to sample from the run's newest checkpoint, each once: the results are in measured.json."""

    def __init__(self, folder: Path, images: int):
        self.images, self.file = images, folder / "measured.json"
        self.checkpoint: Checkpoint = load_checkpoint(str(folder / "checkpoints"))
        self.network, self.transport = self.checkpoint.build_network(), self.checkpoint.record.build_transport()
        self.extractor: Extractor = load_extractor(str(folder / "classifier.pt"))
        with np.load(folder / "reference.npz") as reference:
            self.reference = reference["mu"], reference["sigma"]
        self.known = json.loads(self.file.read_text()) if self.file.exists() else {}

    def __call__(self, sampling: Sampling, seed: int) -> Measurement:
        """The distance, and the mean evaluations and passes per image."""
        sampling = replace(sampling, seed=seed)
        key = json.dumps([self.checkpoint.step, self.images, asdict(sampling)])
        if key not in self.known:
            self.known[key] = self.measure(sampling)
            write_json(self.known, self.file)
            print(key, self.known[key], file=sys.stderr, flush=True)
        return self.known[key]

    def measure(self, sampling: Sampling) -> Measurement:
        guidance = Guidance(self.network, sampling.cfg_scale, None, sampling.cfg_interval)
        features, work = [], Counter[str]()
        for start in range(0, self.images, BATCH):
            indices = list(range(start, min(start + BATCH, self.images)))
            labels = [i * self.network.num_classes // self.images for i in indices]
            images, used = generate(guidance, self.transport, labels, indices, sampling)
            features.append(self.extractor(to_uint8(images).expand(-1, 3, -1, -1))["features"])
            work.update(images=len(indices), **{name: count * len(indices) for name, count in used.items()})
        distance = frechet_distance(*statistics(np.concatenate(features)), *self.reference)
        means = mean_work(work)
        return {"distance": distance, "evaluations": means["evaluations"], "passes": means["passes"]}


def averages(measurements: list[Measurement]) -> Measurement:
    return {name: mean(m[name] for m in measurements) for name in measurements[0]}


def table(measured: dict[Point, list[Measurement]], chosen: Point) -> list[str]:
    """A Markdown row per point: its mean and range over the seeds, and its evaluations as a share of each default's
    whose distance it reaches with every seed; else how much farther it is, on average."""
    defaults = [point for point in measured if point.default]
    heads = [f"of the {point.curve.split(', ')[0]}'s" for point in defaults]
    lines = [f"| sampling | evaluations | passes | distance | {' | '.join(heads)} |"]
    lines.append("| --- | ---: | ---: | ---: |" + " ---: |" * len(defaults))
    for point, found in measured.items():
        average, distances = averages(found), [m["distance"] for m in found]
        cells = [f"{average['evaluations']:.0f}", f"{average['passes']:.0f}"]
        cells.append(f"{average['distance']:.2f} ({min(distances):.2f} – {max(distances):.2f})")
        for default in defaults:
            theirs = measured[default]
            reached = all(m["distance"] <= d["distance"] for m, d in zip(found, theirs, strict=True))
            share = average["evaluations"] / averages(theirs)["evaluations"]
            farther = average["distance"] - averages(theirs)["distance"]
            cells.append(f"{share:.2f}" if reached else f"no ({farther:+.2f})")
        name = f"**{point.name}**" if point is chosen else point.name
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def plot(measured: dict[Point, list[Measurement]], path: Path, title: str) -> None:
    """Distance against evaluations: each curve's mean over the seeds with its range, and stars for the defaults."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for curve in dict.fromkeys(point.curve for point in measured):
        found = [(averages(m), m, point.default) for point, m in measured.items() if point.curve == curve]
        found.sort(key=lambda one: one[0]["evaluations"])
        x, y = ([average[name] for average, _, _ in found] for name in ("evaluations", "distance"))
        bounds = [[pick(m["distance"] for m in each) for _, each, _ in found] for pick in (min, max)]
        (line,) = axes.plot(x, y, marker=".", label=curve)
        axes.fill_between(x, *bounds, color=line.get_color(), alpha=0.2, linewidth=0)
        for average, _, default in found:
            if default:
                axes.plot(average["evaluations"], average["distance"], "*", markersize=14, color=line.get_color())
                axes.axhline(average["distance"], color=line.get_color(), linewidth=0.8, linestyle="--")
    axes.set(xlabel="evaluations of the guided field per image", ylabel="Fréchet distance", xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:.4g}")
        axis.set_minor_formatter("")
    axes.set_xticks([4, 8, 16, 32, 64, 128, 250])
    axes.set_yticks([8, 9, 10, 12, 15, 20, 30])
    axes.grid(alpha=0.3)
    axes.legend(title=f"{title}; ★ the authors' defaults")
    figure.savefig(path, dpi=110)
    with Image.open(path) as image:
        image.convert("RGB").quantize(64).save(path, optimize=True)  # a third of the bytes


if __name__ == "__main__":
    torch.set_num_threads(1)  # several small matrix products gain nothing from more
    sys.exit(main())
