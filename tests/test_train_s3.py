"""A run whose checkpoints go to object storage, a real one on loopback, resumed twice from there."""

import re

import pytest
import torch
from composer.callbacks import CheckpointSaver

from tests.test_to_mds import s3  # noqa: F401 - a fixture
from tests.test_train import bits, differences, run  # noqa: F401 - a fixture


@pytest.mark.slow
def test_each_resume_from_s3_goes_on_from_the_newest_checkpoint(run, s3, tmp_path, monkeypatch):  # noqa: F811
    """Composer keeps what it downloaded for the first resume, and would take it for the newest at the second."""
    monkeypatch.chdir(tmp_path)
    original = CheckpointSaver.__init__

    def quicker(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self._symlink_upload_wait_before_next_try_in_seconds = 1  # of 30

    monkeypatch.setattr(CheckpointSaver, "__init__", quicker)
    remote = ["trainer.save_folder=s3://sit/runs/{run_name}", "trainer.save_interval=2ba"]
    assert run("trainer.max_duration=6ba", folder="whole") == 0
    for batches in (2, 4, 6):
        log = tmp_path / f"{batches}.log"
        logger = f"loggers={{file: {{filename: '{log}'}}}}"
        assert run(f"trainer.max_duration={batches}ba", *remote, logger) == 0
        trained = [int(number) for number in re.findall(r"time/batch: (\d+)", log.read_text())]
        assert min(trained) == batches - 2  # from the newest; an older one would lead to the same bits, but later
    names = {key.rpartition("/")[2] for key in s3.keys("runs/quickstart")}
    assert {"config.yaml", "ep0-ba2-rank0.pt", "ep0-ba4-rank0.pt", "ep0-ba6-rank0.pt"} <= names
    last = tmp_path / "last"
    last.mkdir()
    body = s3.client.get_object(Bucket="sit", Key="runs/quickstart/ep0-ba6-rank0.pt")["Body"].read()
    (last / "latest-rank0.pt").write_bytes(body)
    assert torch.load(last / "latest-rank0.pt", weights_only=False)["state"]["timestamp"]["Timestamp"]["batch"] == 6
    assert differences(bits(tmp_path / "whole"), bits(last)) == []
