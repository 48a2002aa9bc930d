"""Streaming: the right samples, the same after a resume, and a clear error for whatever is wrong with the data."""

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from streaming.base.dataset import _ShardState
from streaming.base.format import Reader
from streaming.base.shared import barrier

from sit_composer.data.loader import SitDataset, build_loader, coin
from sit_composer.data.spec import DataSpec
from sit_composer.data.stream import CheckedStream, DataError, load_spec, shard_fault
from sit_composer.randomness import sample_key
from tests.helpers.digits import DIGITS, LOADERS, SAMPLES, digit, gather, loader, write, write_digits
from tests.helpers.images import adm_center_crop, encode


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """200 digits in about eight shards. Read only."""
    return write_digits(tmp_path_factory.mktemp("digits") / "shards")


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    """100 random latents, and other ones for the mirror image. Read only."""
    random = np.random.default_rng(0).standard_normal((2, 100, 8, 4, 4)).astype(np.float16)
    rows = [{"moments": random[0, i], "moments_flip": random[1, i], "label": i % 10} for i in range(100)]
    columns = {"moments": "ndarray:float16:8,4,4", "moments_flip": "ndarray:float16:8,4,4", "label": "int"}
    folder = tmp_path_factory.mktemp("latents") / "shards"
    vae = {"name": "some/vae", "scale": 0.2, "shift": 0.0, "channels": 4, "downsample": 8}
    spec = {"kind": "latents", "channels": 4, "image_size": 32, "autoencoder": vae}
    write(folder, columns, rows, spec, size_limit=1 << 13)
    np.save(folder.parent / "random.npy", random)
    return folder


@pytest.fixture(autouse=True)
def never_hangs():
    """A hang is a failure."""

    def stop(*_):
        raise TimeoutError("the test hangs")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    while LOADERS:  # a garbage collector that stops them takes five seconds a worker
        LOADERS.pop().__del__()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[:-100])
    else:
        data[-3] ^= 1
        file.write_bytes(data)


# --- What is read ---


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_an_epoch_has_every_sample_once_as_it_was_written(digits, tmp_path, workers, cached):
    batches = loader(digits if cached else None, tmp_path / "cache" if cached else digits, num_workers=workers)
    for number in range(2):
        epoch = gather(batches)
        assert sorted(epoch["index"].tolist()) == list(range(SAMPLES))
        assert epoch["image"].dtype == torch.uint8
        assert epoch["image"].shape == (SAMPLES, 1, 8, 8)
        assert epoch["label"].dtype == epoch["index"].dtype == torch.int64
        assert epoch["key"].tolist() == [sample_key(1, number, i) for i in epoch["index"].tolist()]
        for image, label, index in zip(epoch["image"], epoch["label"], epoch["index"], strict=True):
            assert np.array_equal(image[0], digit(index))
            assert label == DIGITS.target[index]


def test_every_epoch_has_another_order_whatever_the_workers(digits):
    orders = []
    for workers in (0, 2):
        batches = loader(None, digits, num_workers=workers, flip=True)
        orders.append([gather(batches), gather(batches)])
    assert all(map(same, *orders))
    assert not orders[0][0]["index"].equal(orders[0][1]["index"])
    other = gather(loader(None, digits, seed=2))
    assert not other["index"].equal(orders[0][0]["index"])
    in_order = gather(loader(None, digits, shuffle=False))
    assert in_order["index"].tolist() == list(range(SAMPLES))


def test_workers_that_wait_for_each_other_look_every_half_millisecond(digits, monkeypatch):
    dataset, naps = loader(None, digits).dataset, []
    next(iter(dataset))
    assert dataset._shared_barrier.lock.poll_interval == 0.0005
    monkeypatch.setattr(barrier, "sleep", lambda seconds: (naps.append(seconds), time.sleep(seconds)))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(dataset._shared_barrier, 2)
        while not naps:  # it waits
            time.sleep(0.001)
        pool.submit(dataset._shared_barrier, 2)
        first.result(60)
    assert set(naps) == {0.0005}


def test_drop_last_leaves_full_batches_only(digits):
    for workers in (0, 2):
        batches = loader(None, digits, batch_size=48, drop_last=True, num_workers=workers)
        assert [len(batch["index"]) for batch in batches] == [48] * (SAMPLES // 48)
        assert len(batches) == SAMPLES // 48
    assert [len(batch["index"]) for batch in loader(None, digits, batch_size=48)][-1] == SAMPLES % 48


@pytest.mark.parametrize("flip", [False, True])
def test_latents_are_the_moments_of_the_picture_or_of_its_mirror_image(latents, tmp_path, flip):
    random = torch.from_numpy(np.load(latents.parent / "random.npy"))
    batches = loader(latents, tmp_path, flip=flip, num_workers=2 if flip else 0)
    for epoch in range(2):
        got = gather(batches)
        assert got["moments"].dtype == torch.float16
        assert got["moments"].shape == (100, 8, 4, 4)
        coins = [flip and coin(sample_key(1, epoch, i)) for i in got["index"].tolist()]
        assert got["moments"].equal(random[torch.tensor(coins).long(), got["index"]])
        assert got["label"].equal(got["index"] % 10)


def test_a_flip_mirrors_half_of_the_pictures_and_others_each_epoch(digits):
    batches = loader(None, digits, flip=True)
    flips = []
    for _ in range(2):
        epoch = gather(batches)
        order = epoch["index"].argsort()
        flips.append(order.new_zeros(SAMPLES))
        for image, index in zip(epoch["image"][order], range(SAMPLES), strict=True):
            flips[-1][index] = not np.array_equal(image[0], digit(index))
            assert np.array_equal(image[0].flip(-1) if flips[-1][index] else image[0], digit(index))
    assert flips[0].tolist() == [coin(sample_key(1, 0, i)) for i in range(SAMPLES)]
    assert flips[1].tolist() == [coin(sample_key(1, 1, i)) for i in range(SAMPLES)]


def run_rank(rank: int, port: int, folder: Path, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")
    batches = loader(folder, out / "cache", batch_size=8, flip=True)
    torch.save(list(batches), out / f"{rank}.pt")
    with contextlib.suppress(Exception):
        torch.distributed.barrier()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_ranks_share_the_batches_that_one_would_have(digits, tmp_path):
    fork = multiprocessing.get_context("fork")
    port = free_port()
    ranks = [fork.Process(target=run_rank, args=(rank, port, digits, tmp_path), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(40)
        assert rank.exitcode == 0
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    one = list(loader(digits, tmp_path / "one", flip=True))
    assert len(one) == len(halves[0]) == len(halves[1])
    for whole, *parts in zip(one, *halves, strict=True):
        both = gather(parts)
        order, both_order = whole["index"].argsort(), both["index"].argsort()
        assert same({k: v[order] for k, v in whole.items()}, {k: v[both_order] for k, v in both.items()})


# --- Resume ---


@pytest.mark.parametrize(("workers", "workers_after"), [(0, 0), (2, 2), (0, 2)])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resume_within_an_epoch_goes_on_bit_for_bit(digits, tmp_path, epoch, workers, workers_after):
    first = loader(digits, tmp_path / "a", num_workers=workers, flip=True)
    for _ in range(epoch):
        gather(first)
    running = iter(first)
    for _ in range(5):
        next(running)
    state = json.loads(json.dumps(first.state_dict()))
    assert state == first.dataset.state_dict(5 * 16, True)  # as Composer asks
    rest, after = gather(running), gather(first)

    second = loader(digits, tmp_path / "b", num_workers=workers_after, flip=True)
    second.load_state_dict(state)
    assert same(gather(second), rest)
    assert same(gather(second), after)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_checkpoint_at_the_end_of_an_epoch_resumes_with_the_next(digits, workers):
    first = loader(None, digits, num_workers=workers, flip=True)
    assert first.dataset.state_dict(0, True)["epoch"] == 0
    gather(first)
    state = first.dataset.state_dict(0, True)  # Composer has counted no sample of the next epoch
    after = gather(first)

    second = loader(None, digits, num_workers=workers, flip=True)
    second.dataset.load_state_dict(state)
    assert second.dataset.state_dict(0, True)["epoch"] == 1
    assert same(gather(second), after)


# --- Bad shards ---


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_bad_shard_raises_one_line_that_names_it(digits, tmp_path, how, workers, cached):
    shards = shutil.copytree(digits, tmp_path / "shards")
    bad = shards / "shard.00003.mds"
    damage(bad, how)
    if not cached and how != "flipped":
        with pytest.raises(DataError, match=f"^{bad}[^\n]*$"):
            loader(None, shards, num_workers=workers)
        return
    batches = loader(shards if cached else None, tmp_path / "cache" if cached else shards, num_workers=workers)
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            gather(batches)
        assert str(bad) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "Traceback" not in str(caught.value)
        assert not multiprocessing.active_children()  # the program can end at once
    assert bad.exists() == (how != "missing")  # the source is left alone
    assert not (tmp_path / "cache" / bad.name).exists()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
def test_a_bad_file_in_the_cache_is_fetched_again(digits, tmp_path, how, workers):
    cache = shutil.copytree(digits, tmp_path / "cache")
    damage(cache / "shard.00003.mds", how)
    (cache / "index.json").write_text("stale")
    got = gather(loader(digits, cache, num_workers=workers))
    assert same(got, gather(loader(None, digits)))
    assert (cache / "shard.00003.mds").read_bytes() == (digits / "shard.00003.mds").read_bytes()


def test_a_shard_that_disappears_from_local_data_during_the_run_raises(digits, tmp_path):
    shards = shutil.copytree(digits, tmp_path / "shards")
    batches = iter(loader(None, shards, shuffle=False))
    next(batches)
    (shards / "shard.00005.mds").unlink()
    with pytest.raises(DataError, match=r"shard.00005.mds is missing"):
        gather(batches)


def test_shards_without_xxh64_are_checked_by_what_the_index_has(tmp_path):
    shards = write_digits(tmp_path / "sizes", hashes=[])
    assert len(gather(loader(None, shards))["index"]) == SAMPLES
    damage(shards / "shard.00001.mds", "cut")
    with pytest.raises(DataError, match=r"shard.00001.mds has \d+ bytes"):
        loader(None, shards)
    shards = write_digits(tmp_path / "null", hashes=[])
    edit(shards / "index.json", lambda index: [shard["raw_data"].update(hashes=None) for shard in index["shards"]])
    assert len(gather(loader(None, shards))["index"]) == SAMPLES
    shards = write_digits(tmp_path / "sha1", hashes=["sha1"])
    damage(shards / "shard.00001.mds", "flipped")
    with pytest.raises(DataError, match=r"shard.00001.mds has been changed: its sha1"):
        gather(loader(None, shards))


@pytest.mark.parametrize("cached", [False, True])
def test_compressed_shards_are_read_and_those_of_local_data_are_kept(tmp_path, cached):
    shards = write_digits(tmp_path / "shards", compression="zstd:3")
    if cached:
        (tmp_path / "cache").mkdir()
        zipped = shutil.copy(shards / "shard.00002.mds.zstd", tmp_path / "cache")
        damage(Path(zipped), "flipped")
    else:
        gather(loader(None, shards))
        (shards / "shard.00002.mds.zstd").unlink()  # the stock method would now delete its plain form
    got = gather(loader(shards if cached else None, tmp_path / "cache" if cached else shards))
    assert sorted(got["index"].tolist()) == list(range(SAMPLES))
    if not cached:
        assert (shards / "shard.00002.mds").exists()


def test_a_compressed_shard_that_failed_is_not_kept(tmp_path):
    shards = write_digits(tmp_path / "shards", compression="zstd:3", hashes=[])
    bad = shards / "shard.00002.mds.zstd"
    whole = bad.read_bytes()
    bad.write_bytes(whole[::-1])
    with pytest.raises(DataError, match=str(bad)):
        gather(loader(shards, tmp_path / "cache"))
    bad.write_bytes(whole)
    assert len(gather(loader(shards, tmp_path / "cache"))["index"]) == SAMPLES


def test_a_shard_that_another_process_is_fetching_is_waited_for(digits, tmp_path):
    dataset = loader(digits, tmp_path).dataset
    dataset._shard_states[0] = _ShardState.PREPARING
    (tmp_path / "shard.00000.mds").write_bytes(bytes(5000))

    def fetch():
        shutil.copy(digits / "shard.00000.mds", tmp_path)
        dataset._shard_states[0] = _ShardState.LOCAL

    threading.Timer(0.3, fetch).start()
    assert np.array_equal(dataset[0]["image"][0], digit(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tight_cache_limit_neither_hangs_nor_shortens_an_epoch(digits, tmp_path, workers):
    sizes = [file.stat().st_size for file in digits.glob("*.mds")]
    assert len(sizes) > 6
    limit = 4 * max(sizes) + (digits / "index.json").stat().st_size
    batches = loader(digits, tmp_path / "cache", cache_limit=limit, num_workers=workers)
    for _ in range(2):
        assert sorted(gather(batches)["index"].tolist()) == list(range(SAMPLES))
    assert sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.mds")) <= limit
    with pytest.raises(DataError, match="Cache limit"):
        loader(digits, tmp_path / "other", cache_limit=max(sizes))


@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_shards_that_are_fetched_at_the_same_time_stay_within_the_cache_limit(tmp_path, compression):
    shards = write_digits(tmp_path / "shards", compression=compression, hashes=["xxh64"])
    files = [file.stat().st_size for file in shards.glob("*.mds*")]
    dataset = loader(shards, tmp_path / "cache").dataset
    limit = 4 * max(shard.get_max_size() for shard in dataset.shards) + (shards / "index.json").stat().st_size
    dataset = loader(shards, tmp_path / "limited", cache_limit=limit).dataset
    assert len(files) > 6
    most = 0

    def fetch(shard: Reader) -> int:
        nonlocal most
        grown = CheckedStream.prepare_shard(dataset.stream, shard)
        time.sleep(0.2)  # until all threads have begun
        most = max(most, cached())
        return grown

    def cached() -> int:
        return sum(file.stat().st_size for file in list((tmp_path / "limited").glob("*.mds*")) if file.exists())

    dataset.stream.prepare_shard = fetch
    with ThreadPoolExecutor(len(files)) as threads:
        for blocking in (False, True):
            list(threads.map(dataset.prepare_shard, range(len(files)), [blocking] * len(files)))
    assert 0 < most <= limit
    assert cached() + dataset.stream.index_size == dataset.cache_usage <= limit
    assert sorted(dataset[index]["index"] for index in range(SAMPLES)) == list(range(SAMPLES))


def test_a_cache_limit_without_room_for_the_index_and_a_shard_is_refused(tmp_path):
    shards = write_digits(tmp_path / "shards", size_limit=400)
    index = (shards / "index.json").stat().st_size
    with pytest.raises(DataError, match=r"cache_limit: .* don't hold the index and a shard"):
        loader(shards, tmp_path / "cache", cache_limit=index + 10)


def test_a_cache_that_somebody_else_empties_is_filled_again(digits, tmp_path):
    limit = 5 * max(file.stat().st_size for file in digits.glob("*.mds"))
    batches = loader(digits, tmp_path / "cache", cache_limit=limit)
    for _ in range(3):
        assert len(gather(batches)["index"]) == SAMPLES
        for file in (tmp_path / "cache").glob("*.mds"):
            file.unlink()


def test_no_shard_is_evicted_for_one_that_finds_no_room_yet(digits, tmp_path):
    limit = 4 * max(file.stat().st_size for file in digits.glob("*.mds")) + (digits / "index.json").stat().st_size
    dataset = loader(digits, tmp_path / "cache", cache_limit=limit).dataset
    dataset.prepare_shard(0)
    dataset._shard_states.numpy()[1:5] = _ShardState.PREPARING  # as by other processes
    dataset.prepare_shard(5, blocking=False)
    assert dataset._shard_states[5] == _ShardState.REMOTE
    assert dataset._shard_states[0] == _ShardState.LOCAL


def test_a_shard_that_came_late_is_prefetched_again_in_the_next_epoch(tmp_path):
    shards = write_digits(tmp_path / "shards")
    dataset = loader(shards, tmp_path / "cache").dataset
    away = shards / "shard.00001.mds"
    away.rename(tmp_path / "away")
    dataset.prepare_shard(1, blocking=False)
    assert dataset.prefetch_failed == {1}
    (tmp_path / "away").rename(away)
    dataset.prepare_shard(1)
    assert dataset.prefetch_failed == set()


def test_a_shard_that_is_evicted_while_it_is_checked_is_missing(digits, tmp_path, monkeypatch):
    shards = shutil.copytree(digits, tmp_path / "shards")
    shard = loader(None, shards).dataset.shards[1]
    size = os.path.getsize
    monkeypatch.setattr(os.path, "getsize", lambda path: os.unlink(path) or size(path))
    assert str(shard_fault(shard, str(shards))).endswith("shard.00001.mds is missing")


def test_a_cache_limit_never_deletes_local_data(digits, tmp_path):
    shards = shutil.copytree(digits, tmp_path / "shards")
    for remote in (None, shards):  # the second is the same folder
        assert len(gather(loader(remote, shards, cache_limit=1))["index"]) == SAMPLES
    assert len(list(shards.glob("*.mds"))) == len(list(digits.glob("*.mds")))


def test_shards_that_were_written_again_are_fetched_again(tmp_path):
    gather(loader(write_digits(tmp_path / "shards"), tmp_path / "cache"))
    shutil.rmtree(tmp_path / "shards")
    got = gather(loader(write_digits(tmp_path / "shards", first=300), tmp_path / "cache"))
    assert sorted(got["index"].tolist()) == list(range(SAMPLES))
    pairs = zip(got["image"], got["index"], strict=True)
    assert all(np.array_equal(image[0], digit(300 + index)) for image, index in pairs)


def test_one_cache_does_not_serve_two_data_sets(digits, latents, tmp_path):
    loader(digits, tmp_path)
    with pytest.raises(DataError, match=f"{tmp_path}: holds copies of {digits}, not of {latents}"):
        loader(latents, tmp_path)
    assert len(gather(loader(str(digits) + "/", tmp_path))["index"]) == SAMPLES


def start_and_be_killed(remote: Path, local: Path) -> None:
    loader(remote, local)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_job_killed_before_its_first_batch_can_be_started_again(digits, tmp_path):
    job = multiprocessing.get_context("fork").Process(target=start_and_be_killed, args=(digits, tmp_path))
    job.start()
    job.join(30)
    assert job.exitcode == -signal.SIGKILL
    assert len(gather(loader(digits, tmp_path))["index"]) == SAMPLES


def wait_in_a_barrier(folder: Path, queue) -> None:
    SitDataset._resume_incr_epoch = lambda dataset: queue.put(os.getpid()) or time.sleep(60)
    next(iter(loader(None, folder, num_workers=2)))


def test_workers_that_wait_for_others_end_when_their_parent_is_killed(digits):
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    job = fork.Process(target=wait_in_a_barrier, args=(digits, queue))
    job.start()
    workers = [psutil.Process(queue.get(timeout=30)) for _ in range(2)]
    job.kill()
    assert not psutil.wait_procs(workers, timeout=10)[1]


def test_batches_that_shared_memory_cannot_hold_are_refused(digits, monkeypatch):
    monkeypatch.setattr(SitDataset, "batch_bytes", {"image": 10**15})
    with pytest.raises(DataError, match=r"^num_workers: the workers' batches need 8e\+09 MB of /dev/shm, which has"):
        next(iter(loader(None, digits, num_workers=2)))


def start_at_once(folder: Path, barrier) -> None:
    for _ in range(12):
        barrier.wait(30)
        loader(None, folder)


def test_jobs_that_start_at_the_same_moment_do_not_collide(digits):
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(3)
    jobs = [fork.Process(target=start_at_once, args=(digits, barrier), daemon=True) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(40)
        assert job.exitcode == 0


def start_ranks_at_once(folder: Path, barrier, rank: int, port: int, done) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in places.items()}}
    torch.distributed.init_process_group("gloo")
    for _ in range(8):
        barrier.wait(30)
        loader(None, folder)
    done.value = 1


def test_ranks_of_jobs_that_start_at_the_same_moment_do_not_collide(digits):
    fork = multiprocessing.get_context("fork")
    barrier, jobs = fork.Barrier(4), []
    for port in (free_port(), free_port()):
        for rank in range(2):
            done = fork.Value("i", 0)
            job = fork.Process(target=start_ranks_at_once, args=(digits, barrier, rank, port, done), daemon=True)
            jobs.append((job, done))
            job.start()
    for job, _ in jobs:
        job.join(60)
    assert [done.value for _, done in jobs] == [1, 1, 1, 1]


# --- Bad samples ---


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_raises_one_line_with_its_number_and_shard(tmp_path, workers):
    png = encode(Image.fromarray(digit(0)), "PNG")
    cases = {"no picture": (b"no picture", 1), "cut": (png[:60], 1), "label 10": (png, 10), "label -1": (png, -1)}
    for name, (image, label) in cases.items():
        rows = [{"image": png, "label": 0}] * 40 + [{"image": image, "label": label}]
        spec = {"kind": "pixels", "channels": 1}
        folder = write(tmp_path / name, {"image": "bytes", "label": "int"}, rows, spec, size_limit=1 << 20)
        with pytest.raises(DataError, match=rf"^{folder}/shard.00000.mds: sample 40: [^\n]*$") as caught:
            gather(loader(None, folder, num_workers=workers))
        if label != 1:
            assert name.replace(" ", ": got ") in str(caught.value)


def test_moments_of_other_channels_than_the_spec_says_raise(latents):
    spec = DataSpec(**(vars(load_spec(None, str(latents))) | {"channels": 8}))
    with pytest.raises(
        DataError, match=r"\.mds: sample \d+: .*moments: got \(8, 4, 4\), expected \(16, H, W\), by spec"
    ):
        gather(build_loader(None, str(latents), spec=spec, batch_size=16))


def test_moments_of_another_size_than_the_spec_says_raise(latents):
    spec = DataSpec(**(vars(load_spec(None, str(latents))) | {"image_size": 64}))
    with pytest.raises(
        DataError, match=r"\.mds: sample \d+: .*moments: got \(8, 4, 4\), expected \(8, 8, 8\), by spec"
    ):
        gather(build_loader(None, str(latents), spec=spec, batch_size=16))


def test_a_data_error_is_one_line_and_survives_pickling():
    error = pickle.loads(pickle.dumps(DataError("one\n two")))
    assert type(error) is DataError
    assert str(error) == "one two"


# --- Bad index, bad spec ---


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def basename(name: str):
    return lambda index: index["shards"][1]["raw_data"].update(basename=name)


INDEX_FAULTS = {
    "missing": (lambda f: f.unlink(), "can't be read"),
    "cut": (lambda f: f.write_text(f.read_text()[:300]), "not a whole and safe MDS index"),
    "empty": (lambda f: f.write_text(""), "not a whole and safe MDS index"),
    "a list": (lambda f: f.write_text("[]"), "not a whole and safe MDS index"),
    "no shards": (lambda f: edit(f, lambda i: i.pop("shards")), "not a whole and safe MDS index"),
    "no bytes": (lambda f: edit(f, lambda i: i["shards"][1].pop("raw_data")), "not a whole and safe MDS index"),
    "odd samples": (lambda f: edit(f, lambda i: i["shards"][1].update(samples="x")), "not a whole and safe MDS index"),
    "odd columns": (
        lambda f: edit(f, lambda i: i["shards"][1]["column_names"].pop()),
        "not a whole and safe MDS index",
    ),
    "another format": (lambda f: edit(f, lambda i: i["shards"][0].update(format="json")), "the format is 'json'"),
    "pickle": (lambda f: edit(f, lambda i: i["shards"][0]["column_encodings"].__setitem__(1, "pkl")), "unsafe type"),
    "upwards": (lambda f: edit(f, basename("../evil.mds")), "'../evil.mds' leads out of the folder"),
    "absolute": (lambda f: edit(f, basename("/tmp/evil.mds")), "'/tmp/evil.mds' leads out of the folder"),
    "fewer": (lambda f: edit(f, lambda i: i["shards"].pop()), r"got \d+ samples, expected 200 as in spec.json"),
    "column": (
        lambda f: edit(f, lambda i: i["shards"][2]["column_names"].__setitem__(0, "jpg")),
        r"need a column 'image' encoded as bytes; the columns there are {'jpg': 'bytes', 'label': 'int'}",
    ),
    "encoding": (
        lambda f: edit(f, lambda i: i["shards"][2]["column_encodings"].__setitem__(1, "str")),
        "need a column 'label' encoded as int or uint; the columns there are",
    ),
}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_a_bad_index_raises_one_line_that_names_it(digits, tmp_path, fault, cached):
    shards = shutil.copytree(digits, tmp_path / "deep" / "shards")
    change, message = INDEX_FAULTS[fault]
    change(shards / "index.json")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=message) as caught:
        loader(shards if cached else None, tmp_path / "deep" / "cache" if cached else shards)
    assert str(shards / "index.json") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_index_of_no_samples_raises(digits, tmp_path):
    shards = shutil.copytree(digits, tmp_path / "shards")
    edit(shards / "index.json", lambda index: index.update(shards=[]))
    edit(shards / "spec.json", lambda spec: spec.update(samples=0))
    with pytest.raises(DataError, match="no samples"):
        loader(None, shards)


def test_the_spec_is_read_afresh_from_the_remote(digits, tmp_path):
    (tmp_path / "spec.json").write_text("a stale copy")
    assert load_spec(str(digits), str(tmp_path)).samples == SAMPLES
    assert load_spec(None, str(digits)) == load_spec(str(digits), str(tmp_path))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"version": 99}'])
def test_a_bad_spec_raises_one_line_that_names_it(tmp_path, text, cached):
    if text is not None:
        (tmp_path / "spec.json").write_text(text)
    with pytest.raises(DataError, match=f"^[^\n]*{tmp_path}/spec.json[^\n]*$"):
        load_spec(str(tmp_path) if cached else None, str(tmp_path / "cache" if cached else tmp_path))


def test_a_scheme_that_nobody_knows_raises(tmp_path):
    with pytest.raises(DataError, match=r"nonsense://here/spec.json: can't be read"):
        load_spec("nonsense://here", str(tmp_path))


# --- Pictures ---


def test_pictures_of_many_sizes_make_batches_of_one(tmp_path):
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    pictures = [photographs[i % 2].crop((0, 0, 100 + 17 * i, 300 - 13 * i)) for i in range(12)]
    rows = [{"image": encode(picture, "JPEG", quality=95), "label": i % 10} for i, picture in enumerate(pictures)]
    columns = {"image": "bytes", "label": "int"}
    spec = {"kind": "pixels", "channels": 3, "image_size": None}
    folder = write(tmp_path / "shards", columns, rows, spec, size_limit=1 << 16)
    got = gather(loader(None, folder, image_size=64, batch_size=5))
    assert got["image"].shape == (12, 3, 64, 64)
    for image, index in zip(got["image"], got["index"], strict=True):
        theirs = adm_center_crop(Image.open(io.BytesIO(rows[index]["image"])), 64)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), theirs)
    with pytest.raises(DataError, match="image_size"):
        loader(None, folder)


# --- A real S3 ---


def test_shards_stream_from_s3_and_an_outage_raises(s3, digits, tmp_path):
    uri = "s3://sit/digits"
    for file in digits.iterdir():
        s3.client.upload_file(str(file), "sit", f"digits/{file.name}")
    assert same(gather(loader(uri, tmp_path / "a", num_workers=2)), gather(loader(None, digits)))
    with pytest.raises(DataError, match=r"s3://sit/nothing/spec.json: can't be read"):
        load_spec("s3://sit/nothing", str(tmp_path / "b"))
    batches = iter(loader(uri, tmp_path / "c", shuffle=False, predownload=16, num_workers=2))
    next(batches)
    s3.stop()
    with pytest.raises(DataError, match=r"s3://sit/digits/shard.0000\d.mds: can't be read"):
        gather(batches)
