"""Image files, and ADM's crop."""

import io

import numpy as np
from PIL import Image


def encode(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def adm_center_crop(picture: Image.Image, size: int) -> np.ndarray:
    """ADM's center_crop_arr, by PIL throughout."""
    while min(*picture.size) >= 2 * size:
        picture = picture.resize(tuple(side // 2 for side in picture.size), resample=Image.BOX)
    scale = size / min(*picture.size)
    picture = picture.resize(tuple(round(side * scale) for side in picture.size), resample=Image.BICUBIC)
    array = np.array(picture)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


def png(levels: np.ndarray) -> bytes:
    """A PNG file of uint8 (H, W) or (H, W, 3)."""
    return encode(Image.fromarray(levels), "PNG")
