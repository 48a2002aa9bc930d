"""Samples and batches of images or latents, from MDS shards. Images stay uint8; the device normalises them."""

import atexit
import os
import shutil
import signal
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from streaming import StreamingDataLoader
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from sit_composer.data.ahead import ahead
from sit_composer.data.cache import CheckedDataset
from sit_composer.data.needs import AHEAD, PLACES, SHARED
from sit_composer.data.pictures import decode_into
from sit_composer.data.slots import Slots
from sit_composer.data.spec import SPEC_NAME, DataSpec
from sit_composer.data.stream import DataError
from sit_composer.launch import follow_parent
from sit_composer.randomness import sample_keys

MOST_THREADS = 8  # that decode images in a process without workers
# Images or moments, and features if they are asked for, by name; and label, index and key, int64 (3, N).
Batch = tuple[dict[str, Tensor], np.ndarray]


class SitDataset(CheckedDataset):
    """Labelled images or latents. Invalid data raise a DataError, here or when a sample is read.

    A sample has ``index`` (its number in the data set), ``label``, ``key`` (from `randomness`, new in each epoch) and:

    * for pixels, ``image``: uint8 (C, H, W), cropped to ``image_size`` if it has another size;
    * for latents, ``moments``: float16 (2C, H, W), of the image or of its mirror image; (C, H, W) without deviation;
      and with ``features`` a teacher's features of the same one: float16 (T, D).

    ``dataset[index]`` is a sample. Iterating, as `SitLoader` does, gives the batches of an epoch.

    Args:
        image_size: Side in pixels to which images are cropped; None for the spec's. Ignored for latents.
        flip: Mirror half of the samples. Which half depends only on seed, epoch and index.
        shuffle: A new order in each epoch. It depends on ``seed`` and epoch, not on the number of workers and ranks.
        features: Read the features of the spec's teacher, which are many times as large as latents.
    """

    def __init__(
        self,
        *,
        spec: DataSpec,
        image_size: int | None = None,
        flip: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        features: bool = False,
        **options: Any,
    ) -> None:
        self.image_size = image_size or spec.image_size or 0
        if spec.kind == "pixels" and not self.image_size:
            where = options["remote"] or options["local"]
            raise DataError(f"{where}: the images differ in size, expected an image_size to crop them to")
        self.flip = flip
        self.epoch = 0
        super().__init__(spec=spec, shuffle=shuffle, shuffle_seed=seed, **options)
        self.slots: dict[str, Slots] = {}  # of each tensor, shared with the workers that a loader has started
        self._decoders: ThreadPoolExecutor | None = None
        self._fill = self._decode
        self.fields = ("image",) if spec.kind == "pixels" else ("moments", "features") if features else ("moments",)
        if spec.kind == "latents":
            same = self.layout is not None and self._fault(self.layout["moments"].shape) is None
            self._fill = self._gather if same else self._stack
        if features:
            expected = (spec.features["grid"] ** 2, spec.features["width"])
            found = self.layout["features"].shape if self._fill == self._gather else "columns of several sizes"
            if found != expected:
                where = options["remote"] or options["local"]
                raise DataError(f"{where}: features: got {found}, expected {expected}, by {SPEC_NAME}")

    def get_item(self, sample_id: int, retry: int = 0) -> dict[str, Any]:
        """The sample of that number. Fetches its shard first if it is not here."""
        if not 0 <= sample_id < self.size:
            raise IndexError(f"got sample {sample_id} of {self.size}")
        tensors, numbers = self.read(np.array([sample_id], np.int64))
        label, index, key = numbers[:, 0].tolist()
        return {name: tensor[0] for name, tensor in tensors.items()} | {"label": label, "index": index, "key": key}

    @property
    def batch_bytes(self) -> dict[str, int]:
        """The bytes of each of a batch's tensors whose size is known."""
        if self.spec.kind == "pixels":
            return {"image": self.batch_size * self.spec.channels * self.image_size**2}
        return {name: self.batch_size * self.layout[name].itemsize for name in self.fields if self.layout is not None}

    def read(self, indices: np.ndarray) -> Batch:
        """The batch of the samples of those numbers, int64 (N,). In memory, images are (N, H, W, C)."""
        key = sample_keys(self.shuffle_seed, self.epoch, torch.from_numpy(indices))
        flips = coin(key).tolist() if self.flip else [0] * len(indices)
        label = np.empty(len(indices), np.int64)
        tensors = self._fill(indices, flips, label)
        strange = np.flatnonzero((label < 0) | (label >= self.spec.num_classes))
        if len(strange):
            got, classes = label[strange[0]], self.spec.num_classes
            text = f"label: got {got}, expected one of {SPEC_NAME}'s {classes} classes"
            raise self.error(indices[strange[0]], ValueError(text))
        return tensors, np.stack([label, indices, key.numpy()])

    def _gather(self, indices: np.ndarray, flips: list[int], label: np.ndarray) -> dict[str, Tensor]:
        """Moments (N, 2C, H, W) and features (N, T, D), each copied once. Fills in the labels."""
        shapes = {name: (len(indices), *self.layout[name].shape) for name in self.fields}
        tensors = {name: self._empty(name, shape, torch.float16) for name, shape in shapes.items()}
        outs = [(tensor.numpy(), (name, f"{name}_flip")) for name, tensor in tensors.items()]
        for place, shard, row in self.locate(indices):
            for out, sides in outs:
                out[place] = shard.columns[sides[flips[place]]][row]
            label[place] = shard.columns["label"][row]
        return tensors

    def _decode(self, indices: np.ndarray, flips: list[int], label: np.ndarray) -> dict[str, Tensor]:
        """Images (N, C, H, W), decoded into one tensor, by several threads if there are no workers. Fills in labels."""
        shape = (len(indices), self.image_size, self.image_size, self.spec.channels)
        tensor = self._empty("image", shape, torch.uint8)  # as decoders write
        out = tensor.numpy()

        def decode(sample: tuple[int, dict[str, Any]]) -> None:
            place, columns = sample
            try:
                decode_into(out[place], columns["image"], bool(flips[place]))
            except Exception as error:
                raise self.error(indices[place], error) from error

        threads = self._threads() if len(indices) > 1 else None
        for _ in (threads.map if threads else map)(decode, self._rows(indices, label)):
            pass
        return {"image": tensor.permute(0, 3, 1, 2)}

    def _stack(self, indices: np.ndarray, flips: list[int], label: np.ndarray) -> dict[str, Tensor]:
        """Moments (N, 2C, H, W) of shards whose rows have sizes of their own. Fills in the labels."""
        rows = dict(self._rows(indices, label))
        moments = [rows[place]["moments_flip" if flip else "moments"] for place, flip in enumerate(flips)]
        for index, array in zip(indices, moments, strict=True):
            if fault := self._fault(array.shape, moments[0].shape):
                raise self.error(index, ValueError(fault))
        return {"moments": torch.from_numpy(np.stack(moments))}

    def _rows(self, indices: np.ndarray, label: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        """The samples' places among ``indices``, and their columns, one after another. Fills in the labels."""
        for place, shard, row in self.locate(indices):
            try:
                columns = shard.decode(row)
                label[place] = columns["label"]
            except Exception as error:
                raise self.error(indices[place], error) from error
            yield place, columns

    def _empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        worker = get_worker_info()
        if worker is None or name not in self.slots:
            return torch.empty(shape, dtype=dtype)
        return self.slots[name].empty(worker.id, shape, dtype)

    def hand_over(self, batch: Batch) -> tuple[Any, np.ndarray]:
        """A batch as a worker sends it."""
        tensors, numbers = batch
        return {k: self.slots[k].handed(t) if k in self.slots else t for k, t in tensors.items()}, numbers

    def _fault(self, shape: tuple[int, ...], other: tuple[int, ...] | None = None) -> str | None:
        """What is wrong with the moments' shape, or None."""
        if len(shape) != 3 or shape[0] != self.spec.stored:
            return f"moments: got {shape}, expected ({self.spec.stored}, H, W), by {SPEC_NAME}"
        side = (self.spec.image_size or 0) // self.spec.autoencoder["downsample"]
        if side and shape[1:] != (side, side):
            return f"moments: got {shape}, expected ({self.spec.stored}, {side}, {side}), by {SPEC_NAME}"
        return f"moments: got {shape}, expected {other} as of other samples" if other not in (None, shape) else None

    def _threads(self) -> ThreadPoolExecutor | None:
        """Threads that decode; None in a worker, or if this process has one core."""
        cores = len(os.sched_getaffinity(0)) // self._unique_rank_world.ranks_per_node
        if get_worker_info() is not None or cores < 2:
            return None
        if self._decoders is None:
            self._decoders = ThreadPoolExecutor(min(cores, MOST_THREADS), "decode")
        return self._decoders

    def _resume_incr_epoch(self) -> tuple[int, int]:
        self.epoch, sample_in_epoch = super()._resume_incr_epoch()  # called at each epoch's start in each worker
        return self.epoch, sample_in_epoch

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """The position of the run, for a checkpoint. ``num_samples`` counts the samples of all ranks."""
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            # Composer's checkpoint at an epoch's end counts 0 samples of the next epoch. The stock method takes that
            # for the start of the finished epoch, and a resumed run would repeat its order and flips.
            state["epoch"] = max(state["epoch"], self.next_epoch)
        return state


def coin(key: Any) -> Any:
    """A fair coin, 0 or 1, of a key, or of each key of a tensor."""
    return key & 1


class SitLoader(StreamingDataLoader):
    """A loader of `SitDataset`'s batches, which workers read, or a thread; it stops them when one of them fails."""

    dataset: SitDataset
    _iterator: Any
    _ahead: Any = None

    def __init__(self, dataset: SitDataset, **options: Any) -> None:
        super().__init__(dataset, batch_size=None, collate_fn=dataset.hand_over, **options)
        # The data set makes the batches. Composer and len() read these.
        self.__dict__ |= {"batch_size": dataset.batch_size, "drop_last": dataset.drop_last}
        # At the program's end Python would send the workers a SIGTERM, which they ignore, and wait for them forever.
        atexit.register(_stop, weakref.ref(self))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.num_samples_yielded = 0
        if self.num_workers and self._iterator is None:
            sizes = self.dataset.batch_bytes
            need = self.dataset._unique_rank_world.ranks_per_node * self.num_workers * PLACES * sum(sizes.values())
            if os.path.isdir(SHARED) and (free := shutil.disk_usage(SHARED).free) < need:  # Linux would kill a worker
                what = f"the workers' batches need {need / 1e6:.3g} MB of {SHARED}, which has {free / 1e6:.3g} left"
                raise DataError(f"num_workers: {what}; use fewer, or smaller batches; in a container: --shm-size")
            self.dataset.slots = {name: Slots(self.num_workers, PLACES, size) for name, size in sizes.items()}
        # Not by its next(), which makes a record for torch's profiler, slowly.
        batches: Any = iter(DataLoader.__iter__(self)._next_data, None)
        if self.num_workers == 0:
            batches = self._ahead = ahead(batches, AHEAD)
        try:
            for tensors, numbers in batches:
                # The small ones have no part in the tensor's memory, as a list of labels would keep all of it.
                small = torch.from_numpy(numbers)
                label, index, key = (small.pin_memory() if self.pin_memory else small).unbind()
                self.num_samples_yielded += len(label)
                yield {**tensors, "label": label, "index": index, "key": key}
        except Exception:
            self.stop()  # the garbage collector would wait five seconds for each worker
            raise
        finally:
            if self.num_workers == 0:
                batches.close()

    def stop(self) -> None:
        """Ends the workers or the thread."""
        if self._ahead is not None:
            self._ahead.close()
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()  # a worker that waits for a store ignores SIGTERM
                worker.join()


def _stop(loader: "weakref.ref[SitLoader]") -> None:
    if (living := loader()) is not None:
        living.stop()


def build_loader(
    remote: str | None,
    local: str,
    *,
    spec: DataSpec,
    batch_size: int,
    num_workers: int = 0,
    drop_last: bool = True,
    **options: Any,
) -> SitLoader:
    """A loader of dicts: `SitDataset`'s ``image`` or ``moments``, stacked; int64 ``label``, ``index`` and ``key`` (N,).

    ``batch_size`` is per rank, and ``num_workers`` of 0 reads in this process. All ranks have the same number of
    batches, for which an epoch may repeat a few samples. The other options are `SitDataset`'s and `CheckedDataset`'s.
    Invalid data raise a DataError, here or while iterating, with any number of workers.
    """
    return SitLoader(
        SitDataset(remote=remote, local=local, spec=spec, batch_size=batch_size, drop_last=drop_last, **options),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        # A scheduler's SIGTERM often reaches every process of a job. If it ended the workers, the run could not save.
        worker_init_fn=_begin_worker,
        prefetch_factor=AHEAD if num_workers else None,
        # Each pass over a DataLoader draws a seed for its workers. Drawn from torch's own generator, a pass over the
        # evaluation data would change the noise of the training after it.
        generator=torch.Generator(),
    )


def _begin_worker(worker: int) -> None:
    follow_parent()  # torch's workers look for it between batches, and not while streaming's barriers wait
    for number in (signal.SIGTERM, signal.SIGINT):  # which a process group may receive: the main process decides
        signal.signal(number, signal.SIG_IGN)
