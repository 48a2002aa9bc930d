"""The training losses to expect, for each YAML:   python tests/benchmarks/loss_curves.py --out DIR

Trains a small sibling of each YAML on scikit-learn's digits for 300 steps: its transport, optimizer, schedule, average,
label dropout and blocks, on a network of width 64 and depth 4, on pixels of one channel in patches of at most 2x2, in
batches of 64, in float32, with at most 50 steps of warmup.
Siblings that are alike are trained once. Each mean of ten steps is stored in docs/reference_losses.json; what is there
isn't trained again, unless its YAML's recipe has changed. The table of docs/reference_losses.md and the plot are
written anew from what is stored; `--render` does no more than that.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder stands there instead
from sit_composer.choices import dimension_shift
from sit_composer.config.load import load_config
from sit_composer.config.schema import Config, network_arguments
from sit_composer.errors import UserError
from sit_composer.outputs import write_json
from tests.benchmarks.leaderboard import code, fill, machine
from tests.benchmarks.time_sampling import ROOT, plotted, run
from tests.reference.earlier.common import train

YAMLS = sorted((ROOT / "yamls").glob("*.yaml"))
STORE, PAGE = ROOT / "docs" / "reference_losses.json", ROOT / "docs" / "reference_losses.md"
PLOT = ROOT / "docs" / "images" / "reference_losses.png"
STEPS, EACH = 300, 10  # of training; of a mean
DEPTH, SIDE, PATCH = 4, 8, 2
WARMUP = 50  # steps, at the most
SMALL = {
    "model.hidden_size": 64, "model.depth": DEPTH, "model.num_heads": 4, "model.input_size": SIDE,
    "model.in_channels": 1, "model.num_classes": 10, "autoencoder.name": "null",
    "data.remote": "null", "data.global_batch_size": 64, "data.num_workers": 0, "data.flip": "false",
    "precision": "fp32", "frechet": "null", "callbacks": "{}", "trainer.progress_bar": "false",
    "trainer.device_train_microbatch_size": 64, "trainer.save_interval": f"{STEPS}ba",
}  # fmt: skip
PLACES = {"data.local": "-", "data.remote": "null", "autoencoder.name": "null", "trainer.save_folder": "-"}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake or a command that failed, which it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the digits' shards go")
    parser.add_argument("--render", action="store_true", help="write page and plot from what is stored")
    args = parser.parse_args(argv)
    if args.out is None and not args.render:
        parser.error("expected --out DIR, or --render")
    try:
        if not args.render:
            train_missing(args.out)
        render()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


# The siblings


def overrides(config: Config, steps: int = STEPS) -> list[str]:
    """What makes a YAML's config its small sibling's, but for the places of data and checkpoints."""
    network, transport = network_arguments(config.model), config.transport
    changes = {**SMALL, "trainer.max_duration": f"{steps}ba", "model.patch_size": min(network["patch_size"], PATCH)}
    if (start := config.model.class_tokens_start) > 0:
        changes["model.class_tokens_start"] = start * DEPTH // network["depth"]
    for name, arguments in config.scheduler.items():
        if int(arguments.get("t_warmup", "0ba").removesuffix("ba")) > WARMUP:
            changes[f"scheduler.{name}.t_warmup"] = f"{WARMUP}ba"
    if transport.time_shift == "auto":  # of the YAML's dimensions, not of the digits'
        changes["transport.time_shift"] = dimension_shift(network["in_channels"] * network["input_size"] ** 2)
    return as_overrides(changes)


def as_overrides(changes: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in changes.items()]


def read(path: Path, changes: list[str] | None = None) -> Config:
    """A YAML's config, with what it leaves open."""
    return load_config(str(path), [*as_overrides(PLACES), *(changes or [])])


def recipe(path: Path) -> dict[str, Any]:
    """What decides a sibling's losses: every key of these sections that isn't as by default."""
    config = read(path, overrides(read(path)))
    found = {"model": network_arguments(config.model), "scheduler": config.scheduler}
    found |= {"algorithms": config.algorithms} if config.algorithms else {}
    for name in ("transport", "optimizer", "ema"):
        section = getattr(config, name)
        fresh = type(section)() if section is not None else None
        found[name] = {
            f.name: value
            for f in dataclasses.fields(section or ())
            if (value := getattr(section, f.name)) != getattr(fresh, f.name)
        }
    return json.loads(json.dumps(found))  # as it is read back


def losses(path: Path, shards: Path, steps: int = STEPS) -> list[float]:
    """Trains a YAML's sibling in this process; returns each step's loss."""
    with tempfile.TemporaryDirectory() as folder:
        places = {"data.local": shards, "trainer.save_folder": folder, "run_name": path.stem}
        return train([str(path), *overrides(read(path), steps), *as_overrides(places)])


def means(values: list[float]) -> list[float]:
    return [round(mean(values[i : i + EACH]), 5) for i in range(0, len(values), EACH)]


def train_missing(out: Path) -> None:
    """Trains the siblings that aren't stored as they are now, and stores each at its end."""
    run(sys.executable, ROOT / "convert/to_mds.py", "digits", "--out", out)
    stored = stored_curves()
    for path in YAMLS:
        wanted = recipe(path)
        if stored.get(path.stem, {}).get("recipe") == wanted:
            continue
        curve = next((curve for curve in stored.values() if curve["recipe"] == wanted), None)
        if curve is None:
            found = losses(path, out)
            curve = {
                "recipe": wanted,
                "commit": code(),
                "machine": machine(),
                "first": found[0],
                "losses": means(found),
            }
        names = [yaml.stem for yaml in YAMLS]
        stored = {name: curve if name == path.stem else stored[name] for name in names if name in {*stored, path.stem}}
        write_json(stored, STORE)


def stored_curves() -> dict[str, dict[str, Any]]:
    """By the YAML's name: recipe, commit, machine, the first step's loss, and the mean of each ten."""
    return json.loads(STORE.read_text()) if STORE.exists() else {}


# The page


def groups() -> dict[str, dict[str, Any]]:
    """The curves that differ, by the names of their YAMLs."""
    found: list[tuple[list[str], dict[str, Any]]] = []
    for name, curve in stored_curves().items():
        names = next((names for names, other in found if other["recipe"] == curve["recipe"]), None)
        if names is None:
            found.append(([name], curve))
        else:
            names.append(name)
    return {", ".join(names): curve for names, curve in found}


def table() -> list[str]:
    lines = [
        "| YAML | first step | steps 41 to 50 | 91 to 100 | 291 to 300 | commit |",
        "| --- |" + " ---: |" * 4 + " --- |",
    ]
    for names, curve in groups().items():
        shown = [curve["first"], *(curve["losses"][i // EACH - 1] for i in (50, 100, STEPS))]
        cells = [", ".join(f"`{name}`" for name in names.split(", ")), *(f"{value:.3f}" for value in shown)]
        lines.append(f"| {' | '.join([*cells, curve['commit']])} |")
    return lines


def render() -> None:
    """Writes the table of the page, and the plot."""
    fill(PAGE, "losses", table())
    with plotted(PLOT, xlabel="training steps", ylabel=f"loss, mean of {EACH} steps") as axes:
        for names, curve in groups().items():
            axes.plot(range(EACH, STEPS + 1, EACH), curve["losses"], label=names.replace(", ", ",\n"))
        axes.legend(title="small sibling of", fontsize="small")


if __name__ == "__main__":
    sys.exit(main())
