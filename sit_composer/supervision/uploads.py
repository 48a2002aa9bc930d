"""Uploads checkpoints to the object store while training continues."""

import queue
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from composer.utils import dist

from sit_composer.checkpoint.folder import prune
from sit_composer.checkpoint.safe_load import METADATA
from sit_composer.checkpoint.sharded import load_metadata, sharded_files
from sit_composer.storage import RemoteFolder, StorageError, open_store
from sit_composer.supervision.lease import Lease


class Uploads:
    """Uploads each checkpoint while training continues, one at a time, and prunes the old ones there.

    The lease is checked before each request that makes a file appear. For a file in parts this is the last request,
    which puts the parts together; a sharded checkpoint becomes complete with its metadata, the last file. ``keep``
    complete checkpoints stay (-1: all), and a failing upload is retried for ``patience`` seconds.
    """

    def __init__(self, folder: RemoteFolder, lease: Lease, keep: int, patience: float):
        self.folder = open_store(folder.uri)  # with its own client: the lease writes with the other
        self.folder.before_writing(lease.check)
        self.lease = lease
        self.keep = keep
        self.patience = patience
        self.failure: StorageError | None = None
        self._last: str | None = None  # the last sharded checkpoint that this rank began to upload
        self._files = 0  # queued files of checkpoints
        self._jobs: queue.Queue[Path | Callable[[], object] | None] = queue.Queue()  # None: the end
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises StorageError if an upload has failed for good, or the lease is lost."""
        if self.failure is not None:
            raise self.failure
        self.lease.raise_if_lost()

    def wait(self) -> None:
        """Waits for all uploads."""
        self._jobs.join()
        self.check()

    def end(self, seconds: float = 60) -> bool:
        """Ends the thread; returns whether the queued checkpoints were uploaded within so many seconds."""
        self._jobs.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def take(self, files: list[str]) -> None:
        """Queues files that Composer has saved: a ``.pt``, or a shard with those beside it."""
        for file in files:
            if self._files:  # so local space for two checkpoints is enough
                self.wait()
            self._files = 1
            self._jobs.put(Path(file))

    def put(self, name: str, content: bytes) -> None:
        """Queues a small file, which replaces the one of that name."""
        self.do(partial(self._patiently, self.folder.write, name, content))

    def do(self, job: Callable[[], object]) -> None:
        """Queues a job behind what was queued before."""
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self.failure is None:
                    self._upload(job) if isinstance(job, Path) else job()
            except StorageError as error:
                self.failure = error
            except Exception as error:  # a bug or a failing local disk must stop training too
                self.failure = StorageError(f"{self.folder.uri}: {type(error).__name__}: {error}")
            finally:
                if isinstance(job, Path):
                    self._files = 0
                self._jobs.task_done()

    def _upload(self, path: Path) -> None:
        place = path.parent
        if path.suffix == ".pt":
            self._patiently(self.folder.upload, path, path.name)
            path.unlink()
        else:
            name = place.name  # ep0-ba10/__RANK_0.distcp
            if self._last not in (None, name):  # else a kill could leave two checkpoints, none of them complete
                self._patiently(self._expect, self._last, {METADATA: 1})
            self._last = name
            for shard in sorted(place.glob(f"{path.name.rpartition('_')[0]}_*.distcp")):
                self._patiently(self.folder.upload, shard, f"{name}/{shard.name}")
                shard.unlink()
            metadata = place / METADATA
            if metadata.exists():  # on rank 0, the last file of all
                needed = sharded_files(load_metadata(metadata.read_bytes(), str(metadata)))
                self._patiently(self._expect, name, needed)
                self._patiently(self.folder.upload, metadata, f"{name}/{METADATA}")
                metadata.unlink()
        if dist.get_global_rank() == 0 and self.keep >= 0:
            self._patiently(prune, self.folder, self.keep)

    def _expect(self, name: str, needed: dict[str, int]) -> None:
        """Raises StorageError if a file that another rank uploads isn't there yet."""
        sizes = self.folder.listing()
        late = [file for file, size in needed.items() if sizes.get(f"{name}/{file}", -1) < size]
        if late:
            raise StorageError(f"{self.folder.uri}/{name}/{late[0]}: its rank hasn't uploaded it yet")

    def _patiently(self, action: Callable[..., None], *arguments: Any) -> None:
        deadline, pause = time.monotonic() + self.patience, 0.5
        while True:
            try:
                self.lease.check()  # as another job may have taken the folder
                return action(*arguments)
            except StorageError as error:
                if self.lease.lost is not None or time.monotonic() + pause > deadline:
                    raise
                if pause > 4:  # waiting for other ranks is normal at first
                    print(f"warning: {error}; retrying for up to {self.patience:.0f} s", file=sys.stderr, flush=True)
                time.sleep(pause)
                pause = min(2 * pause, 30)
