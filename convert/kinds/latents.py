"""Pictures as shards of latents keep them: an autoencoder's mean and standard deviation, of them and of their mirror
images. Scale and shift stay out of them: `spec.json` has those, and training applies them."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from psutil import virtual_memory
from torch import Tensor

from convert.kinds.pixels import BadPicture, Look, levels
from convert.sources.registry import InputError, Sample
from sit_composer.autoencoder import KLAutoencoder, from_uint8
from sit_composer.errors import UserError

GPU_BATCH = 32  # pictures
BYTES_PER_PIXEL = 6 * 4 * 128  # about, of what an encoder of 128 channels keeps at a time
CPU_BATCH = 32 * 32 * 32  # pixels: more at a time leave the caches
Row = tuple[Sample, dict[str, Any] | BadPicture, Look | None]


def default_device() -> str:
    """What an encoder computes on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype() -> str:
    """What an encoder computes in if it isn't told: bfloat16 on a GPU, float32 without one."""
    return "bfloat16" if default_device() == "cuda" else "float32"


class Latents:
    """Samples of kind ``latents``: ``moments`` and ``moments_flip``, float16 (2C, H, W), mean before deviation.

    The same pictures, options, kind of processor and libraries give the same bits; so a CPU computes a batch on one
    thread, and as many batches at a time as it has cores. A GPU computes one while the next is on its way.

    Args:
        vae: hub name or folder, as `KLAutoencoder` takes it; `spec.json` names it in the same words.
        image_size: side in pixels of the pictures.
        crop: whether they are cropped to it, as training does, or are all squares of that size.
        dtype: in which the encoder computes: float32, bfloat16 or float16. Moments are made float16 after.
        batch_size: pictures that are encoded at a time; None: what is fast. Another one may change the last bits.
        cores: of a CPU, that encode.

    Attributes:
        prepare: makes of a picture (`Sample.image`) what `rows` takes, and may run in another process.
        preload: the modules that it needs.

    Raises:
        InputError: if the autoencoder cannot be loaded, or doesn't take such pictures.
    """

    columns: ClassVar[dict[str, str]] = {
        "moments": "ndarray:float16",
        "moments_flip": "ndarray:float16",
        "label": "int",
    }

    def __init__(self, vae: str, image_size: int, crop: bool, dtype: str, batch_size: int | None, cores: int) -> None:
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32; bfloat16 is as fast as ever
        self.device = default_device()
        if batch_size is None:
            batch_size = GPU_BATCH if self.device == "cuda" else min(GPU_BATCH, max(1, CPU_BATCH // image_size**2))
        try:
            self.encoder = KLAutoencoder(vae, self.device, getattr(torch, dtype), slice_size=batch_size)
        except UserError as error:
            raise InputError(f"--vae: {str(error).removeprefix('autoencoder.name: ')}") from None
        except RuntimeError as error:  # of a GPU that others have filled
            raise UserError(f"--vae: can't be moved to the {self.device}: {str(error).splitlines()[0]}") from None
        self.encoder.vae.to(memory_format=torch.channels_last)  # as convolutions want them
        if self.device == "cuda":
            torch.cuda.synchronize()  # before other streams read the weights
        self.batch_size = batch_size
        memory = batch_size * image_size**2 * BYTES_PER_PIXEL
        self.at_once = 2 if self.device == "cuda" else max(1, min(cores, virtual_memory().available // memory))
        self.pool = ThreadPoolExecutor(self.at_once, initializer=self._begin_thread)
        channels = self.encoder.picture_channels
        if channels not in (1, 3):
            raise InputError(f"--vae: {vae!r} takes pictures of {channels} channels; it takes one of 1 or 3")
        if image_size % self.encoder.spec.downsample:
            times = self.encoder.spec.downsample
            raise InputError(f"--image-size: got {image_size}; the autoencoder takes multiples of {times} pixels")
        self.image_size = image_size
        self.prepare = partial(levels, channels=channels, image_size=image_size if crop else None)
        self.preload = ["sit_composer.pictures"]

    def rows(self, pictures: Iterable[tuple[Sample, Any]]) -> Iterator[Row]:
        """Each sample with its columns but for the label, or with what is wrong with it; in the samples' order.

        Raises:
            InputError: for a picture of another size; for more than a GPU's memory holds.
        """
        encoding: deque[Future[list[Row]]] = deque()
        try:
            for batch in self._batches(pictures):
                encoding.append(self.pool.submit(self._encode, batch))
                if len(encoding) > self.at_once:  # one waits, so that none has to
                    yield from encoding.popleft().result()
            while encoding:
                yield from encoding.popleft().result()
        finally:
            for future in encoding:
                future.cancel()

    def _batches(self, pictures: Iterable[tuple[Sample, Any]]) -> Iterator[list[tuple[Sample, Any]]]:
        """Batches of as many good pictures each, with the bad ones among them."""
        batch: list[tuple[Sample, Any]] = []
        good = 0
        for sample, picture in pictures:
            if not isinstance(picture, BadPicture):
                self._check_size(sample, picture)
                good += 1
            batch.append((sample._replace(image=None), picture))
            if good == self.batch_size:
                yield batch
                batch, good = [], 0
        if batch:
            yield batch

    def spec(self, grey: bool, sizes: list[list[int]]) -> dict[str, Any]:
        """What `DataSpec` says of these latents, whatever the pictures looked like."""
        spec = self.encoder.spec
        return {
            "kind": "latents", "channels": spec.channels, "image_size": self.image_size, "autoencoder": spec.as_dict(),
        }  # fmt: skip

    def _begin_thread(self) -> None:
        if self.device == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream())  # else each thread would wait for the other's batch, too
        else:
            torch.set_num_threads(1)  # with others, sums come in another order, and the last bits differ

    def _encode(self, batch: list[tuple[Sample, Any]]) -> list[Row]:
        good = [torch.from_numpy(picture) for _, picture in batch if not isinstance(picture, BadPicture)]
        encoded = iter(self._moments(good))
        look = (False, self.image_size, self.image_size)
        return [
            (sample, picture if isinstance(picture, BadPicture) else next(encoded), look) for sample, picture in batch
        ]

    def _moments(self, pictures: list[Tensor]) -> list[dict[str, Any] | BadPicture]:
        """The columns of each of the pictures, uint8 (C, H, W) of one size."""
        if not pictures:
            return []
        try:
            levels = torch.stack(pictures).to(self.device)
            straight, mirrored = (
                self.encoder.moments(from_uint8(side)).half().cpu().numpy() for side in (levels, levels.flip(-1))
            )
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            raise InputError(f"--batch-size: got {self.batch_size}; it takes fewer, for this memory") from None
        except UserError as error:  # some are not finite, and it doesn't say whose
            if len(pictures) == 1:
                return [BadPicture(str(error))]
            return [row for picture in pictures for row in self._moments([picture])]
        return [_row(*both) for both in zip(straight, mirrored, strict=True)]

    def _check_size(self, sample: Sample, picture: np.ndarray) -> None:
        height, width = picture.shape[-2:]
        if (height, width) != (self.image_size, self.image_size):
            raise InputError(
                f"{sample.where}: the picture is {width}x{height}, and the first is {self.image_size}x"
                f"{self.image_size}; say --image-size to crop them"
            )


def _row(moments: np.ndarray, moments_flip: np.ndarray) -> dict[str, Any] | BadPicture:
    """The columns of a picture whose moments are float16 arrays (2C, H, W), unless they have left float16."""
    if not (np.isfinite(moments).all() and np.isfinite(moments_flip).all()):
        return BadPicture("its latents are over 65504, float16's largest number: the autoencoder doesn't suit it")
    return {"moments": moments, "moments_flip": moments_flip}
