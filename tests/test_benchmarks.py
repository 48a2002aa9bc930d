"""The benchmarks' own arithmetic and reading, and one whole run of each on a few pictures."""

import gzip
import math
import multiprocessing
import re
import struct
import sys
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from convert import to_mds
from sit_composer import evaluate, train
from sit_composer.config.load import load_config
from sit_composer.errors import UserError
from sit_composer.samplers import Counted, sample_ode
from sit_composer.transport import Transport
from tests.benchmarks import (
    averages,
    convert,
    evaluations,
    growth,
    growth_loader,
    leaderboard,
    loader,
    loss_curves,
    optimizers,
    predictions,
    sampling,
    solvers,
    step,
    time_sampling,
)
from tests.benchmarks.time_sampling import read_idx, steps_to, table, threshold

DISTANCES = st.lists(st.floats(0.1, 100), min_size=1, max_size=8)


def write_idx(path, array):
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def make_source(folder, count=300):
    """Fashion-MNIST's four files, with pictures whose brightness is their class."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        labels = (np.arange(count) % 10).astype(np.uint8)
        pictures = random.integers(0, 25, (count, 28, 28), dtype=np.uint8) + 25 * labels[:, None, None]
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", pictures.astype(np.uint8))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 28, 28)])
def test_an_idx_file_is_read_as_it_was_written(tmp_path, shape):
    array = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    write_idx(tmp_path / "a.gz", array)
    assert np.array_equal(read_idx(tmp_path / "a.gz"), array)
    assert read_idx(tmp_path / "a.gz").shape == shape


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "can't be read"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x05abcdefgh", mtime=0)[:-9], "can't be read"),
        (gzip.compress(b"", mtime=0), "not an IDX file"),
        (gzip.compress(b"\0\0\x0d\x01\0\0\0\x01abcd", mtime=0), "not an IDX file of bytes"),  # floats
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x05abcd", mtime=0), "not an IDX file"),  # one short
        (gzip.compress(b"\0\0\x08\x03\0\0\0\x05\0\0", mtime=0), "not an IDX file"),  # ends in its sizes
    ],
)
def test_another_file_is_refused_by_its_name(tmp_path, content, message):
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.gz: .*{message}"):
        read_idx(tmp_path / "a.gz")


def test_steps_are_read_off_straight_lines_between_measurements():
    curve = {300: 2.0, 100: 10.0, 200: 6.0, 400: 7.0}
    assert steps_to(curve, 10) == 100
    assert steps_to(curve, 8) == 150
    assert steps_to(curve, 5) == 225
    assert steps_to(curve, 6.5) == 187.5  # the first time, whatever comes later
    assert steps_to(curve, 1.9) == math.inf


@given(DISTANCES, st.floats(0.1, 100), st.floats(0.1, 100))
def test_a_smaller_distance_is_never_reached_sooner(distances, a, b):
    curve = {100 * (i + 1): distance for i, distance in enumerate(distances)}
    assert steps_to(curve, min(a, b)) >= steps_to(curve, max(a, b))
    assert (steps_to(curve, a) == math.inf) == (a < min(distances))


@given(st.lists(DISTANCES, min_size=1, max_size=4))
def test_the_first_arm_reaches_the_goal_with_every_seed(runs):
    curves = [{i + 1: distance for i, distance in enumerate(distances)} for distances in runs]
    assert all(steps_to(curve, threshold({"uniform": curves})) < math.inf for curve in curves)


def test_the_table_has_means_medians_and_ranges():
    curves = {
        "uniform": [{100: 20.0, 200: 10.0}, {100: 20.0, 200: 8.0}, {100: 18.0, 200: 9.0}],
        "logit-normal": [{100: 10.0, 200: 5.0}, {100: 15.0, 200: 5.0}, {100: 20.0, 200: 11.0}],
    }
    lines = table(curves)
    assert lines[0] == "| training times | distance after 200 steps | steps to 10.0 | of uniform's steps |"
    assert lines[2] == "| uniform | 9.0 (8.0 – 10.0) | 189 (183 – 200) | 1.00 |"
    assert lines[3] == "| logit-normal(0, 1) | 7.0 (5.0 – 11.0) | 150 (100 – never) | 0.82 (0.50 – never) |"


@pytest.mark.parametrize("arms", [time_sampling.ARMS, predictions.ARMS])
def test_the_yaml_is_whole_and_every_arm_is_one_of_its_transports(arms):
    from sit_composer.config.checks import check

    path = str(time_sampling.YAML)
    transports = {str(vars(load_config(path, overrides).transport)) for _, overrides in arms.values()}
    assert len(transports) == len(arms)
    for _, overrides in arms.values():
        config = load_config(path, [*overrides, "frechet=null"])  # whose files `--prepare` makes
        check(config)
        Transport(**vars(config.transport))


def test_a_missing_source_is_told_in_one_line(tmp_path, capsys):
    assert time_sampling.main(["--out", str(tmp_path / "out"), "--source", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/train-images-idx3-ubyte.gz: no such file")
    assert error.count("\n") == 1


def run_here(*command: object) -> None:
    """Runs a command of time_sampling's in this process, where Composer is imported already."""
    mains = {"to_mds.py": to_mds.main, "sit_composer.evaluate": evaluate.main, "train.py": train.main}
    words = [str(word) for word in command]
    names = [Path(word).name for word in words]
    at = next(i for i, name in enumerate(names) if name in mains)
    assert mains[names[at]](words[at + 1 :]) == 0


def make_small(folder):
    """A source of images, and the YAML with a tiny network and few steps: options for the commands, but --out."""
    make_source(folder / "source")
    config = yaml.safe_load(time_sampling.YAML.read_text())
    config["model"] |= {"hidden_size": 16, "depth": 1}
    config["trainer"] |= {"max_duration": "4ba", "save_interval": "4ba"}
    config["frechet"] |= {"interval": "2ba", "num_images": 20, "num_steps": 2}
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    return ["--source", str(folder / "source"), "--yaml", str(folder / "small.yaml")]


@pytest.mark.slow
def test_a_whole_run_and_what_is_done_is_skipped(tmp_path, monkeypatch, capsys):
    places = [*make_small(tmp_path), "--out", str(tmp_path / "out")]
    options = ["--arms", "uniform", "logit-normal", "--seeds", "0", "--plot", str(tmp_path / "plot.png")]
    monkeypatch.setattr(time_sampling, "run", run_here)
    outputs = []
    for _ in range(2):
        assert time_sampling.main([*places, *options]) == 0
        outputs.append(capsys.readouterr().out)
    assert "| logit-normal(0, 1) |" in outputs[0]
    assert outputs[0].splitlines()[-4:] == outputs[1].splitlines()[-4:]
    assert "logit-normal-0" in outputs[0].splitlines()
    assert "logit-normal-0" not in outputs[1].splitlines()
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.slow
def test_lengths_of_averages_are_compared(tmp_path, monkeypatch, capsys):
    make_source(tmp_path / "source")
    monkeypatch.setattr(time_sampling, "run", run_here)
    monkeypatch.setattr(averages, "SAMPLING", ["--num-images", "20", "--sampling-method", "heun", "--num-steps", "2"])
    data, out = str(tmp_path / "data"), str(tmp_path / "out")
    assert time_sampling.main(["--source", str(tmp_path / "source"), "--out", data, "--prepare"]) == 0
    options = ["--stds", "0.1", "0.15", "--batches", "4", "--every", "2"]
    assert averages.main(["--out", out, "--data", data, *options]) == 0
    rows = capsys.readouterr().out.splitlines()[-8:]
    assert [row.split(" | ")[1] != "–" for row in rows] == [False] * 6 + [True] * 2
    tracked, made = (float(rows[i].split(" | ")[2].strip("| ")) for i in (5, 6))  # of the std 0.1
    assert tracked == pytest.approx(made, rel=0.02)


# --- The leaderboard ---


def stored_row(name, curves, commit="1234567"):
    runs = {seed: {"commit": commit, "machine": "a", "curve": curve} for seed, curve in enumerate(curves)}
    return leaderboard.Row(name, f"title of {name}", ["a=1"], runs, seconds=0.1)


def test_recipes_are_ranked_by_the_median_of_their_steps_and_compared_seed_by_seed():
    first = stored_row("paper", [{100: 60, 200: 20}, {100: 80, 200: 20}, {100: 50, 200: 30}])  # 150, 166.7, 150
    fast = stored_row("fast", [{100: 20, 200: 10}, {100: 50, 200: 30}, {100: 30, 200: 10}])  # 100, 150, 100
    never = stored_row("never", [{100: 90, 200: 41}] * 3)
    lines = leaderboard.table([first, fast, never], first)
    assert lines[2].startswith(
        "| 0 | **paper**: title of paper `a=1` | 150 (150 – 167) | 1.00 | 15 | 23.3 (20.0 – 30.0)"
    )
    assert lines[3].startswith("| 1 | **fast**: title of fast `a=1` | 100 (100 – 150) | 0.67 (0.67 – 0.90) | 10 |")
    assert lines[3].endswith("| 16.7 (10.0 – 30.0), 200 steps | 3 | 1234567 | a |")
    assert "| never | never | never | 41.0, 200 steps |" in lines[4]
    assert (
        leaderboard.table([first], first, short=True)[2]
        == "| 0 | **paper**: title of paper | 150 (150 – 167) | 1.00 | 15 |"
    )


def test_a_first_look_is_compared_with_its_row_at_the_same_step():
    first = stored_row("paper", [{100: 60, 200: 20}, {100: 80, 200: 20}])
    slow = stored_row("slow", [{100: 80, 200: 40}])
    late = stored_row("late", [{50: 70, 100: 9}])
    look = stored_row("look", [{100: 60}])
    look.changes = [*leaderboard.LOOK, "b=2"]
    lines = leaderboard.compared([late, look], first, slow)
    assert lines[2] == "| **late**: title of late `a=1` | 100 | 9.0 | paper | 60.0 | never | 1 | 1234567 | a |"
    assert lines[3].endswith(" `b=2` | 100 | 60.0 | slow | 80.0 | 150 | 1 | 1234567 | a |")


def test_a_block_of_a_page_is_replaced_and_nothing_else():
    page = "a\n<!-- rows -->\nold\n<!-- end -->\nb\n<!-- others -->\n<!-- end -->\n"
    filled = leaderboard.filled(page, "rows", ["| new |"])
    assert filled == "a\n<!-- rows -->\n\n| new |\n\n<!-- end -->\nb\n<!-- others -->\n<!-- end -->\n"
    assert leaderboard.filled(filled, "rows", ["| new |"]) == filled
    with pytest.raises(UserError, match="<!-- rest -->: got 0 of it"):
        leaderboard.filled(page, "rest", [])


def test_every_recipe_is_another_run_that_can_start():
    from sit_composer.config.checks import check

    configs = []
    for _, changes in leaderboard.ROWS.values():
        configs.append(load_config(str(leaderboard.YAML), [*changes, "frechet=null"]))
        check(configs[-1])
    assert all(config not in configs[:number] for number, config in enumerate(configs))


def test_pages_show_what_is_stored():
    assert {path.stem for path in leaderboard.STORE.glob("*.json")} - {"seconds"} <= set(leaderboard.ROWS)
    for (page, name), lines in leaderboard.blocks(*leaderboard.ranked()).items():
        assert leaderboard.filled(page.read_text(), name, lines) == page.read_text()
    losses = loss_curves.PAGE.read_text()
    assert leaderboard.filled(losses, "losses", loss_curves.table()) == losses


def test_a_recipe_needs_half_of_the_papers_steps():
    first, whole, _ = leaderboard.ranked()
    assert set(first.runs) == {0, 1, 2}
    shares = [median(row.steps[seed] / first.steps[seed] for seed in first.steps) for row in whole]
    assert min(shares) <= 0.5


def test_runs_of_other_overrides_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(leaderboard, "STORE", tmp_path)
    (tmp_path / "paper.json").write_text('{"changes": ["ema.decay=0.9"]}')
    assert leaderboard.main(["--render"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/paper.json: its runs are of other overrides")


@pytest.mark.slow
def test_a_leaderboard_is_trained_row_by_row_stored_and_drawn(tmp_path, monkeypatch, capsys):
    options = [
        *make_small(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "--seeds",
        "0",
        "--every",
        "2ba",
        "--length",
        "4ba",
    ]
    pages = {
        "PAGE": "<!-- rows -->\n<!-- end -->\n<!-- others -->\n<!-- end -->",
        "README": "<!-- leaderboard -->\n<!-- end -->",
    }
    for name, content in pages.items():
        (tmp_path / name).write_text(content)
        monkeypatch.setattr(leaderboard, name, tmp_path / name)
    (tmp_path / "store").mkdir()
    places = {"STORE": tmp_path / "store", "PLOT": tmp_path / "plot.png", "SEEDS": [0], "TIMED": 8}
    rows = {name: leaderboard.ROWS[name] for name in ("paper", "logit-normal", "rate-4e-3")}
    for name, value in {**places, "ROWS": rows}.items():
        monkeypatch.setattr(leaderboard, name, value)
    monkeypatch.setattr(time_sampling, "run", run_here)
    assert leaderboard.main([*options, "--rows", "paper"]) == 0
    assert list((tmp_path / "store").iterdir()) == [tmp_path / "store" / "paper.json"]
    options += ["--rows", "paper", "logit-normal"]
    assert leaderboard.main([*options, "--seconds"]) == 0
    assert "paper-0" in capsys.readouterr().out.splitlines()
    assert leaderboard.main(options) == 0
    assert not {"paper-0", "seconds"} & set(capsys.readouterr().out.splitlines())
    curve = time_sampling.read_curve(tmp_path / "out", "logit-normal", 0)
    row = leaderboard.load("logit-normal")
    assert row.curves == {0: {step: round(distance, 2) for step, distance in curve.items()}}
    assert list(curve) == [2, 4]
    assert 0 < row.seconds < 10
    assert "logit-normal times" in (tmp_path / "README").read_text()
    assert (tmp_path / "plot.png").stat().st_size > 1000


# --- Reference losses ---


@pytest.mark.parametrize("path", loss_curves.YAMLS, ids=lambda path: path.stem)
def test_every_yaml_has_the_losses_of_its_recipe(path):
    curve = loss_curves.stored_curves()[path.stem]
    again = "the recipe has changed: run python tests/benchmarks/loss_curves.py --out runs/digits"
    assert curve["recipe"] == loss_curves.recipe(path), again
    assert len(curve["losses"]) == loss_curves.STEPS // loss_curves.EACH
    if "prediction" not in curve["recipe"]["transport"]:  # a velocity x1 - x0, and the first output is 0
        square = float(np.mean((load_digits().images / 16 * 2 - 1) ** 2))
        assert curve["first"] == pytest.approx(square + 1, rel=0.05)
    assert curve["losses"][-1] < 0.6 * curve["first"]


@pytest.mark.slow
def test_the_stored_losses_come_again(tmp_path):
    path = loss_curves.ROOT / "yamls" / "lightningdit_xl_1.yaml"  # a constant rate: the end changes no step
    assert to_mds.main(["digits", "--out", str(tmp_path / "digits")]) == 0
    found = loss_curves.means(loss_curves.losses(path, tmp_path / "digits", steps=20))
    assert found == pytest.approx(loss_curves.stored_curves()[path.stem]["losses"][:2], rel=2e-4)


def test_a_command_that_fails_is_named():
    with pytest.raises(UserError, match=r"raise SystemExit\(3\): failed with exit code 3"):
        time_sampling.run(sys.executable, "-c", "raise SystemExit(3)")


@pytest.mark.slow
def test_conversion_is_compared_with_plain_loops(capsys):
    options = ["--pictures", "20", "--rounds", "1", "--latents", "40", "--vae", "tiny", "--image-size", "16"]
    assert convert.main(options) == 0
    out = capsys.readouterr().out
    rates = re.findall(r"^\| (.*) \| ([\d.]+) \| [\d.]+ – [\d.]+ \| ([\d.]+) \|$", out, re.MULTILINE)
    assert len(rates) == 8
    assert all(float(rate) > 0 for _, rate, _ in rates)
    busy = re.search(r"the encoders are at work ([\d.]+)% of the time", out)
    assert 0 < float(busy[1]) <= 100


@pytest.mark.slow
def test_the_loader_is_compared_with_plain_ones(capsys):
    assert loader.main(["--latents", "300", "--pixels", "20", "--rounds", "1", "--workers", "1"]) == 0
    pattern = r"^\| ([^|,]*), ([^|]*) \| (\d+) \(\d+ – \d+\) \| \d+ \| ([\d.]+) \|$"
    found = re.findall(pattern, capsys.readouterr().out, re.MULTILINE)
    rates = {(kind, side): (float(rate), float(ratio)) for kind, side, rate, ratio in found}
    for kind in ("latents", "pixels"):
        ours, one = rates[kind, "sit_composer"]
        assert one == 1
        theirs, ratio = rates[kind, "StreamingDataset"]
        assert ours / theirs == pytest.approx(ratio, abs=0.02)


@pytest.mark.slow
def test_the_growth_of_the_loaders_times_is_plotted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth_loader, "SAMPLES", 256)
    monkeypatch.setattr(growth_loader, "PIXELS", 64)
    options = ["--out", str(tmp_path), "--points", "2", "--seconds", "0"]
    for _ in range(2):  # the second time from the file
        assert growth_loader.main(options) == 0
        rows = capsys.readouterr().out.splitlines()[2:]
        assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(growth_loader.ROWS)
    assert (tmp_path / "growth_loader.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_step_is_compared_with_a_plain_one(capsys):
    small = ["--model", "SiT-S/8", "--batch", "2", "--precision", "fp32"]
    assert step.main([*small, "--rounds", "2"]) == 0
    number = r"(\d+) \(\d+ – \d+\)"
    row = rf"\| 2 \| fp32 \| {number} \| {number} \| [\d.]+ (\| {number} \| \d+% ){{2}}\| \d+ \| \d+ \|"
    assert re.search(row, capsys.readouterr().out)
    assert step.main([*small, "--losses", "4"]) == 0
    worst = re.search(r"\| 2 \| fp32 \| 4 \| (\S+) \(", capsys.readouterr().out)[1]
    assert float(worst) < 1e-5
    assert step.main([*small, "--profile"]) == 0
    shares = re.findall(r"\| ([\d.]+)% \|$", capsys.readouterr().out, re.MULTILINE)
    assert sum(map(float, shares)) == pytest.approx(100, abs=1)


def test_the_table_of_evaluations_has_shares_only_of_what_is_reached_with_every_seed():
    sde, ode, *others = evaluations.points(1.5)
    few = next(point for point in others if point.candidate)
    assert sde.default
    assert ode.default
    assert (sde.sampling.num_steps, sde.sampling.last_step, ode.sampling.sampling_method) == (250, "Mean", "dopri5")

    def found(evaluations: int, *distances: float) -> list[dict[str, float]]:
        return [{"evaluations": evaluations, "passes": 2 * evaluations, "distance": d} for d in distances]

    lines = evaluations.table({sde: found(250, 8, 10), ode: found(48, 7, 9), few: found(12, 6.5, 9.1)}, few)
    assert lines[2].endswith("| 250 | 500 | 9.00 (8.00 – 10.00) | 1.00 | no (+1.00) |")
    assert lines[3].endswith("| 48 | 96 | 8.00 (7.00 – 9.00) | 0.19 | 1.00 |")
    assert lines[4].startswith(f"| **{few.name}** | 12 |")
    assert lines[4].endswith("| 12 | 24 | 7.80 (6.50 – 9.10) | 0.05 | no (-0.20) |")


def test_no_setting_is_chosen_on_the_images_that_are_reported(tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluations.main(["--run", str(tmp_path), "--choose-on", "2"])
    assert "got 2, expected other seeds than --choose-on's" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_ranks_step_together_and_end(tmp_path, kind):
    if torch.distributed.is_initialized():  # by another test's Trainer
        torch.distributed.destroy_process_group()
    with growth.ranks(kind, 2, tmp_path) as (number, action):
        assert number == 2
        (other,) = multiprocessing.active_children()
        for _ in range(2):
            action()
        assert torch.distributed.get_world_size() == 2
        assert other.is_alive()
    assert multiprocessing.active_children() == []
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("solver", solvers.STAGES)
def test_a_solvers_stages_are_its_evaluations(solver):
    model = Counted(lambda x, t: x)
    points = solvers.points(solver, 25)
    sample_ode(Transport(), model, torch.zeros(1, 1), sampling_method=solver, num_steps=points)
    assert model.evaluations == 25 // solvers.STAGES[solver] * solvers.STAGES[solver]


def test_our_samplers_are_timed_in_both_precisions(capsys):
    options = ["--model", "SiT-S/8", "--input-size", "8", "--rounds", "1", "--solvers", "ODE heun", "SDE Euler"]
    assert sampling.main(["--bf16", *options]) == 0
    rows = re.findall(r"^\| (\w+ \w+) \| (\d+) / (\d+) \| (\S+) \|", capsys.readouterr().out, re.MULTILINE)
    assert [row[:3] for row in rows] == [("ODE heun", "6", "6"), ("SDE Euler", "7", "7")]
    assert all(0 < float(difference) < 0.1 for *_, difference in rows)
    with pytest.raises(SystemExit):
        sampling.main(options)  # without the authors' repository
    assert "expected PATH, or --bf16" in capsys.readouterr().err


def test_the_optimizers_steps_are_measured_and_their_flops_counted(capsys):
    assert optimizers.main(["--depth", "1", "--rounds", "1", "--batch", "1"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^\| (?:AdamW|Muon), \w+ \| \d+ \(\d+ – \d+\) \| [\d.]+ \|$", out, re.MULTILINE)) == 3
    d = 384  # four maps D × D of 3 D³ an iteration, and two D × 4D of 9 D³
    assert f"{2 * 5 * 30 * d**3 / 1e9:.4g} GFLOPs" in out
