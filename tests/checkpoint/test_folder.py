"""What is complete in a run's folder, what is pruned, and who may write to it; on a disk and in a real S3."""

import json
import os
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from sit_composer.checkpoint.folder import checkpoints, clear_incomplete, fetch_checkpoint, newest, prune
from sit_composer.errors import UserError
from sit_composer.storage import LocalFolder, S3Folder, StorageError, open_run_folder
from sit_composer.supervision.lease import NAME, Lease
from tests.helpers.checkpoints import sharded_checkpoint

BEAT = 0.3


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    if request.param == "local":
        return LocalFolder(str(tmp_path / "run"))
    request.getfixturevalue("s3")
    return S3Folder(f"s3://sit/runs/{time.monotonic_ns()}")


def put(folder, name: str, content: bytes = b"x") -> None:
    if isinstance(folder, LocalFolder):
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).write_bytes(content)
    else:
        folder.write(name, content)


def archive(tmp_path, text: str = "x" * 1000) -> bytes:
    with zipfile.ZipFile(tmp_path / "archive", "w") as file:
        file.writestr("data", text)
    return (tmp_path / "archive").read_bytes()


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> dict[str, bytes]:
    return sharded_checkpoint(tmp_path_factory.mktemp("sharded"))


def test_the_newest_complete_checkpoint_is_found(folder, tmp_path, shards):
    assert newest(folder) is None
    whole = archive(tmp_path)
    for batch in (2, 10, 9):
        put(folder, f"ep0-ba{batch}-rank0.pt", whole)
    put(folder, "config.yaml")
    put(folder, "samples/ep0-ba99-rank0.pt", whole)
    assert newest(folder) == "ep0-ba10-rank0.pt"
    if isinstance(folder, LocalFolder):  # an object in S3 is never half there
        put(folder, "ep0-ba11-rank0.pt", whole[:-30])
        assert newest(folder) == "ep0-ba10-rank0.pt"
    for missing in shards:  # any of its files lacking, or cut short
        for name, content in shards.items():
            if name != missing:
                put(folder, name, content)
        assert newest(folder) == "ep0-ba10-rank0.pt"
        put(folder, missing, shards[missing][:-1])
        assert newest(folder) == "ep0-ba10-rank0.pt"
        folder.delete(list(shards))
    for name, content in shards.items():
        put(folder, name, content)
    assert newest(folder) == "ep1-ba30"


def test_pruning_keeps_the_newest_complete_ones_and_what_is_not_a_checkpoint(folder, tmp_path, shards):
    whole = archive(tmp_path)
    for batch in (2, 4, 6):
        put(folder, f"ep0-ba{batch}-rank0.pt", whole)
    put(folder, "config.yaml")
    for name, content in shards.items():
        if not name.endswith(".metadata"):
            put(folder, name, content)  # newer than all, and incomplete: it may just be on its way
    prune(folder, 1)
    assert list(checkpoints(folder)) == ["ep0-ba6-rank0.pt", "ep1-ba30"]
    prune(folder, 0)
    assert newest(folder) == "ep0-ba6-rank0.pt"
    clear_incomplete(folder)
    assert list(checkpoints(folder)) == ["ep0-ba6-rank0.pt"]
    assert set(folder.listing()) == {"config.yaml", "ep0-ba6-rank0.pt"}


def test_a_checkpoint_is_fetched_whole(s3, tmp_path, shards):
    folder = S3Folder("s3://sit/runs/fetch")
    for name, content in shards.items():
        folder.write(name, content)
    fetch_checkpoint(folder, "ep1-ba30", tmp_path / "here")
    assert {f"ep1-ba30/{file.name}": file.read_bytes() for file in (tmp_path / "here" / "ep1-ba30").iterdir()} == shards
    folder.delete(["ep1-ba30/.metadata"])
    with pytest.raises(StorageError, match="s3://sit/runs/fetch/ep1-ba30: the download is incomplete"):
        fetch_checkpoint(folder, "ep1-ba30", tmp_path / "there")


def test_a_file_is_replaced_only_if_it_is_as_it_was_seen(folder):
    assert not folder.replace("a", b"1", b"2")
    assert folder.read("a") is None
    assert folder.replace("a", None, b"1")
    assert not folder.replace("a", None, b"2")
    assert not folder.replace("a", b"0", b"2")
    assert not folder.replace("a", b"0", None)
    assert folder.read("a") == b"1"
    assert folder.replace("a", b"1", b"2")
    assert folder.read("a") == b"2"
    assert folder.replace("a", b"2", None)
    assert folder.listing() == {}


@pytest.mark.parametrize("before", [None, b"before"])
def test_of_several_that_replace_a_file_at_once_one_does(folder, before):
    together = Barrier(8)

    def attempt(name: str, content: bytes) -> bool:
        together.wait()
        return folder.replace(name, before, content)

    with ThreadPoolExecutor(8) as pool:
        for name in map(str, range(20 if isinstance(folder, LocalFolder) else 6)):  # a race in S3 takes seconds
            if before is not None:
                folder.write(name, before)
            contents = [b"%d" % i for i in range(8)]
            done = list(pool.map(attempt, [name] * 8, contents))
            assert [folder.read(name)] == [content for content, did in zip(contents, done, strict=True) if did]


@pytest.mark.parametrize(
    ("uri", "secret", "said"),
    [
        ("s3://none/run", "testsecret", "s3://none/run.*NoSuchBucket"),
        ("s3://sit/run", "wrong", "s3://sit/run.*SignatureDoesNotMatch"),
    ],
)
def test_a_store_that_refuses_is_named_and_no_secret_is(s3, monkeypatch, uri, secret, said):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    with pytest.raises(StorageError, match=said) as error:
        Lease(open_run_folder(uri), BEAT).acquire()
    assert secret not in str(error.value) or secret == "wrong"
    assert "testsecret" not in str(error.value)


def test_what_is_no_folder_is_refused_without_repeating_credentials():
    for uri in ("s3://key:secret@bucket/run", "https://key:secret@host/run"):
        with pytest.raises(UserError) as error:
            open_run_folder(uri)
        assert "secret" not in str(error.value)


# --- The lease ---


def test_one_of_two_has_the_lease_until_it_lets_go(folder):
    first, second = Lease(folder, BEAT), Lease(folder, BEAT)
    first.acquire()
    with pytest.raises(StorageError, match=r"a run of this name is alive on .*, process \d+; stop it first"):
        second.acquire()
    first.check()
    first.release()
    assert NAME not in folder.listing()
    second = Lease(folder, BEAT)
    second.acquire()
    second.release()


def test_a_dead_process_of_this_machine_is_followed_at_once(folder, tmp_path):
    """Killed with kill -9; with a beat so slow that waiting for three of them would show."""
    code = (
        "import sys; from sit_composer.storage import open_run_folder\n"
        "from sit_composer.supervision.lease import Lease\n"
        "lease = Lease(open_run_folder(sys.argv[1]), 30); lease.acquire(); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, folder.uri], stdout=-1, stdin=-1, text=True)
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    start = time.monotonic()
    follower = Lease(folder, 30)
    follower.acquire()
    assert time.monotonic() - start < 20
    follower.release()


def test_a_dead_run_elsewhere_is_followed_after_three_missed_beats(folder):
    folder.write(NAME, json.dumps({"owner": "x", "host": "elsewhere", "pid": 1, "boot": "", "started": ""}).encode())
    start = time.monotonic()
    follower = Lease(folder, BEAT)
    follower.acquire()
    assert time.monotonic() - start >= 3 * BEAT
    follower.release()


def test_a_run_that_was_taken_for_dead_writes_no_more(folder):
    zombie = Lease(folder, BEAT)
    zombie.acquire()
    folder.write(NAME, json.dumps({"owner": "successor", "host": "elsewhere", "pid": 7}).encode())
    with pytest.raises(StorageError, match="another run on elsewhere, process 7, has taken this one for dead"):
        zombie.check()
    time.sleep(3 * BEAT)
    assert json.loads(folder.read(NAME))["owner"] == "successor"  # its beats have stopped
    zombie.release()
    assert json.loads(folder.read(NAME))["owner"] == "successor"
    assert os.getpid() not in [json.loads(folder.read(NAME)).get("pid")]


def test_neither_a_beat_nor_letting_go_undoes_a_takeover(folder, monkeypatch):
    """Between the zombie's look at the file and its request, the successor takes it over."""
    zombie = Lease(folder, 30)
    zombie.acquire()
    seen = zombie.check()
    folder.write(NAME, b"the successor's")
    assert not zombie._write(seen)
    assert folder.read(NAME) == b"the successor's"
    monkeypatch.setattr(zombie, "check", lambda: seen)
    zombie.release()
    assert folder.read(NAME) == b"the successor's"


def test_of_two_that_follow_a_dead_run_at_once_one_has_it(folder, monkeypatch):
    """The first one to write, whenever they look."""
    holder = json.dumps({"owner": "x", "host": "elsewhere", "pid": 1, "beat": 0.1}).encode()
    folder.write(NAME, holder)
    first, second = Lease(folder, BEAT), Lease(folder, BEAT)
    follow = second._write

    def write_late(there: bytes) -> bool:
        first.acquire()
        return follow(there)

    monkeypatch.setattr(second, "_write", write_late)
    with pytest.raises(StorageError, match="a run of this name is alive"):
        second.acquire()
    first.check()
    first.release()


# --- What is not ours to delete, or to follow ---


def test_checkpoints_that_cannot_be_judged_are_left_alone(tmp_path, shards):
    folder = LocalFolder(str(tmp_path / "run"))
    for name, content in shards.items():
        put(folder, name, content if not name.endswith(".metadata") else b"cos\nsystem\n.")
    put(folder, "ep0-ba2-rank0.pt", archive(tmp_path))
    before = folder.listing()
    with pytest.raises(StorageError, match=r"ep1-ba30/.metadata: .*it asks for os.system.*move the checkpoint away"):
        clear_incomplete(folder)
    assert folder.listing() == before


def test_a_folder_with_nothing_whole_is_not_emptied(folder):
    """As when each node saves to a folder of its own."""
    for batch in (2, 4):
        put(folder, f"ep0-ba{batch}/__0_0.distcp")
    with pytest.raises(StorageError, match="got 2 checkpoints, expected at least one complete"):
        clear_incomplete(folder)
    assert len(folder.listing()) == 2


def test_names_that_lead_out_of_a_checkpoint_are_not_fetched(s3, tmp_path, shards):
    folder = S3Folder("s3://sit/runs/escape")
    for name, content in shards.items():
        folder.write(name, content)
    folder.write("ep1-ba30/planted.pth", b"x")
    folder.write("ep1-ba30/sub/planted", b"x")

    class Hostile(LocalFolder):  # SeaweedFS takes no such name; a store may
        def listing(self):
            return {"ep1-ba30/../../planted": 1, "ep1-ba30/__0_0.distcp": 1}

    assert checkpoints(Hostile("")) == {"ep1-ba30": ["ep1-ba30/__0_0.distcp"]}
    fetch_checkpoint(folder, "ep1-ba30", tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("planted*"))


def test_the_order_is_by_batch_and_then_by_epoch(folder):
    for name in ("ep1-ba7-rank0.pt", "ep0-ba7-rank0.pt", "ep0-ba10-rank0.pt", "ep2-ba9-rank0.pt"):
        put(folder, name)
    ordered = ["ep0-ba7-rank0.pt", "ep1-ba7-rank0.pt", "ep2-ba9-rank0.pt", "ep0-ba10-rank0.pt"]
    assert list(checkpoints(folder)) == ordered


def test_a_file_that_vanishes_while_a_folder_is_listed_is_not_there(tmp_path, monkeypatch):
    """As the lease's own of a live run, or a checkpoint that it prunes."""
    for name in ("kept", "gone"):
        (tmp_path / name).write_bytes(b"1234")
    walk = os.walk

    def walk_and_delete(path):
        for found in walk(path):
            (tmp_path / "gone").unlink(missing_ok=True)
            yield found

    monkeypatch.setattr(os, "walk", walk_and_delete)
    assert LocalFolder(str(tmp_path)).listing() == {"kept": 4}
    assert not LocalFolder(str(tmp_path)).is_whole("gone")
