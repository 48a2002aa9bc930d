"""The MDS shards of one part of a source. `Output.publish` writes one index for all parts.

streaming's own writer writes an `index.json` even if its `with` fails, and starts uploads that it never waits for.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from streaming import MDSWriter

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

    def flush_shard(self) -> None:
        # The base class flushes an empty first shard if the first sample alone exceeds the size limit.
        if not self.new_samples:
            return
        super().flush_shard()  # its "upload" to the folder itself does nothing
        self.deliver(Path(self.local, self.shards[-1]["raw_data"]["basename"]))

    def __exit__(self, *_: object) -> None:
        self.executor.shutdown(wait=True)

    def _name_next_shard(self, extension: str | None = None) -> tuple[str, None]:
        return f"{self.stem}.{len(self.shards):05}.mds", None
