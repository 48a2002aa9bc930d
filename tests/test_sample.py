"""Sampling and the checkpoints it reads, on a tiny network that two batches trained."""

import argparse
import contextlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from argparse import Namespace
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.nn.modules.module import register_module_forward_hook

from sit_composer import sample
from sit_composer.autoencoder import PixelAutoencoder
from sit_composer.captions import draw_samples
from sit_composer.checkpoint.load import CheckpointError, load_checkpoint
from sit_composer.choices import Sampling
from sit_composer.errors import INTERRUPTED, UserError
from sit_composer.gallery import SETTINGS, choose_labels
from sit_composer.generate import generate
from sit_composer.guidance import Guidance
from sit_composer.precision import resolve
from sit_composer.transport import Transport
from tests.helpers.paths import ROOT
from tests.helpers.runs import train_at_once


@pytest.fixture(scope="module")
def checkpoints(digits_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    overrides = [
        "model.hidden_size=32",
        "model.depth=1",
        "model.num_heads=2",
        "trainer.max_duration=2ba",
        "scheduler={constant: {}}",
    ]
    places = [f"data.local={digits_shards}", f"trainer.save_folder={folder}", "trainer.progress_bar=false"]
    assert train_at_once([str(ROOT / "yamls" / "quickstart.yaml"), *overrides, *places]) == 0
    return folder


@pytest.fixture
def draw(checkpoints, tmp_path):
    def draw(*options: str, out: str = "out", checkpoint=checkpoints) -> int:
        return sample.main([str(checkpoint), "--out", str(tmp_path / out), "--num-steps", "5", *options])

    return draw


def pictures(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("0*.png"))}


def test_it_writes_pictures_a_grid_an_array_and_every_setting(draw, tmp_path, capsys, checkpoints):
    npz = tmp_path / "all.npz"
    assert draw("--classes", "3,7", "--per-class", "2", "--cfg-scale", "2", "--seed", "5", "--npz", str(npz)) == 0
    out = tmp_path / "out"
    assert list(pictures(out)) == [f"{i:06d}.png" for i in range(4)]
    with np.load(npz) as content:
        assert content["arr_0"].shape == (4, 8, 8, 3)
        assert content["arr_0"].dtype == np.uint8
        assert content["labels"].tolist() == [3, 3, 7, 7]
        with Image.open(out / "000002.png") as picture:
            assert picture.mode == "L"
            assert np.array_equal(np.asarray(picture), content["arr_0"][2, :, :, 0])
    settings = json.loads((out / SETTINGS).read_text())
    assert settings["labels"] == [3, 3, 7, 7]
    assert (settings["cfg_scale"], settings["seed"], settings["sampling_method"]) == (2.0, 5, "dopri5")
    assert settings["evaluations"] > 0
    assert settings["checkpoint"]["weights"] == "ema"
    assert settings["checkpoint"]["step"] == 2
    assert settings["checkpoint"]["path"] == str(checkpoints / "ep0-ba2-rank0.pt")
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(out / "grid.png")


def test_classes_are_found_by_names_that_have_commas():
    classes = ["tench, Tinca tinca", "tench", "crane (bird)", "4"]
    args = argparse.Namespace(classes="tench, Tinca tinca,crane (bird), tench,4, 0", per_class=1)
    assert choose_labels(args, classes) == [0, 2, 1, 3, 0]


def test_classes_are_drawn_equally_often(draw, tmp_path):
    assert draw("--num-images", "20", "--sampling-method", "euler") == 0
    assert json.loads((tmp_path / "out" / SETTINGS).read_text())["labels"] == [i // 2 for i in range(20)]


def test_random_labels_are_the_seeds(draw, tmp_path):
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        options = ["--num-images", "12", "--labels", "random", "--seed", seed, "--sampling-method", "euler"]
        assert draw(*options, out=out) == 0
    a, b, c = (json.loads((tmp_path / out / SETTINGS).read_text())["labels"] for out in "abc")
    assert a == b != c
    assert a != sorted(a)


def test_guidance_options_reach_the_network(draw, tmp_path, checkpoints):
    def passes(out: str, *options: str) -> int:
        assert draw("--num-images", "2", "--sampling-method", "euler", *options, out=out) == 0
        return json.loads((tmp_path / out / SETTINGS).read_text())["passes"]

    assert passes("none", "--cfg-scale", "1") == 4
    assert passes("all", "--cfg-scale", "2") == 8
    assert passes("some", "--cfg-scale", "2", "--cfg-interval", "0.2", "0.6") == 6  # of t = 0, ¼, ½, ¾, the inner two
    assert passes("guide", "--cfg-scale", "2", "--guide", str(checkpoints)) == 8
    a, b = pictures(tmp_path / "none"), pictures(tmp_path / "guide")
    assert a == b  # guided away from itself: no guidance


UNEVEN = ["--sampling-method", "adaptive_heun", "--atol", "1e-6", "--rtol", "1e-6"]  # takes other steps a batch
UNEVEN += ["--weights", "training", "--cfg-scale", "1"]


def evaluations(checkpoints, batches: list[list[int]], count: int) -> dict[int, int]:
    """What each picture of ``count`` takes of the solver of ``UNEVEN`` when drawn with its batch."""
    checkpoint = load_checkpoint(str(checkpoints), "training")
    guidance = Guidance(checkpoint.build_network(), 1.0)
    transport = checkpoint.record.build_transport()
    taken = {}
    for batch in batches:
        labels = [i * 10 // count for i in batch]
        _, used = generate(
            guidance, transport, labels, batch, Sampling("ODE", "adaptive_heun", 5, atol=1e-6, rtol=1e-6)
        )
        taken |= dict.fromkeys(batch, used["evaluations"])
    return taken


@pytest.mark.slow
def test_two_ranks_draw_what_one_draws_and_count_for_both(draw, checkpoints, tmp_path):
    options = ["--num-images", "6", "--num-steps", "5", *UNEVEN]
    assert draw(*options) == 0
    composer = os.path.join(os.path.dirname(sys.executable), "composer")
    out = tmp_path / "two"
    command = [composer, "-n", "2", "-m", "sit_composer.sample", str(checkpoints), "--out", str(out), *options]
    done = subprocess.run([*command, "--batch-size", "2"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, content in pictures(tmp_path / "out").items():
        with Image.open(io.BytesIO(content)) as a, Image.open(out / name) as b:
            assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1
    assert (out / "grid.png").exists()
    settings = json.loads((out / SETTINGS).read_text())
    taken = evaluations(checkpoints, [[0, 2], [4], [1, 3], [5]], 6)
    assert len(set(taken.values())) > 1
    assert settings["evaluations"] == settings["passes"] == pytest.approx(sum(taken.values()) / 6, abs=1e-3)
    assert settings["counted_pictures"] == 6


def test_a_resumed_commands_pictures_count_with_those_before(draw, checkpoints, tmp_path):
    options = ["--num-images", "6", *UNEVEN]
    assert draw(*options, "--batch-size", "3") == 0
    for i in (1, 5):
        (tmp_path / "out" / f"{i:06d}.png").unlink()
    before = json.loads((tmp_path / "out" / SETTINGS).read_text())
    assert draw(*options, "--batch-size", "1") == 0
    settings = json.loads((tmp_path / "out" / SETTINGS).read_text())
    first, new = (evaluations(checkpoints, batches, 6) for batches in ([[0, 1, 2], [3, 4, 5]], [[1], [5]]))
    assert before["evaluations"] == pytest.approx(sum(first.values()) / 6, abs=1e-3)
    expected = (4 * before["evaluations"] + sum(new.values())) / 6
    assert settings["evaluations"] == pytest.approx(expected, abs=1e-3)
    assert settings["counted_pictures"] == 6


@pytest.fixture(scope="module")
def latent(digits_shards, vae_folder, tmp_path_factory):
    """A run on latents, and the folder of its autoencoder, which may do with float16."""
    folder, vae = tmp_path_factory.mktemp("latent"), tmp_path_factory.mktemp("vae") / "small"
    shutil.copytree(vae_folder, vae)
    change(vae, force_upcast=False)
    overrides = ["model.hidden_size=32", "model.depth=1", "model.num_heads=2", "trainer.max_duration=1ba"]
    overrides += ["model.in_channels=4", "model.input_size=4", f"autoencoder.name={vae}"]
    places = [f"data.local={digits_shards}", f"trainer.save_folder={folder}", "trainer.progress_bar=false"]
    assert train_at_once([str(ROOT / "yamls" / "quickstart.yaml"), *overrides, *places]) == 0
    return folder, vae


def change(vae, **keys) -> None:
    """Changes an autoencoder's config.json."""
    file = vae / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def levels(folder) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / name)) for name in pictures(folder)]).astype(int)


def test_latents_are_decoded_in_the_dtype_and_the_batches_asked_for(draw, latent, tmp_path, capsys):
    def run(out: str, *options: str, code: int = 0) -> dict:
        common = ["--num-images", "5", "--sampling-method", "euler"]
        assert draw(*common, *options, out=out, checkpoint=latent[0]) == code
        return json.loads((tmp_path / out / SETTINGS).read_text())

    said = run("float32")
    assert (said["decode_dtype"], said["decode_batch_size"]) == ("float32", 8)
    assert levels(tmp_path / "float32").shape == (5, 8, 8, 3)
    for dtype, most in (("bfloat16", 12), ("float16", 3)):
        said = run(dtype, "--decode-dtype", dtype, "--decode-batch-size", "2")
        assert (said["decode_dtype"], said["decode_batch_size"]) == (dtype, 2)
        difference = np.abs(levels(tmp_path / "float32") - levels(tmp_path / dtype)).max()
        assert 0 < difference <= most
    (tmp_path / "float32" / "000003.png").unlink()
    run("float32", "--decode-dtype", "bfloat16", code=2)
    assert "holds samples with another decode_dtype" in capsys.readouterr().err
    assert run("float32", "--decode-batch-size", "1")["decode_batch_size"] == 1  # which changes nothing but memory


def test_latents_are_decoded_by_the_autoencoder_they_are_of_and_in_no_dtype_it_overflows_in(
    draw, latent, tmp_path, capsys
):
    original = (latent[1] / "config.json").read_text()
    try:
        change(latent[1], force_upcast=True)
        assert draw("--num-images", "1", "--decode-dtype", "float16", checkpoint=latent[0]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert "config.json has force_upcast" in error
        change(latent[1], scaling_factor=0.5)
        assert draw("--num-images", "1", checkpoint=latent[0]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "trained on latents of" in error
        assert "scale=0.5" in error
    finally:
        (latent[1] / "config.json").write_text(original)
    assert not list((tmp_path / "out").glob("*.png"))


def test_bfloat16_is_the_networks_and_the_settings_say_so(draw, tmp_path, capsys):
    options = ["--num-images", "6", "--weights", "training", "--sampling-method", "euler"]
    said, seen = {}, []
    hook = register_module_forward_hook(lambda layer, _, out: seen.append((type(layer), out.dtype)))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("auto", None)):
        assert draw(*options, "--precision", precision, out=precision) == 0
        said[precision] = json.loads((tmp_path / precision / SETTINGS).read_text())["precision"]
        assert {made for layer, made in seen if layer is torch.nn.Linear} == {dtype or seen[-1][1]}
        seen.clear()
    hook.remove()
    assert said == {"fp32": "fp32", "bf16": "bf16", "auto": resolve("auto", "cpu")}
    assert pictures(tmp_path / "auto") == pictures(tmp_path / said["auto"])
    assert np.abs(levels(tmp_path / "fp32") - levels(tmp_path / "bf16")).max() <= 4
    assert draw(*options, out="bf16") == 2
    assert "holds samples with another precision" in capsys.readouterr().err


def test_images_of_earlier_versions_settings_are_continued(draw, tmp_path, capsys):
    options = ["--num-images", "3", "--sampling-method", "heun"]
    assert draw(*options) == 0
    whole, file = pictures(tmp_path / "out"), tmp_path / "out" / SETTINGS
    settings = json.loads(file.read_text())
    new = [settings.pop(name) for name in ("version", "precision", "time_shift")]
    assert new == [1, "fp32", 1.0]  # which they didn't have
    file.write_text(json.dumps(settings))
    (tmp_path / "out" / "000001.png").unlink()
    assert draw(*options, "--time-shift", "2") == 2
    assert "holds samples with another time_shift" in capsys.readouterr().err
    assert draw(*options) == 0
    assert pictures(tmp_path / "out") == whole


def test_shifted_times_reach_the_solver(draw, tmp_path):
    for out, options in (("uniform", []), ("shifted", ["--time-shift", "2"])):
        assert draw("--num-images", "2", "--mode", "SDE", *options, out=out) == 0
    assert pictures(tmp_path / "uniform") != pictures(tmp_path / "shifted")
    assert json.loads((tmp_path / "shifted" / SETTINGS).read_text())["time_shift"] == 2


def watch(monkeypatch, decode) -> None:
    """Has each batch's decoding go through ``decode(original, latents)``."""
    original = PixelAutoencoder.decode
    monkeypatch.setattr(PixelAutoencoder, "decode", lambda self, latents: decode(partial(original, self), latents))


def test_a_batch_is_decoded_while_the_next_one_is_generated(draw, tmp_path, monkeypatch):
    options = ["--num-images", "5", "--sampling-method", "euler", "--batch-size", "2"]
    assert draw(*options, out="before") == 0
    starts, begun = [], [threading.Event() for _ in range(4)]

    def counted(*args):
        begun[len(starts)].set()
        starts.append(threading.current_thread())
        return generate(*args)

    def decode(original, latents):
        decoders.append(threading.current_thread())
        if len(latents) == 2:  # all but the last batch
            assert begun[len(decoders)].wait(20), "decoding and generating take turns"
        return original(latents)

    decoders: list[threading.Thread] = []
    monkeypatch.setattr("sit_composer.gallery.generate", counted)
    watch(monkeypatch, decode)
    assert draw(*options) == 0
    assert pictures(tmp_path / "out") == pictures(tmp_path / "before")
    assert set(starts) == {threading.main_thread()}
    assert threading.main_thread() not in decoders
    assert all(not thread.is_alive() for thread in decoders)


@pytest.mark.parametrize("batch", [0, 2])
def test_an_error_of_the_decoder_ends_the_command_and_what_was_finished_stays(
    draw, tmp_path, monkeypatch, capsys, batch
):
    done = []

    def decode(original, latents):
        if len(done) == batch:
            raise UserError("the decoder overflowed")
        done.append(1)
        return original(latents)

    watch(monkeypatch, decode)
    assert draw("--num-images", "6", "--sampling-method", "euler", "--batch-size", "2") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: the decoder overflowed"
    assert list(pictures(tmp_path / "out")) == [f"{i:06d}.png" for i in range(2 * batch)]
    settings = json.loads((tmp_path / "out" / SETTINGS).read_text())
    assert settings.get("counted_pictures", 0) == 2 * batch


def test_an_interrupted_command_finishes_the_batch_in_its_thread_and_goes_on(draw, tmp_path, monkeypatch):
    options = ["--num-images", "6", "--sampling-method", "euler", "--batch-size", "2"]
    assert draw(*options, out="whole") == 0
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args)

    with monkeypatch.context() as patch:
        patch.setattr("sit_composer.gallery.generate", interrupted)
        assert draw(*options) == INTERRUPTED
    assert list(pictures(tmp_path / "out")) == [f"{i:06d}.png" for i in range(4)]
    assert json.loads((tmp_path / "out" / SETTINGS).read_text())["counted_pictures"] == 4
    assert draw(*options) == 0
    assert pictures(tmp_path / "out") == pictures(tmp_path / "whole")
    assert json.loads((tmp_path / "out" / SETTINGS).read_text())["counted_pictures"] == 6


@pytest.mark.parametrize("mode", [("--mode", "ODE", "--sampling-method", "heun"), ("--mode", "SDE")])
def test_a_picture_is_the_same_whatever_the_batch(draw, tmp_path, mode):
    assert draw("--num-images", "6", "--batch-size", "6", *mode, out="whole") == 0
    assert draw("--num-images", "6", "--batch-size", "4", *mode, out="parts") == 0
    for name in pictures(tmp_path / "whole"):
        with Image.open(tmp_path / "whole" / name) as a, Image.open(tmp_path / "parts" / name) as b:
            assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1  # a matrix product's last bits


def test_seeds_differ_and_repeat(draw, tmp_path):
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert draw("--num-images", "3", "--seed", seed, out=out) == 0
    a, b, c = (pictures(tmp_path / out) for out in "abc")
    assert a == b
    assert all(a[name] != c[name] for name in a)


def test_what_is_drawn_already_is_kept(draw, tmp_path):
    options = ["--num-images", "4", "--sampling-method", "euler", "--batch-size", "1"]
    assert draw(*options) == 0
    whole = pictures(tmp_path / "out")
    kept = tmp_path / "out" / "000001.png"
    (tmp_path / "out" / "000002.png").unlink()
    before = kept.stat().st_mtime_ns
    assert draw(*options) == 0
    assert pictures(tmp_path / "out") == whole
    assert kept.stat().st_mtime_ns == before


def test_training_weights_are_drawn_from_when_asked_for(checkpoints, tmp_path):
    training, ema = (load_checkpoint(str(checkpoints), which) for which in ("training", "ema"))
    assert not torch.equal(training.weights["final_layer.linear.weight"], ema.weights["final_layer.linear.weight"])
    network = training.record.build_network()
    network.load_state_dict(training.weights, strict=True)
    network.load_state_dict(ema.weights, strict=True)
    guidance = Guidance(network.eval(), 2.0)
    latents, used = generate(guidance, Transport(), [1], [0], Sampling("ODE", "euler", 5))
    assert latents.shape == (1, 1, 8, 8)
    assert used == {"evaluations": 4, "passes": 8}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "10"], "--classes: got '10', expected labels 0 to 9"),
        (["--classes", "-1"], "--classes: got '-1'"),
        (["--sampling-method", "midpiont"], "adaptive_heun; did you mean midpoint?"),
        (["--sampling-method", "Euler"], "--sampling-method of the ODE: got 'Euler', expected euler"),
        (
            ["--mode", "SDE", "--sampling-method", "dopri5"],
            "--sampling-method of the SDE: got 'dopri5', expected",
        ),
        (["--num-steps", "1"], "argument --num-steps: got '1', expected a whole number of at least 2"),
        (["--cfg-scale", "nan"], "argument --cfg-scale: got 'nan', expected a number of at least 0"),
        (["--mode", "SDE", "--diffusion-norm", "-1"], "argument --diffusion-norm: got '-1', expected a number"),
        (["--per-class", "3"], "argument --per-class: has no effect without --classes"),
        (["--npz", "/"], "--npz: got /, expected a file name"),
        (["--npz", "/dev/null/x.npz"], "--npz: /dev/null/x.npz can't be written in /dev/null"),
        (["--npz", __file__], "exists, and this command didn't write it; delete it, or choose another"),
        (["--last-step", "Euler"], "argument --last-step: has no effect without --mode SDE"),
        (["--diffusion-norm", "2"], "argument --diffusion-norm: has no effect without --mode SDE"),
        (["--mode", "SDE", "--atol", "1e-3"], "argument --atol: has no effect without an adaptive ODE solver (dopri5"),
        (
            ["--sampling-method", "heun", "--rtol", "1e-3"],
            "argument --rtol: has no effect without an adaptive",
        ),
        (["--mode", "SDE", "--last-step", "None", "--last-step-size", "0.1"], "--last-step-size: has no effect"),
        (
            ["--cfg-scale", "1", "--cfg-interval", "0", "0.5"],
            "argument --cfg-interval: has no effect with --cfg",
        ),
        (["--cfg-interval", "0.8", "0.2"], "--cfg-interval: got 0.8 to 0.2, expected two times in [0, 1], in order"),
        (["--cfg-channels", "2"], "--cfg-channels: got 2, expected at most the 1 of the network"),
        (["--classes", "1", "--labels", "random"], "argument --labels: random has no effect without --num"),
        (["--time-shift", "2"], "argument --time-shift: has no effect with dopri5, which chooses its own steps"),
        (
            ["--sampling-method", "heun", "--time-shift", "0"],
            "argument --time-shift: got '0', expected a number above 0",
        ),
        (["--precision", "fp16"], "argument --precision: invalid choice: 'fp16'"),
        (["--atol", "0", "--rtol", "0"], "--atol: got 0, and --rtol too, expected a number above 0"),
        (["--atol", "1e-30", "--rtol", "1e-30"], "the solver gave up"),
        (["--decode-dtype", "float16"], "--decode-dtype: got float16, but "),
        (["--decode-batch-size", "4"], "generates pixels, which need no decoder"),
        (["--decode-batch-size", "0"], "argument --decode-batch-size: got '0', expected a whole number of at least 1"),
        (["--num-images", "0"], "argument --num-images: got '0', expected a whole"),
        (["--mode", "SDE", "--last-step-size", "2"], "last_step_size: got 2.0"),
    ],
)
def test_a_wrong_option_is_named(draw, tmp_path, capsys, options, message):
    with contextlib.suppress(SystemExit):  # argparse's way out
        assert draw(*options) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_guide_that_predicts_something_else_is_refused(draw, checkpoints, tmp_path, monkeypatch, capsys):
    checkpoint = load_checkpoint(str(checkpoints), "ema")
    found = {str(checkpoints): checkpoint}
    monkeypatch.setattr("sit_composer.gallery.load_checkpoint", lambda path, which: found[path])
    autoencoder, classes = replace(checkpoint.record.autoencoder, scale=0.5), checkpoint.record.classes
    for name, value, message in (
        ("transport", {**checkpoint.record.transport, "prediction": "noise"}, "transport.prediction noise"),
        ("autoencoder", autoencoder, "autoencoder.scale 0.5"),
        ("model", {**checkpoint.record.model, "in_channels": 3}, "in_channels 3"),
        ("classes", [*classes[1:], classes[0]], "other classes"),
    ):
        found["other"] = replace(checkpoint, record=replace(checkpoint.record, **{name: value}))
        assert draw("--guide", "other", "--num-images", "1") == 2
        assert f"--guide: other has {message}" in capsys.readouterr().err


def test_num_steps_of_an_adaptive_solver_are_said_to_have_no_effect(draw, capsys):
    assert draw("--num-images", "1") == 0
    assert "note: dopri5 chooses its own steps; --num-steps has no effect" in capsys.readouterr().err


def test_settings_that_are_no_settings_are_somebody_elses(draw, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / SETTINGS).write_text("[1, 2]")
    (tmp_path / "out" / "other").touch()
    assert draw("--num-images", "1") == 2
    assert "holds files that are not samples" in capsys.readouterr().err


def test_a_grid_shows_all_where_classes_differ_in_number():
    pictures = [Image.new("L", (48, 48), 10 * i) for i in range(6)]
    grid = draw_samples(pictures, [4, 1, 1, 1, 7, 1], list("abcdefgh"), 1.5)
    assert {0, 10, 20, 30, 40, 50} <= set(np.asarray(grid).ravel().tolist())


def test_a_grid_names_the_guidance_and_each_class_once_per_row(monkeypatch):
    drawn = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, place, text, **options: drawn.append(text))
    draw_samples([Image.new("L", (8, 8))] * 4, [1, 1, 0, 0], ["ant", "bee"], 4.0)
    draw_samples([Image.new("L", (8, 8))] * 2, [1, 0], ["ant", "bee"], 1.5)
    assert drawn == ["bee", "ant", "guidance 4", "bee", "ant", "guidance 1.5"]


def test_a_command_that_was_refused_does_not_keep_the_folder(draw, tmp_path):
    assert draw("--num-images", "1", "--mode", "SDE", "--last-step-size", "2") == 2
    assert draw("--num-images", "1", "--mode", "SDE") == 0


def test_an_out_that_cannot_be_made_is_named(checkpoints, capsys):
    assert sample.main([str(checkpoints), "--out", "/proc/none/x", "--num-images", "1"]) == 2
    assert "/proc/none" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(draw, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    assert draw("--num-images", "1") == 2
    assert "holds files that are not samples" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]


def test_samples_with_other_settings_are_left_alone(draw, tmp_path, capsys):
    assert draw("--num-images", "2", "--seed", "1") == 0
    before = pictures(tmp_path / "out")
    assert draw("--num-images", "2", "--seed", "2") == 2
    assert "holds samples with another seed (1, not 2); delete it" in capsys.readouterr().err
    assert draw("--num-images", "3", "--seed", "1") == 2
    assert "holds samples with another labels (2 images, not 3); delete it" in capsys.readouterr().err
    assert pictures(tmp_path / "out") == before


class Planted:
    def __reduce__(self):
        return (open, (os.environ["PLANTED"], "w"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a checkpoint"),
        (b"<html>not found</html>", "not a checkpoint"),
        ({"weights": torch.zeros(1)}, "not a checkpoint of sit_composer's"),
        ({"state": {"model": {}}}, "not a checkpoint of sit_composer's (it has no 'callbacks')"),
        (torch.zeros(3), "it holds a Tensor"),
        (Planted(), "without running code in it"),
    ],
)
def test_what_is_no_checkpoint_is_refused_and_nothing_in_it_runs(draw, tmp_path, capsys, monkeypatch, content, message):
    monkeypatch.setenv("PLANTED", str(tmp_path / "planted"))
    file = tmp_path / "some.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file, pickle_module=pickle)
    assert draw(checkpoint=file) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {file}: ")
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "planted").exists()
    assert not (tmp_path / "out").exists()


def test_a_missing_checkpoint_is_named(draw, tmp_path, capsys):
    assert draw(checkpoint=tmp_path / "nothing.pt") == 2
    assert "nothing.pt: no checkpoint here" in capsys.readouterr().err
    assert draw(checkpoint=tmp_path) == 2
    assert "no complete checkpoint here" in capsys.readouterr().err


def test_ema_weights_that_were_never_kept_are_not_made_up(digits_shards, tmp_path):
    overrides = ["model.hidden_size=32", "model.depth=1", "model.num_heads=2", "trainer.max_duration=1ba", "ema=null"]
    places = [f"data.local={digits_shards}", f"trainer.save_folder={tmp_path}", "trainer.progress_bar=false"]
    assert train_at_once([str(ROOT / "yamls" / "quickstart.yaml"), *overrides, *places]) == 0
    with pytest.raises(CheckpointError, match="no EMA weights"):
        load_checkpoint(str(tmp_path), "ema")
    assert load_checkpoint(str(tmp_path), "training").step == 1


def test_a_mistyped_class_is_told_the_closest():
    with pytest.raises(UserError, match=r"got 'Tenc', expected labels 0 to 1, .*; did you mean tench, label 1"):
        choose_labels(Namespace(classes="Tenc", per_class=1), ["goldfish", "tench"])
    assert choose_labels(Namespace(classes="tench,0", per_class=1), ["goldfish", "tench"]) == [1, 0]
