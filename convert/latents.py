"""Pictures as shards of latents keep them: an autoencoder's mean and standard deviation, of them and of their mirror
images. Scale and shift stay out of them: `spec.json` has those, and training applies them."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pixels import BadPicture, ahead, crop, read_file
from sources import InputError, Sample
from torch import Tensor

from sit_composer.autoencoder import KLAutoencoder, from_uint8
from sit_composer.errors import UserError


def default_dtype() -> str:
    """What an encoder computes in if it isn't told: bfloat16 on a GPU, float32 without one."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


class Latents:
    """Samples of kind ``latents``: ``moments`` and ``moments_flip``, float16 (2C, H, W), mean before deviation.

    The same pictures, options, machine and libraries give the same bits.

    Args:
        vae: hub name or folder, as `KLAutoencoder` takes it; `spec.json` names it in the same words.
        image_size: side in pixels to which pictures are cropped, as training does; None if all are squares of one size.
        dtype: in which the encoder computes: float32, bfloat16 or float16. Moments are made float16 after.
        batch_size: pictures that are encoded at a time. Another one may change the last bits.

    Raises:
        InputError: if the autoencoder cannot be loaded, or doesn't take such pictures.
    """

    columns: ClassVar[dict[str, str]] = {
        "moments": "ndarray:float16",
        "moments_flip": "ndarray:float16",
        "label": "int",
    }

    def __init__(self, vae: str, image_size: int | None, dtype: str, batch_size: int) -> None:
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32; bfloat16 is as fast as ever
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.encoder = KLAutoencoder(vae, self.device, getattr(torch, dtype), slice_size=batch_size)
        except UserError as error:
            raise InputError(f"--vae: {str(error).removeprefix('autoencoder.name: ')}") from None
        self.batch_size = batch_size
        self.channels = self.encoder.picture_channels
        if self.channels not in (1, 3):
            raise InputError(f"--vae: {vae!r} takes pictures of {self.channels} channels; it takes one of 1 or 3")
        self.cropped = image_size is not None
        self.image_size = image_size
        if image_size is not None:
            self._check_size(image_size)

    def rows(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, dict[str, Any] | BadPicture]]:
        """Each sample with its columns but for the label, or with what is wrong with it; in the samples' order.

        Raises:
            InputError: for pictures of several sizes without an ``image_size``; for more than a GPU's memory holds.
        """
        batch: list[tuple[Sample, Tensor | BadPicture]] = []
        good = 0
        # The next batch is decoded while this one is encoded.
        with closing(ahead(self._decode, samples, self.batch_size)) as pictures:
            for sample, picture in pictures:
                if isinstance(picture, Tensor):
                    self._check_picture(sample, picture)
                    good += 1
                batch.append((sample, picture))
                if good == self.batch_size:
                    yield from self._encode(batch)
                    batch, good = [], 0
        yield from self._encode(batch)

    def spec(self) -> dict[str, Any]:
        """What `DataSpec` says of these latents."""
        spec = self.encoder.spec
        return {
            "kind": "latents", "channels": spec.channels, "image_size": self.image_size, "autoencoder": spec.as_dict(),
        }  # fmt: skip

    def _decode(self, image: bytes | Path | None) -> Tensor:
        return crop(read_file(image), self.channels, self.image_size if self.cropped else None)

    def _encode(
        self, batch: list[tuple[Sample, Tensor | BadPicture]]
    ) -> Iterator[tuple[Sample, dict[str, Any] | BadPicture]]:
        encoded = iter(self._moments([picture for _, picture in batch if isinstance(picture, Tensor)]))
        for sample, picture in batch:
            yield sample, next(encoded) if isinstance(picture, Tensor) else picture

    def _moments(self, pictures: list[Tensor]) -> list[dict[str, Any] | BadPicture]:
        """The columns of each of the pictures, uint8 (C, H, W) of one size."""
        if not pictures:
            return []
        try:
            levels = torch.stack(pictures).to(self.device)
            straight, mirrored = (
                self.encoder.moments(from_uint8(side)).half().cpu().numpy() for side in (levels, levels.flip(-1))
            )
        except torch.OutOfMemoryError:
            raise InputError(f"--batch-size: got {self.batch_size}; it takes fewer, on this GPU's memory") from None
        except UserError as error:  # some are not finite, and it doesn't say whose
            if len(pictures) == 1:
                return [BadPicture(str(error))]
            return [row for picture in pictures for row in self._moments([picture])]
        return [_row(*both) for both in zip(straight, mirrored, strict=True)]

    def _check_picture(self, sample: Sample, picture: Tensor) -> None:
        height, width = picture.shape[-2:]
        if self.image_size is None and height == width:
            self._check_size(width)
            self.image_size = width
        if (height, width) != (self.image_size, self.image_size):
            others = f", and others are {self.image_size}x{self.image_size}" if self.image_size else ""
            raise InputError(f"{sample.where}: the picture is {width}x{height}{others}; say --image-size to crop them")

    def _check_size(self, size: int) -> None:
        if size % self.encoder.spec.downsample:
            times = self.encoder.spec.downsample
            raise InputError(f"--image-size: got {size}; the autoencoder takes multiples of {times} pixels")


def _row(moments: np.ndarray, moments_flip: np.ndarray) -> dict[str, Any] | BadPicture:
    """The columns of a picture whose moments are float16 arrays (2C, H, W), unless they have left float16."""
    if not (np.isfinite(moments).all() and np.isfinite(moments_flip).all()):
        return BadPicture("its latents are over 65504, float16's largest number: the autoencoder doesn't suit it")
    return {"moments": moments, "moments_flip": moments_flip}
