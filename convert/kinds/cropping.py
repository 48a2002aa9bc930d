"""Images cropped as training crops them, for shards of cropped images and of latents. This imports torch."""

import io
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from convert.kinds import BadPicture, Look
from convert.kinds.pixels import Pixels, decoded, opened, read_file
from sit_composer.data.pictures import center_crop, decode_image

MAX_PIXELS = 1 << 26  # of an image whose short side is resized, before it is cropped


class CroppedPixels(Pixels):
    """Samples of kind ``pixels``, cropped to squares as training does: JPEGs of a ``quality``, or lossless PNGs."""

    def __init__(self, image_size: int, quality: int | None) -> None:
        self.prepare = partial(cropped, image_size=image_size, quality=quality)
        self.preload = ["convert.kinds.cropping"]


def cropped(image: bytes | Path | None, image_size: int, quality: int | None) -> tuple[bytes, Look]:
    """The file of a cropped image, and its look."""
    data = read_file(image)
    grey, _, _, small = decoded(data, load=False, image_size=image_size)
    levels = crop(data, 1 if grey else 3, image_size)
    file = io.BytesIO()
    encoded = Image.fromarray(levels[0].numpy() if grey else levels.permute(1, 2, 0).contiguous().numpy())
    encoded.save(file, "PNG") if quality is None else encoded.save(file, "JPEG", quality=quality)
    return file.getvalue(), (grey, image_size, image_size, small)


def levels(image: bytes | Path | None, channels: int, image_size: int | None) -> tuple[np.ndarray, str | None]:
    """An image for the encoder, uint8 (C, H, W), cropped to a square if there is a size; why it counts as small."""
    data = read_file(image)
    array = crop(data, channels, image_size).numpy()  # torch would send it in a file between processes
    return array, decoded(data, load=False, image_size=image_size)[-1]


def crop(data: bytes, channels: int, image_size: int | None) -> Tensor:
    """An image as training sees it: uint8 (channels, H, W), with H and W ``image_size`` unless that is None."""
    with opened(data) as image:
        width, height = image.size
        # A long and thin image would fill the memory before it is cropped.
        if image_size and image_size**2 * max(width, height) > MAX_PIXELS * min(width, height):
            raise BadPicture(f"the image is too thin: {width}x{height}, too large with a short side of {image_size}")
        levels = decode_image(data, channels)
        return levels if image_size is None else center_crop(levels, image_size)
