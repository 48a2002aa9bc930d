"""What the code of commit 10cd1a6 wrote, before its reorganisation, is read, continued and resumed to the same bits.

tests/reference/earlier/make.py says what there is. Only commands and the documented `load_checkpoint` are used here.
One process runs all commands, as importing Composer takes longer than they do:

    python -m tests.test_earlier_versions COMMANDS RESULTS

COMMANDS is JSON, name -> [program, arguments], and so is RESULTS, name -> exit code, output and losses.
"""

import hashlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torchvision.io import encode_png, read_image

from tests.reference.earlier import common

ROOT = Path(__file__).parent.parent
EARLIER = ROOT / "tests" / "reference" / "earlier"
QUICKSTART = str(ROOT / "yamls" / "quickstart.yaml")
COMPOSER = Path(sys.executable).with_name("composer")
RANKS = "tests.helpers.ranks" if (ROOT / "tests" / "helpers" / "ranks.py").exists() else "tests.ranks"
TORCH = "2.7.0"  # which wrote the fixtures
CHECKPOINT = "run/ep1-ba8-rank0.pt"
COMMANDS = {
    "pixels": ["convert/to_mds.py", [*common.PIXELS, "--out", "shards"]],
    "latents": ["convert/to_mds.py", [*common.LATENTS, "--out", "latents"]],
    "encoded": ["convert/to_mds.py", [*common.LATENTS, "--out", "encoded"]],
    "conversion": ["convert/to_mds.py", [*common.CONVERSION, "--out", "conversion/shards"]],
    "verify pixels": ["convert/verify_mds.py", ["shards", "--source"]],
    "verify latents": ["convert/verify_mds.py", ["latents"]],
    "sample": ["sit_composer.sample", [CHECKPOINT, *common.SAMPLING, "--out", "samples"]],
    "export": ["sit_composer.export", [CHECKPOINT, "--out", "export", "--hub"]],
    "export anew": ["sit_composer.export", [CHECKPOINT, "--out", "exported", "--hub"]],
    "resume": ["train", [QUICKSTART, *common.training("run", 12, 12)]],
    "golden": ["train", [QUICKSTART, *common.training("golden", 20, 20)]],
    "train on latents": ["train", [QUICKSTART, *common.training("latent", 4, 4, common.LATENT_TRAINING)]],
}


# --- The process that runs the commands ---


def call(program: str, arguments: list[str]) -> Any:
    """The exit code of a command; of a training, the losses."""
    if program == "train":
        return common.train(arguments)
    if not program.endswith(".py"):
        return import_module(program).main(arguments)
    path = str(ROOT / program)
    with patch.object(sys, "argv", [path, *arguments]), patch.object(sys, "path", [os.path.dirname(path), *sys.path]):
        runpy.run_path(path, run_name="__main__")


def perform(program: str, arguments: list[str]) -> dict[str, Any]:
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        try:
            value = call(program, arguments)
        except SystemExit as end:
            value = end.code
        except Exception as error:
            value = repr(error)
    losses = value if isinstance(value, list) else None
    return {"code": 0 if losses else value or 0, "losses": losses, "out": out.getvalue()}


# --- The tests ---


def copied(place: Path) -> Path:
    shutil.copytree(EARLIER, place, symlinks=True, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    common.settle(place)
    return place


def launch(place: Path, *command: Any) -> None:
    environment = {**os.environ, **common.ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((EARLIER / "expected.json").read_text())


@pytest.fixture(scope="module")
def same_processor(expected) -> bool:
    """Whether bits must be the same: on another processor or torch they may not be, for all that ENVIRONMENT asks."""
    return common.processor() == expected["processor"] and version("torch").partition("+")[0] == TORCH


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Path:
    """A copy of what was written."""
    return copied(tmp_path_factory.mktemp("before") / "earlier")


@pytest.fixture(scope="module")
def after(tmp_path_factory) -> Path:
    """Another, on which the commands were run."""
    place = copied(tmp_path_factory.mktemp("after") / "earlier")
    commands, results = place.parent / "commands.json", place.parent / "results.json"
    commands.write_text(json.dumps(COMMANDS))
    launch(place, sys.executable, "-m", "tests.test_earlier_versions", commands, results)
    return place


@pytest.fixture(scope="module")
def result(after):
    """What a command of that name said, and its losses if it trained; it must have ended well."""
    results = json.loads((after.parent / "results.json").read_text())

    def result(name: str) -> dict[str, Any]:
        assert results[name]["code"] == 0, f"{results[name]['code']}\n{results[name]['out']}"
        return results[name]

    return result


def check_close(found: dict[str, Any], known: dict[str, Any], atol: float) -> None:
    """Also where kernels or ranks differ. Of a key's bias the gradient is rounding alone, which Adam scales."""
    import torch

    assert found.keys() == known.keys()
    for name, tensor in known.items():
        bound = max(atol, 1e-3) if atol and name.endswith("qkv.bias") else atol
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=bound, msg=name)


def check_trained(place: Path, hashes: dict[str, str], same_processor: bool) -> None:
    """Weights, average and optimizer are those of a training that wasn't interrupted."""
    from safetensors.torch import load_file

    found, whole = common.trained(place), load_file(EARLIER / "whole.safetensors")
    for kind in ("training", "ema"):
        known = {name.removeprefix(f"{kind}."): tensor for name, tensor in whole.items() if name.startswith(kind)}
        check_close(found[kind], known, 1e-5)
    if same_processor:
        assert {kind: common.bits(tensors) for kind, tensors in found.items()} == hashes


def check_same_weights(place: Path, other: Path, which: str, atol: float = 0) -> None:
    one, two = (common.load_checkpoint(folder, which) for folder in (place, other))
    assert one.step == two.step == 8
    assert one.record == two.record
    check_close(two.weights, one.weights, atol)


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_a_finished_conversion_is_known_as_done(result, kind):
    assert "already converted" in result(kind)["out"]


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_shards_are_sound(result, kind):
    result(f"verify {kind}")


def test_the_same_latents_are_made_again(result, after, before, same_processor):
    result("encoded")
    made, known = common.hashes(after / "encoded"), common.hashes(before / "latents")
    assert made.keys() == known.keys()
    assert made["spec.json"] == known["spec.json"]
    if same_processor:
        assert made == known


def test_a_killed_conversion_goes_on_to_the_same_bytes(result, before, after, expected):
    finished = len(list((before / "conversion" / "shards.partial").glob("part.*.json")))
    assert f"{finished} of 3 parts" in result("conversion")["out"]
    assert common.hashes(after / "conversion" / "shards") == expected["converted"]
    assert not (after / "conversion" / "shards.partial").exists()


def test_an_interrupted_run_resumes_to_the_bits_of_one_that_was_not(result, after, expected, same_processor):
    losses = result("resume")["losses"]
    assert losses == pytest.approx(expected["losses"][8:12], rel=1e-6)
    check_trained(after / "run" / "ep2-ba12-rank0.pt", expected["whole"], same_processor)


@pytest.mark.parametrize(("name", "key"), [("golden", "losses"), ("train on latents", "latent_losses")])
def test_a_new_training_has_the_losses_of_the_earlier_code(result, expected, name, key):
    assert result(name)["losses"] == pytest.approx(expected[key], rel=1e-6)


def test_the_import_that_the_earlier_readme_names_still_works():
    assert callable(import_module("sit_composer.checkpoint").load_checkpoint)


@pytest.mark.parametrize("which", ["training", "ema"])
def test_a_sharded_checkpoint_is_read_and_is_that_of_the_same_training(before, which):
    check_same_weights(before / CHECKPOINT, before / "sharded", which, atol=1e-6)


@pytest.mark.slow
def test_two_sharded_ranks_resume_to_the_bits_of_a_run_that_was_not_interrupted(tmp_path, expected, same_processor):
    place = copied(tmp_path / "earlier")
    launch(place, COMPOSER, "-n", "2", "-m", RANKS, QUICKSTART, "fsdp={}", *common.training("sharded", 12, 12))
    check_trained(place / "sharded" / "ep2-ba12", expected["sharded"], same_processor)


@pytest.mark.parametrize("which", ["training", "ema"])
def test_an_export_holds_the_weights_of_its_run(before, which):
    check_same_weights(before / CHECKPOINT, before / "export" / "checkpoint-8", which)


def test_a_hub_export_holds_the_average_of_its_run(before):
    check_same_weights(before / CHECKPOINT, before / "export" / "hub-8", "ema")


def test_an_earlier_export_is_known_and_a_new_one_is_the_same(result, before, after):
    assert result("export")["out"].count("already exported") == 2
    result("export anew")
    for folder in ("checkpoint-8", "hub-8"):
        made, known = (common.hashes(place / folder) for place in (after / "exported", before / "export"))
        assert made.keys() == known.keys()
        for name in ("config.json", *(name for name in known if name.endswith(".safetensors"))):
            assert made.get(name) == known.get(name), name


def test_interrupted_sampling_draws_the_pictures_that_are_missing(result, before, after, expected, same_processor):
    result("sample")
    drawn, there = common.hashes(after / "samples", "*.png"), common.hashes(before / "samples", "*.png")
    assert len(there) == 4
    assert drawn.keys() == expected["pictures"].keys()
    assert there.items() <= drawn.items()
    if same_processor:  # the pixels are the same; torchvision wrote the files then, Pillow does now
        files = {
            name: bytes(encode_png(read_image(str(after / "samples" / name))).numpy())
            for name in drawn
            if name != "grid.png"
        }
        found = {name: hashlib.sha256(file).hexdigest() for name, file in files.items()}
        assert found.items() <= expected["pictures"].items()
        assert len(found) == 8


if __name__ == "__main__":
    found = {name: perform(*command) for name, command in json.loads(Path(sys.argv[1]).read_text()).items()}
    Path(sys.argv[2]).write_text(json.dumps(found))
