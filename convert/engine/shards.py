"""The MDS shards of one part of a source. `Output.publish` writes one index for all parts.

streaming's own writer writes an `index.json` even if its `with` fails, starts uploads that it never waits for, and
copies each image four times on its way to the file, which takes longer than all else that is done for it but decoding.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from streaming import MDSWriter
from streaming.base.format.mds.encodings import mds_encode

SHARD_BYTES = 1 << 26


class PartWriter(MDSWriter):
    """Writes samples to ``{prefix}shard.PPPPP.NNNNN.mds``, P being the part, in a new, empty folder.
    ``deliver`` is called with each file that is whole; it may wait, and may move the file away."""

    def __init__(
        self, columns: dict[str, str], folder: Path, part: int, prefix: str, deliver: Callable[[Path], None]
    ) -> None:
        self.stem = f"{prefix}shard.{part:05}"
        self.deliver = deliver
        super().__init__(columns=columns, out=str(folder), hashes=["xxh64"], size_limit=SHARD_BYTES, max_workers=1)

    def end(self) -> list[dict[str, Any]]:
        """Writes the last shard. Returns the index's entries for all shards."""
        self.flush_shard()
        self._reset_cache()
        return self.shards

    def write(self, sample: dict[str, Any]) -> None:
        """Adds a sample, and begins a shard where the base class does."""
        columns = [mds_encode(self.columns[name], sample[name]) for name in self.column_names]
        lengths = [len(data) for data, size in zip(columns, self.column_sizes, strict=True) if size is None]
        pieces = [np.array(lengths, np.uint32).tobytes(), *columns]
        length = sum(map(len, pieces))
        if self.new_shard_size + length + self.extra_bytes_per_sample > SHARD_BYTES:
            self.flush_shard()
            self._reset_cache()
        self.new_samples += pieces
        self.lengths.append(length)
        self.new_shard_size += length + self.extra_bytes_per_sample

    def flush_shard(self) -> None:
        if not self.lengths:  # the first sample alone exceeds the size limit
            return
        offsets = np.cumsum([4 + 4 * (len(self.lengths) + 1) + len(self.config_data), *self.lengths]).astype(np.uint32)
        file, digest = Path(self.local, f"{self.stem}.{len(self.shards):05}.mds"), xxhash.xxh64()
        with open(file, "wb") as out:
            for piece in (
                np.uint32(len(self.lengths)).tobytes(),
                offsets.tobytes(),
                self.config_data,
                *self.new_samples,
            ):
                digest.update(piece)
                out.write(piece)
        data = {"basename": file.name, "bytes": int(offsets[-1]), "hashes": {"xxh64": digest.hexdigest()}}
        self.shards.append({"samples": len(self.lengths), "raw_data": data, "zip_data": None, **self.get_config()})
        self.deliver(file)

    def _reset_cache(self) -> None:
        super()._reset_cache()  # of the pieces of samples
        self.lengths: list[int] = []  # of samples

    def __exit__(self, *_: object) -> None:
        self.executor.shutdown(wait=True)
