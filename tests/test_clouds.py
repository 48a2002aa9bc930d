"""Folders in Google's and Azure's stores: what they share with folders on disk, and what users get to read.

Here with obstore's store in memory, which has the conditional writes; tests/supervision/test_train_azure.py has a real
Azure Blob Storage.
"""

import os
import threading
import time

import pytest
from huggingface_hub import constants

from sit_composer import clouds, sample, train
from sit_composer.checkpoint.folder import checkpoints, clear_incomplete, fetch_checkpoint, newest, prune
from sit_composer.checkpoint.load import find_checkpoint
from sit_composer.checkpoint.safe_load import CheckpointError
from sit_composer.clouds import CloudFolder
from sit_composer.errors import StorageError
from sit_composer.storage import LocalFolder, open_run_folder, open_store
from sit_composer.supervision.lease import Lease
from tests.helpers.checkpoints import sharded_checkpoint
from tests.helpers.paths import ROOT

obstore = pytest.importorskip("obstore", reason="the extra clouds is not installed")


@pytest.fixture
def memory(monkeypatch):
    """Puts stores in memory in the place of the cloud's; returns them by the names of their buckets."""
    stores = {}

    def connect(folder, patience):
        return stores.setdefault(folder.bucket, obstore.store.MemoryStore())

    monkeypatch.setattr(CloudFolder, "_connect", connect)
    return stores


def test_it_does_what_a_folder_on_disk_does(memory, tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(256)) * 80_000)  # 20 MB: three parts
    seen = {}
    for folder in (LocalFolder(str(tmp_path / "disk")), open_store("az://box/a/run/"), open_store("gs://box")):
        seen[folder.uri] = [
            folder.listing(),
            folder.read("config.yaml"),
            folder.write("config.yaml", b"1"),
            folder.write("config.yaml", b"22"),
            folder.read("config.yaml"),
            folder.replace("lease", None, b"a"),
            folder.replace("lease", None, b"b"),
            folder.replace("lease", b"b", b"c"),
            folder.replace("lease", b"a", b"c"),
            folder.read("lease"),
            folder.replace("lease", b"a", None),
            folder.replace("lease", b"c", None),
            folder.replace("lease", b"c", b"d"),
            folder.listing(),
            folder.delete(["config.yaml", "none"]),
            folder.listing(),
        ]
        assert folder.is_whole("none") == isinstance(folder, CloudFolder)  # where objects appear whole
    expected, *others = seen.values()
    assert others == [expected, expected]
    folder = open_store("az://box/a")
    for size in (0, 1, 20_480_000):
        os.truncate(tmp_path / "file", size) if size < 2 else (tmp_path / "file").write_bytes(b"abcde" * 4_096_000)
        folder.upload(tmp_path / "file", "b/file")
        folder.download("b/file", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes()
        assert folder.listing() == {"b/file": size}
    with pytest.raises(StorageError, match=r"^az://box/a/none: no such object$"):
        folder.download("none", tmp_path / "back")
    assert {entry["path"] for entry in obstore.list(memory["box"]).collect()} == {"a/b/file"}


def test_of_several_runs_that_start_together_one_acquires_the_lease(memory):
    refusals, leases = [], [Lease(open_run_folder("gs://box/run"), 0.2) for _ in range(6)]

    def acquire(lease):
        try:
            lease.acquire()
        except StorageError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=acquire, args=[lease]) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refusals) == 5
    assert all(line.startswith("gs://box/run: a run of this name is alive on ") for line in refusals)
    holder = next(lease for lease in leases if lease._thread.is_alive())
    before = holder._beats
    time.sleep(0.5)
    holder.check()
    assert holder._beats > before
    holder.release()
    assert open_run_folder("gs://box/run").listing() == {}


def test_whole_checkpoints_are_found_kept_and_fetched_and_others_not(memory, tmp_path):
    folder, files = open_store("az://box/run"), sharded_checkpoint(tmp_path)
    for name, content in files.items():
        for batch in (10, 20, 30):
            folder.write(name.replace("ba30", f"ba{batch}"), content)
    folder.write("ep1-ba40/__0_0.distcp", b"its metadata is missing")
    assert (list(checkpoints(folder))[-1], newest(folder)) == ("ep1-ba40", "ep1-ba30")
    clear_incomplete(folder)
    prune(folder, 2)
    assert list(checkpoints(folder)) == ["ep1-ba20", "ep1-ba30"]
    fetch_checkpoint(folder, "ep1-ba30", tmp_path / "fetched")
    assert find_checkpoint("az://box/run/ep1-ba20").name == "ep1-ba20"
    assert all((tmp_path / "fetched" / name).read_bytes() == content for name, content in files.items())


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (
            "hf://someone/model",
            r"hf://: holds no runs and conversions, as the Hugging Face Hub has no conditional writes",
        ),
        ("ftp://server/run", r"ftp://: an unknown object store, expected s3://, gs://, az://, abfs:// or a folder"),
        ("az:///run", r"az://: expected a container's name after it"),
        ("abfs://box@account.dfs.core.windows.net/run", r"abfs://: expected a container's name after it \(AZURE_"),
        ("gs://", r"gs://: expected a bucket's name after it"),
    ],
)
def test_an_address_that_no_run_can_be_saved_to_is_refused_by_name(uri, expected):
    with pytest.raises(StorageError, match=f"^{expected}"):
        open_run_folder(uri)


def test_refusals_come_before_torch_is_loaded_and_name_the_option(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    quickstart = str(ROOT / "yamls" / "quickstart.yaml")
    assert train.main([quickstart, "trainer.save_folder=hf://someone/model"]) == 2
    assert capsys.readouterr().err.startswith("error: trainer.save_folder: hf://: holds no runs")
    monkeypatch.setattr("sit_composer.cli.find_spec", lambda name: None)
    assert train.main([quickstart, "trainer.save_folder=gs://box/run"]) == 2
    told = "error: trainer.save_folder: gs://box: the package obstore is not installed; run pip install -e '.[clouds]'"
    assert capsys.readouterr().err.startswith(told)
    assert sample.main([str(tmp_path), "--out", "az://box/images"]) == 2
    assert "--out: got az://box/images, expected a path on disk" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_does_not_answer_is_one_line_without_its_address_signature(monkeypatch):
    monkeypatch.setattr(clouds, "ATTEMPTS", 1)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=2021&sig=SECRET%2Fsignature")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", "http://127.0.0.1:9/account")
    for ask in (CloudFolder.listing, lambda folder: folder.read("x"), lambda folder: folder.write("x", b"")):
        with pytest.raises(StorageError, match=r"^az://box/run(/x)?: [^\n]*Connection refused\)$") as raised:
            ask(open_store("az://box/run"))
        assert "SECRET" not in str(raised.value)


def test_missing_credentials_are_one_line_that_says_where_they_are_read(monkeypatch, tmp_path):
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        StorageError, match=r"^az://box/run: [^\n]*AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY"
    ):
        open_store("az://box/run")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(
        StorageError, match=r"^gs://box/run: [^\n]*none.json: No such file[^\n]*; credentials are read from"
    ):
        open_store("gs://box/run").listing()


def test_weights_on_the_hub_are_read_and_no_others(monkeypatch, tmp_path):
    """From the Hub's cache, as without a network; the library is the real one."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--someone--model"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("1" * 40)
    for name in ("config.json", "model.safetensors", "runs/ep0-ba2-rank0.pt"):
        file = model / "snapshots" / ("1" * 40) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
    assert find_checkpoint("hf://someone/model/") == file.parents[1]
    assert find_checkpoint("hf://someone/model/runs/ep0-ba2-rank0.pt").read_bytes() == b"runs/ep0-ba2-rank0.pt"
    for uri, reason in (
        ("hf://someone/other", "can't be read from the Hub: "),
        ("hf://someone", "expected hf://OWNER"),
    ):
        with pytest.raises(CheckpointError, match=f"^{uri}: {reason}[^\n]+$"):
            find_checkpoint(uri)
