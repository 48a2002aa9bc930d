"""Faults of an S3 or a disk, for checkpoints and shards: retries, then an error of one line; never a short epoch, a
hang, a silent skip, or a run that starts from zero.

A proxy between the client and a real S3 answers 503, cuts connections and stalls.
"""

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from sit_composer import storage
from sit_composer.checkpoint.folder import newest
from sit_composer.data import stream
from sit_composer.data.stream import DataError, load_spec
from sit_composer.storage import LocalFolder, S3Folder, StorageError
from sit_composer.supervision.lease import NAME, Lease
from sit_composer.supervision.uploads import Uploads
from tests.helpers.digits import LOADERS, SAMPLES, gather, loader, write_digits
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.paths import ROOT
from tests.helpers.runs import COMPOSER, FOLDER, QUICKSTART, REMOTE, bits, differences, fetched

pytestmark = pytest.mark.slow  # minutes, of real outages
KINDS = ("503", "cut", "stall")
EACH_KIND = pytest.mark.parametrize("kind", ["503", "cut", pytest.param("stall", marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def never_hangs(request) -> Iterator[None]:
    """A hang is a failure."""

    def stop(*_):
        raise TimeoutError("the test hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(180)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    while LOADERS:  # the garbage collector would take five seconds per worker
        LOADERS.pop().__del__()


@pytest.fixture
def proxy(s3, monkeypatch) -> Iterator[FaultProxy]:
    """A proxy in front of the S3, which S3_ENDPOINT_URL then names; clients wait for only a second."""
    monkeypatch.setattr(storage, "CONNECT_TIMEOUT", 1)
    monkeypatch.setattr(storage, "READ_TIMEOUT", 1)
    with FaultProxy(s3.url) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
        yield proxy


def last_error(capsys) -> str:
    """The one line of error that a failed command printed, without a traceback."""
    said = capsys.readouterr().err
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# --- A folder in S3 ---

OPERATIONS = {  # requests: the operation that makes them
    "list-type": lambda folder, file: folder.listing()["small"] == 5000,
    "GET /sit/runs/f/small": lambda folder, file: folder.read("small") == b"s" * 5000,
    "PUT /sit/runs/f/new": lambda folder, file: folder.write("new", b"n" * 5000) or folder.read("new") == b"n" * 5000,
    "(PUT|POST) /sit/runs/f/up": lambda folder, file: (
        folder.upload(file, "up") or folder.read("up") == file.read_bytes()
    ),
    "(GET|HEAD) /sit/runs/f/large": lambda folder, file: (
        folder.download("large", file.parent / "down") or (file.parent / "down").read_bytes() == file.read_bytes()
    ),
    "DELETE /sit/runs/f/new": lambda folder, file: folder.delete(["new"]) or "new" not in folder.listing(),
}


@pytest.fixture
def folder(proxy, tmp_path) -> S3Folder:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 36_000)  # 9.2 MB: in two parts
    folder = S3Folder("s3://sit/runs/f")
    folder.write("small", b"s" * 5000)
    folder.upload(tmp_path / "file", "large")
    return folder


@EACH_KIND
def test_a_request_that_fails_for_a_while_is_made_again(proxy, folder, tmp_path, kind):
    for pattern, works in OPERATIONS.items():
        fault = proxy.fault(kind, pattern, times=2, seconds=2)
        assert works(folder, tmp_path / "file"), pattern
        assert fault.met == 2, pattern
        proxy.heal()


@EACH_KIND
def test_a_store_that_stays_broken_is_one_line_that_names_what_was_asked_for(proxy, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    (tmp_path / "file").write_bytes(bytes(range(256)) * 36_000)
    folder = S3Folder("s3://sit/runs/f")
    folder.upload(tmp_path / "file", "large")
    folder.write("small", b"s" * 5000)
    for pattern, works in OPERATIONS.items():
        proxy.fault(kind, pattern)
        before = time.monotonic()
        with pytest.raises(StorageError, match=rf"^{folder.uri}(/\w+)?: [^\n]+$"):
            works(folder, tmp_path / "file")
        assert time.monotonic() - before < 20, pattern
        proxy.heal()
    assert not (tmp_path / "down").exists()
    assert "new" not in folder.listing()
    assert "up" not in folder.listing()  # nothing appears in part


def test_the_store_checks_signatures_behind_the_proxy_too(proxy, monkeypatch):
    S3Folder("s3://sit/run").write("x", b"y")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=r"s3://sit/run: .*SignatureDoesNotMatch"):
        S3Folder("s3://sit/run").listing()
    assert proxy.requests


def test_the_patience_of_the_product_is_minutes_and_no_more():
    """For a request to a store that stalls forever, with backoff."""
    worst = storage.ATTEMPTS * max(storage.CONNECT_TIMEOUT, storage.READ_TIMEOUT) + 1 + 2 + 4 + 8 + 16
    assert 60 < worst < 300


# --- The lease ---


def test_beats_that_fail_for_a_while_do_not_end_a_run(proxy, s3, monkeypatch):
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    lease = Lease(S3Folder("s3://sit/run"), 0.2)
    lease.acquire()
    for kind in KINDS:
        fault = proxy.fault(kind)
        deadline = time.monotonic() + 20
        while fault.met < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        proxy.heal()
        beats = lease._beats
        while lease._beats <= beats + 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        lease.check()
        assert lease._beats > beats + 1
    monkeypatch.setenv("S3_ENDPOINT_URL", s3.url)
    with pytest.raises(StorageError, match="is alive"):
        Lease(S3Folder("s3://sit/run"), 1).acquire()
    lease.release()


def test_letting_go_does_not_wait_for_a_store_that_stalls(proxy):
    lease = Lease(S3Folder("s3://sit/run"), 0.2)
    lease.acquire()
    fault = proxy.fault("stall")
    while not fault.met:
        time.sleep(0.05)
    before = time.monotonic()
    lease.release()
    assert time.monotonic() - before < 2


def test_a_run_that_was_cut_off_from_the_store_writes_no_more_when_it_is_back(proxy, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    folder = S3Folder("s3://sit/run")
    cut_off = Lease(folder, 0.3)
    cut_off.acquire()
    uploads = Uploads(folder, cut_off, keep=-1, patience=60)
    proxy.fault("503")
    file = tmp_path / "ep0-ba2-rank0.pt"
    file.write_bytes(b"late")
    uploads._jobs.put(file)
    monkeypatch.setenv("S3_ENDPOINT_URL", s3.url)
    successor = Lease(S3Folder("s3://sit/run"), 0.3)
    monkeypatch.setattr(successor, "_is_dead", lambda _: False)  # as on another machine
    successor.acquire()
    proxy.heal()
    with pytest.raises(StorageError, match=r"s3://sit/run: another run .* took over"):
        uploads.wait()
    uploads.end()
    cut_off.release()
    successor.check()
    assert set(successor.folder.listing()) == {NAME}
    successor.release()


@pytest.mark.parametrize("name", ["ep0-ba2-rank0.pt", "ep0-ba2/.metadata"])
def test_an_upload_that_began_before_a_takeover_does_not_appear_after_it(proxy, s3, tmp_path, name):
    """The takeover comes before two parts are put together, or before a small file's second attempt."""
    folder = S3Folder("s3://sit/run")
    zombie = Lease(folder, 60)
    zombie.acquire()
    uploads = Uploads(folder, zombie, keep=-1, patience=60)
    file = tmp_path / "file"
    file.write_bytes(b"x" * (9_200_000 if name.endswith(".pt") else 1000))
    fault = proxy.fault(*(("stall", "PUT .*partNumber=2") if name.endswith(".pt") else ("503", "PUT .*metadata")))
    fault.times, fault.seconds = 1, 0.5
    send = partial(uploads._patiently, uploads.folder.upload, file, name)
    upload = threading.Thread(target=lambda: pytest.raises(StorageError, send))
    upload.start()
    while not fault.met:
        time.sleep(0.01)
    s3.client.put_object(Bucket="sit", Key=f"run/{NAME}", Body=b'{"owner": "successor"}')
    upload.join()
    assert "took over" in zombie.lost
    assert set(folder.listing()) == {NAME}
    assert not s3.client.list_multipart_uploads(Bucket="sit").get("Uploads")
    uploads.end()


@pytest.mark.parametrize("kind", ["501", "lost"])
def test_a_condition_that_the_store_does_not_know_or_whose_answer_is_lost_is_no_refusal(proxy, kind):
    folder = S3Folder("s3://sit/run")
    for before, content in ((None, b"1"), (b"1", b"2"), (b"2", None)):
        fault = proxy.fault(kind, "(PUT|DELETE) .*file", times=1)
        assert folder.replace("file", before, content)
        assert fault.met == 1
        assert folder.read("file") == content


# --- A run whose checkpoints go to S3 ---

WHOLE = {}


@pytest.fixture
def whole(run, tmp_path) -> dict:
    """The bits of a run of four batches without faults."""
    if not WHOLE:
        assert run("trainer.max_duration=4ba", "data.flip=true", folder="whole") == 0
        WHOLE.update(bits(tmp_path / "whole"))
    return WHOLE


def test_a_run_through_faults_of_all_kinds_equals_one_without(run, proxy, tmp_path, whole):
    for batches in (2, 4):  # the second one resumes
        for pattern in (r"ep0-ba\d", "alive.json", "config.yaml", "list-type"):
            for kind in KINDS:
                proxy.fault(kind, pattern, times=1, seconds=2, after=1000)
        assert run(f"trainer.max_duration={batches}ba", *REMOTE, "supervision.heartbeat=1") == 0
        assert all(fault.met for fault in proxy.faults if fault.pattern != "config.yaml")
        proxy.heal()
        assert newest(S3Folder(FOLDER)) == f"ep0-ba{batches}-rank0.pt"
    assert set(S3Folder(FOLDER).listing()) == {
        "config.yaml", "metrics.jsonl", "ep0-ba2-rank0.pt", "ep0-ba4-rank0.pt",
    }  # fmt: skip
    assert differences(whole, fetched(tmp_path)) == []


@pytest.mark.parametrize("kind", ["503", pytest.param("cut", marks=pytest.mark.slow), "stall"])
def test_a_run_whose_uploads_fail_for_good_ends_with_one_line(run, proxy, capsys, monkeypatch, kind):
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    proxy.fault(kind, r"(PUT|POST) .*ep0-ba2", after=1000)
    before = time.monotonic()
    assert run("trainer.max_duration=400ba", *REMOTE, "supervision.patience=3") == 2
    assert time.monotonic() - before < 60
    assert last_error(capsys).startswith(f"error: {FOLDER}/ep0-ba2-rank0.pt: ")
    proxy.heal()
    assert set(S3Folder(FOLDER).listing()) == {"config.yaml", "metrics.jsonl"}  # and the lease was released


FAILS_ON_RANK_1 = """
import os, sys
from sit_composer.callbacks.run_record import RunRecord
from sit_composer.storage import StorageError
from tests.helpers import ranks

def fail(self, state, logger):
    if os.environ["RANK"] == "1" and state.timestamp.batch == 3:
        raise StorageError("what only this rank met")

RunRecord.batch_end = fail
sys.exit(ranks.main(sys.argv[1:]))
"""


def test_an_error_on_one_rank_of_two_ends_the_run(digits_shards, tmp_path):
    """The other rank waits for it until the launcher ends it."""
    signal.alarm(400)
    (tmp_path / "script.py").write_text(FAILS_ON_RANK_1)
    tiny = ["model.hidden_size=32", "model.depth=1", "model.num_heads=2", f"data.local={digits_shards}", "fsdp={}"]
    options = [f"trainer.save_folder={tmp_path / 'run'}", "supervision.grace=5"]
    command = [COMPOSER, "-n", "2", str(tmp_path / "script.py"), QUICKSTART, *tiny, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0  # rank 0's, which the launcher ended
    assert "error: what only this rank met" in done.stdout + done.stderr


def test_a_run_whose_store_is_broken_never_starts_from_zero(run, proxy, capsys, monkeypatch, tmp_path, whole):
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    assert run("trainer.max_duration=2ba", *REMOTE) == 0
    before = {name: size for name, size in S3Folder(FOLDER).listing().items() if name != NAME}
    capsys.readouterr()
    for kind, pattern in (
        ("503", ""),
        ("503", "GET .*alive.json"),
        ("stall", "list-type"),
        ("503", "list-type"),
        ("cut", "GET .*config.yaml"),
        ("503", "(GET|HEAD) .*ep0-ba2"),
        ("cut", "GET .*ep0-ba2"),
    ):
        proxy.fault(kind, pattern)
        assert run("trainer.max_duration=4ba", *REMOTE) == 2, pattern
        assert f" {FOLDER}" in last_error(capsys)
        proxy.heal()
        assert {name: size for name, size in S3Folder(FOLDER).listing().items() if name != NAME} == before
    assert run("trainer.max_duration=4ba", *REMOTE) == 0
    assert differences(whole, fetched(tmp_path)) == []


# --- Shards in S3 ---


@pytest.fixture
def shards(s3, proxy, tmp_path) -> str:
    """200 digits in about eight shards, in S3."""
    for file in write_digits(tmp_path / "source").iterdir():
        s3.client.upload_file(str(file), "sit", f"digits/{file.name}")
    return "s3://sit/digits"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_through_faults_of_all_kinds_has_every_sample(proxy, shards, tmp_path, workers):
    met = [proxy.fault("503", "spec.json|index.json", times=2)]
    for number, kind in enumerate(KINDS):  # four times: the client itself tries three times
        met.append(proxy.fault(kind, f"{'GET .*' if workers else ''}shard.0000{number}.mds", times=4, seconds=3))
    epoch = gather(loader(shards, tmp_path / "cache", download_retry=14, download_timeout=1, num_workers=workers))
    assert sorted(epoch["index"].tolist()) == list(range(SAMPLES))
    assert [fault.met for fault in met] == [2, 4, 4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_that_is_down_for_a_while_holds_an_epoch_up_and_no_more(proxy, shards, tmp_path, workers):
    batches = loader(shards, tmp_path / "cache", download_retry=14, num_workers=workers)
    proxy.fault("503")
    threading.Timer(30, proxy.heal).start()  # the client's own two attempts end earlier
    assert sorted(gather(batches)["index"].tolist()) == list(range(SAMPLES))


@pytest.mark.parametrize("workers", [0, 2])
@EACH_KIND
def test_a_shard_that_cannot_be_had_is_one_line_that_names_it(proxy, shards, tmp_path, monkeypatch, kind, workers):
    monkeypatch.setattr(stream, "OUTAGE", 1)  # seconds
    proxy.fault(kind, "shard.00003.mds")
    options = {"download_retry": 14, "download_timeout": 1, "num_workers": workers}
    batches = loader(shards, tmp_path / "cache", **options)
    before = time.monotonic()
    with pytest.raises(DataError, match=rf"^{shards}/shard.00003.mds: can't be read: [^\n]+$"):
        gather(batches)
    assert time.monotonic() - before < 50
    proxy.heal()
    assert sorted(gather(loader(shards, tmp_path / "cache"))["index"].tolist()) == list(range(SAMPLES))


def test_a_shard_that_is_not_there_is_asked_for_twice_at_most(proxy, shards, s3, tmp_path):
    batches = loader(shards, tmp_path / "cache", download_retry=14)
    s3.client.delete_object(Bucket="sit", Key="digits/shard.00003.mds")
    with pytest.raises(DataError, match=rf"^{shards}/shard.00003.mds: can't be read: [^\n]+$"):
        gather(batches)
    assert sum("shard.00003.mds" in request for request in proxy.requests) <= 4  # ahead of time, and when needed


def test_a_spec_that_cannot_be_had_is_one_line_that_names_it(proxy, shards, tmp_path, monkeypatch):
    for kind in KINDS:
        proxy.fault(kind, "spec.json")
        with pytest.raises(DataError, match=rf"^{shards}/spec.json: can't be read \([^\n]+$"):
            stream.read_text(shards, str(tmp_path), "spec.json", timeout=1)
        proxy.heal()
    with pytest.raises(DataError, match=r"^s3://none/digits/spec.json: An error occurred \(NoSuchBucket\)[^\n]+$"):
        load_spec("s3://none/digits", str(tmp_path))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(DataError, match=rf"^{shards}/spec.json: An error occurred \(SignatureDoesNotMatch\)[^\n]+$"):
        load_spec(shards, str(tmp_path))


def test_a_run_whose_shard_cannot_be_had_ends_with_one_line(run, proxy, shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stream, "OUTAGE", 1)
    proxy.fault("503", "shard.00003.mds")
    data = [f"data.remote={shards}", f"data.local={tmp_path / 'cache'}", "data.global_batch_size=20"]
    assert run("trainer.max_duration=1ep", *data) == 2
    assert last_error(capsys).startswith(f"error: {shards}/shard.00003.mds: can't be read: ")
    proxy.heal()
    assert run("trainer.max_duration=1ep", *data) == 0
    assert newest(LocalFolder(str(tmp_path / "run"))).endswith("-ba10-rank0.pt")  # all of the 200 samples


# --- A full disk ---


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_under_the_cache_is_one_line_that_names_the_folder(shards, disk, workers):
    cache = disk.path / "cache"
    for free, said in ((0, "copies of s3://sit/digits"), (20_000, rf"{shards}/shard.0000\d.mds")):
        disk.fill(free)
        with pytest.raises(DataError, match=rf"^{cache}: no space left on the disk for {said}$"):
            gather(loader(shards, cache, num_workers=workers))
        disk.clear()
    epoch = gather(loader(shards, cache, num_workers=workers))
    assert sorted(epoch["index"].tolist()) == list(range(SAMPLES))


def test_torchs_own_words_for_a_full_disk_are_known(disk, tmp_path):
    import torch
    import torch.distributed.checkpoint as dcp

    weights = {str(i): torch.zeros(1000) for i in range(50)}
    writes = (
        lambda place: torch.save(weights, place),
        lambda place: dcp.save(weights, storage_writer=dcp.FileSystemWriter(place), no_dist=True),
    )
    for number, write in enumerate(writes):
        disk.fill(60_000)
        with pytest.raises(BaseException, match=r"\S") as caught:  # torch's CheckpointException is no Exception
            write(disk.path / str(number))
        assert storage.is_disk_full(caught.value), caught.value
        disk.clear()
        write(tmp_path / str(number))
    (tmp_path / "cut").write_bytes((tmp_path / "0").read_bytes()[:-500])
    for error in (RuntimeError("unexpected"), FileNotFoundError(2, "not there")):
        assert not storage.is_disk_full(error)
    with pytest.raises(RuntimeError, match="PytorchStreamReader") as caught:
        torch.load(tmp_path / "cut")
    assert not storage.is_disk_full(caught.value)


def test_a_full_disk_under_the_checkpoints_is_one_line_and_a_rerun_resumes(run, disk, capsys, tmp_path, whole):
    options = [f"trainer.save_folder={disk.path}/run", "trainer.save_interval=2ba", "data.flip=true"]
    assert run("trainer.max_duration=2ba", *options) == 0
    disk.fill(60_000)
    assert run("trainer.max_duration=4ba", *options) == 2
    assert last_error(capsys).startswith(f"error: {disk.path}/run: no space left on the disk")
    assert newest(LocalFolder(f"{disk.path}/run")) == "ep0-ba2-rank0.pt"
    disk.clear()
    assert run("trainer.max_duration=4ba", *options) == 0
    assert differences(whole, bits(disk.path / "run")) == []


def test_a_full_disk_between_a_run_and_s3_is_one_line_and_a_rerun_resumes(
    run,
    s3,
    disk,
    capsys,
    tmp_path,
    whole,
    monkeypatch,
):
    monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
    for batches, said in (
        (2, "rank0: no space left on the disk"),
        (4, "resume: No space left on device, for s3://sit"),
    ):
        disk.fill(60_000)
        assert run(f"trainer.max_duration={batches}ba", *REMOTE) == 2
        error = last_error(capsys)
        assert error.startswith(f"error: {disk.path}/sit_composer-")
        assert f"/{said}" in error
        disk.clear()
        assert run(f"trainer.max_duration={batches}ba", *REMOTE) == 0
    assert differences(whole, fetched(tmp_path)) == []
