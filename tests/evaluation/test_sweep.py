"""Sweeps of a small network of random weights, with a small network of random weights for features."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sit_composer import evaluate, sample, sweep
from sit_composer.autoencoder import AutoencoderSpec
from sit_composer.checkpoint.export import write_folder
from sit_composer.checkpoint.load import load_checkpoint
from sit_composer.checkpoint.record import Checkpoint, Record
from sit_composer.errors import INTERRUPTED, UserError
from sit_composer.evaluation import sweeping
from sit_composer.evaluation.sweeping import check_same, identity_of, interleave, measure
from sit_composer.gallery import Networks
from sit_composer.generate import generate
from sit_composer.storage import open_store
from tests.helpers.networks import small_network
from tests.helpers.paths import REFERENCE, ROOT

COUNT = 20  # images
EARLIER = REFERENCE / "earlier" / "run"
SIZES = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 10, "in_channels": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """An exported network with two sets of weights, a feature extractor, and two references."""
    top = tmp_path_factory.mktemp("sweep")
    (top / "trained").write_bytes(b"")
    held = {}
    for which, name, scale in (("training", "model.safetensors", 1.0), ("ema", "ema.safetensors", 0.5)):
        weights = {key: value * scale for key, value in small_network(in_channels=1).state_dict().items()}
        record = Record(SIZES, {}, AutoencoderSpec(None, 1), [f"class {i}" for i in range(10)], ema_decay=0.9)
        held[name] = Checkpoint(weights, which, record, 7, str(top / "trained"))
    write_folder(top / "network", held, {})

    class Features(torch.nn.Sequential):
        def forward(self, x):
            features = super().forward(x.float() / 127.5 - 1)
            return features, features[:, :5] * 3

    torch.manual_seed(0)
    network = Features(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 8), torch.nn.Tanh()).eval().requires_grad_(False)
    torch.jit.trace(network, torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).save(str(top / "features.pt"))
    images = np.random.default_rng(0).integers(0, 256, (2, 30, 8, 8, 3)).astype(np.uint8)
    for name, arrays in zip(("real", "other"), images, strict=True):
        np.savez(top / f"{name}.npz", arr_0=arrays)
    names = {"checkpoint": "network", "features": "features.pt", "reference": "real.npz", "other": "other.npz"}
    return {name: str(top / file) for name, file in names.items()}


@pytest.fixture
def command(files, tmp_path):
    def command(*options: str, out: str = "out", checkpoint: str = files["checkpoint"]) -> list[str]:
        fixed = ["--features", files["features"], "--num-images", str(COUNT), "--sampling-method", "heun"]
        given = [checkpoint, "--reference", files["reference"], "--out", str(tmp_path / out)]
        return [*given, *fixed, *options]

    return command


@pytest.fixture
def run(command, tmp_path):
    """Runs the command; gives the cells of its results."""

    def run(*options: str, out: str = "out", **where: str) -> list[dict]:
        assert sweep.main(command(*options, out=out, **where)) == 0
        return json.loads((tmp_path / out / "sweep.json").read_text())["cells"]

    return run


GRID = ("--weights", "ema,training", "--num-steps", "3", "--cfg-scale", "1,1.5")


def test_a_second_extractor_is_a_column_of_its_own(run, command, files, tmp_path, capsys):
    other = str(tmp_path / "other.pt")
    torch.jit.trace(torch.nn.Flatten(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).save(other)
    grid = ("--num-steps", "3", "--metrics", "fid,fd")
    (both,) = run(*grid, "--features", f"{files['features']},{other}")
    (alone,) = run("--num-steps", "3", "--metrics", "fid", "--features", other, out="alone")
    assert both["metrics"]["fd"] == alone["metrics"]["fid"]
    assert "| FD | FD, other.pt |" in capsys.readouterr().out
    swapped = command(*grid, "--features", f"{other},{files['features']}")
    assert "holds a sweep with another features;" in refused(capsys, *swapped)


def test_a_cell_is_what_sample_and_evaluate_give(run, files, tmp_path, capsys):
    grid = ("--weights", "training", "--num-steps", "3", "--cfg-scale", "1,1.5", "--cfg-interval", "0", "0.6")
    cells = run(*grid, "--keep-images")
    out, err = capsys.readouterr()
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2
    for cell in cells:
        place = cell["cell"]
        where, result = tmp_path / f"by hand {place['cfg_scale']}", tmp_path / "result.json"
        guidance = ["--cfg-interval", "0", "0.6"] if place["cfg_scale"] != 1 else []
        options = ["--weights", place["weights"], "--cfg-scale", str(place["cfg_scale"]), *guidance]
        options += ["--num-steps", str(place["num_steps"]), "--sampling-method", "heun", "--num-images", str(COUNT)]
        assert sample.main([files["checkpoint"], "--out", str(where), *options]) == 0
        against = ["--reference", files["reference"], "--features", files["features"], "--out", str(result)]
        assert evaluate.main([str(where), *against]) == 0
        expected = json.loads(result.read_text())
        assert cell["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)
        for name in ("left_out", "settings", "features", "reference", "versions"):
            assert cell[name] == expected[name]
        assert cell["samples"]["sampling"] == expected["samples"]["sampling"]
        folder = (
            tmp_path / "out" / "images" / f"{place['weights']}-heun-{place['num_steps']}-cfg-{place['cfg_scale']:g}"
        )
        for i in range(COUNT):
            assert (folder / f"{i:06d}.png").read_bytes() == (where / f"{i:06d}.png").read_bytes()
        assert evaluate.main([str(folder), *against]) == 0  # as a folder of samples
        assert json.loads(result.read_text())["metrics"] == expected["metrics"]

    table = (tmp_path / "out" / "sweep.md").read_text()
    assert table in out
    assert err.count("sfid is left out: it needs spatial") == 1
    head, _, *rows = table.strip().splitlines()
    assert head.startswith("| steps | cfg | passes | FD | IS | P | R | KID × 10³ |")  # weights and solver don't vary
    assert len(rows) == 2
    best = min(cells, key=lambda cell: cell["metrics"]["fid"])
    assert [f"**{best['metrics']['fid']:.4g}**" in row for row in rows].count(True) == 1
    with Image.open(tmp_path / "out" / "sweep.png") as plot:
        assert plot.width > 800


def test_an_interrupted_sweep_continues_with_the_missing_cells(run, command, tmp_path, monkeypatch, capsys):
    options = (*GRID, "--metrics", "fid")
    whole = run(*options, out="whole")
    places = [(c["cell"]["weights"], c["cell"]["cfg_scale"]) for c in whole]
    assert places == [(w, s) for w in ("ema", "training") for s in (1.0, 1.5)]
    assert len({cell["metrics"]["fid"] for cell in whole}) == 4
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args)

    with monkeypatch.context() as patch:
        patch.setattr("sit_composer.gallery.generate", interrupted)
        assert sweep.main(command(*options)) == INTERRUPTED
    assert "stopped; rerun to continue" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "out" / "sweep.json").read_text())["cells"]) == 2
    (tmp_path / "out" / "sweep.md").unlink()  # as if killed just before it was written

    def counted(*args):
        calls.append(1)
        return generate(*args)

    calls.clear()
    monkeypatch.setattr("sit_composer.gallery.generate", counted)
    assert run(*options) == whole
    (tmp_path / "out" / "sweep.md").unlink()  # and again, with no cell missing
    assert run(*options) == whole
    assert "all cells were measured before" in capsys.readouterr().err
    assert len(calls) == 2
    for name in ("sweep.md", "sweep.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    more = run("--metrics", "fid", "--weights", "ema", "--num-steps", "3", "--cfg-scale", "1.5,2")  # adds one
    assert len(calls) == 3
    assert more[:-1] == whole


def test_options_without_effect_in_a_cell_are_left_out_there_and_equal_cells_are_one(run, capsys):
    cells = run(
        "--sampling-method",
        "euler,bosh3",
        "--num-steps",
        "2,3",
        "--cfg-scale",
        "1",
        "--atol",
        "1e-1",
        "--rtol",
        "1",
        "--metrics",
        "fid",
        "--num-images",
        "8",
    )
    found = [(c["cell"]["sampling_method"], c["cell"]["num_steps"]) for c in cells]
    assert found == [("euler", 2), ("euler", 3), ("bosh3", None)]
    sampling = {method: cell["samples"]["sampling"] for (method, _), cell in zip(found, cells, strict=True)}
    assert (sampling["euler"]["atol"], sampling["bosh3"]["atol"]) == (1e-6, 0.1)
    err = capsys.readouterr().err
    assert err.count("covariance") == err.count("warning: each cell: 8 images for 8 features: the covariance is") == 1
    note = "note: an adaptive solver chooses its own steps; --num-steps has no effect"
    assert note not in err
    adaptive = ("--sampling-method", "bosh3", "--num-steps", "2,3", "--cfg-scale", "1", "--atol", "1e-1", "--rtol", "1")
    assert len(run(*adaptive, "--metrics", "fid", out="adaptive")) == 1
    assert note in capsys.readouterr().err.splitlines()


def refused(capsys, *arguments: str) -> str:
    with contextlib.suppress(SystemExit):  # argparse's way out
        assert sweep.main(list(arguments)) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    return error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cfg-scale", "1,x"], "argument --cfg-scale: got 'x', expected a number of at least 0"),
        (["--num-steps", "1"], "argument --num-steps: got '1', expected a whole number of at least 2"),
        (["--weights", "ema,best"], "weights: got 'best'"),
        (["--sampling-method", "heun,Heun"], "--sampling-method of the ODE: got 'Heun'"),
        (["--atol", "1"], "argument --atol: has no effect without an adaptive ODE solver"),
        (["--cfg-scale", "1", "--cfg-interval", "0", "1"], "argument --cfg-interval: has no effect with --cfg-scale 1"),
        (["--features", "none.pt"], "--features: none.pt is no file"),
        (["--reference", "none.npz"], "none.npz: no such file or folder"),
        (["--metrics", "fud"], "--metrics: got 'fud'"),
        (["--npz", "x.npz"], "unrecognized arguments: --npz"),
        (["--out", __file__], "is a file, expected a folder"),
    ],
)
def test_invalid_options_are_refused_before_torch_is_loaded(command, monkeypatch, capsys, options, message):
    def loaded(*args):
        raise AssertionError("torch is loaded")

    monkeypatch.setattr("sit_composer.sweep.hand_over", loaded)
    assert message in refused(capsys, *command(*options))


def test_a_number_of_images_must_be_given(files, tmp_path, capsys):
    given = [files["checkpoint"], "--reference", files["reference"], "--out", str(tmp_path / "out")]
    assert "--num-images: no value" in refused(capsys, *given, "--features", files["features"])


def test_sweeps_that_run_together_keep_each_others_cells(run, monkeypatch):
    measure, others = sweeping.measure, [1.5]

    def and_another(*args):
        if others:
            run("--num-steps", "3", "--metrics", "fid", "--cfg-scale", str(others.pop()))
        return measure(*args)

    monkeypatch.setattr(sweeping, "measure", and_another)
    cells = run("--num-steps", "3", "--metrics", "fid", "--cfg-scale", "1,2")
    assert sorted(cell["cell"]["cfg_scale"] for cell in cells) == [1, 1.5, 2]


@pytest.mark.parametrize("cells", [[{}], [{"cell": "x"}], [1], 1])
def test_a_damaged_result_is_one_line(run, command, tmp_path, capsys, cells):
    run("--num-steps", "3", "--metrics", "fid", "--cfg-scale", "1")
    file = tmp_path / "out" / "sweep.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "cells": cells}))
    assert f"{file} can't be read" in refused(capsys, *command("--num-steps", "3", "--metrics", "fid"))


def test_another_sweep_in_the_folder_is_refused(run, command, files, tmp_path, capsys):
    options = ("--num-steps", "2", "--cfg-scale", "1", "--metrics", "fid")
    run(*options)
    before = (tmp_path / "out" / "sweep.json").read_bytes()
    for other, name in (
        (["--num-images", "30"], "num_images"),
        (["--reference", files["other"]], "reference"),
        (["--metrics", "kid"], "metrics"),
        (["--mode", "SDE", "--sampling-method", "Euler"], "mode"),
    ):
        assert f"holds a sweep with another {name};" in refused(capsys, *command(*options, *other))
    for content in (files["reference"], files["other"]):  # under the same name
        shutil.copy(content, tmp_path / "mine.npz")
        same = command(*options, "--reference", str(tmp_path / "mine.npz"), out="named")
        if content == files["reference"]:
            assert sweep.main(same) == 0
        else:
            assert "holds a sweep with another reference;" in refused(capsys, *same)
    with open(os.path.join(files["checkpoint"], "config.json"), "a") as file:
        file.write(" ")
    try:
        assert "holds a sweep with another checkpoint;" in refused(capsys, *command(*options))
    finally:
        with open(os.path.join(files["checkpoint"], "config.json"), "r+") as file:
            file.truncate(len(file.read()) - 1)
    assert (tmp_path / "out" / "sweep.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert "holds files that are not a sweep's" in refused(capsys, *command(*options, out="mine"))


def test_statistics_of_other_features_are_refused_before_any_image_is_generated(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sit_composer.gallery.generate", None)
    np.savez(tmp_path / "other.npz", mu=np.zeros(5), sigma=np.eye(5))
    for metrics in ("fid,is", "fid"):  # the first attempt leaves nothing that refuses a second
        other = ["--reference", str(tmp_path / "other.npz"), "--metrics", metrics]
        error = refused(capsys, *command("--num-steps", "3", *other))
        assert "mu: got 5 features numbers, expected the 8 of features.pt" in error


def test_weights_that_are_missing_are_refused_before_any_image_is_generated(
    command, files, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr("sit_composer.gallery.generate", None)
    shutil.copytree(files["checkpoint"], tmp_path / "network")
    (tmp_path / "network" / "model.safetensors").unlink()
    given = command("--num-steps", "3", "--weights", "ema,training", checkpoint=str(tmp_path / "network"))
    assert "model.safetensors" in refused(capsys, *given)


def test_too_few_images_for_the_ranks_are_refused_by_the_option_that_was_given(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "30")
    given = command("--num-steps", "3")
    assert "--num-images: got 20 images, expected at least one for each of the 30 ranks" in refused(capsys, *given)
    at = given.index("--num-images")
    given[at : at + 2] = ["--classes", "1,2"]
    assert "--classes: got 2 images, expected at least one for each of the 30 ranks" in refused(capsys, *given)


def test_checkpoints_that_training_saves_meanwhile_are_not_mixed_in(run, files, monkeypatch, tmp_path):
    runs = [tmp_path / name for name in ("run", "guide")]
    for folder in runs:
        folder.mkdir()
        shutil.copy(EARLIER / "ep0-ba4-rank0.pt", folder)

    def then_save(*args):
        for folder in runs:
            shutil.copy(EARLIER / "ep1-ba8-rank0.pt", folder)
        return measure(*args)

    monkeypatch.setattr("sit_composer.evaluation.sweeping.measure", then_save)
    options = ("--num-steps", "2", "--weights", "ema,training", "--metrics", "fid", "--guide", str(runs[1]))
    used = [cell["samples"]["sampling"] for cell in run(*options, checkpoint=str(runs[0]))]
    assert [(one["checkpoint"]["step"], one["guide"]["step"]) for one in used] == [(4, 4), (4, 4)]
    old, new = (load_checkpoint(str(EARLIER / f"{name}-rank0.pt")) for name in ("ep0-ba4", "ep1-ba8"))
    settings = {"checkpoint": identity_of(old), "guide": identity_of(old)}  # as the first rank has them
    for mixed in ((old, new), (new, old)):
        with pytest.raises(UserError, match="got step 8, but the sweep began with step 4"):
            check_same(settings, Networks(*mixed, None, None, "fp32"))
    check_same(settings, Networks(old, old, None, None, "fp32"))


@pytest.mark.slow
def test_a_remote_checkpoint_is_downloaded_once(run, s3, tmp_path, monkeypatch):
    uris = ["s3://sit/run", "s3://sit/guide"]
    for uri in uris:
        open_store(uri).upload(EARLIER / "ep0-ba4-rank0.pt", "ep0-ba4-rank0.pt")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    options = ("--num-steps", "2", "--weights", "ema,training", "--metrics", "fid", "--guide", uris[1])
    used = [cell["samples"]["sampling"] for cell in run(*options, checkpoint=uris[0])]
    assert [[one["checkpoint"]["path"], one["guide"]["path"]] for one in used] == [uris, uris]
    assert len(list((tmp_path / "temporary").glob("sit_composer-checkpoint-*"))) == 2


def test_rows_of_ranks_are_in_order():
    rows = np.arange(14.0).reshape(7, 2)
    assert np.array_equal(interleave([rows[rank::3] for rank in range(3)]), rows)


@pytest.mark.slow
def test_two_ranks_measure_what_one_measures_also_against_shards(run, command, digits_shards, tmp_path):
    options = (*GRID, "--reference", str(digits_shards), "--batch-size", "4")
    whole = run(*options, out="one")
    composer = os.path.join(os.path.dirname(sys.executable), "composer")
    command = [composer, "-n", "2", "-m", "sit_composer.sweep", *command(*options, out="two")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads((tmp_path / "two" / "sweep.json").read_text())["cells"]
    assert [cell["cell"] for cell in cells] == [cell["cell"] for cell in whole]
    for one, two in zip(whole, cells, strict=True):
        assert two["reference"]["count"] == 1797
        assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-6)
        assert two["samples"]["sampling"] == one["samples"]["sampling"]
    refused = subprocess.run([*command, "--metrics", "fid"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2
    assert "holds a sweep with another metrics" in refused.stdout + refused.stderr
