"""A run whose checkpoints go to a real object store on loopback."""

import tempfile

import pytest

from sit_composer.callbacks.run_record import RunRecord
from sit_composer.checkpoint import metrics
from sit_composer.checkpoint.folder import newest
from sit_composer.checkpoint.load import load_checkpoint
from sit_composer.storage import LocalFolder, S3Folder
from tests.helpers.runs import FOLDER, REMOTE, bits, differences, fetched

pytestmark = pytest.mark.slow


def test_each_resume_from_s3_goes_on_from_the_newest_checkpoint(run, s3, tmp_path):
    assert run("trainer.max_duration=6ba", "data.flip=true", folder="whole") == 0
    for batches in (2, 4, 6):
        assert run(f"trainer.max_duration={batches}ba", "trainer.save_num_checkpoints_to_keep=2", *REMOTE) == 0
        assert newest(S3Folder(FOLDER)) == f"ep0-ba{batches}-rank0.pt"
    names = set(S3Folder(FOLDER).listing())
    kept = {"ep0-ba4-rank0.pt", "ep0-ba6-rank0.pt"}
    assert names == {"config.yaml", "metrics.jsonl", *kept}  # the oldest is pruned, the lease released
    attempts, rows = metrics.read(S3Folder(FOLDER).read("metrics.jsonl"))
    assert [attempt["start"] for attempt in attempts] == [0, 2, 4]
    expected = metrics.read((tmp_path / "whole" / "metrics.jsonl").read_bytes())[1]
    assert [row["loss/train/total"] for row in rows] == [row["loss/train/total"] for row in expected]
    assert differences(bits(tmp_path / "whole"), fetched(tmp_path)) == []
    # The commands read it from S3.
    here = load_checkpoint(str(tmp_path / "whole"))
    there = load_checkpoint(FOLDER)
    assert (there.step, there.source) == (6, FOLDER)
    assert all(there.weights[name].equal(here.weights[name]) for name in here.weights)
    assert load_checkpoint(f"{FOLDER}/ep0-ba4-rank0.pt").step == 4


def test_what_a_kill_left_in_s3_is_not_resumed_from(run, s3, tmp_path):
    assert run("trainer.max_duration=6ba", "data.flip=true", folder="whole") == 0
    assert run("trainer.max_duration=2ba", *REMOTE) == 0
    folder = S3Folder(FOLDER)
    folder.write("ep0-ba4/__0_0.distcp", b"one shard of several")
    multipart = s3.client.create_multipart_upload(Bucket="sit", Key="runs/quickstart/ep0-ba4-rank0.pt")
    part = {"Bucket": "sit", "Key": multipart["Key"], "UploadId": multipart["UploadId"], "PartNumber": 1}
    s3.client.upload_part(**part, Body=b"0" * 5_000_000)
    assert newest(folder) == "ep0-ba2-rank0.pt"
    assert run("trainer.max_duration=6ba", *REMOTE) == 0
    assert differences(bits(tmp_path / "whole"), fetched(tmp_path)) == []
    assert LocalFolder(str(tmp_path / "fetched")).is_whole("ep0-ba6-rank0.pt")


def test_what_a_kill_left_on_the_disk_is_not_resumed_from(run, s3, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "disk"))
    staging = []

    def look(self, state, logger):
        staging[:] = (tmp_path / "disk").glob("sit_composer-*")

    monkeypatch.setattr(RunRecord, "batch_end", look, raising=False)
    assert run("trainer.max_duration=4ba", "data.flip=true", folder="whole") == 0
    assert run("trainer.max_duration=2ba", *REMOTE) == 0
    for name in ("resume/ep0-ba2-rank0.pt", "rank0/ep0-ba4-rank0.pt"):
        (staging[0] / name).parent.mkdir(parents=True)
        (staging[0] / name).write_bytes(b"stale")
    assert run("trainer.max_duration=4ba", *REMOTE) == 0
    assert differences(bits(tmp_path / "whole"), fetched(tmp_path)) == []
    assert not staging[0].exists()


def test_a_run_of_another_config_is_refused_from_s3_too(run, s3, capsys):
    assert run("trainer.max_duration=2ba", *REMOTE) == 0
    assert run("trainer.max_duration=4ba", *REMOTE, "optimizer.lr=1") == 2
    error = capsys.readouterr().err
    assert "optimizer.lr: got 1.0, expected 0.003" in error
    assert f"the run in {FOLDER}, which this one would resume" in error


@pytest.mark.parametrize("fault", ["bucket", "secret"])
def test_a_store_that_refuses_is_one_line(run, s3, capsys, monkeypatch, fault):
    if fault == "secret":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    uri = "s3://none/run" if fault == "bucket" else "s3://sit/run"
    assert run("trainer.max_duration=2ba", f"trainer.save_folder={uri}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: trainer.save_folder: {uri}")
    assert ("NoSuchBucket" if fault == "bucket" else "SignatureDoesNotMatch") in error
