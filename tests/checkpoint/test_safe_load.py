"""Planted pickles, by the ways that Composer and torch would take to them."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import default_planner, filesystem
from torch.distributed.checkpoint.api import CheckpointException

from sit_composer.checkpoint import sharded
from sit_composer.checkpoint.safe_load import CheckpointError, load_file
from sit_composer.checkpoint.sharded import load_sharded
from sit_composer.supervision.loading import guard_composer


class Planted:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def guarded(monkeypatch):
    monkeypatch.setattr(default_planner.DefaultLoadPlanner, "load_bytes", default_planner.DefaultLoadPlanner.load_bytes)
    monkeypatch.setattr(filesystem.FileSystemReader, "read_metadata", filesystem.FileSystemReader.read_metadata)
    guard_composer()


def test_values_and_tensors_come_back(tmp_path):
    content = {"a": torch.arange(6.0).reshape(2, 3), "b": {"c": [1, "two"]}}
    dcp.save(dict(content), storage_writer=dcp.FileSystemWriter(tmp_path / "x"), no_dist=True)
    got = load_sharded(tmp_path / "x", lambda name: True)
    assert torch.equal(got["a"], content["a"])
    assert got["b.c"] == [1, "two"]
    assert load_sharded(tmp_path / "x", lambda name: name == "a").keys() == {"a"}


def test_what_only_some_releases_of_torch_write_may_be_missing_and_no_more(tmp_path):
    """A scheduler's flags, which checkpoints of torch 2.7 and of 2.14 lack in turn."""
    scheduler = {"last_epoch": 4, "_last_lr": [0.1]}
    written = {"state": {"schedulers": {"LambdaLR": scheduler}}}
    dcp.save(written, storage_writer=dcp.FileSystemWriter(tmp_path / "x"), no_dist=True)

    def load(**entries):
        wanted = {"state": {"schedulers": {"LambdaLR": {"last_epoch": 0, "_last_lr": [0.0], **entries}}}}
        reader = dcp.FileSystemReader(tmp_path / "x")
        dcp.load(wanted, storage_reader=reader, planner=sharded.SafePlanner(), no_dist=True)
        return wanted["state"]["schedulers"]["LambdaLR"]

    for flag in ("_is_initial", "_get_lr_called_within_step"):
        assert load(**{flag: False}) == {**scheduler, flag: False}
    with pytest.raises(CheckpointException, match="_step_count"):
        load(_step_count=1)


def test_a_planted_file_is_refused(tmp_path):
    torch.save({"x": Planted(tmp_path / "ran")}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="without running code in it"):
        load_file(tmp_path / "file.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("reader", [sharded.SafeReader, filesystem.FileSystemReader])
def test_a_planted_metadata_is_refused_by_torchs_own_reader_too(tmp_path, guarded, reader):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="it asks for"):
        reader(tmp_path).read_metadata()
    assert not (tmp_path / "ran").exists()


def test_a_planted_value_is_refused_by_torchs_own_planner_too(tmp_path, guarded):
    dcp.save({"a": Planted(tmp_path / "ran")}, storage_writer=dcp.FileSystemWriter(tmp_path / "x"), no_dist=True)
    for planner in (sharded.SafePlanner(), default_planner.DefaultLoadPlanner(allow_partial_load=True), None):
        with pytest.raises(CheckpointException, match="without running code in it"):
            dcp.load({"a": None}, storage_reader=dcp.FileSystemReader(tmp_path / "x"), planner=planner, no_dist=True)
    assert not (tmp_path / "ran").exists()
