"""Samples and batches of images or latents, from MDS shards. Images stay uint8; the device normalises them."""

import signal
from collections.abc import Iterator
from typing import Any

import torch
from streaming import StreamingDataLoader

from sit_composer.data.cache import CheckedDataset
from sit_composer.data.pictures import center_crop, decode_image
from sit_composer.data.spec import SPEC_NAME, DataSpec
from sit_composer.data.stream import DataError
from sit_composer.randomness import sample_key


class SitDataset(CheckedDataset):
    """Labelled images or latents. Invalid data raise a DataError, here or when a sample is read.

    A sample has ``index`` (its number in the data set), ``label``, ``key`` (from `randomness`, new in each epoch) and:

    * for pixels, ``image``: uint8 (C, H, W), cropped to ``image_size`` if it has another size;
    * for latents, ``moments``: float16 (2C, H, W), of the image or of its mirror image.

    Args:
        image_size: Side in pixels to which images are cropped; None for the spec's. Ignored for latents.
        flip: Mirror half of the samples. Which half depends only on seed, epoch and index.
        shuffle: A new order in each epoch. It depends on ``seed`` and epoch, not on the number of workers and ranks.
    """

    def __init__(
        self,
        *,
        spec: DataSpec,
        image_size: int | None = None,
        flip: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.image_size = image_size or spec.image_size or 0
        if spec.kind == "pixels" and not self.image_size:
            where = options["remote"] or options["local"]
            raise DataError(f"{where}: the images differ in size, expected an image_size to crop them to")
        self.flip = flip
        self.epoch = 0
        super().__init__(spec=spec, shuffle=shuffle, shuffle_seed=seed, **options)

    def make_sample(self, index: int, row: dict[str, Any]) -> dict[str, Any]:
        """The tensors of a row."""
        key = sample_key(self.shuffle_seed, self.epoch, index)
        flip = self.flip and coin(key)
        if self.spec.kind == "pixels":
            image = center_crop(decode_image(row["image"], self.spec.channels), self.image_size)
            sample = {"image": image.flip(-1) if flip else image}
        else:
            moments = row["moments_flip" if flip else "moments"]
            if moments.ndim != 3 or moments.shape[0] != 2 * self.spec.channels:
                raise ValueError(f"moments: got {moments.shape}, expected {SPEC_NAME}'s {self.spec.channels} channels")
            sample = {"moments": torch.from_numpy(moments.copy())}
        label = int(row["label"])
        if not 0 <= label < self.spec.num_classes:
            raise ValueError(f"label: got {label}, expected one of {SPEC_NAME}'s {self.spec.num_classes} classes")
        return {**sample, "label": label, "index": index, "key": key}

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


def coin(key: int) -> bool:
    """A sample's fair coin."""
    return bool(key & 1)


class SitLoader(StreamingDataLoader):
    """A StreamingDataLoader that stops its workers when one of them fails."""

    _iterator: Any

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        try:
            yield from super().__iter__()
        except Exception:
            self.stop()  # the garbage collector would wait five seconds for each worker
            raise

    def stop(self) -> None:
        """Ends the workers. Call it before the program ends: Python would wait for them forever."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()  # a worker that waits for a store ignores SIGTERM


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
        SitDataset(remote=remote, local=local, spec=spec, batch_size=batch_size, **options),
        batch_size=batch_size,
        num_workers=num_workers,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        # A scheduler's SIGTERM often reaches every process of a job. If it ended the workers, the run could not save.
        worker_init_fn=_ignore_signals,
        prefetch_factor=2 if num_workers else None,
        # Each pass over a DataLoader draws a seed for its workers. Drawn from torch's own generator, a pass over the
        # evaluation data would change the noise of the training after it.
        generator=torch.Generator(),
    )


def _ignore_signals(worker: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # which a process group may receive: the main process decides
        signal.signal(number, signal.SIG_IGN)
