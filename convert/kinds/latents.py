"""Images as shards of latents keep them: an autoencoder's mean and standard deviation, for each image and its mirror
image. They are not standardized: `spec.json` says how training does it."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from psutil import virtual_memory
from torch import Tensor

from convert.kinds import MEASURE, BadPicture, Row
from convert.kinds.cropping import levels
from convert.kinds.statistics import doubt, fields, measured, overall, sums_of
from convert.sources.parts import InputError, Sample
from sit_composer.autoencoder import DiffusersAutoencoder, from_uint8
from sit_composer.errors import UserError, first_line
from sit_composer.teacher import Teacher, load_teacher

GPU_BATCH = 32  # images
BYTES_PER_PIXEL = 6 * 4 * 128  # memory of an encoder of 128 channels, about
SIDES = ("", "_flip")  # how the columns of an image and of its mirror image end
CPU_BATCH = 32 * 32 * 32  # pixels: more at a time would not fit the caches


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class Latents:
    """Samples of kind ``latents``: ``moments`` and ``moments_flip``, float16 (2C, H, W), mean before deviation; or
    (C, H, W), if the autoencoder is deterministic. ``statistics``: None for the autoencoder's own, MEASURE for those of
    the data, or means and deviations. ``features``: a teacher's name and grid, whose features are stored too, as
    ``features`` and ``features_flip``, float16 (T, D).

    The same images, options, kind of processor and libraries give the same bits; so a CPU encodes each batch on one
    thread, and as many batches at a time as it has cores. A GPU encodes one while the next is transferred. Another
    ``batch_size`` may change the last bits.
    """

    def __init__(
        self,
        vae: str,
        image_size: int,
        crop: bool,
        dtype: str,
        batch_size: int | None,
        cores: int,
        statistics: str | tuple[list[float], list[float]] | None = None,
        features: tuple[str, int] | None = None,
    ) -> None:
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32; bfloat16 is as fast as ever
        self.device = default_device()
        if batch_size is None:
            batch_size = GPU_BATCH if self.device == "cuda" else min(GPU_BATCH, max(1, CPU_BATCH // image_size**2))
        try:
            self.encoder = DiffusersAutoencoder(vae, self.device, getattr(torch, dtype), slice_size=batch_size)
        except UserError as error:
            raise InputError(f"--vae: {str(error).removeprefix('autoencoder.name: ')}") from None
        except RuntimeError as error:  # the GPU's memory is in use by others
            raise MemoryError(f"--vae: can't be moved to the {self.device}: {first_line(error)}") from None
        self.encoder.vae.to(memory_format=torch.channels_last)  # faster convolutions
        self.teacher = open_teacher(*features, dtype) if features else None
        if self.device == "cuda":
            torch.cuda.synchronize()  # before other streams read the weights
        self.batch_size, self.image_size, self.statistics = batch_size, image_size, statistics
        self.of = self.encoder.spec
        if isinstance(statistics, tuple):
            self.of = replace(self.of, **fields(*statistics, "file"))
        memory = batch_size * image_size**2 * BYTES_PER_PIXEL
        self.at_once = 2 if self.device == "cuda" else max(1, min(cores, virtual_memory().available // memory))
        self.pool = ThreadPoolExecutor(self.at_once, initializer=self._begin_thread)
        channels = self.encoder.picture_channels
        if channels not in (1, 3):
            raise InputError(f"--vae: {vae!r} is for images of {channels} channels, expected 1 or 3")
        self.prepare = partial(levels, channels=channels, image_size=image_size if crop else None)
        self.preload = ["convert.kinds.cropping"]

    @property
    def columns(self) -> dict[str, str]:
        if self.teacher is None:
            return dict.fromkeys(("moments", "moments_flip"), "ndarray:float16") | {"label": "int"}
        side, teacher = self.image_size // self.of.downsample, self.teacher
        shapes = {"moments": f"{self.of.stored},{side},{side}", "features": f"{teacher.grid**2},{teacher.width}"}
        # With sizes, so that rows have one size, and a loader reads only what a run asks for.
        return {name + end: f"ndarray:float16:{s}" for name, s in shapes.items() for end in SIDES} | {"label": "int"}

    def rows(self, images: Iterable[tuple[Sample, Any]]) -> Iterator[Row]:
        encoding: deque[Future[list[Row]]] = deque()
        try:
            for batch in self._batches(images):
                encoding.append(self.pool.submit(self._encode, batch))
                if len(encoding) > self.at_once:  # one batch more than is encoded, so that no thread idles
                    yield from encoding.popleft().result()
            while encoding:
                yield from encoding.popleft().result()
        finally:
            for future in encoding:
                future.cancel()

    def _batches(self, images: Iterable[tuple[Sample, Any]]) -> Iterator[list[tuple[Sample, Any]]]:
        """Batches of ``batch_size`` good images each, and the bad ones between them."""
        batch: list[tuple[Sample, Any]] = []
        good, size = 0, self.image_size
        for sample, image in images:
            if not isinstance(image, BadPicture):
                height, width = image[0].shape[-2:]
                if (height, width) != (size, size):
                    sizes = f"the image is {width}x{height}, expected {size}x{size}, as the first is"
                    raise InputError(f"{sample.where}: {sizes}; crop with --image-size")
                good += 1
            batch.append((sample._replace(image=None), image))
            if good == self.batch_size:
                yield batch
                batch, good = [], 0
        if batch:
            yield batch

    def spec(self, grey: bool, sizes: list[list[int]], sums: list[list[float]]) -> dict[str, Any]:
        of = self.of
        if sums and self.statistics == MEASURE:
            of = replace(of, **measured(of, sums))
        elif sums and (fault := doubt(of, sums)):
            raise InputError(f"--statistics: {fault}; use --statistics {MEASURE}")
        features = {"features": self.teacher.as_dict()} if self.teacher is not None else {}
        known = {"kind": "latents", "channels": of.channels, "image_size": self.image_size}
        return {**known, "autoencoder": of.as_dict(), **features}

    def check_part(self, sums: list[list[float]]) -> None:
        """Raises InputError if a part rules the statistics out, by all channels together: it may hold few classes."""
        if fault := self.of.doubt(*overall(self.of, sums), "latents of a part"):
            raise InputError(f"--statistics: {fault}; use --statistics {MEASURE}")

    def _begin_thread(self) -> None:
        if self.device == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream())  # else each thread would also wait for the other's batch
        else:
            torch.set_num_threads(1)  # more threads add in another order, which changes the last bits

    def _encode(self, batch: list[tuple[Sample, Any]]) -> list[Row]:
        good = [torch.from_numpy(image[0]) for _, image in batch if not isinstance(image, BadPicture)]
        encoded, size = iter(self._moments(good)), self.image_size
        rows: list[Row] = []
        for sample, image in batch:
            bad = isinstance(image, BadPicture)
            rows.append((sample, image, None) if bad else (sample, next(encoded), (False, size, size, image[1])))
        return rows

    def _moments(self, images: list[Tensor]) -> list[dict[str, Any] | BadPicture]:
        """The columns of each image, uint8 (C, H, W) of one size."""
        if not images:
            return []
        try:
            columns = self._encoded(torch.stack(images).to(self.device))
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            raise InputError(f"--batch-size: got {self.batch_size}, expected less: out of memory") from None
        except UserError as error:  # some values are not finite; one by one, find which
            if len(images) == 1:
                return [BadPicture(f"its latents are not finite: {error}")]
            return [row for image in images for row in self._moments([image])]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [overflow(row) or self._measured(row) for row in rows]

    def _encoded(self, levels: Tensor) -> dict[str, np.ndarray]:
        """The columns of images, uint8 (N, C, H, W)."""
        columns = {}
        for end, side in zip(SIDES, (levels, levels.flip(-1)), strict=True):
            images = from_uint8(side)
            columns[f"moments{end}"] = self.encoder.moments(images)
            if self.teacher is not None:
                columns[f"features{end}"] = self.teacher.features(images)
        return {name: values.half().cpu().numpy() for name, values in columns.items()}

    def _measured(self, row: dict[str, Any]) -> dict[str, Any]:
        if not self.statistics:
            return row
        sums = [sums_of(row[f"moments{end}"], self.of.channels) for end in SIDES]
        return row | {"sums": np.sum(sums, axis=0).tolist()}


def overflow(row: dict[str, np.ndarray]) -> BadPicture | None:
    """The fault of moments or features that float16 can't hold; None if it holds all."""
    for name, values in row.items():
        if not np.isfinite(values).all():
            what, maker = ("latents", "autoencoder") if name.startswith("moments") else ("features", "teacher")
            return BadPicture(f"its {what} are over 65504, float16's largest number: the {maker} does not suit it")
    return None


def open_teacher(name: str, grid: int, dtype: str) -> Teacher:
    """The teacher of --features, loaded once. Raises InputError if it can't be."""
    try:
        return load_teacher(name, grid, default_device(), getattr(torch, dtype))
    except UserError as error:
        raise InputError(f"--features: {error}") from None
