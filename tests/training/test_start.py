"""Runs that start from weights, and runs of which weights are frozen: `init_from` and `freeze`."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from sit_composer import export
from sit_composer.checkpoint.load import load_checkpoint
from sit_composer.storage import open_store
from sit_composer.training import start
from sit_composer.training.dry_run import run as dry_run
from tests.helpers.digits import DIGITS, digit, write
from tests.helpers.images import png
from tests.helpers.paths import ROOT
from tests.helpers.runs import COMPOSER, QUICKSTART, TINY, bits, differences, runner, state_of

TABLE = "y_embedder.embedding_table.weight"
STILL = ["optimizer.lr=1e-30", "trainer.max_duration=1ba"]  # a step that leaves the weights as they are


def write_classes(folder: Path, names: list[str], count: int = 128) -> Path:
    """Shards of ``count`` digits, with these names in the place of 0, 1, ..."""
    indices = [i for i, label in enumerate(DIGITS.target) if label < len(names)][:count]
    rows = [{"image": png(digit(i)), "label": int(DIGITS.target[i])} for i in indices]
    spec = {"num_classes": len(names), "classes": names, "class_counts": [0] * len(names)}
    return write(folder, {"image": "bytes", "label": "int"}, rows, {"kind": "pixels", "channels": 1, **spec})


@pytest.fixture(scope="module")
def before(digits_shards, tmp_path_factory) -> Path:
    """A run of ten classes, whose average is another than its weights."""
    top = tmp_path_factory.mktemp("before")
    assert runner(digits_shards, top)("trainer.max_duration=10ba", "optimizer.lr=0.01", "ema.decay=0.5") == 0
    return top / "run"


@pytest.mark.parametrize("weights", ["ema", "training"])
def test_a_run_starts_from_weights_and_so_do_its_averages(run, before, tmp_path, weights, capsys):
    start_from = [f"init_from={before}", f"init_weights={weights}", "ema.decays=[0.5]"]
    assert run(*start_from, *STILL) == 0
    expected = load_checkpoint(str(before), weights).weights
    held = load_checkpoint(str(tmp_path / "run"), "training").record.averages
    assert held == ["0.99", "0.5"]
    for kind in ("training", *(f"ema:{name}" for name in held)):
        got = load_checkpoint(str(tmp_path / "run"), kind).weights
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-20, msg=f"{kind} {name}")
    (optimizer,) = state_of(tmp_path / "run")["optimizers"].values()
    assert {float(one["step"]) for one in optimizer["state"].values()} == {1}
    out = capsys.readouterr().out
    assert f"start:       from the {weights} weights of {before}" in out
    assert re.search(rf"weights:     {weights} of \S+ep0-ba10-rank0.pt, 10 batches; the optimizer starts anew", out)
    assert "classes:     10 of 10 keep their rows, by name; the null class is kept" in out


def test_other_classes_and_another_resolution_start_from_it(before, tmp_path, capsys):
    shards = write_classes(tmp_path / "shards", ["9", "yak", "1"])
    sizes = ["model.num_classes=3", "model.input_size=16", "data.image_size=16"]
    assert runner(shards, tmp_path)(f"init_from={before}", *sizes, *STILL) == 0
    got, old = (load_checkpoint(str(place)).weights for place in (tmp_path / "run", before))
    torch.testing.assert_close(got[TABLE][[0, 2, 3]], old[TABLE][[9, 1, 10]], rtol=0, atol=1e-20)
    assert (got[TABLE][1] - old[TABLE]).abs().amax(1).min() > 0.01  # none of them
    assert torch.equal(got["pos_embed"].unflatten(1, (8, 8))[:, ::2, ::2].flatten(1, 2), old["pos_embed"])
    out = capsys.readouterr().out
    assert "classes:     2 of 3 keep their rows, by name; new: yak; the null class is kept" in out
    assert "positions:   4x4 tokens become 8x8, interpolated between the positions of before" in out


@pytest.fixture(scope="module")
def exported(before, tmp_path_factory) -> Path:
    """The folder that is exported of that run."""
    top = tmp_path_factory.mktemp("export")
    assert export.main([str(before), "--out", str(top)]) == 0
    (folder,) = top.iterdir()
    return folder


@pytest.mark.parametrize(
    "place", ["folder", "hub", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("s3", "an export in s3"))]
)
def test_a_run_starts_from_an_export_from_the_hub_and_from_a_bucket(
    run, before, exported, tmp_path, monkeypatch, request, place, capsys
):
    name = str(exported)
    if place == "hub":  # from its cache, laid out as huggingface_hub does, so that no network is needed
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        name, cached, commit = "someone/sit", tmp_path / "cache" / "models--someone--sit", "0" * 40
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(commit)
        shutil.copytree(exported, cached / "snapshots" / commit)
    elif place != "folder":
        request.getfixturevalue("s3")
        name = "s3://sit/start"
        for file in (exported if place == "an export in s3" else before).iterdir():
            if file.is_file() and not file.is_symlink():
                open_store(name).upload(file, file.name)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert run(f"init_from={name}", *STILL) == 0
    got = load_checkpoint(str(tmp_path / "run")).weights
    torch.testing.assert_close(got, load_checkpoint(str(before)).weights, rtol=0, atol=1e-20)
    assert f"from the ema weights of {name}" in capsys.readouterr().out
    assert list((tmp_path / "temporary").glob("sit_composer-checkpoint-*")) == []  # no copy stays


def test_a_hubs_name_that_is_not_there_is_told_before_anything_is_trained(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert run("init_from=someone/else", *STILL) == 2
    told = "error: init_from: someone/else: no such folder, and not from the Hub either: "
    assert told in capsys.readouterr().err


def test_a_resumed_run_does_not_load_them_again_and_has_the_same_bits(before, tmp_path, monkeypatch, capsys):
    shards, copy = write_classes(tmp_path / "shards", ["9", "yak", "1"]), tmp_path / "copy"
    shutil.copytree(before, copy, symlinks=True)
    run = runner(shards, tmp_path)
    options = [
        f"init_from={copy}",
        "model.num_classes=3",
        "model.input_size=16",
        "data.image_size=16",
        "data.flip=true",
    ]
    assert run(*options, "trainer.max_duration=5ba", folder="whole") == 0
    assert run(*options, "trainer.max_duration=3ba") == 0
    shutil.rmtree(copy)  # nothing reads it any more
    monkeypatch.setattr(start, "load_checkpoint", None)
    capsys.readouterr()
    assert run(*options, "trainer.max_duration=5ba") == 0
    out = capsys.readouterr().out
    assert f"from the ema weights of {copy}, which are not read again" in out
    assert "classes:" not in out
    assert differences(bits(tmp_path / "whole"), bits(tmp_path / "run")) == []
    assert run("trainer.max_duration=6ba", *options[1:]) == 2
    error = capsys.readouterr().err
    assert f"error: init_from: got None, expected {copy}, the value of the run in {tmp_path}/run" in error
    for other in ("init_weights=training", "freeze=[t_embedder.*]"):
        assert run("trainer.max_duration=6ba", *options, other) == 2
        assert f"error: {other.partition('=')[0]}: got " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init_from=nowhere"], "init_from: no checkpoint in 'nowhere'"),
        (["init_from={before}", "model.depth=2"], "init_from: model.depth: got 2, expected 1 as in {before}"),
        (["init_from={before}", "init_weights=ema:0.7"], "no average 0.7, expected one of its weights"),
        (["init_weights=training"], "init_weights: needs init_from"),
        (["init_from={before}", "init_weights=best"], "init_weights: got 'best', expected ema, training"),
        (["init_from={before}", "trainer.load_path=a.pt"], "trainer.load_path: has no place beside init_from"),
        (["freeze=[block.*]"], "freeze: block.* matches no weight of the network, expected a pattern such as blocks.*"),
    ],
)
def test_what_cannot_be_started_from_is_refused_in_one_line(run, before, tmp_path, capsys, overrides, message):
    assert run(*(text.format(before=before) for text in overrides), "trainer.max_duration=1ba") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message.format(before=before) in last
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_file_that_would_run_code_is_refused(run, tmp_path, capsys):
    class Planted:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "planted"),))

    torch.save({"ema": {"x_embedder.proj.weight": Planted()}}, tmp_path / "planted.pt")
    assert run(f"init_from={tmp_path}/planted.pt", *STILL) == 2
    assert "without running code in it" in capsys.readouterr().err
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_weights_keep_their_bits_and_have_no_state(run, before, tmp_path, optimizer):
    options = [f"init_from={before}", f"optimizer.name={optimizer}", "freeze=['t_embedder.*', blocks.0.attn.*]"]
    assert run(*options, "trainer.max_duration=4ba") == 0
    old = load_checkpoint(str(before)).weights
    state = state_of(tmp_path / "run")
    (held,) = state["optimizers"].values()
    averaged = {name.removeprefix("network.") for name in state["callbacks"]["EMAWeights"]["params"]}
    for kind in ("training", "ema"):
        got = load_checkpoint(str(tmp_path / "run"), kind).weights
        same = {name for name in old if torch.equal(old[name], got[name])}
        frozen = {name for name in old if name.startswith(("t_embedder.", "blocks.0.attn."))}
        assert same == frozen | {"pos_embed"}
    assert averaged == old.keys() - same
    assert {name.removeprefix("network.") for name in held["state"]} == averaged


def test_a_dry_run_tells_the_start_and_what_is_frozen(before, digits_shards, tmp_path, capsys):
    from sit_composer.config.load import load_config

    own = [*TINY, f"data.local={digits_shards}", f"trainer.save_folder={tmp_path}/run", "callbacks={}", "scheduler={}"]
    for frozen in ("[]", "[blocks.*]"):
        config = load_config(QUICKSTART, [*own, f"init_from={before}", f"freeze={frozen}"])
        assert dry_run(config) == 0
        out = capsys.readouterr().out
        assert re.search(r"init_from +ok: weights: ema of \S+, 10 batches; the optimizer starts anew; classes: 10", out)
        assert (", of which 0.0 M are frozen" in out) == (frozen != "[]")
    config = load_config(QUICKSTART, [*own, f"init_from={before}", "model.depth=2"])
    assert dry_run(config) == 2
    assert "failed: init_from: model.depth: got 2, expected 1" in capsys.readouterr().out


@pytest.fixture(scope="module")
def ranks(before, tmp_path_factory) -> Path:
    """What two ranks have trained, see `start_ranks`; and what they said."""
    top = tmp_path_factory.mktemp("ranks")
    shards = write_classes(top / "shards", ["9", "yak", "1"])
    command = [COMPOSER, "-n", "2", "-m", "tests.helpers.start_ranks", shards, before, top]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (top / "out").write_text(done.stdout)
    return top


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_several_ranks_start_alike_and_resume_with_frozen_weights(before, ranks, way):
    said = (ranks / "out").read_text().count("2 of 3 keep their rows, by name; new: yak; the null class is kept")
    assert said == 6  # once for each of three runs in two ways
    old = load_checkpoint(str(before)).weights
    rest = {name: tensor for name, tensor in old.items() if name != TABLE}
    frozen = {name for name in rest if name.startswith(("t_embedder.", "blocks.0.attn.", "pos_embed"))}
    for kind in ("training", "ema"):
        first, whole, halves = (
            load_checkpoint(str(ranks / way / name), kind).weights for name in ("still", "whole", "halves")
        )
        torch.testing.assert_close(first[TABLE][[0, 2, 3]], old[TABLE][[9, 1, 10]], rtol=0, atol=1e-20)
        torch.testing.assert_close({name: first[name] for name in rest}, rest, rtol=0, atol=1e-20)
        assert {name for name in rest if torch.equal(whole[name], rest[name])} == frozen
        assert [name for name in whole if not torch.equal(whole[name], halves[name])] == []
