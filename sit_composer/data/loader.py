"""The streaming data set and its loader: MosaicML's StreamingDataset, made safe enough to trust a result.

A shard that is missing, changed or cut short, and a remote that fails, raise a `DataError` that names the file: an
epoch is never short, and never hangs. `CheckedStream` reads the index and vouches for the shards' bytes, `SitDataset`
makes tensors of a sample, and `build_loader` batches. Pictures stay uint8; the device normalises them.
"""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _ShardState

from sit_composer.data.pictures import center_crop, decode_image
from sit_composer.data.spec import SPEC_NAME, DataSpec
from sit_composer.data.stream import CheckedStream, DataError, load_spec, source
from sit_composer.randomness import sample_key
from sit_composer.storage import is_disk_full

__all__ = ["DataError", "SitDataset", "build_loader", "load_spec"]


class SitDataset(StreamingDataset):
    """Labelled pictures or latents.

    A sample has ``index`` (its number in the data set), ``label``, ``key`` (of `randomness`, new in each epoch) and:

    * of pixels, ``image``: uint8 (C, H, W), cropped to ``image_size`` (None: the spec's) if it isn't of that size;
    * of latents, ``moments``: float16 (2C, H, W), of the picture or of its mirror image.

    See `build_loader` for the arguments. ``batch_size`` is a rank's; ``streaming`` are StreamingDataset's own.

    Raises:
        DataError: if anything is wrong with the data, also later, when a sample is read.
    """

    def __init__(
        self,
        *,
        remote: str | None,
        local: str,
        spec: DataSpec,
        batch_size: int,
        image_size: int | None = None,
        flip: bool = False,
        seed: int = 0,
        download_retry: int = 14,
        download_timeout: float = 60,
        cache_limit: int | str | None = None,
        **streaming: Any,
    ) -> None:
        self.spec = spec
        self.image_size = image_size or spec.image_size
        if spec.kind == "pixels" and self.image_size is None:
            raise DataError(f"the pictures of {remote or local} differ in size; say to which image_size to crop them")
        self.flip = flip
        self.epoch = 0
        self.prefetch_failed: set[int] = set()
        remote = source(remote, local)
        download = {"download_retry": download_retry, "download_timeout": download_timeout}
        for attempts_left in reversed(range(10)):
            try:
                self.stream = CheckedStream(spec, remote=remote, local=local, **download)
                super().__init__(
                    streams=[self.stream],
                    batch_size=batch_size,
                    shuffle_seed=seed,
                    cache_limit=cache_limit if remote else None,  # it would delete the source
                    **streaming,
                )
                break
            except DataError:
                raise
            except (ValueError, RuntimeError, OSError) as error:
                # Two jobs that start on a machine at the same moment choose the same name for their shared memory. Of
                # several ranks the others wait for this one in the middle of it, and cannot choose again.
                collision = isinstance(error, FileExistsError) and self._unique_rank_world.ranks_per_node == 1
                if remote and is_disk_full(error):
                    raise DataError(f"{local}: no space left on the disk for copies of {remote}") from error
                if not (collision and attempts_left):
                    raise DataError(f"cannot stream {remote or local}: {error}") from error
        least = self.stream.index_size + max(shard.get_max_size() for shard in self.shards)
        if self.cache_limit and self.cache_limit < least:
            raise DataError(f"cache_limit: {self.cache_limit} bytes don't hold the index and a shard, {least} bytes")
        # What was here before this run is checked by each process when it first touches it.
        self.unchecked = set(np.flatnonzero(self._shard_states.numpy() == _ShardState.LOCAL).tolist())
        # A job killed before its first batch leaves shared memory for which the next is refused ("Reused local
        # directory"). The library passes over a name with this lock file, but makes the file at the first batch only.
        Path(self._cache_filelock_path).touch()

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """The sample of that number; its shard is fetched first if need be."""
        index = int(sample_id)
        shard_id = int(self.spanner[index][0])
        try:
            self._ensure_shard(shard_id)
            return self._tensors(index, super().get_item(index, retry))
        except DataError:
            raise
        except Exception as error:
            where = self.stream.where(self.shards[shard_id])
            raise DataError(f"sample {index}, in {where}: {type(error).__name__}: {error}") from error

    def _tensors(self, index: int, row: dict[str, Any]) -> dict[str, Any]:
        key = sample_key(self.shuffle_seed, self.epoch, index)
        flip = self.flip and coin(key)
        if self.spec.kind == "pixels":
            image = center_crop(decode_image(row["image"], self.spec.channels), self.image_size)
            sample = {"image": image.flip(-1) if flip else image}
        else:
            moments = row["moments_flip" if flip else "moments"]
            if moments.ndim != 3 or moments.shape[0] != 2 * self.spec.channels:
                raise ValueError(f"moments are {moments.shape}, but {SPEC_NAME} says {self.spec.channels} channels")
            sample = {"moments": torch.from_numpy(moments.copy())}
        label = int(row["label"])
        if not 0 <= label < self.spec.num_classes:
            raise ValueError(f"label {label}, but {SPEC_NAME} has {self.spec.num_classes} classes")
        return {**sample, "label": label, "index": index, "key": key}

    def _ensure_shard(self, shard_id: int) -> None:
        """Sees to it that the shard is here, and was checked by this process or by the one that fetched it."""
        if shard_id in self.unchecked:
            fault = self.stream.fault(self.shards[shard_id])
            if fault and self.stream.remote is None:
                raise DataError(f"{fault}; restore it, or write the shards again")
            if fault:
                with FileLock(self._cache_filelock_path):
                    # Another process may be fetching it again, or have done so.
                    local = self._shard_states[shard_id] == _ShardState.LOCAL
                    if local and self.stream.fault(self.shards[shard_id]):
                        self._evict_shard(shard_id)
            self.unchecked.discard(shard_id)
        if self._shard_states[shard_id] != _ShardState.LOCAL:
            self.prepare_shard(shard_id)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetches a shard; if ``blocking``, until it is here or this process's own attempt has failed.

        In place of the stock method, which counts a shard toward ``cache_limit`` only when it is here, so that several
        that are fetched at a time exceed the limit, and which leaves one that failed PREPARING, waited for for ever.
        """
        if not blocking and shard_id in self.prefetch_failed:
            return
        if not blocking and not self.cache_limit and self._shard_states[shard_id] == _ShardState.LOCAL:
            return  # without the file lock, for every sample that is prefetched
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
            raise DataError(f"cannot read the shard {where}: {type(error).__name__}: {error}") from error
        finally:
            with FileLock(self._cache_filelock_path):
                self.cache_usage += grown - shard.get_max_size()
                self._shard_access_times[shard_id] = time.time_ns()
                self._shard_states[shard_id] = state

    def _claim(self, shard_id: int) -> _ShardState:
        """LOCAL: the shard is here. REMOTE: it is now this process's to fetch, with room set aside for it. PREPARING:
        another process fetches it, or what is being fetched takes all the room."""
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
            room = shard.get_max_size()
            if self.cache_limit:
                coming = np.flatnonzero(states == _ShardState.PREPARING)
                taken = self.stream.index_size + sum(self.shards[other].get_max_size() for other in coming)
                if taken + room > self.cache_limit:
                    return _ShardState.PREPARING
                while self.cache_usage + room > self.cache_limit and _ShardState.LOCAL in states:
                    self._evict_coldest_shard()
                if self.cache_usage + room > self.cache_limit:  # somebody else has deleted files
                    self.cache_usage = taken
            self.cache_usage += room
            states[shard_id] = _ShardState.PREPARING
            return _ShardState.REMOTE

    # A shard that fails in the background makes the stock epoch end early, or hang; one that a cache_limit evicts at
    # the wrong moment makes it hang as well: the samples wait for a "ready" thread, which waits for ever. Here the
    # background only fetches ahead: get_item() itself waits for what it needs, or raises.
    def _ready_thread(self, it: Any) -> None:
        it.on_exit()

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        for sample_id in it.sample_ids:
            if it.should_exit():
                break
            if sample_id != -1:
                yield sample_id
            it.yield_index += 1
        it.on_exit()

    def _resume_incr_epoch(self) -> tuple[int, int]:
        self.epoch, sample_in_epoch = super()._resume_incr_epoch()  # at an epoch's start, in each process that reads
        return self.epoch, sample_in_epoch

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where the run is, for a checkpoint; ``num_samples`` counts those of all ranks."""
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            # Composer's checkpoint at an epoch's end counts 0 samples of the next one. The stock method takes that for
            # the start of the epoch just done, whose order and flips a resumed run would then see again.
            state["epoch"] = max(state["epoch"], self.next_epoch)
        return state


def coin(key: int) -> bool:
    """A sample's fair coin."""
    return bool(key & 1)


class SitLoader(StreamingDataLoader):
    """A StreamingDataLoader that stops its workers when one of them fails."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        try:
            yield from super().__iter__()
        except Exception:
            self.stop()  # left to the garbage collector, they are waited for five seconds each
            raise

    def stop(self) -> None:
        """Ends the workers. Before the program ends this must be called: Python would wait for them for ever."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()  # one that waits for a store, and is deaf to the SIGTERM that it has been sent


def build_loader(
    remote: str | None,
    local: str,
    *,
    spec: DataSpec,
    batch_size: int,
    image_size: int | None = None,
    flip: bool = False,
    shuffle: bool = True,
    seed: int = 0,
    num_workers: int = 0,
    drop_last: bool = True,
    **options: Any,
) -> SitLoader:
    """A loader of dicts: `SitDataset`'s ``image`` or ``moments``, stacked; int64 ``label``, ``index`` and ``key`` (N,).

    Args:
        remote: Folder or URI (s3://, gs://, …) of the shards; None if they are in ``local``.
        local: The folder of the shards, or of the local copies of the remote ones: one folder for every running job.
        spec: What the shards hold, as of `load_spec`.
        batch_size: Samples a batch and rank. All ranks have equally many batches, for which an epoch may repeat a few
            samples; with ``drop_last`` every batch is full.
        image_size: Side in pixels to which pictures are cropped; None for the spec's. Of no meaning for latents.
        flip: Mirror half of the samples, in each epoch others; which is a function of seed, epoch and index alone.
        shuffle: Another order each epoch, a function of ``seed`` and epoch, whatever the number of workers and ranks.
        num_workers: Processes a rank that read; with 0 this one does.
        options: predownload (samples whose shards a worker fetches ahead; 8 batches), cache_limit (bytes or "100gb",
            of at least four shards; without a remote it means nothing), download_retry (attempts to fetch a shard from
            S3 when that doesn't answer, 14: five minutes), download_timeout (60 seconds), epoch_size,
            num_canonical_nodes, shuffle_algo, shuffle_block_size: all as StreamingDataset has them.

    Raises:
        DataError: if anything is wrong with the data; while iterating too, with any number of workers.
    """
    dataset = SitDataset(
        remote=remote,
        local=local,
        spec=spec,
        batch_size=batch_size,
        image_size=image_size,
        flip=flip,
        shuffle=shuffle,
        seed=seed,
        **options,
    )
    return SitLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        # A SIGTERM often reaches a job's every process. Workers would die of it, and the run could not save.
        worker_init_fn=_ignore_sigterm,
        prefetch_factor=2 if num_workers else None,
        # Each pass over a DataLoader draws a seed for its workers; from torch's own generator, an evaluation would
        # change the noise of the training after it.
        generator=torch.Generator(),
    )


def _ignore_sigterm(worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
