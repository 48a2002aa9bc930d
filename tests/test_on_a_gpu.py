"""The GPU's measurements run whole, in small, on a CPU; what is missing costs its own rows alone."""

import json
import math
import os
import subprocess
import sys

import pytest

from tests.benchmarks import on_a_gpu
from tests.benchmarks.gpu import harness
from tests.benchmarks.gpu.names import TABLES
from tests.helpers.paths import ROOT

STEPS = ("step, eager", "host waits", "attention", "step, compiled", "Composer's Trainer")
ROWS = {
    *(f"{size} {row}" for size in ("B/2", "XL/2") for row in STEPS),
    *(f"noise of {what}" for what in ("the samples' keys", "the samples' keys, compiled", "torch.randn")),
    *("loss and its gradient", "loss and its gradient, compiled"),
    *(f"latents, {workers} workers" for workers in (4, 8)),
    *(f"{method}, {kind}" for method in ("heun", "euler") for kind in ("bfloat16", "float32, TF32", "float32")),
    *(f"one at a time, {kind}" for kind in ("float32", "bfloat16")),
    *(f"batches of {size}, bfloat16" for size in (8, 32, 128)),
}
# Runs before anything else in each process, and hides packages as if they weren't installed.
HIDE = """
import sys
sys.path.insert(0, {root!r})
from sit_composer.lean import Blind
sys.meta_path[:] = [Blind(finder, {names!r}) for finder in sys.meta_path]
"""


HIDDEN = ("composer", "mosaicml", "streaming", "diffusers", "torchmetrics")


def python(tmp_path, *arguments, hidden=()):
    """A finished process of Python, in which these packages aren't installed."""
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(root=str(ROOT), names=hidden) if hidden else "")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def run(tmp_path, *options, hidden=()):
    """The report of a run in small, without these packages; and what it printed."""
    command = ("tests/benchmarks/on_a_gpu.py", "--tiny", "--out", tmp_path / "a.json", *options)
    done = python(tmp_path, *command, hidden=hidden)
    assert (tmp_path / "a.json").exists(), done.stdout + done.stderr
    report = json.loads((tmp_path / "a.json").read_text())
    assert done.returncode == any("error" in row for row in report["rows"].values()), done.stderr
    return report, done.stdout


def check(report, errors):
    """All rows are there, with finite numbers; but for those whose errors are expected."""
    assert report["rows"].keys() == ROWS
    assert {name: row["error"] for name, row in report["rows"].items() if "error" in row} == errors
    for name, row in report["rows"].items():
        numbers = [value for value in row.values() if isinstance(value, float | int)]
        assert numbers or name in errors or name.endswith("attention"), name
        assert all(math.isfinite(value) for value in numbers), name
    for size in ("B/2", "XL/2"):
        for kind in ("eager", "compiled"):
            assert report["rows"][f"{size} step, {kind}"]["memory_ratio"] == pytest.approx(1, abs=0.05)
        assert report["rows"][f"{size} host waits"]["host_waits"] is False
        assert report["rows"][f"{size} attention"]["flash"] is True
    assert report["versions"]["torch"]
    assert report["machine"]["device"] == "cpu"


def test_the_step_needs_no_composer(tmp_path):
    done = python(tmp_path, "-c", "import tests.benchmarks.gpu.training", hidden=HIDDEN)
    assert done.returncode == 0, done.stderr


@pytest.mark.nightly  # a minute on a quiet core
def test_without_composer_streaming_and_diffusers_their_rows_say_so_and_the_rest_is_measured(tmp_path):
    report, out = run(tmp_path, hidden=HIDDEN)
    missing = {
        "composer": [f"{size} Composer's Trainer" for size in ("B/2", "XL/2")],
        "streaming": [name for name in ROWS if name.startswith("latents,")],
        "diffusers": [name for name in ROWS if name.startswith(("one at", "batches"))],
    }
    check(report, {name: f"Missing: {what} is not installed" for what, names in missing.items() for name in names})
    assert all(f"### {title}" in out for title, _ in TABLES.values())


@pytest.mark.slow
def test_all_rows_are_measured_where_all_is_installed(tmp_path, capsys):
    report, out = run(tmp_path)
    check(report, {})
    assert on_a_gpu.main(["--tables", str(tmp_path / "a.json")]) == 0
    assert capsys.readouterr().out == out


def test_a_row_that_fails_or_takes_too_long_says_so():
    def spin():
        while True:
            pass

    assert harness.attempt(lambda: 1 / 0, 5) == {"error": "ZeroDivisionError: division by zero"}
    assert harness.attempt(spin, 0.05) == {"error": "TimeoutError: took more than 0.05 s"}
    assert harness.attempt(lambda: {"ms": math.nan, "mfu": None}, 5) == {"error": "not finite: ms"}
    assert harness.attempt(lambda: {"ms": 2.0, "mfu": None}, 5) == {"ms": 2.0, "mfu": None}


def test_a_step_that_reads_from_the_device_is_found():
    import torch

    from tests.benchmarks.gpu.training import Refused

    for reads in (lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: float(x[0]), lambda x: bool(x.any())):
        with pytest.raises(RuntimeError, match="reads from the device"), Refused():
            reads(torch.ones(3))


def test_a_group_without_time_is_reported(tmp_path):
    report, _ = run(tmp_path, "--groups", "kernels", "sampling", "--seconds", "0")
    assert {name: row["error"] for name, row in report["rows"].items()} == dict.fromkeys(
        ("kernels", "sampling"), "no time left"
    )
