"""A leaderboard of recipes on a CPU:   python tests/benchmarks/leaderboard.py --out DIR

Trains `yamls/fashion_mnist.yaml` by each recipe of ROWS, and reads off in how many steps the Fréchet distance of the
averaged weights comes down to GOAL. Data, classifier and distance are those of `time_sampling.py`, whose folder DIR may
be used too. Network width, depth and patches, batch size, evaluation and seeds are the same for all rows; a row's title
and overrides say all that differs.

A finished run is stored in docs/leaderboard/ROW.json, and what is there isn't trained again: if interrupted, rerun the
same command. `--rows` and `--seeds` select. `--seconds` measures the processor time of a step of all rows, in turn; run
it on an idle machine. Each call writes the tables of docs/leaderboard.md and README.md and the plot anew from what is
stored; `--render` does no more than that. To add a recipe, add a line to ROWS.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder stands there instead
from sit_composer.errors import UserError
from sit_composer.outputs import write_json
from tests.benchmarks.time_sampling import (
    DEBIAN,
    ROOT,
    YAML,
    Curve,
    plot,
    prepare,
    read_curve,
    read_pictures,
    spread,
    train,
)
from tests.benchmarks.time_sampling import steps_to as steps_on
from tests.helpers.vit_teacher import train_teacher
from tests.reference.earlier.common import processor
from tests.reference.earlier.common import train as train_here

STORE, PLOT = ROOT / "docs" / "leaderboard", ROOT / "docs" / "images" / "leaderboard.png"
PAGE, README = ROOT / "docs" / "leaderboard.md", ROOT / "README.md"
GOAL = 40.0  # the Fréchet distance to come down to; it stays, so that later rows compare
SEEDS = [0, 1, 2]
ORIGIN = ["seeds", "commit", "machine"]  # columns
TOP = 3  # rows of the README, besides row 0
TIMED, SKIPPED, ROUNDS = 24, 4, 3  # of --seconds: a run's steps, those not measured, runs of each row

RATE = ["optimizer.lr=8e-3"]  # of row 0, as the best of four
LOOK = ["optimizer.lr=4e-3", "trainer.max_duration=500ba"]  # of a first look at one change, beside "rate-4e-3"
LOGIT_NORMAL = ["transport.time_sampling=logit-normal"]
TO_ZERO = ["scheduler={linear_with_warmup: {t_warmup: 50ba, alpha_f: 0.0}}"]
FALLING = [*LOGIT_NORMAL, *TO_ZERO, "trainer.max_duration=520ba", "ema.decay=0.95"]
TAUGHT = ["alignment={name: repa, block: 2}", "alignment.teacher=timm:DIR/teacher"]  # DIR is that of --out
ROWS: dict[str, tuple[str, list[str]]] = {  # file name: title, overrides
    "paper": ("the paper's recipe: uniform times, velocity, AdamW, a constant rate", RATE),
    "muon-fast": ("Muon, twice the rate, after 20 steps falling to 0 at step 450, logit-normal times, "
                  "an average of 20 steps",
                  ["optimizer.name=muon", "optimizer.lr=1.6e-2", *LOGIT_NORMAL, "ema.decay=0.95",
                   "scheduler={linear_with_warmup: {t_warmup: 20ba, alpha_f: 0.0}}", "trainer.max_duration=450ba"]),
    "muon-decay": ("Muon, twice the rate, falling to 0 at step 520, logit-normal times, an average of 20 steps",
                   ["optimizer.name=muon", "optimizer.lr=1.6e-2", *FALLING]),
    "muon-tokens": ("as muon-decay, and four class tokens",
                    ["optimizer.name=muon", "optimizer.lr=1.6e-2", *FALLING, "model.class_tokens=4"]),
    "x-muon": ("as muon-tokens, and images (x) predicted instead of velocities, with their own loss",
               ["optimizer.name=muon", "optimizer.lr=1.6e-2", *FALLING, "model.class_tokens=4",
                "transport.prediction=x"]),
    "x-short": ("as x-muon, after 20 steps falling to 0 at step 300",
                ["optimizer.name=muon", "optimizer.lr=1.6e-2", *LOGIT_NORMAL, "ema.decay=0.95",
                 "scheduler={linear_with_warmup: {t_warmup: 20ba, alpha_f: 0.0}}", "trainer.max_duration=300ba",
                 "model.class_tokens=4", "transport.prediction=x"]),
    "x-modern": ("as x-muon, with rotary positions and SwiGLU",
                 ["optimizer.name=muon", "optimizer.lr=1.6e-2", *FALLING, "model.class_tokens=4",
                  "transport.prediction=x", "model.rotary=true", "model.swiglu=true"]),
    "x-fast": ("images (x) predicted, with their own loss", [*RATE, "transport.prediction=x"]),
    "logit-normal": ("logit-normal times", [*RATE, *LOGIT_NORMAL]),
    "muon": ("Muon", [*LOOK, "optimizer.name=muon"]),
    "rate-1e-3": ("an eighth of the rate", ["optimizer.lr=1e-3"]),
    "rate-2e-3": ("a quarter of the rate", ["optimizer.lr=2e-3"]),
    "rate-4e-3": ("half of the rate", ["optimizer.lr=4e-3"]),
    "decay": ("logit-normal times, a quarter of the rate, falling to 0 at step 600",
              ["optimizer.lr=2e-3", *LOGIT_NORMAL, *TO_ZERO, "trainer.max_duration=600ba"]),
    "betas": ("a shorter second moment", [*LOOK, "optimizer.betas=[0.9,0.95]"]),
    "ema": ("an average of 20 steps", [*LOOK, "ema.decay=0.95"]),
    "x": ("x predicted, loss as velocity", [*LOOK, "transport.prediction=x", "transport.loss_weight=velocity"]),
    "x-own": ("x predicted, loss as x", [*LOOK, "transport.prediction=x"]),
    "sra": ("SRA", [*LOOK, "alignment={name: sra, block: 1, teacher_block: 3}"]),
    "repa": ("REPA, with a teacher that was trained on the labels", [*LOOK, *TAUGHT]),
    "irepa": ("the same with iREPA's convolution and spatial norm",
              [*LOOK, *TAUGHT, "alignment.projector=conv", "alignment.spatial_norm=0.8"]),
    "qk-norm": ("normalized queries and keys", [*LOOK, "model.qk_norm=true"]),
    "rms-norm": ("RMSNorm", [*LOOK, "model.rms_norm=true"]),
    "swiglu": ("SwiGLU", [*LOOK, "model.swiglu=true"]),
    "rotary": ("rotary positions", [*LOOK, "model.rotary=true"]),
    "class-tokens": ("four class tokens", [*LOOK, "model.class_tokens=4"]),
    "shared-adaln": ("one modulation for all blocks", [*LOOK, "model.shared_adaln=true"]),
}  # fmt: skip


@dataclass
class Row:
    """A recipe, and what was measured of it."""

    name: str
    title: str
    changes: list[str]
    runs: dict[int, dict] = field(default_factory=dict)  # seed: commit, machine, curve
    seconds: float | None = None  # of processor time per step

    @property
    def curves(self) -> dict[int, Curve]:
        return {s: {int(step): d for step, d in run["curve"].items()} for s, run in sorted(self.runs.items())}

    @property
    def steps(self) -> dict[int, float]:
        """Steps to the goal, by seed."""
        return {seed: steps_on(curve, GOAL) for seed, curve in self.curves.items()}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake or a command that failed, which it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="where data, checkpoints and the classifier go")
    add("--source", type=Path, default=DEBIAN, metavar="DIR", help="Fashion-MNIST's four files, gzipped (%(default)s)")
    add("--yaml", type=Path, default=YAML, metavar="FILE", help="the run that is varied (yamls/fashion_mnist.yaml)")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)} (all)")
    add("--seeds", nargs="+", type=int, default=SEEDS, metavar="N", help="(0 1 2)")
    add("--every", default="100ba", metavar="TIME", help="between two distances (%(default)s)")
    add("--length", default="1000ba", metavar="TIME", help="of runs, unless a row has its own (%(default)s)")
    add("--seconds", action="store_true", help="measure the processor time of steps instead of training")
    add("--render", action="store_true", help="write page, README and plot from what is stored, and train nothing")
    args = parser.parse_args(argv)
    if args.out is None and not args.render:
        parser.error("expected --out DIR, or --render")
    try:
        if not args.render:
            prepare(args.source, args.out)
            if args.seconds:
                measure_seconds(args)
            else:
                train_missing(args)
        render()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


# What is stored


def load(name: str) -> Row:
    """A row with its stored runs.

    Raises:
        UserError: if they are of another recipe.
    """
    title, changes = ROWS[name]
    row = Row(name, title, changes)
    path = STORE / f"{name}.json"
    if path.exists():
        stored = json.loads(path.read_text())
        if stored.pop("changes") != changes:
            raise UserError(f"{path}: its runs are of other overrides than row {name}; delete it, or rename the row")
        row.runs = {int(seed): run for seed, run in stored.items()}
    seconds = STORE / "seconds.json"
    if seconds.exists():
        row.seconds = json.loads(seconds.read_text())["per_step"].get(name)
    return row


def train_missing(args: argparse.Namespace) -> None:
    """Trains the selected rows by the selected seeds, where they aren't stored, and stores each at its end."""
    for name in args.rows:
        for seed in args.seeds:
            if seed in load(name).runs:
                continue
            commit, changes = code(), ROWS[name][1]
            common = [f"frechet.interval={args.every}", f"trainer.max_duration={args.length}"]
            changes = [change.replace("DIR", str(args.out.resolve())) for change in changes]
            if TAUGHT[1] in ROWS[name][1] and not (args.out / "teacher" / "model.safetensors").exists():
                train_teacher(*read_pictures(args.source, "train"), args.out / "teacher")
            train(args.yaml, args.out, name, seed, [*common, *changes])
            curve = {step: round(distance, 2) for step, distance in read_curve(args.out, name, seed).items()}
            runs = load(name).runs  # another seed may have been stored meanwhile
            runs[seed] = {"commit": commit, "machine": machine(), "curve": curve}
            write_json({"changes": ROWS[name][1], **{str(s): runs[s] for s in sorted(runs)}}, STORE / f"{name}.json")
            render()


def measure_seconds(args: argparse.Namespace) -> None:
    """Stores the median processor seconds of a step of each row, trained in turn in this process, without distances."""
    found: dict[str, list[float]] = {name: [] for name in args.rows}
    for _ in range(ROUNDS):
        for name in args.rows:
            with tempfile.TemporaryDirectory() as folder:
                places = [f"data.local={args.out / 'train'}", f"trainer.save_folder={folder}", "frechet=null"]
                rest = ["callbacks={}", "trainer.progress_bar=false", f"trainer.max_duration={TIMED}ba"]
                options = [*load(name).changes, "run_name=seconds", *places, *rest]
                ends = train_here([str(args.yaml), *options], lambda _: time.process_time())
            steps = [after - before for before, after in pairwise(ends)]
            found[name].append(median(steps[SKIPPED:]))
    seconds = {name: round(median(values), 5) for name, values in found.items()}
    write_json({"commit": code(), "machine": machine(), "per_step": seconds}, STORE / "seconds.json")


def code() -> str:
    """The commit of the code that trains, with + if it was changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()

    changed = git("diff", "--name-only", "HEAD", "--", "sit_composer", "yamls")
    return git("rev-parse", "--short=7", "HEAD") + ("+" if changed else "")


def machine() -> str:
    return f"{processor().removeprefix('model name ')}; {os.cpu_count()} cores"


# The page


def render() -> None:
    """Writes the tables of page and README, and the plot, from what is stored."""
    first, whole, others = ranked()
    for (path, name), lines in blocks(first, whole, others).items():
        fill(path, name, lines)
    titles = {row.name: f"{number}  {row.name}" for number, row in enumerate([first, *whole])}
    curves = {row.name: list(row.curves.values()) for row in [first, *whole]}
    plot(curves, PLOT, titles, "recipe", GOAL)


def ranked() -> tuple[Row, list[Row], list[Row]]:
    """Row 0; the rows with all seeds, by their steps; and the others, as ROWS has them.

    Raises:
        UserError: if row 0 has no run.
    """
    first, *rows = map(load, ROWS)
    if not first.runs:
        raise UserError(f"{STORE / first.name}.json: not there, expected runs of row 0; train it first")
    whole = [row for row in rows if set(row.runs) >= set(SEEDS)]
    others = [row for row in rows if row.runs and row not in whole]
    return first, sorted(whole, key=lambda row: median(row.steps.values())), others


def blocks(first: Row, whole: list[Row], others: list[Row]) -> dict[tuple[Path, str], list[str]]:
    """The tables, by page and name of the block."""
    return {
        (PAGE, "rows"): table([first, *whole], first),
        (PAGE, "others"): compared(others, first, load("rate-4e-3")),
        (README, "leaderboard"): table([first, *whole[:TOP]], first, short=True),
    }


def table(rows: list[Row], first: Row, short: bool = False) -> list[str]:
    """Markdown; each number is the median of the seeds, with their range, and the distance at the end their mean."""
    heads = ["", "recipe", f"steps to {GOAL:g}", "of row 0's", "seconds"]
    heads += [] if short else ["distance at the end", *ORIGIN]
    lines = headed(heads, right=(0, 2, 3, 4, 5))
    for number, row in enumerate(rows):
        steps = row.steps
        shares = [found / first.steps[seed] for seed, found in steps.items() if seed in first.steps]
        middle = median(steps.values())
        cells = [str(number), title(row, short)]
        cells += [spread(middle, list(steps.values()), ".0f"), spread(median(shares), shares, ".2f")]
        cells += ["" if row.seconds is None else spread(middle * row.seconds, [middle * row.seconds], ".0f")]
        if not short:
            ends = [curve[end(row)] for curve in row.curves.values()]
            cells += [f"{spread(mean(ends), ends, '.1f')}, {end(row)} steps", *origin(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def compared(rows: list[Row], first: Row, look: Row) -> list[str]:
    """Markdown of rows that have few seeds, or steps: where another row with the same seeds is then, and when there.

    That is ``look`` for those that begin with LOOK, and row 0 for others.
    """
    lines = headed(["recipe", "steps", "distance", "beside", "its distance", "is there after", *ORIGIN], (1, 2, 4, 5))
    for row in rows:
        other, step = look if row.changes[: len(LOOK)] == LOOK else first, end(row)
        ends = {seed: curve[step] for seed, curve in row.curves.items() if seed in other.runs}
        if not ends:
            continue  # the other row's runs come later
        theirs = [other.curves[seed].get(step, math.nan) for seed in ends]
        steps = [steps_on(other.curves[seed], distance) for seed, distance in ends.items()]
        cells = [title(row), str(step), spread(mean(ends.values()), list(ends.values()), ".1f"), other.name]
        cells += [spread(mean(theirs), theirs, ".1f").replace("nan", ""), spread(median(steps), steps, ".0f")]
        lines.append(f"| {' | '.join([*cells, *origin(row)])} |")
    return lines


def headed(heads: list[str], right: tuple[int, ...]) -> list[str]:
    marks = ("---:" if column in right else "---" for column in range(len(heads)))
    return [f"| {' | '.join(heads)} |", f"| {' | '.join(marks)} |"]


def end(row: Row) -> int:
    """The last step that all seeds measured."""
    return min(max(curve) for curve in row.curves.values())


def origin(row: Row) -> list[str]:
    """The cells of ORIGIN."""
    found = (sorted({str(run[what]) for run in row.runs.values()}) for what in ("commit", "machine"))
    return [str(len(row.runs)), *map(", ".join, found)]


def title(row: Row, short: bool = False) -> str:
    """Name and title, and unless short the overrides."""
    return " ".join([f"**{row.name}**: {row.title}", *(f"`{change}`" for change in row.changes if not short)])


def fill(path: Path, name: str, lines: list[str]) -> None:
    """Writes lines into a page, between the comments ``<!-- name -->`` and ``<!-- end -->``."""
    path.write_text(filled(path.read_text(), name, lines))


def filled(page: str, name: str, lines: list[str]) -> str:
    start, end = f"<!-- {name} -->\n", "<!-- end -->"
    if page.count(start) != 1:
        raise UserError(f"{start.strip()}: got {page.count(start)} of it in the page, expected 1")
    head, _, rest = page.partition(start)
    return "\n".join([head + start, *lines, "", end]) + rest.partition(end)[2]


if __name__ == "__main__":
    sys.exit(main())
