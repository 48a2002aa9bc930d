"""Interrupted and uninterrupted runs, on one rank and on two, replicated and sharded: the same bits."""

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from sit_composer import posthoc_ema
from sit_composer.checkpoint.folder import newest
from sit_composer.checkpoint.load import load_checkpoint
from sit_composer.checkpoint.safe_load import METADATA, load_file
from sit_composer.checkpoint.sharded import load_metadata, load_sharded
from sit_composer.storage import LocalFolder
from tests.helpers.runs import differences, launch, losses

pytestmark = pytest.mark.slow
MOMENTS = {"middle": 4, "epoch": 7, "evaluation": 5}


def interruptions(way: str, moments=tuple(MOMENTS)) -> list[str]:
    stopped = [f"{way}:{moment}:{n}" for moment in moments for n in (MOMENTS[moment], 14)]
    return [f"{way}:whole:14", *stopped]


@pytest.fixture(scope="session")
def one(few_digits, tmp_path_factory) -> Path:
    """The runs of one process, and a run that two processes will resume."""
    top = tmp_path_factory.mktemp("one")
    muon = interruptions("ddp-muon", ["evaluation"])
    launch(1, few_digits, top, *interruptions("ddp"), "ddp:up:4", *muon, "ddp-sra:whole:14")
    return top


@pytest.fixture(scope="session")
def two(few_digits, tmp_path_factory, one) -> Path:
    """The runs of two processes, and a run that one process will resume."""
    top = tmp_path_factory.mktemp("two")
    (top / "ddp").mkdir()
    (one / "ddp" / "up").rename(top / "ddp" / "up")
    launch(
        2,
        few_digits,
        top,
        *interruptions("ddp"),
        *interruptions("fsdp"),
        "fsdp:told:13:told",
        "fsdp:told:14",
        "ddp:up:14",
        "fsdp:down:4",
        "hsdp:whole:14",
    )
    launch(1, few_digits, top, "fsdp:down:14")
    return top


def content(folder: Path) -> dict:
    """Everything in the newest checkpoint, except the list of checkpoints before it."""
    place = folder / newest(LocalFolder(str(folder)))
    if place.is_dir():
        return load_sharded(place, lambda name: "CheckpointSaver" not in name)
    found = load_file(place)
    found["state"]["callbacks"].pop("CheckpointSaver")
    return found


def same_bits(top: Path, way: str, moment: str) -> None:
    whole, stopped = top / way / "whole", top / way / moment
    assert differences(content(whole), content(stopped)) == []
    assert repr(losses(whole, 14)) == repr(losses(stopped, MOMENTS[moment], 14))  # NaN differs from itself
    assert len(losses(whole, 14)) == 14


@pytest.mark.parametrize(("way", "moment"), [*(("ddp", moment) for moment in MOMENTS), ("ddp-muon", "evaluation")])
def test_one_process_resumes_to_the_bit(one, way, moment):
    same_bits(one, way, moment)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_ranks_resume_to_the_bit(two, way, moment):
    same_bits(two, way, moment)


def test_two_ranks_resume_to_the_bit_after_a_sigterm_to_one_in_an_evaluation(two):
    whole, told = two / "fsdp" / "whole", two / "fsdp" / "told"
    assert (told / "ep0-ba5" / METADATA).exists()
    assert "metrics/eval/loss" not in Path(f"{told}-13.log").read_text()  # it was interrupted
    assert differences(content(whole), content(told)) == []
    assert losses(whole, 14) == losses(told, 13, 14)
    assert len(losses(told, 14)) == 9


@pytest.mark.parametrize(
    ("ranks", "way"),
    [
        pytest.param(1, "ddp-compiled", marks=pytest.mark.nightly),  # minutes of C++ compiler
        (2, "fsdp-compiled"),
        (2, "fsdp-newer"),
    ],
)
def test_compiled_runs_and_newer_blocks_resume_to_the_bit(few_digits, tmp_path, ranks, way):
    launch(ranks, few_digits, tmp_path, *interruptions(way, ["evaluation"]))
    same_bits(tmp_path, way, "evaluation")


def test_several_averages_resume_to_the_bit_in_shards_and_combine_to_others(few_digits, tmp_path):
    way = "fsdp-averages"
    launch(2, few_digits, tmp_path, *interruptions(way, ["evaluation"]))
    same_bits(tmp_path, way, "evaluation")
    run = tmp_path / way / "evaluation"
    entries = load_metadata((run / "ep1-ba14" / METADATA).read_bytes(), "").state_dict_metadata
    for name in ("0.5", "0.9", "power0.05", "power0.1"):
        prefix = f"state.callbacks.EMAWeights.averages.{name}.network."
        parts = [len(entry.chunks) for entry_name, entry in entries.items() if entry_name.startswith(prefix)]
        assert len(parts) > 20
        assert set(parts) == {2}
    assert posthoc_ema.main([str(run), "--std", "0.1", "--out", str(tmp_path / "made")]) == 0
    made = load_checkpoint(str(tmp_path / "made" / "power0.1-14")).weights
    for name, value in load_checkpoint(str(run), "ema:power0.1").weights.items():
        torch.testing.assert_close(made[name], value, rtol=0, atol=1e-6, msg=name)


def test_muon_trains_alike_on_any_ranks_and_resumes_to_the_bit(few_digits, one, tmp_path):
    launch(2, few_digits, tmp_path, *interruptions("fsdp-muon", ["middle"]), "ddp-muon:whole:14", "hsdp-muon:whole:14")
    same_bits(tmp_path, "fsdp-muon", "middle")
    expected = load_checkpoint(str(one / "ddp-muon" / "whole"), "training").weights
    for way in ("ddp-muon", "fsdp-muon", "hsdp-muon"):
        got = load_checkpoint(str(tmp_path / way / "whole"), "training").weights
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6, msg=f"{way} {name}")


def test_aligned_runs_resume_to_the_bit_and_any_ranks_train_what_one_does(few_digits, one, tmp_path):
    """The teacher of replicated weights is the average itself; sharded, both are exchanged for its pass."""
    ways = ("ddp-sra", "fsdp-sra")
    launch(2, few_digits, tmp_path, *(step for way in ways for step in interruptions(way, ["evaluation"])))
    alone = one / "ddp-sra" / "whole"
    for way in ways:
        same_bits(tmp_path, way, "evaluation")
        assert losses(tmp_path / way / "whole", 14) == pytest.approx(losses(alone, 14), abs=2e-4)
        for weights in ("training", "ema"):
            expected, got = (load_checkpoint(str(run), weights).weights for run in (alone, tmp_path / way / "whole"))
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("weights", ["training", "ema"])
@pytest.mark.parametrize("way", ["ddp/whole", "fsdp/whole", "hsdp/whole", "ddp/up", "fsdp/down"])
def test_any_ranks_train_what_one_process_does(one, two, way, weights):
    """Also after a resume on more or fewer ranks: the same samples, noise and batches follow."""
    expected = load_checkpoint(str(one / "ddp" / "whole"), weights).weights
    got = load_checkpoint(str(two / way), weights).weights
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6, msg=name)
    interrupted = [4, 14] if way in ("ddp/up", "fsdp/down") else [14]
    logged = losses(two / way, *interrupted) if way != "ddp/up" else losses(two / way, 14)
    assert logged == pytest.approx(losses(one / "ddp" / "whole", 14)[-len(logged) :], abs=2e-4)


def test_any_ranks_generate_the_same_grids(one, two):
    for way in ("ddp", "fsdp"):
        for name in ("ba0000005.png", "ba0000010.png"):
            pictures = [Image.open(top / "whole" / "samples" / name).convert("L") for top in (one / "ddp", two / way)]
            assert ImageChops.difference(*pictures).getextrema()[1] <= 1


def test_the_average_is_stored_in_shards_and_apart_from_the_training_weights(two):
    place = two / "fsdp" / "whole" / "ep1-ba14"
    entries = load_metadata((place / METADATA).read_bytes(), "").state_dict_metadata
    average = {name: entry for name, entry in entries.items() if "EMAWeights" in name}
    assert len(average) > 20
    for name, entry in average.items():
        assert len(entry.chunks) == 2, name  # a tensor, a part per rank
    uneven = average["state.callbacks.EMAWeights.params.network.y_embedder.embedding_table.weight"]
    assert [chunk.sizes[0] for chunk in uneven.chunks] == [6, 5]
    weights = [load_checkpoint(str(place), name).weights["final_layer.linear.weight"] for name in ("training", "ema")]
    assert not torch.equal(*weights)


def test_runs_that_skip_or_roll_back_are_alike_on_all_ranks_and_resume_to_the_bit(few_digits, tmp_path):
    """Batches 3 and 10 have an infinite latent on the last rank; the interrupted run resumes between the two."""
    steps = [step for way in ("ddp-skip", "fsdp-rollback") for step in interruptions(way, ["middle"])]
    launch(2, few_digits, tmp_path, *steps, "fsdp-skip:whole:14", "hsdp-skip:whole:14")
    same_bits(tmp_path, "ddp-skip", "middle")
    same_bits(tmp_path, "fsdp-rollback", "middle")
    expected = load_checkpoint(str(tmp_path / "ddp-skip" / "whole"), "training").weights
    for way in ("fsdp-skip", "hsdp-skip"):
        got = load_checkpoint(str(tmp_path / way / "whole"), "training").weights
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6, msg=f"{way} {name}")
    for way, rollbacks in (("fsdp-skip", 0), ("fsdp-rollback", 2)):
        found = content(tmp_path / way / "whole")
        counted = [found[f"state.callbacks.Guard.{name}"] for name in ("skipped", "in_a_row", "rollbacks")]
        assert counted == [2, 0, rollbacks]
