"""Batches that are gathered from mapped shards and shared with workers are those that samples, one by one, make."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.distributed import barrier

from sit_composer.data.ahead import ahead
from sit_composer.data.loader import SitDataset, coin
from sit_composer.data.pictures import decode_image
from sit_composer.data.rows import Rows, row_layout
from sit_composer.data.slots import Slots
from sit_composer.data.stream import DataError, load_spec
from sit_composer.randomness import sample_key
from tests.helpers.digits import LOADERS, gather, loader, write, write_digits
from tests.helpers.paths import ROOT

ROWS = 100
COLUMNS = {"moments": "ndarray:float16:8,4,4", "moments_flip": "ndarray:float16:8,4,4", "label": "int"}


def write_latents(folder: Path, columns: dict[str, str] = COLUMNS) -> Path:
    random = np.random.default_rng(0).standard_normal((2, ROWS, 8, 4, 4)).astype(np.float16)
    rows = [{"moments": random[0, i], "moments_flip": random[1, i], "label": i % 10} for i in range(ROWS)]
    vae = {"name": "some/vae", "scale": 0.2, "shift": 0.0, "channels": 4, "downsample": 8}
    spec = {"kind": "latents", "channels": 4, "image_size": 32, "autoencoder": vae}
    return write(folder, columns, rows, spec, size_limit=1 << 13)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, Path]:
    """Read only."""
    folder = tmp_path_factory.mktemp("shards")
    sizeless = COLUMNS | {"moments": "ndarray:float16", "moments_flip": "ndarray:float16"}
    return {
        "latents": write_latents(folder / "latents"),
        "latents without a size": write_latents(folder / "sizeless", sizeless),
        "pixels": write_digits(folder / "pixels"),
    }


@pytest.fixture(autouse=True)
def stopped():
    yield
    while LOADERS:
        LOADERS.pop().stop()


class OneByOne(SitDataset):
    """Streaming's own iteration and reading of rows, and the keys in Python's whole numbers."""

    __iter__ = StreamingDataset.__iter__
    _each_sample_id = StreamingDataset._each_sample_id
    _ready_thread = StreamingDataset._ready_thread

    def get_item(self, sample_id: int, retry: int = 0):
        shard, place = self.spanner[sample_id]
        row, key = self.shards[shard][place], sample_key(self.shuffle_seed, self.epoch, int(sample_id))
        flip = self.flip and coin(key)
        if self.fields == ("image",):
            tensor = decode_image(row["image"], self.spec.channels)
            tensor = tensor.flip(-1) if flip else tensor
        else:
            tensor = torch.from_numpy(row["moments_flip" if flip else "moments"].copy())
        return {self.fields[0]: tensor, "label": row["label"], "index": int(sample_id), "key": key}


def one_by_one(folder: Path, workers: int, drop_last: bool) -> StreamingDataLoader:
    options = {"remote": None, "local": str(folder), "batch_size": 16, "seed": 1, "flip": True}
    dataset = OneByOne(spec=load_spec(None, str(folder)), **options)
    LOADERS.append(StreamingDataLoader(dataset, batch_size=16, num_workers=workers, drop_last=drop_last))
    LOADERS[-1].stop = LOADERS[-1].__del__
    return LOADERS[-1]


def copies_of(folder: Path, copies: Path) -> Path:
    """Each side needs a folder of its own, as it shares memory by its name."""
    for side in "ab":
        shutil.copytree(folder, copies / side)
    return copies


def check(copies: Path, workers: int, drop_last: bool) -> None:
    """Two epochs, and a resume within the second."""
    sides = [
        one_by_one(copies / "a", workers, drop_last),
        loader(None, copies / "b", num_workers=workers, drop_last=drop_last, flip=True),
    ]
    epochs = [[list(side), list(side)] for side in sides]
    state = json.loads(json.dumps(sides[0].dataset.state_dict(0, True))) | {"epoch": 1, "sample_in_epoch": 32}
    barrier()  # a rank that is slower would read the shared memory that the other one has made and not yet filled
    for side, read in zip(sides, epochs, strict=True):
        side.load_state_dict(state)
        read.append(list(side))
    for theirs, ours in zip(*epochs, strict=True):
        assert [len(batch["index"]) for batch in theirs] == [len(batch["index"]) for batch in ours]
        for a, b in zip(theirs, ours, strict=True):
            assert list(a) == list(b)
            assert all(a[name].equal(b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("kind", ["latents", "latents without a size", "pixels"])
def test_batches_are_those_of_single_samples_in_streamings_order(shards, tmp_path, kind, workers, drop_last):
    check(copies_of(shards[kind], tmp_path), workers, drop_last)


def run_rank(rank: int, port: int, copies: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")
    check(copies, 0, False)
    torch.distributed.barrier()
    os._exit(0)  # streaming's threads and shared memory outlive a fork's end


def test_they_are_on_two_ranks_too(shards, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    copies = copies_of(shards["latents"], tmp_path)
    ranks = [fork.Process(target=run_rank, args=(rank, port, copies), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(50)
        assert rank.exitcode == 0


def test_a_row_of_another_size_raises_one_line_with_its_shard_and_row(shards, tmp_path):
    folder = shutil.copytree(shards["latents"], tmp_path / "shards")
    file = folder / "shard.00001.mds"
    data = bytearray(file.read_bytes())
    offsets = np.frombuffer(data, np.uint32, 5, 4).copy()
    offsets[3] += 2
    data[4:24] = offsets.tobytes()
    file.write_bytes(data)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][1]["raw_data"]["hashes"] = {}
    (folder / "index.json").write_text(json.dumps(index))
    expected = rf"^{file}: sample \d+: ValueError: its row 2 has 522 bytes, expected 520$"
    with pytest.raises(DataError, match=expected):
        gather(loader(None, folder))


def test_a_row_whose_columns_have_other_sizes_than_itself_raises_one_line(shards, tmp_path):
    folder = shutil.copytree(shards["pixels"], tmp_path / "shards")
    file = folder / "shard.00000.mds"
    data = bytearray(file.read_bytes())
    start, end = np.frombuffer(data, np.uint32, 2, 4).tolist()
    data[start : start + 4] = np.uint32(end - start - 8).tobytes()  # the image's size, which is 4 less
    file.write_bytes(data)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["raw_data"]["hashes"] = {}
    (folder / "index.json").write_text(json.dumps(index))
    expected = rf"^{file}: sample 0: ValueError: row 0 ends at byte {end}, its columns at {end + 4}$"
    with pytest.raises(DataError, match=expected):
        gather(loader(None, folder))


def test_a_shard_that_is_cut_while_it_is_mapped_raises(shards, tmp_path):
    """Reading the map would end the process."""
    folder = shutil.copytree(shards["latents"], tmp_path / "shards")
    dataset = loader(None, folder).dataset
    assert dataset[0]["index"] == 0
    file = folder / "shard.00000.mds"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"shard.00000.mds has \d+ bytes, expected"):
        dataset[0]


def test_a_shard_that_was_deleted_is_not_kept_on_the_disk(shards, tmp_path):
    limit = 4 * max(file.stat().st_size for file in shards["latents"].glob("*.mds")) + 100_000
    dataset = loader(shards["latents"], tmp_path / "cache", cache_limit=limit).dataset
    dataset.read(np.arange(ROWS))
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "cache") not in maps


def test_the_layout_of_rows_is_known_only_if_all_columns_have_a_size(shards):
    for kind, known in (("latents", True), ("latents without a size", False), ("pixels", False)):
        shard = loader(None, shards[kind]).dataset.shards[0]
        layout = row_layout(shard)
        assert (layout is not None) == known
        rows = Rows(f"{shards[kind]}/{shard.raw_data.basename}", shard, layout)
        assert rows.decode(2)["label"] == shard[2]["label"]


def test_images_are_contiguous_once_they_are_on_the_device(shards):
    from sit_composer.autoencoder import from_uint8  # takes seconds

    image = next(iter(loader(None, shards["pixels"])))["image"]
    assert from_uint8(image).is_contiguous()


# --- Memory that is shared ---


def test_a_place_is_free_again_when_its_tensor_is_gone():
    slots = Slots(workers=2, each=2, size=100)
    first = slots.empty(1, (5, 3), torch.float16).fill_(7)
    again = slots.handed(first.permute(1, 0)).__reduce__()
    got = again[0](*again[1])
    assert got.equal(first.permute(1, 0))
    assert got.stride() == (1, 3)
    second = slots.empty(1, (5, 3), torch.float16)
    third = slots.empty(1, (5, 3), torch.float16)  # has no place
    assert slots.handed(second) is not second
    assert slots.handed(third) is third
    part = got[0]
    del got
    assert slots.handed(slots.empty(1, (2,), torch.float16)).__class__ is torch.Tensor
    del part
    slots.empty(1, (5, 3), torch.float16)[:] = 1
    assert (first == 1).all()  # the same memory


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_are_kept_are_never_written_over(shards, workers):
    batches = loader(None, shards["latents"], num_workers=workers, batch_size=4)
    kept = []
    for _ in range(2):
        for batch in batches:
            kept.append((batch["moments"], batch["moments"].clone()))
    assert all(a.equal(b) for a, b in kept)


# --- Reading ahead ---


def test_a_thread_makes_items_ahead_and_no_more():
    made = []

    def items():
        for number in range(10):
            made.append(number)
            yield number

    running = ahead(items(), 2)
    assert next(running) == 0
    time.sleep(0.2)
    assert made == [0, 1, 2, 3]  # one is taken, two wait, and one has no room
    running.close()
    assert made == [0, 1, 2, 3]
    assert "batches" not in [thread.name for thread in threading.enumerate()]


def test_an_error_in_the_thread_comes_after_the_items_before_it():
    def items():
        yield 1
        raise DataError("bad")

    running = ahead(items(), 2)
    assert next(running) == 1
    with pytest.raises(DataError, match="bad"):
        next(running)


def test_the_state_counts_only_the_samples_that_were_handed_over(shards):
    batches = loader(None, shards["latents"], num_workers=0)
    running = iter(batches)
    next(running)
    time.sleep(0.2)  # the thread has read more
    assert batches.state_dict()["sample_in_epoch"] == 16
    batches.stop()


PROGRAM = """
import sys
from sit_composer.data.loader import build_loader
from sit_composer.data.stream import load_spec
folder = sys.argv[1]
batches = build_loader(None, folder, spec=load_spec(None, folder), batch_size=16, num_workers=1)
print(len(next(iter(batches))["label"]))
"""


@pytest.mark.slow
def test_a_program_that_stops_no_loader_ends(shards):
    command = [sys.executable, "-c", PROGRAM, str(shards["pixels"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "16\n"), done.stderr
