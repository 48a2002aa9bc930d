"""`to_mds.py --engine ray`, on a cluster that is started here: the bytes of one process, though a worker is killed."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.test_conversion import contents

import parts  # isort: skip
import progress  # isort: skip

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
    tmp_path,
    table,
    convert,
    monkeypatch,
    vae_folder,
):
    monkeypatch.setattr(parts, "PART", 25)
    killed = []

    def log(self, event, **details):
        if event == "part" and not killed:
            killed.append(workers()[0])
            os.kill(killed[0], signal.SIGKILL)

    options = ["--latents", "--vae", vae_folder, "--image-size", "16"]
    assert convert(table, "--out", tmp_path / "one", *options, "--workers", 0)[0] == 0
    with monkeypatch.context() as context:
        context.setattr(progress.Progress, "log", log)
        code, _, stderr = convert(table, "--out", tmp_path / "many", *options, "--engine", "ray")
    assert code == 0, stderr
    assert killed
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    deadline = time.monotonic() + 20
    while workers():
        assert time.monotonic() < deadline, "they live on"
        time.sleep(0.1)
    assert sorted(os.listdir(tmp_path)) == ["many", "one"]


def test_a_bad_picture_is_one_line_and_what_is_finished_stays(tmp_path, jpegs, convert, monkeypatch):
    monkeypatch.setattr(parts, "PART", 2)
    root = tmp_path / "pictures" / "a"
    root.mkdir(parents=True)
    for number, data in enumerate([*jpegs, b"broken"]):
        (root / f"{number}.jpg").write_bytes(data)
    code, _, stderr = convert(root.parent, "--out", tmp_path / "out", "--engine", "ray")
    assert code == 2
    assert stderr.splitlines()[-1].startswith(f"error: {root}/6.jpg: not a picture")
    (root / "6.jpg").unlink()
    code, _, stderr = convert(root.parent, "--out", tmp_path / "out", "--engine", "ray", "--skip-bad")
    assert code == 2
    assert f"the source's files have changed: {root} is another" in stderr
