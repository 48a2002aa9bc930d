"""Averages made after training, from a run's checkpoints, and how commands name one of several averages."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from sit_composer import export, sample
from sit_composer.averages import combine
from sit_composer.checkpoint.load import load_checkpoint
from sit_composer.checkpoint.record import Record
from sit_composer.checkpoint.safe_load import CheckpointError
from sit_composer.choices import check_weights
from sit_composer.errors import UserError
from sit_composer.posthoc_ema import main
from sit_composer.sit import SiT
from tests.helpers.paths import ROOT
from tests.helpers.runs import train_at_once

BATCHES = [2, 4, 6, 8]


@pytest.fixture(scope="module")
def train_tiny(digits_shards, tmp_path_factory):
    def train_tiny(*overrides: str):
        folder = tmp_path_factory.mktemp("run")
        sizes = ["model.hidden_size=32", "model.depth=1", "model.num_heads=2", "optimizer.lr=0.01"]
        places = [f"data.local={digits_shards}", f"trainer.save_folder={folder}", "trainer.progress_bar=false"]
        times = ["trainer.save_interval=2ba", "trainer.max_duration=8ba", "trainer.save_num_checkpoints_to_keep=-1"]
        everything = [*sizes, *places, *times, "scheduler={constant: {}}", *overrides]
        assert train_at_once([str(ROOT / "yamls" / "quickstart.yaml"), *everything]) == 0
        return folder

    return train_tiny


@pytest.fixture(scope="module")
def run(train_tiny):
    return train_tiny("ema.decay=0.9", "ema.power=[0.05, 0.1]")


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    assert main([str(run), "--std", "0.1", "0.15", "--out", str(out)]) == 0
    return out


def difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_a_tracked_average_is_made_again(run, made):
    tracked = load_checkpoint(str(run), "ema:power0.1").weights
    assert difference(load_checkpoint(str(made / "power0.1-8")).weights, tracked) < 1e-6
    assert difference(load_checkpoint(str(run), "ema:power0.05").weights, tracked) > 1e-3


def test_another_average_is_the_sum_of_those_in_the_checkpoints(run, made):
    stds = [0.05, 0.1] * len(BATCHES)
    coefficients, off = combine([batch for batch in BATCHES for _ in range(2)], stds, 0.15)
    files = [f"{run}/ep0-ba{batch}-rank0.pt" for batch in BATCHES for _ in range(2)]
    parts = [load_checkpoint(file, f"ema:power{std}").weights for file, std in zip(files, stds, strict=True)]
    expected = {
        name: sum(c * part[name].double() for c, part in zip(coefficients, parts, strict=True)) for name in parts[0]
    }
    found = load_checkpoint(str(made / "power0.15-8"))
    assert difference(found.weights, expected) < 1e-6
    assert torch.equal(found.weights["pos_embed"], parts[0]["pos_embed"])
    assert (found.which, found.record.averages, found.step) == ("ema:power0.15", ["power0.15"], 8)
    assert found.record.ema_decay is None
    state = json.loads((made / "power0.15-8" / "trainer_state.json").read_text())
    assert (state["made_of"], state["profile_off_by"]) == (["power0.05", "power0.1"], pytest.approx(off))
    assert sorted(state["source"]) == [f"ep0-ba{batch}-rank0.pt" for batch in BATCHES]


def test_averages_end_at_a_checkpoint_and_may_come_from_some(run, tmp_path):
    assert main([str(run), "--std", "0.05", "--at", "6", "--out", str(tmp_path / "a")]) == 0
    some = [f"{run}/ep0-ba{batch}-rank0.pt" for batch in (6, 2)]
    assert main([*some, "--std", "0.05", "--out", str(tmp_path / "b")]) == 0
    tracked = load_checkpoint(some[0], "ema:power0.05").weights
    for place in ("a", "b"):
        found = load_checkpoint(str(tmp_path / place / "power0.05-6"))
        assert difference(found.weights, tracked) < 1e-6
        assert (found.step, found.samples) == (6, 6 * 64)


def test_checkpoints_of_a_bucket_are_fetched_one_by_one_and_deleted(run, made, s3, tmp_path, monkeypatch):
    for batch in BATCHES:
        name = f"ep0-ba{batch}-rank0.pt"
        s3.client.upload_file(str(run / name), "sit", f"runs/averages/{name}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert main(["s3://sit/runs/averages", "--std", "0.15", "--out", str(tmp_path / "out")]) == 0
    found = load_checkpoint(str(tmp_path / "out" / "power0.15-8")).weights
    assert difference(found, load_checkpoint(str(made / "power0.15-8")).weights) == 0
    assert os.listdir(tmp_path) == ["out"]


def test_a_sampler_names_the_average_and_takes_what_was_made(run, made, tmp_path, capsys):
    options = ["--num-images", "2", "--sampling-method", "heun", "--num-steps", "3"]
    for place, weights, name in (
        (run, "ema", "ema:0.9"),
        (run, "ema:power0.1", "ema:power0.1"),
        (made / "power0.1-8", "ema", "ema:power0.1"),
    ):
        out = tmp_path / f"{place.name}-{weights}"
        capsys.readouterr()
        assert sample.main([str(place), "--out", str(out), "--weights", weights, *options]) == 0
        assert re.fullmatch(rf"weights: \S+, step 8, {name}\n", capsys.readouterr().err)
        assert json.loads((out / "sampling.json").read_text())["checkpoint"]["weights"] == name
    assert sample.main([str(run), "--out", str(tmp_path / "none"), "--weights", "ema:0.5"]) == 2
    assert "no average 0.5, expected one of its weights, ema:0.9, ema:power0.05" in capsys.readouterr().err


def test_an_export_has_all_averages_and_the_hubs_folder_the_one_named(run, tmp_path):
    assert export.main([str(run), "--out", str(tmp_path), "--hub", "--weights", "ema:power0.05"]) == 0
    folder = tmp_path / "checkpoint-8"
    for name in ("training", "ema", "ema:0.9", "ema:power0.05", "ema:power0.1"):
        before, after = load_checkpoint(str(run), name), load_checkpoint(str(folder), name)
        assert (before.which, before.record) == (after.which, after.record)
        assert difference(before.weights, after.weights) == 0
    average = load_checkpoint(str(run), "ema:power0.05").weights
    assert difference(load_file(folder / "ema-power0.05.safetensors"), average) == 0
    for name in ("ema", "ema:power0.05"):
        assert difference(SiT.from_pretrained(str(tmp_path / "hub-8"), name).state_dict(), average) == 0
    assert "relative standard deviation 0.05" in (tmp_path / "hub-8" / "README.md").read_text()
    assert export.main([str(folder), "--out", str(tmp_path / "again")]) == 0
    assert {path.name for path in (tmp_path / "again" / "checkpoint-8").iterdir()} == {p.name for p in folder.iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--at", "5"], "--at: got 5, expected a checkpoint's batch, 2, 4, 6, 8"),
        (["--at", "2"], "got 1 complete checkpoint until batch 2, expected at least 2; keep more by"),
    ],
)
def test_what_is_missing_is_said_in_a_line(run, tmp_path, capsys, options, message):
    assert main([str(run), "--std", "0.1", "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_told_before_the_work(run, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert main([str(run), "--std", "0.1", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: --out: {tmp_path}/out/power…-… can't be written in {tmp_path}/out\n"


def test_a_run_without_power_functions_and_two_runs_are_refused(train_tiny, run, tmp_path, capsys):
    plain = train_tiny("ema.decay=0.9")
    other = shutil.copy(train_tiny("ema.power=[0.05, 0.1]", "model.depth=2") / "ep0-ba6-rank0.pt", tmp_path)
    for places, message in (
        ([plain], "got the averages 0.9, expected averages of power functions; train with ema.power"),
        ([run / "ep0-ba2-rank0.pt", other], "of another run than"),
        ([tmp_path], "got 1 complete checkpoint"),
        ([ROOT / "README.md"], "expected a run's folder, or checkpoints such as ep0-ba100-rank0.pt"),
    ):
        assert main([*map(str, places), "--std", "0.1", "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert load_checkpoint(str(plain), "ema:0.9").which == "ema"  # its only one, under the name of earlier versions


@pytest.mark.parametrize("std", ["0", "0.29", "nan", "x"])
def test_a_std_of_no_power_function_is_refused(run, tmp_path, capsys, std):
    with pytest.raises(SystemExit) as error:
        main([str(run), "--std", std, "--out", str(tmp_path)])
    assert error.value.code == 2
    assert f"argument --std: got '{std}', expected a number in (0, 0.2886751346)" in capsys.readouterr().err


@pytest.mark.parametrize("averages", [[], "0.9", [0.9], ["../x"], ["power"]])
def test_a_record_with_names_of_no_averages_is_refused(run, averages):
    content = load_checkpoint(str(run), "training").record.as_dict()
    with pytest.raises(CheckpointError, match=r"here: averages: got .*, expected names such as"):
        Record.from_dict({**content, "averages": averages}, "here")


def test_names_of_weights():
    for name in ("ema", "training", "ema:0.9999", "ema:power0.05", "ema:1e-05"):
        check_weights("--weights", name)
    for name in ("EMA", "ema:", "ema:../x", "training:0.9", "power0.05"):
        with pytest.raises(UserError, match=r"--weights: got .*, expected ema, training, or one of several averages"):
            check_weights("--weights", name)
