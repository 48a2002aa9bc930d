"""Shards are streaming's own, to the byte, though they are written without its copies."""

from itertools import count
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming import MDSWriter

from convert.engine import shards
from tests.helpers.shards import contents

KINDS = {
    "pixels": ({"image": "bytes", "label": "int"}, lambda size, k: {"image": bytes([k % 256]) * size, "label": k}),
    "latents": (
        {"moments": "ndarray:float16", "moments_flip": "ndarray:float16", "label": "int"},
        lambda size, k: dict.fromkeys(("moments", "moments_flip"), np.full((2, size + 1, 3), k, np.float16))
        | {"label": k},
    ),
}


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(list(KINDS)), st.lists(st.integers(0, 900), min_size=1, max_size=30), st.integers(300, 3000))
def test_a_part_is_written_as_streaming_writes_it(kind, sizes, limit):
    check(kind, sizes, limit)


def test_a_shard_that_is_exactly_full_is_streamings_too():
    columns, make = KINDS["pixels"]
    options = {"columns": columns, "hashes": ["xxh64"], "size_limit": 999}  # whose digits a shard holds
    with TemporaryDirectory() as folder, MDSWriter(out=folder, **options) as writer:
        for k in range(3):
            writer.write(make(100, k))
    full = writer.shards[0]["raw_data"]["bytes"]  # of three samples
    for limit in (full - 1, full, full + 1):
        check("pixels", [100] * 6, limit)


def check(kind, sizes, limit):
    columns, make = KINDS[kind]
    with TemporaryDirectory() as folder:
        with MDSWriter(out=f"{folder}/theirs", columns=columns, hashes=["xxh64"], size_limit=limit) as theirs:
            for k, size in enumerate(sizes):
                theirs.write(make(size, k))
        delivered = []
        with (
            mock.patch.object(shards, "SHARD_BYTES", limit),
            shards.PartWriter(columns, f"{folder}/ours", 7, "again-", delivered.append) as ours,
        ):
            for k, size in enumerate(sizes):
                ours.write(make(size, k))
            entries = ours.end()
        wanted = [entry for entry in theirs.shards if entry["samples"]]  # it begins with none if a sample is too large
        names = [f"again-shard.00007.{number:05}.mds" for number, _ in zip(count(), wanted)]
        assert [file.name for file in delivered] == [entry["raw_data"]["basename"] for entry in entries] == names
        for entry, other in zip(entries, wanted, strict=True):
            file = contents(delivered[0].parent)[entry["raw_data"]["basename"]]
            assert file == contents(delivered[0].parent.parent / "theirs")[other["raw_data"].pop("basename")]
            entry["raw_data"].pop("basename")
            assert entry == other
