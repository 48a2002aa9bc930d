"""A streaming data set whose shards are fetched, checked and evicted without a hang or a short epoch.

StreamingDataset fetches shards in background threads. A shard that fails there ends its epoch early or hangs it. Here
the background only fetches ahead: reading a sample waits for the shard, or raises a `DataError` that names the file.
The order of the samples is StreamingDataset's, which opens a file for each sample; here, an epoch is read by batches
from mapped files.
"""

import threading
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from streaming import StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _ShardState
from streaming.base.shared import barrier

from sit_composer.data.rows import OpenShards, Rows, row_layout
from sit_composer.data.shared_names import one_job_at_a_time
from sit_composer.data.spec import DataSpec
from sit_composer.data.stream import CheckedStream, DataError, source
from sit_composer.storage import is_disk_full

STARTS = 10  # attempts to choose a name for shared memory
READS = 8  # attempts to read a shard that other processes evict
# Seconds. Streaming's barriers, three before an epoch's first batch, look every 7 ms, and their lock every 50 ms.
POLL = barrier.TICK = 0.0005


class CheckedDataset(StreamingDataset):
    """The rows of a `CheckedStream`. Invalid data raise a DataError, here or when a sample is read.

    Args:
        remote: Folder or URI (s3://, gs://, …) of the shards; None if they are in ``local``.
        local: The folder of the shards, or of the local copies of the remote ones. Each running job needs its own.
        spec: The contents of the shards, from `load_spec`.
        download_retry: Attempts, each of ``download_timeout`` seconds, to fetch a shard. 14 take five minutes.
        drop_last: Leave out what remains of an epoch's samples after the last whole batch of this worker.
        cache_limit: Bytes, or text such as "100gb", of at least four shards; ignored if there is no remote.
        options: StreamingDataset's own: batch_size (per rank), shuffle, shuffle_seed, predownload (samples whose shards
            a worker fetches ahead; 8 batches), epoch_size, num_canonical_nodes, shuffle_algo, shuffle_block_size.
    """

    cache_usage: int  # StreamingDataset's, in memory that all processes share

    def __init__(
        self,
        *,
        remote: str | None,
        local: str,
        spec: DataSpec,
        download_retry: int = 14,
        download_timeout: float = 60,
        cache_limit: int | str | None = None,
        drop_last: bool = False,
        **options: Any,
    ) -> None:
        self.spec = spec
        self.drop_last = drop_last
        self.prefetch_failed: set[int] = set()
        remote = source(remote, local)
        options["cache_limit"] = cache_limit if remote else None  # a limit would delete the source
        for attempts_left in reversed(range(STARTS)):
            try:
                places = {"remote": remote, "local": local}
                self.stream = CheckedStream(spec, download_retry, **places, download_timeout=download_timeout)
                with one_job_at_a_time():
                    super().__init__(streams=[self.stream], **options)
                break
            except DataError:
                raise
            except (ValueError, RuntimeError, OSError) as error:
                # Another user's job may have taken the name for the shared memory. With several ranks, the others wait
                # for this one inside the constructor and cannot choose again.
                collision = isinstance(error, FileExistsError) and self._unique_rank_world.ranks_per_node == 1
                if remote and is_disk_full(error):
                    raise DataError(f"{local}: no space left on the disk for copies of {remote}") from error
                if not (collision and attempts_left):
                    raise DataError(f"{remote or local}: can't be streamed: {error}") from error
        least = self.stream.index_size + max(shard.get_max_size() for shard in self.shards)
        if self.cache_limit and self.cache_limit < least:
            raise DataError(f"cache_limit: {self.cache_limit} bytes don't hold the index and a shard, {least} bytes")
        kinds = {(*shard.column_encodings, *shard.column_names): shard for shard in self.shards}
        # Of the rows of all shards; None if they differ.
        self.layout = row_layout(kinds.popitem()[1]) if len(kinds) == 1 else None
        self.open_shards = OpenShards(self.layout)
        # Each process checks a shard that an earlier run fetched when it first reads from it.
        self.unchecked = set(np.flatnonzero(self._shard_states.numpy() == _ShardState.LOCAL).tolist())
        # A job killed before its first batch leaves shared memory, for which streaming refuses the next job ("Reused
        # local directory"). It passes over a name with this lock file, but creates the file only at the first batch.
        Path(self._cache_filelock_path).touch()

    def __iter__(self) -> Iterator[Any]:
        """The batches of an epoch, as `read` returns them, of this worker: the next epoch, or what is left of one that
        was resumed."""
        self._unique_worker_world = self._unique_rank_world.detect_workers()
        self._parallel_worker_world = self._parallel_rank_world.detect_workers()
        self._shared_barrier.lock = FileLock(self._shared_barrier.filelock_path, poll_interval=POLL)
        work = self._get_work(*self._resume_incr_epoch())
        work = work[work != -1]
        used = len(work) // self.batch_size * self.batch_size if self.drop_last else len(work)
        with Prefetch(self, work) as prefetch:
            for start in range(0, used, self.batch_size):
                prefetch.at(start)
                yield self.read(work[start : min(start + self.batch_size, used)])

    @abstractmethod
    def read(self, indices: np.ndarray) -> Any:
        """The batch of the samples of those numbers, int64 (N,)."""

    def locate(self, indices: np.ndarray) -> Iterator[tuple[int, Rows, int]]:
        """For each number, shard by shard: its place among ``indices``, its shard, and its row there."""
        shard_ids = self.shards_of(indices)
        rows = (indices - self.sample_offset_per_shard[shard_ids]).tolist()
        places: dict[int, list[int]] = {}
        for place, shard_id in enumerate(shard_ids.tolist()):
            places.setdefault(shard_id, []).append(place)
        for shard_id, here in places.items():
            try:
                shard = self._open_shard(shard_id)
            except Exception as error:
                raise self.error(indices[here[0]], error) from error
            for place in here:
                yield place, shard, rows[place]
            self._shard_access_times[shard_id] = time.time_ns()
            if self.cache_limit:
                self.open_shards.close()  # an evicted file's bytes stay on the disk while it is open

    def shards_of(self, indices: np.ndarray) -> np.ndarray:
        """The numbers of the samples' shards."""
        return np.asarray(np.searchsorted(self.sample_offset_per_shard, indices, side="right") - 1)

    def error(self, index: Any, error: Exception) -> DataError:
        """What is wrong with the sample of that number, and where."""
        if isinstance(error, DataError):
            return error
        where = self.stream.where(self.shards[self.shards_of(np.array([index]))[0]])
        return DataError(f"{where}: sample {index}: {type(error).__name__}: {error}")

    def _open_shard(self, shard_id: int) -> Rows:
        shard = self.shards[shard_id]
        self._ensure_shard(shard_id)
        for _ in range(READS):
            try:
                return self.open_shards.rows(shard_id, self.stream.path(shard), shard)
            except FileNotFoundError:  # another process has evicted it in the meantime
                self.prepare_shard(shard_id)
        raise RuntimeError(f"evicted {READS} times before it was read; raise cache_limit")

    def _ensure_shard(self, shard_id: int) -> None:
        """Ensures that the shard is here, checked by this process or by the process that fetched it."""
        shard = self.shards[shard_id]
        if shard_id in self.unchecked:
            fault = self.stream.fault(shard)
            if fault and self.stream.remote is None:
                raise DataError(fault)
            if fault:
                with FileLock(self._cache_filelock_path):
                    # Another process may be fetching it again, or have done so.
                    local = self._shard_states[shard_id] == _ShardState.LOCAL
                    if local and self.stream.fault(shard):
                        self._evict_shard(shard_id)
            self.unchecked.discard(shard_id)
        if self._shard_states[shard_id] != _ShardState.LOCAL:
            self.prepare_shard(shard_id)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetches a shard. If ``blocking``, returns when it is here and raises if this process failed to fetch it.

        Replaces the stock method, which counts a shard toward ``cache_limit`` only when it is here, so that several
        fetched together exceed the limit, and which leaves a failed shard PREPARING, so that readers wait forever.
        """
        if not blocking and shard_id in self.prefetch_failed:
            return
        if not blocking and not self.cache_limit and self._shard_states[shard_id] == _ShardState.LOCAL:
            return  # without taking the file lock for every prefetched sample
        while (state := self._claim(shard_id)) == _ShardState.PREPARING:
            if not blocking:
                return
            time.sleep(TICK)
        if state == _ShardState.LOCAL:
            return
        shard = self.shards[shard_id]
        grown = 0
        try:
            grown = self.stream.prepare_shard(shard)
            state = _ShardState.LOCAL
            self.prefetch_failed.discard(shard_id)
        except Exception as error:
            if not blocking:
                self.prefetch_failed.add(shard_id)  # get_item() will try again, and raise
                return
            where = self.stream.where(shard)
            if is_disk_full(error):
                raise DataError(f"{self.stream.local}: no space left on the disk for {where}") from error
            raise DataError(f"{where}: can't be read: {type(error).__name__}: {error}") from error
        finally:
            with FileLock(self._cache_filelock_path):
                self.cache_usage += grown - shard.get_max_size()
                self._shard_access_times[shard_id] = time.time_ns()
                self._shard_states[shard_id] = state

    def _claim(self, shard_id: int) -> _ShardState:
        """Claims a shard for fetching.

        LOCAL: the shard is here. REMOTE: this process must fetch it, and its bytes are reserved in the cache.
        PREPARING: another process fetches it, or the shards being fetched leave no room for it.
        """
        shard = self.shards[shard_id]
        states = self._shard_states.numpy()
        with FileLock(self._cache_filelock_path):
            if states[shard_id] == _ShardState.LOCAL:
                if (Path(self.stream.local) / shard.file_pairs[0][0].basename).is_file():
                    self._shard_access_times[shard_id] = time.time_ns()
                    return _ShardState.LOCAL
                if self.stream.remote is not None:  # a job was killed before it had decompressed the shard
                    self._evict_shard(shard_id)
            elif states[shard_id] == _ShardState.PREPARING:
                return _ShardState.PREPARING
            size = shard.get_max_size()
            if self.cache_limit and not self._make_room(size, states):
                return _ShardState.PREPARING
            self.cache_usage += size
            states[shard_id] = _ShardState.PREPARING
            return _ShardState.REMOTE

    def _evict_shard(self, shard_id: int) -> None:
        with suppress(FileNotFoundError):  # another job that shares the folder has evicted it just now
            super()._evict_shard(shard_id)

    def _make_room(self, size: int, states: np.ndarray) -> bool:
        """Evicts shards until the cache has room; False if the shards being fetched leave none."""
        coming = np.flatnonzero(states == _ShardState.PREPARING)
        taken = self.stream.index_size + sum(self.shards[other].get_max_size() for other in coming)
        if taken + size > self.cache_limit:
            return False
        while self.cache_usage + size > self.cache_limit and _ShardState.LOCAL in states:
            self._evict_coldest_shard()
        if self.cache_usage + size > self.cache_limit:  # another program has deleted files
            self.cache_usage = taken
        return True


class Prefetch:
    """Fetches the shards of the samples to come, in a thread, up to ``predownload`` samples ahead."""

    def __init__(self, dataset: CheckedDataset, work: np.ndarray) -> None:
        self.dataset = dataset
        self.work = work
        self._reached: int | None = 0  # the first sample of the batch that is read
        self._moved = threading.Condition()

    def __enter__(self) -> "Prefetch":
        if self.dataset.stream.remote is not None:
            # A daemon, as the program need not wait for a store to answer.
            threading.Thread(target=self._run, name="shards", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.at(None)

    def at(self, reached: int | None) -> None:
        """Notes where the reader is; None: it is done."""
        with self._moved:
            self._reached = reached
            self._moved.notify()

    def _run(self) -> None:
        dataset, size = self.dataset, self.dataset.batch_size
        states, access_times = dataset._shard_states.numpy(), dataset._shard_access_times.numpy()
        for start in range(0, len(self.work), size):
            with self._moved:
                while self._reached is not None and start - self._reached > dataset.predownload:
                    self._moved.wait()
            shard_ids = dataset.shards_of(self.work[start : start + size])
            here = states[shard_ids] == _ShardState.LOCAL
            if dataset.cache_limit:
                access_times[shard_ids[here]] = time.time_ns()  # so that they aren't evicted before they are read
            for shard_id in dict.fromkeys(shard_ids[~here].tolist()):
                if self._reached is None:
                    return
                dataset.prepare_shard(shard_id, blocking=False)
