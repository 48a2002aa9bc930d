"""The rows of MDS shards in memory-mapped files, so that no file is opened and no bytes are parsed for a sample.

A shard is the number n of its rows (uint32), the n + 1 offsets of their bytes in the file (uint32), its columns as
JSON, and the rows. If all columns have a fixed size, a row is their values, one after another, and the rows of a shard
are an array. Else a row begins with the sizes of those that have none.
"""

import mmap
import os
from contextlib import suppress
from typing import Any

import numpy as np
from streaming.base.format import Reader
from streaming.base.format.mds.encodings import mds_decode

from sit_composer.data.needs import MOST_OPEN


def row_layout(shard: Reader) -> np.dtype | None:
    """The shard's rows as a structured dtype; None if a column has no fixed size."""
    if not all(shard.column_sizes):
        return None
    columns = zip(shard.column_names, shard.column_encodings, shard.column_sizes, strict=True)
    return np.dtype([(name, *_type(encoding, size)) for name, encoding, size in columns])


def _type(encoding: str, size: int) -> tuple[str, tuple[int, ...]]:
    kind, _, shape = encoding.removeprefix("ndarray:").partition(":")
    if kind == "int":  # MDS's name
        return "int64", ()
    with suppress(TypeError, ValueError):
        values = np.dtype(kind), tuple(map(int, shape.split(","))) if shape else ()
        if np.dtype(values).itemsize == size:
            return kind, values[1]
    return f"V{size}", ()  # bytes that nobody reads


class Rows:
    """The rows of one shard's file. Raises a ValueError if the file's head contradicts the index or ``layout``."""

    def __init__(self, path: str, shard: Reader, layout: np.dtype | None) -> None:
        self.shard = shard
        with open(path, "rb") as file:
            self.file = identity(os.fstat(file.fileno()))
            size, least = self.file[1], 4 * (shard.samples + 2)
            if size != shard.raw_data.bytes or size < least:
                raise ValueError(f"{path} has {size} bytes, expected {max(least, shard.raw_data.bytes)}")
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        count, *_ = np.frombuffer(self.bytes, np.uint32, 1)
        if count != shard.samples:
            raise ValueError(f"{path} has {count} rows, expected {shard.samples}")
        self.offsets = np.frombuffer(self.bytes, np.uint32, count + 1, 4)
        sizes = np.diff(self.offsets.astype(np.int64))
        odd = np.flatnonzero(sizes < 0 if layout is None else sizes != layout.itemsize)
        if len(odd):
            expected = "at least 0" if layout is None else layout.itemsize
            raise ValueError(f"its row {odd[0]} has {sizes[odd[0]]} bytes, expected {expected}")
        if self.offsets[-1] > size:
            raise ValueError(f"its last row ends at byte {self.offsets[-1]} of {size}")
        # Each column's values (n, *shape), with a layout.
        self.columns: dict[str, np.ndarray] = {}
        if layout is not None:
            table = np.frombuffer(self.bytes, layout, count, int(self.offsets[0]))
            self.columns = {name: table[name] for name in layout.names}

    def decode(self, row: int) -> dict[str, Any]:
        """A row's columns."""
        at, end = self.offsets[row : row + 2].tolist()
        shard, unsized = self.shard, self.shard.column_sizes.count(None)
        sizes = np.frombuffer(self.bytes, np.uint32, unsized, at).tolist()[::-1]
        at += 4 * unsized
        columns = {}
        for name, encoding, size in zip(shard.column_names, shard.column_encodings, shard.column_sizes, strict=True):
            size = size or sizes.pop()
            value = self.bytes[at : at + size]
            columns[name] = value if encoding == "bytes" else mds_decode(encoding, value)
            at += size
        if at != end:
            raise ValueError(f"row {row} ends at byte {end}, its columns at {at}")
        return columns


class OpenShards:
    """The shards that this process has mapped, the last used ones. A process that is forked or spawned maps its own."""

    def __init__(self, layout: np.dtype | None) -> None:
        self.layout = layout
        self._open: dict[int, Rows] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"layout": self.layout, "_open": {}}

    def rows(self, number: int, path: str, shard: Reader) -> Rows:
        """The rows of the shard of that number. Raises FileNotFoundError if the file is not here."""
        rows = self._open.pop(number, None)
        # To read a map of a file that was cut ends the process; a map of a deleted file keeps its bytes on the disk.
        if rows is None or rows.file != identity(os.stat(path)):
            rows = Rows(path, shard, self.layout)
        self._open[number] = rows  # the last in order
        if len(self._open) > MOST_OPEN:
            del self._open[next(iter(self._open))]
        return rows

    def close(self) -> None:
        """Closes all."""
        self._open.clear()


def identity(stat: os.stat_result) -> tuple[int, int]:
    """What changes if a file is replaced, and its size."""
    return stat.st_ino, stat.st_size
