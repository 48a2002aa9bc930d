"""Runs, conversions and images whose files are in a real Azure Blob Storage on loopback, through faults and kills."""

import os
import re
import signal
import subprocess
import threading
import time

import pytest

from sit_composer import clouds, sample
from sit_composer.checkpoint.folder import fetch_checkpoint, newest
from sit_composer.checkpoint.load import load_checkpoint
from sit_composer.data.stream import DataError, load_spec
from sit_composer.storage import StorageError, open_store
from tests.helpers.azurite import ACCOUNT, KEY, Azurite
from tests.helpers.digits import LOADERS, SAMPLES, gather, loader, write_digits
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.paths import ROOT
from tests.helpers.runs import COMPOSER, QUICKSTART, TINY, bits, differences

from convert import verify_mds  # isort: skip

pytestmark = pytest.mark.slow
pytest.importorskip("obstore", reason="the extra clouds is not installed")
FOLDER, SHARDS = "az://box/runs/quickstart", "abfs://box/digits"
AZURE = [
    "trainer.save_folder=az://box/runs/{run_name}",
    "trainer.save_interval=2ba",
    "data.flip=true",
    "supervision.heartbeat=1",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    try:
        server = Azurite(tmp_path_factory.mktemp("azurite"))
    except RuntimeError as reason:
        pytest.skip(str(reason))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def azure(server, monkeypatch) -> Azurite:
    """Azurite with the empty container "box", as the environment says."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", server.url)
    folder = open_store("az://box")
    folder.delete(list(folder.listing()))
    return server


@pytest.fixture
def proxy(azure, monkeypatch):
    """A proxy in front of it; clients of this process wait for only half a second."""
    monkeypatch.setattr(clouds, "READ_TIMEOUT", 0.5)
    with FaultProxy(azure.url) as proxy:
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"{proxy.url}/{ACCOUNT}")
        yield proxy


def batch_of(name: str | None) -> int:
    return int(re.search(r"-ba(\d+)", name)[1]) if name else 0


def test_a_run_that_is_killed_resumes_to_the_bit_and_keeps_a_second_one_out(run, azure, convert, tmp_path, capsys):
    folder = open_store(FOLDER)
    code, _, stderr = convert("digits", "--out", SHARDS, "--workers", 0)
    assert code == 0, stderr
    assert verify_mds.main([SHARDS]) == 0
    data = [f"data.remote={SHARDS}", f"data.local={tmp_path / 'cache'}", "data.num_workers=2"]
    options = [*TINY, *data, *AZURE, "trainer.save_num_checkpoints_to_keep=2", "scheduler={constant: {}}"]
    options += ["trainer.progress_bar=false", "trainer.max_duration=4000ba"]
    assert run("trainer.max_duration=2ba", *AZURE) == 0  # so that this process has imported all before the other runs
    command = [COMPOSER, "-n", "1", "sit_composer/train.py", QUICKSTART, *options]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while batch_of(newest(folder)) < 4:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        capsys.readouterr()
        assert run("trainer.max_duration=4000ba", *AZURE) == 2
        assert f"error: trainer.save_folder: {FOLDER}: a run of this name is alive on" in capsys.readouterr().err
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    time.sleep(2)  # a request that was under way at the kill may still be done
    last = batch_of(newest(folder)) + 2
    assert run(f"trainer.max_duration={last}ba", *AZURE, "trainer.save_num_checkpoints_to_keep=2") == 0
    assert f"resumes at batch {last - 2:,} of {last:,} from ep" in capsys.readouterr().out
    name = newest(folder)
    assert batch_of(name) == last
    assert len(folder.listing()) == 4  # two checkpoints, config.yaml and metrics.jsonl; the lease was released
    assert run(f"trainer.max_duration={last}ba", "data.flip=true", folder="whole") == 0
    fetch_checkpoint(folder, name, tmp_path / "fetched")
    (tmp_path / "fetched" / "latest-rank0.pt").symlink_to(name)
    assert differences(bits(tmp_path / "whole"), bits(tmp_path / "fetched")) == []
    assert load_checkpoint(FOLDER).source == FOLDER
    sampling = ["--classes", "7", "--per-class", "1", "--num-steps", "2", "--sampling-method", "euler"]
    assert sample.main([f"{FOLDER}/{name}", "--out", str(tmp_path / "images"), *sampling]) == 0
    assert (tmp_path / "images" / "000000.png").exists()


def test_of_writers_that_race_one_wins_each_time(azure):
    folders = [open_store("az://box/race") for _ in range(8)]
    before = None
    for turn in range(5):
        won, contents = [], [f"{turn} {i}".encode() for i in range(8)]

        def write(folder, content, before=before, won=won):
            if folder.replace("lease", before, content):
                won.append(content)

        threads = [threading.Thread(target=write, args=pair) for pair in zip(folders, contents, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        before = folders[0].read("lease")
        assert won == [before]


@pytest.mark.parametrize("kind", ["503", "cut", "stall"])
def test_a_request_that_fails_for_a_while_is_made_again_and_one_that_fails_for_good_is_one_line(
    proxy, tmp_path, monkeypatch, kind
):
    file, back, content = tmp_path / "file", tmp_path / "back", bytes(range(256)) * 36_000  # 9.2 MB: in two parts
    file.write_bytes(content)
    folder = open_store("az://box/f")
    folder.upload(file, "large")
    operations = {
        "restype=container&comp=list": lambda: folder.listing()["large"] == len(content),
        "PUT .*/f/new": lambda: folder.write("new", b"n" * 5000) or True,
        "GET .*/f/new": lambda: folder.read("new") == b"n" * 5000,
        "PUT .*/f/up": lambda: folder.upload(file, "up") or folder.listing()["up"] == len(content),
        "GET .*/f/large": lambda: folder.download("large", back) or back.read_bytes() == content,
        "comp=batch": lambda: folder.delete(["up"]) or "up" not in folder.listing(),
    }
    for pattern, works in operations.items():
        fault = proxy.fault(kind, pattern, times=2, seconds=2)
        assert works(), pattern
        assert fault.met == 2, pattern
        proxy.heal()
    monkeypatch.setattr(clouds, "ATTEMPTS", 2)
    folder = open_store("az://box/f")
    folder.delete(["new"])
    for pattern, works in operations.items():
        proxy.fault(kind, pattern)
        before = time.monotonic()
        with pytest.raises(StorageError, match=rf"^{folder.uri}(/\w+)?: [^\n]+$"):
            works()
        assert time.monotonic() - before < 20, pattern
        proxy.heal()
        if pattern == "PUT .*/f/new":
            folder.write("new", b"n" * 5000)
    assert "up" not in folder.listing()  # nothing appears in part


def test_a_condition_whose_answer_is_lost_is_no_refusal(proxy):
    folder = open_store("az://box/lost")
    for before, content in ((None, b"1"), (b"1", b"2"), (b"2", None)):
        fault = proxy.fault("lost", "PUT .*file", times=1)
        assert folder.replace("file", before, content)
        assert fault.met == 1
        assert folder.read("file") == content


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_through_faults_has_every_sample_and_a_missing_shard_is_one_line(proxy, tmp_path, workers):
    folder = open_store("az://box/set")
    for file in write_digits(tmp_path / "source").iterdir():
        folder.upload(file, file.name)
    met = [proxy.fault(kind, f"GET .*shard.0000{i}.mds", times=2) for i, kind in enumerate(("503", "cut"))]
    batches = loader(folder.uri, tmp_path / "cache", download_retry=14, num_workers=workers)
    assert sorted(gather(batches)["index"].tolist()) == list(range(SAMPLES))
    assert [fault.met for fault in met] == [2, 2]
    folder.delete(["shard.00003.mds"])
    with pytest.raises(DataError, match=rf"^{folder.uri}/shard.00003.mds: can't be read: [^\n]+no such object"):
        gather(loader(folder.uri, tmp_path / "cache2", download_retry=14, num_workers=workers))
    while LOADERS:
        LOADERS.pop().__del__()


def test_a_wrong_key_and_a_missing_container_are_one_line_each(azure, monkeypatch, run, capsys):
    assert run("trainer.max_duration=2ba", "trainer.save_folder=az://none/run") == 2
    told = "az://none/run/alive.json: The specified container does not exist (404 ContainerNotFound)"
    assert f"trainer.save_folder: {told}" in capsys.readouterr().err
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc=")
    for ask in (lambda: open_store("az://box/x").listing(), lambda: load_spec("az://box/x", "")):
        with pytest.raises(
            ValueError, match=r"^az://box/x[^\n]*403 [^\n]*AZURE_STORAGE_ACCOUNT_NAME, and [^\n]+$"
        ) as error:
            ask()
        assert "d3Jvbmc" not in str(error.value)
