"""The training command on the digits' shards, run in this process, so that Composer is imported once."""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from composer.loggers import Logger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sit_composer import bits_per_dim, evaluate, sample
from sit_composer.callbacks import drawing
from sit_composer.callbacks.run_record import RunRecord
from sit_composer.checkpoint import metrics
from sit_composer.checkpoint.load import load_checkpoint
from sit_composer.checkpoint.safe_load import load_file
from sit_composer.storage import LocalFolder, S3Folder
from sit_composer.supervision.lease import Lease
from sit_composer.training.model import ComposerSiT
from tests.helpers.digits import write
from tests.helpers.judge_digits import judge
from tests.helpers.paths import ROOT
from tests.helpers.runs import COMPOSER, QUICKSTART, bits, differences


@pytest.mark.parametrize(("workers", "precision"), [(0, "fp32"), (2, "bf16")])
def test_a_run_stopped_in_mid_epoch_resumes_to_the_bit(run, tmp_path, workers, precision):
    overrides = [f"data.num_workers={workers}", "data.flip=true"]  # flips must resume too
    assert run("trainer.max_duration=40ba", *overrides, folder="whole") == 0  # 28 batches per epoch
    assert run("trainer.max_duration=10ba", *overrides) == 0
    assert run("trainer.max_duration=40ba", *overrides) == 0
    assert differences(bits(tmp_path / "whole"), bits(tmp_path / "run")) == []


def test_flops_per_second_count_whole_batches_with_microbatches_too(run, tmp_path):
    log = tmp_path / "log.txt"
    monitor = ["callbacks.speed_monitor={window_size: 2}", f"loggers={{file: {{filename: '{log}'}}}}"]
    sizes = "trainer.device_train_microbatch_size=24"  # of 64: 24, 24, 16
    assert run("trainer.max_duration=6ba", *monitor, sizes) == 0
    text = log.read_text()
    assert "loss/train/total" in text
    flops, batches = (
        [float(value) for value in re.findall(rf"throughput/{name}_per_sec: ([\d.e+]+)", text)]
        for name in ("flops", "batches")
    )
    macs = load_checkpoint(str(tmp_path / "run")).record.build_network().forward_macs()
    assert flops
    for a, b in zip(flops, batches, strict=True):
        assert a / b == pytest.approx(6 * macs * 64, rel=1e-3)


def test_evaluation_is_logged_and_leaves_the_training_bits_alone(run, tmp_path, digits_shards):
    log = tmp_path / "log.txt"
    shards = f"eval_data={{local: {digits_shards}, global_batch_size: 599, num_workers: 0}}"
    assert run("trainer.max_duration=10ba", folder="whole") == 0
    logger = f"loggers={{file: {{filename: '{log}'}}}}"
    assert run("trainer.max_duration=10ba", "trainer.eval_interval=5ba", shards, logger) == 0
    assert "metrics/eval/loss" in log.read_text()
    assert differences(bits(tmp_path / "whole"), bits(tmp_path / "run")) == []


def test_sample_grids_leave_the_training_bits_alone(run, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(Logger, "log_images", lambda self, images, **options: logged.append((images, options)))
    grid = "sample_grid={interval: 5ba, labels: [3, 7], per_class: 3, num_steps: 3}"
    assert run("trainer.max_duration=10ba", "data.flip=true", folder="whole") == 0
    assert run("trainer.max_duration=10ba", "data.flip=true", grid) == 0
    assert differences(bits(tmp_path / "whole"), bits(tmp_path / "run")) == []
    grids = sorted((tmp_path / "run" / "samples").iterdir())
    assert [path.name for path in grids] == ["ba0000005.png", "ba0000010.png"]
    with Image.open(grids[0]) as picture:
        assert np.array_equal(np.asarray(picture), logged[0][0])
        assert (logged[0][1]["step"], logged[0][1]["channels_last"]) == (5, True)
        assert (picture.width, picture.height) == (
            3 * 52 - 4,
            19 + 4 + 2 * (48 + 4 + 19 + 4) - 4,
        )  # 3 of each of 2 classes
    # The sampling command generates the same images from the same weights.
    options = ["--classes", "3,7", "--per-class", "3", "--cfg-scale", "1.5", "--num-steps", "3"]
    out = tmp_path / "out"
    assert sample.main([str(tmp_path / "run"), "--out", str(out), "--sampling-method", "heun", *options]) == 0
    assert (out / "grid.png").read_bytes() == grids[1].read_bytes()


def test_a_shift_of_auto_and_a_prediction_of_x_reach_grids_samples_and_likelihoods(
    run, tmp_path, digits_shards, capsys
):
    objective = "transport={prediction: x, loss_weight: velocity, time_shift: auto}"
    grid = "sample_grid={interval: 10ba, labels: [3], per_class: 2, num_steps: 4}"
    assert run("trainer.max_duration=10ba", "optimizer.lr=0.01", "ema.decay=0.1", objective, grid) == 0
    assert "Linear, x, time shift 0.125 for 64 dimensions; below 4,096 it did harm" in capsys.readouterr().out
    checkpoint, settings = str(tmp_path / "run"), {}
    options = ["--classes", "3", "--per-class", "2", "--cfg-scale", "1.5", "--num-steps", "4"]
    shifts = {"own": [], "auto": ["--time-shift", "auto"], "none": ["--time-shift", "1"]}
    for name, shift in shifts.items():
        place = ["--out", str(tmp_path / name), "--sampling-method", "heun"]
        assert sample.main([checkpoint, *place, *options, *shift]) == 0
        settings[name] = json.loads((tmp_path / name / "sampling.json").read_text())
    assert [one["time_shift"] for one in settings.values()] == [0.125, 0.125, 1]  # √(64 / 4096)
    assert settings["own"]["evaluations"] == 5  # the last of Heun's three steps is Euler's
    drawn = (tmp_path / "run" / "samples" / "ba0000010.png").read_bytes()
    assert [(tmp_path / name / "grid.png").read_bytes() == drawn for name in shifts] == [True, True, False]
    data = ["--data", str(digits_shards), "--num-images", "2"]
    assert bits_per_dim.main([checkpoint, *data, "--out", str(tmp_path / "bits.json")]) == 0
    result = json.loads((tmp_path / "bits.json").read_text())
    assert (result["transport"]["prediction"], result["settings"]["interval"]) == ("x", [0, 1])
    assert result["bits_per_dim"] > 0


def test_tensorboard_gets_one_file_of_events_with_losses_and_grids(run, tmp_path, digits_shards):
    evaluation = f"eval_data={{local: {digits_shards}, global_batch_size: 599, num_workers: 0}}"
    grid = "sample_grid={interval: 3ba, labels: [3], num_steps: 2}"
    logger = f"loggers={{tensorboard: {{log_dir: {tmp_path}/events, flush_interval: 2}}}}"
    assert run("trainer.max_duration=6ba", "trainer.eval_interval=2ba", evaluation, grid, logger) == 0
    (file,) = (tmp_path / "events").rglob("events.*")
    events = EventAccumulator(str(file)).Reload()
    assert [event.step for event in events.Scalars("loss/train/total")] == [0, 1, 2, 3, 4, 5]
    assert len(events.Scalars("metrics/eval/loss")) == 3
    assert len(events.Tags()["images"]) == 1


@pytest.mark.parametrize(("interval", "drawn"), [("1ep", [28, 56]), ("40ba", [40, 56]), ("0.25dur", [14, 28, 42, 56])])
def test_a_grid_is_written_at_each_interval_and_at_the_end(run, tmp_path, interval, drawn):
    grid = f"sample_grid={{interval: {interval}, labels: [3], num_steps: 2}}"
    assert run("trainer.max_duration=2ep", grid) == 0
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [f"ba{n:07}.png" for n in drawn]


@pytest.fixture
def frechet_files(digits_shards, tmp_path) -> dict[str, str]:
    """A small feature extractor, and the digits' statistics by it."""
    torch.manual_seed(0)
    example = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)

    class Features(torch.nn.Sequential):
        def forward(self, x):
            return super().forward(x.float() / 127.5 - 1)

    network = Features(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 16), torch.nn.Tanh()).eval().requires_grad_(False)
    files = {"features": str(tmp_path / "features.pt"), "reference": str(tmp_path / "digits.npz")}
    torch.jit.trace(network, example).save(files["features"])
    shards, save = str(digits_shards), ["--metrics", "fid", "--save-statistics", files["reference"]]
    assert evaluate.main([shards, "--reference", shards, "--features", files["features"], *save]) == 0
    return files


def test_the_frechet_distance_is_logged_resumes_and_leaves_the_training_bits_alone(run, tmp_path, frechet_files):
    frechet = [f"frechet.{name}={value}" for name, value in frechet_files.items()]
    frechet += ["frechet.interval=5ba", "frechet.num_images=30", "frechet.num_steps=3", "frechet.batch_size=7"]
    log = tmp_path / "log.txt"
    assert run("trainer.max_duration=20ba", folder="without") == 0
    assert run("trainer.max_duration=20ba", *frechet, f"loggers={{file: {{filename: '{log}'}}}}", folder="whole") == 0
    assert differences(bits(tmp_path / "without"), bits(tmp_path / "whole")) == []
    assert run("trainer.max_duration=10ba", *frechet) == 0
    assert run("trainer.max_duration=20ba", *frechet) == 0
    results = [json.loads((tmp_path / folder / "frechet.json").read_text()) for folder in ("whole", "run")]
    assert results[0] == results[1]
    assert list(results[0]["frechet_distance"]) == ["5", "10", "15", "20"]
    assert f"metrics/frechet_distance: {results[0]['frechet_distance']['20']:.4f}" in log.read_text()
    # The commands give the same for the same weights.
    out, file = tmp_path / "out", tmp_path / "result.json"
    options = ["--num-images", "30", "--cfg-scale", "1", "--num-steps", "3", "--sampling-method", "heun"]
    assert sample.main([str(tmp_path / "run"), "--out", str(out), *options]) == 0
    features = ["--features", frechet_files["features"], "--metrics", "fid", "--out", str(file)]
    assert evaluate.main([str(out), "--reference", frechet_files["reference"], *features]) == 0
    distance = json.loads(file.read_text())["metrics"]["fid"]
    assert results[0]["frechet_distance"]["20"] == pytest.approx(distance, rel=1e-4)


def test_a_reference_of_other_features_is_refused_at_the_start(run, tmp_path, frechet_files, capsys):
    np.savez(tmp_path / "other.npz", mu=np.zeros(5), sigma=np.eye(5))
    frechet = [f"frechet.features={frechet_files['features']}", f"frechet.reference={tmp_path / 'other.npz'}"]
    assert run("trainer.max_duration=5ba", *frechet) == 2
    assert "has 5 features, expected 16" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_finished_run_says_so_and_changes_nothing(run, tmp_path, capsys):
    assert run("trainer.max_duration=10ba") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.pt")}
    assert run("trainer.max_duration=10ba") == 0
    assert "quickstart: already trained, 10 batches" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.pt")} == before


def test_the_resolved_config_lies_beside_the_checkpoints(run, tmp_path):
    assert run("trainer.max_duration=1ba", "optimizer.lr=0.5") == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["optimizer"]["lr"] == 0.5
    assert saved["data"]["global_batch_size"] == 64
    assert saved["transport"]["train_eps"] is None


def test_checkpoints_of_an_earlier_run_are_neither_resumed_nor_overwritten_unasked(run, tmp_path, capsys):
    assert run("trainer.max_duration=1ba") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.pt")}
    assert run("trainer.max_duration=1ba", "trainer.autoresume=false") == 2
    assert "trainer.save_folder: " in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.pt")} == before


def test_a_run_killed_between_a_checkpoint_and_its_latest_goes_on(run, tmp_path):
    assert run("trainer.max_duration=10ba", folder="whole") == 0
    assert run("trainer.max_duration=10ba") == 0
    (tmp_path / "run" / "latest-rank0.pt").unlink()
    (tmp_path / "run" / "ep0-ba10-rank0.pt").write_bytes(b"half of it")
    assert run("trainer.max_duration=10ba") == 0
    assert differences(bits(tmp_path / "whole"), bits(tmp_path / "run")) == []


def test_composers_own_parts_are_reached_by_their_names(run, tmp_path):
    clipping = "algorithms={gradient_clipping: {clipping_type: norm, clipping_threshold: 1.0e-9}}"
    assert run("trainer.max_duration=2ba", "callbacks.lr_monitor={}", folder="free") == 0
    assert run("trainer.max_duration=2ba", clipping, "callbacks.nan_monitor={}") == 0
    assert differences(bits(tmp_path / "free")["model"], bits(tmp_path / "run")["model"]) != []


def test_the_newest_complete_checkpoint_is_resumed_from_whatever_latest_says(run, tmp_path):
    assert run("trainer.max_duration=30ba") == 0
    folder = tmp_path / "run"
    whole = bits(folder)
    (folder / "latest-rank0.pt").unlink()
    (folder / "latest-rank0.pt").symlink_to("ep0-ba10-rank0.pt")  # a stale one
    half = (folder / "ep1-ba30-rank0.pt").read_bytes()
    (folder / "ep1-ba30-rank0.pt").write_bytes(half[: len(half) // 2])
    (folder / "ep0-ba10-rank0.pt").write_bytes(b"not looked at")
    assert run("trainer.max_duration=30ba") == 0
    assert differences(whole, bits(folder)) == []


def test_a_run_that_is_not_to_be_resumed_leaves_the_one_there_alone(run, tmp_path, capsys):
    assert run("trainer.max_duration=10ba") == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    assert run("trainer.max_duration=20ba", "trainer.autoresume=false") == 2
    assert "holds checkpoints (ep0-ba10-rank0.pt); trainer.autoresume=true resumes" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_resumes_to_the_bit(run, tmp_path, monkeypatch, capsys, number):
    assert run("trainer.max_duration=20ba", folder="whole") == 0

    def told(self, state, logger):
        if state.timestamp.batch == 7:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(RunRecord, "batch_end", told, raising=False)
    assert run("trainer.max_duration=20ba", "supervision.grace=300") == 128 + number
    assert "quickstart: saved at batch 7; the same command resumes" in capsys.readouterr().out.splitlines()
    assert (tmp_path / "run" / "ep0-ba7-rank0.pt").exists()
    monkeypatch.undo()
    assert run("trainer.max_duration=20ba") == 0
    assert "run:         quickstart, which resumes at batch 7 of 20 from ep0-ba7-rank0.pt" in capsys.readouterr().out
    assert differences(bits(tmp_path / "whole"), bits(tmp_path / "run")) == []
    assert run("trainer.max_duration=5ba") == 0
    told = capsys.readouterr().out
    assert "run:         quickstart, which has trained 20 batches already, and 5 are asked for\n" in told
    assert "time:        about 0:00 to train" in told


@pytest.mark.parametrize("when", ["evaluation", "images"])
def test_a_sigterm_in_an_evaluation_or_while_generating_images_leaves_and_saves(
    run, tmp_path, digits_shards, monkeypatch, capsys, when
):
    options = ["trainer.max_duration=10ba", "sample_grid={interval: 5ba, labels: [3], num_steps: 3, batch_size: 1}"]
    options += [f"eval_data={{local: {digits_shards}, global_batch_size: 600, num_workers: 0}}"]
    options += ["trainer.eval_interval=5ba", "supervision.grace=300"]
    assert run(*options, folder="whole") == 0
    calls, generate = [], drawing.generate

    def told(*_) -> None:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    if when == "evaluation":
        monkeypatch.setattr(RunRecord, "eval_batch_start", told, raising=False)
    else:
        monkeypatch.setattr(drawing, "generate", lambda *args: told() or generate(*args))
    assert run(*options) == 143
    assert "; the same command resumes" in capsys.readouterr().out
    assert len(calls) == 2  # of three batches, or four images
    assert sorted(path.name for path in (tmp_path / "run").glob("ep*")) == ["ep0-ba5-rank0.pt"]
    monkeypatch.undo()
    assert run(*options) == 0
    assert differences(bits(tmp_path / "whole"), bits(tmp_path / "run")) == []


@pytest.mark.parametrize("told", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_ends_with_workers_for_its_evaluation_too(digits_shards, tmp_path, told):
    """Python waits for workers that are left, which ignore the signal that it sends them."""
    log = tmp_path / "log.txt"
    options = ["model.hidden_size=32", "model.depth=1", "model.num_heads=2", "trainer.eval_interval=2ba"]
    options += [f"data.local={digits_shards}", f"trainer.save_folder={tmp_path / 'run'}", "data.num_workers=1"]
    options += [f"eval_data={{local: {digits_shards}, global_batch_size: 600, num_workers: 1}}"]
    options += [f"loggers={{file: {{filename: '{log}', flush_interval: 1}}}}"]
    options += [f"trainer.max_duration={100000 if told else 2}ba", "supervision.grace=100"]
    command = [sys.executable, "sit_composer/train.py", QUICKSTART, *options]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=-3, stderr=-3)
    try:
        deadline = time.monotonic() + 200
        while told and not (log.exists() and "metrics/eval/loss" in log.read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        if told:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=200) == (143 if told else 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_worker_that_is_killed_ends_the_run_with_a_line_that_says_so(run, monkeypatch, capsys):
    def kill(*_):
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()

    monkeypatch.setattr(RunRecord, "batch_end", kill, raising=False)
    assert run("trainer.max_duration=9ba", "data.num_workers=1") == 1  # as for 2 a scheduler would not try again
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert re.search(r"^error: DataLoader worker .*; if memory ran out, lower num_workers; rerun to", said, re.M)


def test_a_node_reports_what_only_it_sees(tmp_path):
    program = "import sys, time; time.sleep = lambda s: None; from sit_composer.train import main; sys.exit(main())"
    command = [sys.executable, "-c", program, QUICKSTART, f"data.local={tmp_path / 'none'}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "RANK": "8"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: data.local: no shards in '{tmp_path / 'none'}'")


@pytest.mark.slow
def test_a_sigterm_to_every_process_of_a_run_saves_too(digits_shards, tmp_path):
    """As schedulers send it; it would kill torch's data workers, and their death the run."""
    log = tmp_path / "log.txt"
    tiny = ["model.hidden_size=32", "model.depth=1", "model.num_heads=2", "trainer.max_duration=100000ba"]
    places = [f"data.local={digits_shards}", f"trainer.save_folder={tmp_path / 'run'}", "data.num_workers=2"]
    logger = f"loggers={{file: {{filename: '{log}', flush_interval: 1}}}}"
    command = [sys.executable, "sit_composer/train.py", QUICKSTART, *tiny, *places, logger, "supervision.grace=100"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=-3, stderr=-3)
    try:
        deadline = time.monotonic() + 200
        while not (log.exists() and "time/batch: 5 " in log.read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(150) == 143
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert load_checkpoint(str(tmp_path / "run")).step >= 5


def test_only_so_many_checkpoints_are_kept_also_over_resumes_and_that_is_said(run, tmp_path, capsys):
    assert run("trainer.max_duration=5ba", "trainer.save_interval=2ba", "trainer.save_num_checkpoints_to_keep=-1") == 0
    assert len(list((tmp_path / "run").glob("ep*"))) == 3
    for batches in (20, 30):
        assert run(f"trainer.max_duration={batches}ba", "trainer.save_num_checkpoints_to_keep=0") == 0
        assert [path.name for path in (tmp_path / "run").glob("ep*")] == [f"ep{batches // 29}-ba{batches}-rank0.pt"]
    assert capsys.readouterr().out.count("/run: 2 old checkpoints will be deleted with the next save") == 1


def test_a_second_run_beside_a_live_one_is_refused(run, tmp_path, capsys):
    holder = Lease(LocalFolder(str(tmp_path / "run")), beat=0.2)
    holder.acquire()
    try:
        assert run("trainer.max_duration=1ba", "supervision.heartbeat=0.4") == 2
    finally:
        holder.release()
    assert "a run of this name is alive" in capsys.readouterr().err
    assert run("trainer.max_duration=1ba") == 0


def test_a_run_that_was_taken_for_dead_saves_no_more(run, tmp_path, monkeypatch, capsys):
    def taken_over(self, state, logger):
        if state.timestamp.batch == 10:
            (tmp_path / "run" / "alive.json").write_text('{"owner": "successor"}')

    monkeypatch.setattr(RunRecord, "batch_end", taken_over, raising=False)
    assert run("trainer.max_duration=20ba") == 2
    assert "another run has taken this one for dead" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["alive.json", "config.yaml"]  # no metrics too


def test_a_planted_pickle_does_not_run(run, tmp_path, capsys):
    assert run("trainer.max_duration=10ba") == 0
    file, mark = tmp_path / "run" / "ep0-ba10-rank0.pt", tmp_path / "ran"
    content = torch.load(file, weights_only=False)
    for place, poison in (
        ("seed", Planted(mark)),
        ("algorithms", [("BlurPool", {"repr": f"__name__ and open('{mark}', 'w')"})]),
    ):
        planted = {**content, "state": {**content["state"], place: poison}}
        torch.save(planted, file)
        code = run("trainer.max_duration=20ba")
        assert not mark.exists()
        if place == "seed":
            assert code == 2
            assert "without running code in it" in capsys.readouterr().err
    torch.load(tmp_path / "run" / "ep0-ba10-rank0.pt", weights_only=False)


class Planted:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("content", [b"", b"half", b"<html></html>"])
def test_a_broken_checkpoint_is_named_and_not_a_traceback(run, tmp_path, capsys, content):
    file = tmp_path / "some.pt"
    file.write_bytes(content)
    assert run("trainer.max_duration=1ba", "trainer.autoresume=false", f"trainer.load_path={file}") == 2
    assert str(file) in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("override", ["optimizer.lr=1e-6", "optimizer.name=muon", "seed=3"])
def test_what_a_resumed_run_could_not_change_is_refused(run, tmp_path, capsys, override):
    assert run("trainer.max_duration=1ba") == 0
    before = (tmp_path / "run" / "config.yaml").read_text()
    assert run("trainer.max_duration=2ba", override) == 2
    assert f"error: {override.partition('=')[0]}: got" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_finished_run_keeps_its_config(run, tmp_path):
    assert run("trainer.max_duration=1ba") == 0
    before = (tmp_path / "run" / "config.yaml").read_text()
    assert run("trainer.max_duration=1ba", "data.num_workers=1") == 0
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_evaluation_data_with_other_classes_is_refused(run, digits_shards, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(digits_shards, other)
    spec = json.loads((other / "spec.json").read_text())
    (other / "spec.json").write_text(json.dumps({**spec, "classes": spec["classes"][::-1]}))
    assert run("trainer.max_duration=1ba", f"eval_data={{local: {other}, global_batch_size: 9, num_workers: 0}}") == 2
    assert "eval_data.local: its classes are not data's" in capsys.readouterr().err
    assert run("trainer.max_duration=1ba") == 0
    assert run("trainer.max_duration=2ba", f"data.local={other}") == 2  # and so is resuming on them
    assert "other classes than the data has, from label 0 on" in capsys.readouterr().err


def test_a_run_that_cannot_start_does_not_delete_the_one_that_it_is_to_replace(run, tmp_path, capsys):
    assert run("trainer.max_duration=3ba", "report=true") == 0
    before = sorted((tmp_path / "run").iterdir())
    again = ["trainer.max_duration=2ba", "trainer.autoresume=false", "trainer.save_overwrite=true"]
    assert run(*again, "trainer.device_train_microbatch_size=auto") == 2  # which Composer refuses on a CPU
    assert "error: trainer: " in capsys.readouterr().err
    assert sorted((tmp_path / "run").iterdir()) == before
    assert run(*again) == 0
    assert [path.name for path in (tmp_path / "run").glob("ep*")] == ["ep0-ba2-rank0.pt"]
    attempts, rows = metrics.read((tmp_path / "run" / metrics.NAME).read_bytes())
    assert ([one["start"] for one in attempts], rows[-1]["batch"]) == ([0], 2)  # nothing of the earlier run
    assert not (tmp_path / "run" / "report.html").exists()  # which shows it, and this run writes none


@pytest.mark.slow
def test_a_run_in_a_bucket_that_replaces_another_has_its_own_metrics(run, s3):
    for again in ((), ("trainer.autoresume=false", "trainer.save_overwrite=true")):
        assert run("trainer.save_folder=s3://sit/again", "trainer.max_duration=2ba", *again) == 0
    attempts, rows = metrics.read(S3Folder("s3://sit/again").read(metrics.NAME))
    assert ([one["start"] for one in attempts], rows[-1]["batch"]) == ([0], 2)


def write_latents(folder, vae: str, scale: float) -> None:
    """Shards of moments whose mean and deviation are 1."""
    autoencoder = {"name": vae, "scale": scale, "shift": 0.0, "channels": 4, "downsample": 2}
    spec = {"kind": "latents", "channels": 4, "image_size": 8, "autoencoder": autoencoder}
    moments = np.ones((8, 4, 4), np.float16)
    rows = [{"moments": moments, "moments_flip": moments, "label": i % 10} for i in range(100)]
    columns = {"moments": "ndarray:float16:8,4,4", "moments_flip": "ndarray:float16:8,4,4", "label": "int"}
    write(folder, columns, rows, spec)


def test_evaluation_on_latents_of_another_scale_is_refused(run, vae_folder, tmp_path, capsys):
    for name, scale in (("a", 0.2), ("b", 0.3)):
        write_latents(tmp_path / name, vae_folder, scale)
    latents = ["model.in_channels=4", "model.input_size=4", f"autoencoder.name={vae_folder}"]
    latents += ["trainer.max_duration=1ba", f"data.local={tmp_path / 'a'}"]
    for name, code in (("a", 0), ("b", 2)):
        places = f"eval_data={{local: {tmp_path / name}, global_batch_size: 9, num_workers: 0}}"
        assert run(*latents, places, folder=name) == code
    assert "error: eval_data.local: got latents of " in capsys.readouterr().err


def test_latents_of_a_wrong_scale_are_told_once_before_the_first_step(run, vae_folder, tmp_path, capsys, monkeypatch):
    forward = ComposerSiT.forward
    monkeypatch.setattr(ComposerSiT, "forward", lambda *args: print("step") or forward(*args))
    latents = ["model.in_channels=4", "model.input_size=4", f"autoencoder.name={vae_folder}"]

    def train(name: str, batches: int) -> list[str]:
        options = [f"data.local={tmp_path / name}", f"trainer.max_duration={batches}ba"]
        assert run(*latents, *options, folder=f"run-{name}") == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("warning", "step"))]

    write_latents(tmp_path / "good", vae_folder, 1.0)
    write_latents(tmp_path / "bad", vae_folder, 0.2)
    assert train("good", 1) == ["step"]
    warning, *steps = train("bad", 2)
    where = f"warning: {tmp_path / 'bad'}: the latents have a standard deviation of "
    assert re.fullmatch(rf"{where}(0\.19|0\.2)\d* after scale 0.2, expected about 1: the scale is wrong, .*", warning)
    assert steps == ["step", "step"]
    resumed, *steps = train("bad", 3)
    assert resumed.startswith(where)
    assert steps == ["step"]


def test_grey_images_are_encoded_by_an_autoencoder_of_three_channels(run, vae_folder, digits_shards, tmp_path, capsys):
    latents = ["model.in_channels=4", "model.input_size=4", f"autoencoder.name={vae_folder}"]
    assert run("trainer.max_duration=1ba", *latents) == 0  # random weights know no scale
    assert "warning: " + f"{digits_shards}: the latents have a standard deviation of " in capsys.readouterr().out
    assert load_checkpoint(str(tmp_path / "run")).record.autoencoder.name == vae_folder


def test_the_state_of_another_optimizer_is_left_out_with_a_word(run, tmp_path):
    assert run("trainer.max_duration=1ba", folder="other") == 0
    weights = f"trainer.load_path={tmp_path / 'other' / 'latest-rank0.pt'}"
    with pytest.warns(UserWarning, match="Muon is not in the state_dict. Its state will not be restored"):
        assert run("trainer.max_duration=2ba", "trainer.autoresume=false", weights, "optimizer.name=muon") == 0
    state = load_file(tmp_path / "run" / "latest-rank0.pt")["state"]
    groups = state["optimizers"]["Muon"]["param_groups"]
    assert state["schedulers"]["LambdaLR"]["base_lrs"] == [group["initial_lr"] for group in groups]  # each is scheduled


def test_weights_without_an_option_of_the_blocks_are_refused_in_one_line(run, tmp_path, capsys):
    assert run("trainer.max_duration=1ba") == 0
    weights = f"trainer.load_path={tmp_path / 'run' / 'latest-rank0.pt'}"
    others = ["trainer.autoresume=false", "trainer.load_weights_only=true", "model.rotary=true"]
    assert run("trainer.max_duration=1ba", *others, weights, folder="other") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: trainer: ")
    assert "feat_rope.freqs_cos" in error
    torch.save(load_checkpoint(str(tmp_path / "run")).weights, tmp_path / "SiT.pt")
    released = f"trainer.load_path={tmp_path / 'SiT.pt'}"
    assert run("trainer.max_duration=1ba", *others, released, folder="other") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: trainer.load_path: {tmp_path / 'SiT.pt'} is not a run's checkpoint; released ")


def test_a_run_of_another_network_under_the_same_name_is_refused(run, tmp_path, capsys):
    assert run("trainer.max_duration=1ba") == 0
    before = sorted((tmp_path / "run").iterdir())
    assert run("trainer.max_duration=2ba", "model.depth=2") == 2
    assert "model.depth: got 2, expected 1, the value of the run in" in capsys.readouterr().err
    assert sorted((tmp_path / "run").iterdir()) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["precision=amp_bf16"], "precision: got amp_bf16, expected auto, bf16 or fp32: there is no GPU here"),
        (["callbacks.early_stopper={monitor: x, dataloader_label: y, patience: soon}"], "callbacks.early_stopper"),
        (["data.local=nowhere"], "data.local: no shards in 'nowhere'"),
        (["model.num_classes=11"], "expected 10: "),
        (
            ["trainer.autoresume=false", "trainer.load_path=/nowhere.pt"],
            "trainer: Local path /nowhere.pt does not exist",
        ),
        (["trainer.save_folder=/proc/none"], "trainer.save_folder: /proc/none: No such file or directory"),
        (["data.remote=/nowhere/at/all", "data.local=cache"], "/nowhere/at/all/spec.json: can't be read"),
    ],
)
def test_what_only_the_libraries_refuse_is_one_line_too(run, overrides, message, capsys, tmp_path, monkeypatch):
    if torch.cuda.is_available() and "precision" in message:
        pytest.skip("there is a GPU here, which takes amp_bf16")
    monkeypatch.chdir(tmp_path)
    assert run("trainer.max_duration=1ba", *overrides) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_a_broken_shard_stops_the_command_with_its_name(run, digits_shards, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(digits_shards, broken)
    shard = next(broken.glob("shard.*.mds"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    assert run("trainer.max_duration=5ba", f"data.local={broken}") == 2
    assert shard.name in capsys.readouterr().err


@pytest.mark.nightly  # CI runs `make quickstart`, which is judged as well
def test_the_quickstart_generates_digits_of_the_requested_class(digits_shards, tmp_path):
    """End to end, with the real launcher: a classifier finds the requested class in 95 % of 500 guided EMA samples."""
    command = [COMPOSER, "-n", "1", "sit_composer/train.py", "yamls/quickstart.yaml"]
    places = [f"data.local={digits_shards}", f"trainer.save_folder={tmp_path / 'run'}"]
    done = subprocess.run([*command, *places], cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    npz = tmp_path / "samples.npz"
    classes = ["--classes", "0,1,2,3,4,5,6,7,8,9", "--per-class", "50", "--cfg-scale", "1.5", "--batch-size", "100"]
    assert sample.main([str(tmp_path / "run"), "--out", str(tmp_path / "samples"), "--npz", str(npz), *classes]) == 0
    with np.load(npz) as samples:
        assert samples["arr_0"].shape == (500, 8, 8, 3)
        real, drawn = judge(samples["arr_0"], samples["labels"])
    assert real >= 95
    assert drawn >= 95
    checkpoint = load_checkpoint(str(tmp_path / "run"))
    assert (checkpoint.which, checkpoint.step) == ("ema", 800)


def test_under_the_launcher_a_mistake_is_a_line_and_exit_code_2(tmp_path):
    command = [COMPOSER, "-n", "2", "sit_composer/train.py", "yamls/quickstart.yaml", "modl.depth=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "error: modl: no such key; did you mean model?" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
