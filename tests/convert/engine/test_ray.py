"""`to_mds.py --engine ray`, on a cluster that is started here: the bytes of one process, though a worker is killed."""

import os
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.shards import contents

from convert.sources import parts  # isort: skip
from convert.engine import pipeline  # isort: skip
from convert.engine import progress  # isort: skip

pytestmark = pytest.mark.slow


def workers() -> list[int]:
    """The processes of Ray's that convert."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::") and b"MapWorker" in title:
            found.append(int(folder.name))
    return found


def test_a_cluster_gives_the_bytes_of_one_process_though_a_worker_is_killed(
    tmp_path, table, convert, monkeypatch, vae_folder
):
    monkeypatch.setattr(parts, "PART", 25)
    rows = pq.read_table(table)
    images = [b"broken" if row == 580 else image for row, image in enumerate(rows["image"].to_pylist())]
    source = tmp_path / "digits.parquet"
    pq.write_table(pa.table({"image": images, "label": rows["label"]}), source, row_group_size=25)
    options = [source, "--latents", "--vae", vae_folder, "--image-size", "16"]
    assert convert(*options, "--out", tmp_path / "one", "--workers", 0, "--skip-bad")[0] == 0
    code, _, stderr = convert(*options, "--out", tmp_path / "many", "--engine", "ray")
    assert code == 2
    assert stderr.splitlines()[-1].startswith(f"error: {source} row 580: not an image")
    killed = []

    def log(self, event, **details):
        if event == "start":
            assert 0 < details["finished"] < 24
        if event == "part" and not killed:
            killed.append(workers()[0])
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(progress.Progress, "log", log)
    monkeypatch.setattr(pipeline.Output, "begin", forget_half)  # so that there is something to do while one is killed
    code, _, stderr = convert(*options, "--out", tmp_path / "many", "--engine", "ray", "--skip-bad")
    assert code == 0, stderr
    assert killed
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert sorted(os.listdir(tmp_path)) == ["digits.parquet", "many", "one"]
    deadline = time.monotonic() + 20
    while workers():
        assert time.monotonic() < deadline, "they live on"
        time.sleep(0.1)


begin = pipeline.Output.begin


def forget_half(self, plan, overwrite):
    records = begin(self, plan, overwrite)
    return {number: record for number, record in records.items() if number % 2}
