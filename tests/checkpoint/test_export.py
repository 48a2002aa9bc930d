"""Exported folders: from a run's checkpoint and back, to the bit."""

import dataclasses
import json
import os
import re
import resource

import pytest
import torch
from safetensors.torch import load_file

from sit_composer import sample
from sit_composer.autoencoder import AutoencoderSpec, DiffusersAutoencoder
from sit_composer.checkpoint.export import model_card
from sit_composer.checkpoint.load import load_checkpoint
from sit_composer.checkpoint.record import digest
from sit_composer.data.spec import DataSpec
from sit_composer.export import main
from sit_composer.sit import SiT, build_sit
from tests.helpers.paths import ROOT
from tests.helpers.runs import train_at_once


@pytest.fixture(scope="module")
def train_tiny(digits_shards, tmp_path_factory):
    def train_tiny(*overrides: str):
        folder = tmp_path_factory.mktemp("run")
        sizes = ["model.hidden_size=32", "model.depth=1", "model.num_heads=2", "trainer.max_duration=2ba"]
        places = [f"data.local={digits_shards}", f"trainer.save_folder={folder}", "trainer.progress_bar=false"]
        overrides = [*sizes, "scheduler={constant: {}}", *overrides, *places]
        assert train_at_once([str(ROOT / "yamls" / "quickstart.yaml"), *overrides]) == 0
        return folder

    return train_tiny


@pytest.fixture(scope="module")
def checkpoints(train_tiny):
    return train_tiny()


@pytest.fixture
def exported(checkpoints, tmp_path):
    assert main([str(checkpoints), "--out", str(tmp_path), "--hub"]) == 0
    return tmp_path


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_has_all_of_the_run_to_the_bit(checkpoints, exported):
    folder = exported / "checkpoint-2"
    assert sorted(path.name for path in exported.iterdir()) == ["checkpoint-2", "hub-2"]
    assert sorted(content(folder)) == [
        "config.json", "ema.pt", "ema.safetensors", "model.safetensors", "trainer_state.json",
    ]  # fmt: skip
    for which, name in (("training", "model"), ("ema", "ema")):
        before, after = load_checkpoint(str(checkpoints), which), load_checkpoint(str(folder), which)
        assert before.record == after.record
        assert (before.step, before.epoch, before.samples) == (after.step, after.epoch, after.samples) == (2, 0, 128)
        assert list(before.weights) == list(before.record.build_network().state_dict())
        stored = load_file(folder / f"{name}.safetensors")
        assert before.weights.keys() == after.weights.keys() == stored.keys()
        for key, tensor in before.weights.items():
            assert torch.equal(tensor, after.weights[key])
            assert tensor.dtype == after.weights[key].dtype
    plain = torch.load(folder / "ema.pt", weights_only=True)
    assert all(torch.equal(plain[key], tensor) for key, tensor in before.weights.items())
    before.record.build_network().load_state_dict(plain, strict=True)
    assert json.loads((folder / "config.json").read_text())["version"] == 1
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["source"] == {"ep0-ba2-rank0.pt": digest(checkpoints / "ep0-ba2-rank0.pt")}
    assert state["sha256"] == {name: digest(folder / name) for name in content(folder) if name != "trainer_state.json"}


@pytest.mark.parametrize("folder", ["checkpoint-2", "hub-2"])
def test_from_pretrained_gives_the_same_outputs(checkpoints, exported, folder):
    run = load_checkpoint(str(checkpoints), "ema")
    before = run.record.build_network().eval()
    before.load_state_dict(run.weights)
    after = SiT.from_pretrained(str(exported / folder))
    x, t, y = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 5, 10])
    assert torch.equal(before(x, t, y), after(x, t, y))
    assert not after.training


@pytest.mark.parametrize("weights", ["ema", "training"])
def test_the_pictures_are_the_same_as_the_runs(checkpoints, exported, tmp_path, weights):
    options = ["--num-images", "3", "--num-steps", "5", "--weights", weights]
    for place, out in ((checkpoints, "a"), (exported / "checkpoint-2", "b")):
        assert sample.main([str(place), "--out", str(tmp_path / out), *options]) == 0
    a, b = content(tmp_path / "a"), content(tmp_path / "b")
    for name in ("000000.png", "000001.png", "000002.png", "grid.png"):
        assert a[name] == b[name]


def test_the_hub_folder_has_the_average_and_a_card_that_runs(exported):
    folder = exported / "hub-2"
    assert sorted(content(folder)) == ["README.md", "config.json", "model.safetensors", "trainer_state.json"]
    average = load_file(exported / "checkpoint-2" / "ema.safetensors")
    published = load_file(folder / "model.safetensors")
    assert all(torch.equal(published[name], average[name]) for name in average)
    card = (folder / "README.md").read_text()
    assert "8×8 images of 10 classes" in card
    settings = json.loads(re.search(r"```json\n(.*?)```", card, re.DOTALL)[1])
    assert (settings["sampling_method"], settings["cfg_scale"]) == ("dopri5", 4.0)
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    names = {}
    exec(snippet.replace("OWNER/NAME", str(folder)), names)
    assert names["velocity"].shape == (2, 1, 8, 8)


def test_a_folders_autoencoder_is_told_of_and_named_as_on_the_hub(train_tiny, vae_folder, tmp_path, capsys):
    run = train_tiny("model.in_channels=4", "model.input_size=4", f"autoencoder.name={vae_folder}")
    assert main([str(run), "--out", str(tmp_path / "a"), "--hub"]) == 0
    assert f"warning: hub-2: its autoencoder is {vae_folder}, a folder here, so that nobody" in capsys.readouterr().err
    assert main([str(run), "--out", str(tmp_path / "b"), "--hub", "--vae-id", "owner/tiny-vae"]) == 0
    assert capsys.readouterr().err == ""
    assert "latents of `owner/tiny-vae`" in (tmp_path / "b" / "hub-2" / "README.md").read_text()
    before, after = (load_checkpoint(str(tmp_path / x)).record for x in ("a/hub-2", "b/hub-2"))
    assert after == dataclasses.replace(
        before, autoencoder=dataclasses.replace(before.autoencoder, name="owner/tiny-vae")
    )
    assert load_checkpoint(str(tmp_path / "b" / "checkpoint-2")).record == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vae-id", "owner/vae"], "argument --vae-id: has no effect without --hub"),
        (["--hub", "--vae-id", "/local/vae"], "argument --vae-id: got '/local/vae', expected a name on the Hub"),
        (["--hub", "--vae-id", "owner/vae"], "--vae-id: got owner/vae, but "),
    ],
)
def test_an_autoencoders_name_without_effect_is_refused(checkpoints, tmp_path, capsys, arguments, message):
    try:
        code = main([str(checkpoints), "--out", str(tmp_path), *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_files_have_the_mode_of_the_umask(checkpoints, tmp_path):
    before = os.umask(0o027)
    try:
        assert main([str(checkpoints), "--out", str(tmp_path), "--hub"]) == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {0o640}


def test_what_is_exported_already_is_kept(checkpoints, exported, capsys):
    before = {path: path.stat().st_mtime_ns for path in exported.rglob("*")}
    capsys.readouterr()
    assert main([str(checkpoints), "--out", str(exported), "--hub"]) == 0
    assert capsys.readouterr().out.count("already exported") == 2
    assert {path: path.stat().st_mtime_ns for path in exported.rglob("*")} == before


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "ema.safetensors"),
        lambda folder: (folder / "ema.pt").unlink(),
        lambda folder: (folder / "trainer_state.json").write_text("[]"),
        lambda folder: [path.unlink() for path in folder.iterdir()],
    ],
)
def test_a_folder_of_anything_else_is_left_alone(checkpoints, exported, capsys, damage):
    folder = exported / "checkpoint-2"
    damage(folder)
    before = content(folder)
    assert main([str(checkpoints), "--out", str(exported)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: --out: {folder} exists and is not this export")
    assert "\n" not in error
    assert content(folder) == before
    assert sorted(path.name for path in exported.iterdir()) == ["checkpoint-2", "hub-2"]


def test_another_runs_export_of_that_step_is_left_alone(train_tiny, exported, capsys):
    before = content(exported / "checkpoint-2")
    assert main([str(train_tiny("seed=1")), "--out", str(exported)]) == 2
    assert "is not this export" in capsys.readouterr().err
    assert content(exported / "checkpoint-2") == before


def test_a_run_without_an_average_exports_what_it_has_and_says_so(train_tiny, tmp_path, capsys):
    assert main([str(train_tiny("ema=null")), "--out", str(tmp_path), "--hub"]) == 0
    assert "it has no ema weights; exporting the others" in capsys.readouterr().out
    assert sorted(content(tmp_path / "checkpoint-2")) == ["config.json", "model.safetensors", "trainer_state.json"]
    card = (tmp_path / "hub-2" / "README.md").read_text()
    assert "the training weights, not an average" in card
    assert "--num-images 16 --weights training\n" in card
    snippet = card.rpartition("```python\n")[2].partition("```")[0]
    exec(snippet.replace("OWNER/NAME", str(tmp_path / "hub-2")), {})


def test_a_released_file_is_exported_as_the_average_that_it_is(tmp_path, capsys):
    weights = build_sit("SiT-S/8", depth=1).state_dict()
    torch.save(weights, tmp_path / "SiT.pt")
    assert main([str(tmp_path / "SiT.pt"), "--out", str(tmp_path / "out"), "--hub"]) == 0
    assert "it has no training weights" in capsys.readouterr().out
    folder = tmp_path / "out" / "checkpoint-0"
    assert sorted(content(folder)) == ["config.json", "ema.pt", "ema.safetensors", "trainer_state.json"]
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in SiT.from_pretrained(str(folder)).state_dict().items()
    )
    assert "latents of `stabilityai/sd-vae-ft-ema`" in (tmp_path / "out" / "hub-0" / "README.md").read_text()


@pytest.fixture
def lightning(tmp_path, vae_of_kind):
    """A file in the layout of LightningDiT's, for latents with statistics from a file, and the spec of such shards."""
    network = build_sit("LightningDiT-B/1", depth=1, input_size=4, in_channels=6, num_classes=3)
    torch.save({"model": {}, "ema": network.state_dict(), "opt": {}, "config": {}}, tmp_path / "lightning.pt")
    statistics = {"scale": 1.0, "mean": [0.1] * 6, "std": [0.4] * 6, "statistics": "file"}
    of = {**DiffusersAutoencoder(vae_of_kind("dc")).spec.as_dict(), **statistics}
    classes = {"num_classes": 3, "classes": ["a", "b", "c"], "class_counts": [1, 1, 1], "samples": 3}
    return network, DataSpec("latents", 6, 16, **classes, autoencoder=of)


def test_weights_of_other_latents_than_the_authors_are_exported_with_a_spec_of_these(lightning, tmp_path, capsys):
    network, spec = lightning
    (tmp_path / "spec.json").write_text(spec.to_json())
    command = [str(tmp_path / "lightning.pt"), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "got 6 channels, expected the 4 of the authors' autoencoder; give the spec.json" in capsys.readouterr().err
    hub = ["--hub", "--weights", "ema", "--vae-id", "owner/autoencoder"]
    assert main([*command, "--spec", str(tmp_path / "spec.json"), *hub]) == 0
    assert load_checkpoint(str(tmp_path / "out" / "hub-0")).record.classes == ["a", "b", "c"]
    folder = str(tmp_path / "out" / "checkpoint-0")
    read = load_checkpoint(folder)
    assert all(torch.equal(tensor, read.weights[name]) for name, tensor in network.state_dict().items())
    assert read.record.autoencoder == AutoencoderSpec(**spec.autoencoder)
    assert read.record.classes == ["a", "b", "c"]
    options = ["--num-images", "2", "--sampling-method", "heun", "--num-steps", "2"]
    assert sample.main([folder, "--out", str(tmp_path / "images"), *options]) == 0
    assert (tmp_path / "images" / "000001.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 32}, "the spec has images of 32, expected 16"),
        ({"channels": 4, "autoencoder": {"name": "a", "scale": 1.0, "shift": 0.0, "channels": 4, "downsample": 4}},
         "got 6 channels, expected the 4 of the spec's latents"),
        ({"num_classes": 2, "classes": ["a", "b"], "class_counts": [1, 1]}, "classes: expected 3 names"),
        ({"kind": "pixels", "channels": 3, "autoencoder": None}, "spec.json is of pixels, expected one of latents"),
    ],
)  # fmt: skip
def test_a_spec_that_is_not_of_the_weights_latents_is_refused(lightning, tmp_path, capsys, change, message):
    (tmp_path / "spec.json").write_text(dataclasses.replace(lightning[1], **change).to_json())
    options = ["--out", str(tmp_path / "out"), "--spec", str(tmp_path / "spec.json")]
    assert main([str(tmp_path / "lightning.pt"), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_spec_beside_a_checkpoint_that_has_its_own_is_refused(checkpoints, lightning, tmp_path, capsys):
    (tmp_path / "spec.json").write_text(lightning[1].to_json())
    assert main([str(checkpoints), "--out", str(tmp_path / "out"), "--spec", str(tmp_path / "spec.json")]) == 2
    assert "leave out --spec, which is for released weights" in capsys.readouterr().err


def test_the_card_of_a_network_that_was_trained_with_a_shift_says_so(checkpoints):
    checkpoint = load_checkpoint(str(checkpoints))
    assert "time shift of" not in model_card(checkpoint)
    transport = {**checkpoint.record.transport, "time_shift": "auto", "dims": 4096 * 4}
    shifted = dataclasses.replace(checkpoint, record=dataclasses.replace(checkpoint.record, transport=transport))
    assert "It was trained with a time shift of 2, by which fixed-step solvers" in model_card(shifted)


def test_an_exported_folder_can_be_exported(exported, tmp_path):
    assert main([str(exported / "checkpoint-2"), "--out", str(tmp_path / "again")]) == 0
    first, again = content(exported / "checkpoint-2"), content(tmp_path / "again" / "checkpoint-2")
    for name in ("model.safetensors", "ema.safetensors", "config.json"):
        assert first[name] == again[name]


def test_a_disk_that_is_full_leaves_nothing(checkpoints, tmp_path, capsys):
    """A limit on the size of files stands for the disk: the second file is the first that is over it."""
    size = (checkpoints / "ep0-ba2-rank0.pt").stat().st_size // 20
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        assert main([str(checkpoints), "--out", str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: --out: can't write {tmp_path / 'out' / 'checkpoint-2'}: ")
    assert "\n" not in error
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("nothing.pt", lambda path: None, "no checkpoint here"),
        ("thesis.pt", lambda path: path.write_text("x"), "not a checkpoint"),
        ("other.pt", lambda path: torch.save({"weights": torch.ones(1)}, path), "not a checkpoint of sit_composer's"),
    ],
)
def test_what_is_no_checkpoint_is_named_in_a_line(tmp_path, capsys, name, make, message):
    make(tmp_path / name)
    assert main([str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {tmp_path / name}: ")
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_a_file_is_named(checkpoints, tmp_path, capsys):
    (tmp_path / "out").write_text("x")
    assert main([str(checkpoints), "--out", str(tmp_path / "out")]) == 2
    assert f"--out: can't write {tmp_path / 'out' / 'checkpoint-2'}: " in capsys.readouterr().err
