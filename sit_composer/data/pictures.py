"""Image files, decoded and cropped to uint8 tensors.

The crop is ADM's `center_crop_arr`, to the bit: PIL's BOX filter halves an image while its short side is at least twice
the target, PIL's BICUBIC resizes the short side to the target, and the centre is kept. Here PIL's faster `reduce`
halves, and torch's `embedding_bag` does PIL's integer arithmetic of the bicubic filter, for the crop's pixels only.
All sums are exact, so all machines round alike. (torchvision's faster resize rounds weights to 16 bits, and differs.)
"""

import io
import math
from functools import lru_cache
from struct import Struct
from threading import get_ident

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from simplejpeg import decode_jpeg
from torch import Tensor
from torch.nn.functional import embedding_bag

from sit_composer.data.image_files import BROAD, formats

SEGMENT, FRAME = Struct(">BBH"), Struct(">BHHB")  # of a JPEG: its start, kind and length; bits, height, width, channels
FRAMES = {0xC0, 0xC1, 0xC2}
HARMLESS = {*range(0xE0, 0xF0), 0xC4, 0xDB, 0xDD, 0xFE}  # metadata, tables, a comment


def decode_image(data: bytes, channels: int) -> Tensor:
    """Decodes an image file to uint8 (channels, H, W): grey if ``channels`` is 1, RGB if 3.

    Transparent pixels become white; of 16 bits per channel, the upper 8 are kept; an animation gives its first frame;
    an EXIF rotation is ignored, as in ADM. The grey of a JPEG in colour is its luma channel. A file that is no image or
    has 32-bit pixels raises a ValueError; one that can't be read or has over 179 million pixels, PIL's error.
    """
    if usual_jpeg(data) and (levels := _decode_jpeg(data, channels)) is not None:
        return torch.from_numpy(levels).permute(2, 0, 1)
    try:
        image = Image.open(io.BytesIO(data), formats=formats())
    except UnidentifiedImageError:
        raise ValueError(f"not an image that Pillow reads: it starts with {data[:12]!r}") from None
    with image:
        is_jpeg = image.format in ("JPEG", "MPO") and image.mode != "CMYK"
        if is_jpeg and (levels := _decode_jpeg(data, channels)) is not None:
            return torch.from_numpy(levels).permute(2, 0, 1)
        if image.mode == "F" or (image.mode == "I" and image.format not in BROAD):  # convert() would clip them
            raise ValueError("its pixels are 32-bit numbers, whose white level is unknown")
        if image.mode.startswith("I"):  # 16 bits, which convert() would clip too
            numbers = np.asarray(image)
            levels = np.where(numbers == image.info.get("transparency"), 255, numbers >> 8).astype(np.uint8)
            image = Image.fromarray(levels)
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return _to_tensor(image.convert("L" if channels == 1 else "RGB"))


def usual_jpeg(data: bytes) -> tuple[int, int] | None:
    """The height and width of a JPEG that PIL would open without a warning, by the segments before its first scan.

    It stands in for PIL's own, slower parsing; what is unusual is left to PIL.
    """
    at, size = (2 if data[:2] == b"\xff\xd8" else len(data)), None
    while at + 10 <= len(data):
        start, marker, length = SEGMENT.unpack_from(data, at)
        if start != 0xFF:
            return None
        if marker == 0xDA:  # the first scan
            return size
        if marker in FRAMES:
            bits, height, width, channels = FRAME.unpack_from(data, at + 4)
            bounded = height * width <= (Image.MAX_IMAGE_PIXELS or height * width)
            size = (height, width) if bits == 8 and channels in (1, 3) and bounded else None
        elif marker not in HARMLESS:
            return None
        at += 2 + length
    return None


def _decode_jpeg(data: bytes, channels: int, out: np.ndarray | None = None, colours: str = "RGB") -> np.ndarray | None:
    """A JPEG's levels (H, W, channels), in ``out`` if given, as PIL's; None if PIL must read it, or say its error."""
    try:
        return decode_jpeg(data, "GRAY" if channels == 1 else colours, buffer=out)
    except ValueError:  # for warnings, too
        return None


def decode_into(out: np.ndarray, data: bytes, flip: bool = False) -> None:
    """Decodes an image file, crops it, as below, to uint8 (size, size, channels), and mirrors it if ``flip``.

    A JPEG of that size is decoded in place. Mirrored, it is decoded to BGR, and the bytes of its rows are reversed.
    """
    size, _, channels = out.shape
    target, mirrored, colours = (*_warm(get_ident(), *out.shape), "BGR") if flip else (out, None, "RGB")
    levels = _decode_jpeg(data, channels, target, colours) if usual_jpeg(data) == (size, size) else None
    if levels is None or levels.shape != out.shape:
        image = center_crop(decode_image(data, channels), size).permute(1, 2, 0)
        out[:] = (image.flip(1) if flip else image).numpy()
    elif mirrored is not None:
        out.reshape(size, -1).view(f"u{mirrored.itemsize}")[:] = mirrored


@lru_cache(16)  # threads that decode at a time, at most
def _warm(thread: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """A thread's memory for an image (size, size, channels), and its rows from their last byte to their first. It stays
    in the processor's caches; to addresses that are multiples of 32, libjpeg-turbo writes past them."""
    memory = np.empty(math.prod(shape) + 32, np.uint8)
    image = memory[(16 - memory.ctypes.data) % 32 :][: math.prod(shape)].reshape(shape)
    rows = image.reshape(shape[0], -1)
    word = math.gcd(8, rows.shape[1])  # bytes that are reversed at a time
    return image, rows.view(np.dtype(f"u{word}").newbyteorder())[:, ::-1]


def center_crop(image: Tensor, size: int) -> Tensor:
    """Resizes the short side of uint8 (C, H, W) to ``size`` and crops the centre, as ADM does: (C, size, size)."""
    lengths = list(image.shape[1:])
    if lengths == [size, size]:
        return image
    halvings = max(0, (min(lengths) // size).bit_length() - 1)
    halved = [length >> halvings for length in lengths]
    scale = size / min(halved)
    down, across = (_filter(n, round(n * scale), size) for n in halved)
    # Cut off first what the crop doesn't need. If a length is odd, its halves aren't pairs of pixels.
    whole = [length % (1 << halvings) for length in lengths]
    rows, columns = (
        slice(0, n) if odd else slice(kept.start << halvings, kept.stop << halvings)
        for n, odd, (kept, *_) in zip(lengths, whole, (down, across), strict=True)
    )
    image = _halve(image[:, rows, columns], halvings)
    image = image[:, down[0] if whole[0] else slice(None), across[0] if whole[1] else slice(None)]
    crop = torch.empty(len(image), size, size, dtype=torch.uint8)
    for channel, levels in zip(crop, image, strict=True):  # one at a time, to stay in a core's cache
        levels = _weighted_sums(levels.T, *across[1:])  # (size, rows): the columns first, as PIL does
        channel.copy_(_weighted_sums(levels.T, *down[1:]))
    return crop


def _halve(image: Tensor, times: int) -> Tensor:
    """Halves both sides of uint8 (C, H, W) ``times`` times, to the bit as PIL's BOX filter."""
    if not times:
        return image
    levels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    halved = Image.fromarray(levels.contiguous().numpy())  # PIL copies slowly from memory that isn't contiguous
    for _ in range(times):
        for factor in ((2, 1), (1, 2)):  # columns, then rows, with rounding after each, as resize() does
            half = (halved.width // factor[0], halved.height // factor[1])
            even = halved.size == (half[0] * factor[0], half[1] * factor[1])
            # reduce() is three times as fast, with the same result for pairs of pixels.
            halved = halved.reduce(factor) if even else halved.resize(half, Image.Resampling.BOX)
    return _to_tensor(halved)


def _to_tensor(image: Image.Image) -> Tensor:
    """uint8 (C, H, W) of an image in grey or RGB."""
    return torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1).permute(2, 0, 1)


@lru_cache(128)
def _filter(n: int, out: int, size: int) -> tuple[slice, Tensor, Tensor, Tensor]:
    """PIL's bicubic filter from ``n`` pixels to the ``size`` in the middle of ``out``.

    Returns the slice of the n that it needs; and, for `_weighted_sums`, (size, taps) each: the indices of each output's
    inputs in that slice, and their weights (in sum 2 ** 22) times 2 ** -11, as the upper bits and the lower 11.
    """
    scale = n / out
    stretch = max(scale, 1.0)  # of the filter, which averages if the image shrinks
    centers = (np.arange(size) + (out - size) // 2 + 0.5) * scale
    first = np.maximum((centers - 2 * stretch + 0.5).astype(int), 0)
    last = np.minimum((centers + 2 * stretch + 0.5).astype(int), n) - 1
    taps = first[:, None] + np.arange((last - first).max() + 1)  # (size, taps)
    x = np.abs((taps - centers[:, None] + 0.5) * (1 / stretch))
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, (((x - 5) * x + 8) * x - 4) * -0.5, 0))
    weights[taps > last[:, None]] = 0
    weights /= weights.cumsum(1)[:, -1:]  # summed in PIL's order
    weights = np.trunc(weights * 2**22 + np.copysign(0.5, weights)).astype(int)
    taps = np.minimum(taps, last[:, None]) - first[0]
    kept = slice(int(first[0]), int(last[-1]) + 1)
    upper, lower = (torch.from_numpy(part).float() for part in (weights >> 11, weights & 2047))
    return kept, torch.from_numpy(taps).int(), upper / 2**11, lower / 2**11


def _weighted_sums(levels: Tensor, taps: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """Weighted sums of the rows of uint8 (N, L), rounded to uint8 (M, L), with the M rows of `_filter`'s tensors.

    PIL's sums need 31 bits and a float32 has 24: two exact sums replace one.
    """
    table = levels.to(torch.float32, memory_format=torch.contiguous_format)
    carried = embedding_bag(taps, table, mode="sum", per_sample_weights=lower).floor_()
    sums = embedding_bag(taps, table, mode="sum", per_sample_weights=upper).add_(carried, alpha=1 / 2**11)
    return torch.from_numpy(sums.add_(0.5).clamp_(0, 255).numpy().astype(np.uint8))  # torch's conversion is slower
