"""An MDS writer that leaves an index only behind a whole result.

streaming's own writes `index.json` also when the body of its `with` fails, and uploads it before it knows that every
shard has arrived; here it is written by `publish` alone, after everything else.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from streaming import MDSWriter

from sit_composer.spec import SPEC_NAME, DataSpec

SHARD_BYTES = 1 << 26
UPLOADS = 4  # at once; as many finished shards again may wait for them


class UploadError(OSError):
    """A file did not reach the remote."""


class ShardWriter(MDSWriter):
    """Writes samples to shards in ``folder``, and moves these to ``remote`` (if any) as they fill.

    ``prefix`` goes before each shard's name. Use it as a context manager: leaving it ends all uploads; samples and
    uploads are only whole after `finish_shards`, and readers see them only after `publish`.
    """

    def __init__(self, columns: dict[str, str], folder: Path, remote: str | None = None, prefix: str = "") -> None:
        self.prefix = prefix
        self.failure: BaseException | None = None
        out = str(folder) if remote is None else (str(folder), remote)
        try:
            super().__init__(columns=columns, out=out, hashes=["xxh64"], size_limit=SHARD_BYTES, max_workers=UPLOADS)
        except (BotoCoreError, ClientError) as error:  # it looks for the bucket
            raise UploadError(f"cannot write to {remote}: {error}") from error

    def finish_shards(self) -> None:
        """Writes the last shard, and waits until all have arrived.

        Raises:
            UploadError: if one did not.
        """
        self.flush_shard()
        self._reset_cache()
        self._wait_for_uploads()

    def publish(self, spec: DataSpec) -> None:
        """Writes `spec.json` and, when that has arrived, `index.json`.

        Raises:
            UploadError: if one did not arrive.
        """
        Path(self.local, SPEC_NAME).write_text(spec.to_json(), encoding="utf-8")
        for put in (lambda: self._upload(SPEC_NAME), self._write_index):
            self.executor = ThreadPoolExecutor(1)
            put()
            self._wait_for_uploads()

    def flush_shard(self) -> None:
        # The base class flushes an empty first shard when the first sample alone is over the size limit.
        if not self.new_samples:
            return
        # It also never waits for its uploads: with a slow remote, all shards would pile up on the local disk.
        while self.executor._work_queue.qsize() >= UPLOADS and not self.failure:
            time.sleep(0.05)
        self._raise_failure()
        super().flush_shard()

    def exception_callback(self, future: Future[Any]) -> None:
        # The base class raises on cancelled uploads, and keeps only *that* something failed.
        if not future.cancelled():
            self.failure = self.failure or future.exception()

    def __exit__(self, *_: object) -> None:
        self.executor.shutdown(wait=True, cancel_futures=True)

    def _name_next_shard(self, extension: str | None = None) -> tuple[str, str | None]:
        name, compressed = super()._name_next_shard(extension)
        return self.prefix + name, compressed

    def _upload(self, name: str) -> None:
        self.executor.submit(self.cloud_writer.upload_file, name).add_done_callback(self.exception_callback)

    def _wait_for_uploads(self) -> None:
        self.executor.shutdown(wait=True)
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self.failure:
            raise UploadError(f"an upload to {self.remote} failed: {self.failure}") from self.failure
