"""Pictures as their files have them, decoded and cropped to uint8 tensors.

The crop is ADM's `center_crop_arr`, to the bit: PIL's BOX filter halves a picture while its short side is twice the
target or more, PIL's BICUBIC makes the short side the target, and the centre is kept. PIL goes from value to value.
Here the halves come from its faster `reduce`, and the bicubic filter is PIL's integer arithmetic in torch's vectorised
`embedding_bag`, on the pixels alone that the crop keeps. All sums are exact, so that no machine rounds otherwise.
(torchvision's resize is faster still. But it rounds weights to 16 bits, and so is a level off in 4 values of 1,000, and
in some pictures two.)
"""

import io
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import embedding_bag
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as tvf

from sit_composer.choices import IMAGE_FORMATS


def decode_image(data: bytes, channels: int) -> Tensor:
    """Decodes a picture's file to uint8 (channels, H, W): grey if ``channels`` is 1, RGB if 3.

    What is transparent shows white; 16 bits a channel become the upper 8; an animation gives its first frame; a
    rotation noted in EXIF is left alone, as ADM does. The grey of a JPEG in colour is its own luma.

    Raises:
        Exception: PIL's, if it cannot be read or has over 179 million pixels; ValueError, if it is no picture, or one
            of 32-bit numbers, of which none is known to be white.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"not a picture ({', '.join(IMAGE_FORMATS)}): it starts with {data[:12]!r}") from None
    with picture:
        if picture.format in ("JPEG", "MPO"):  # a third faster than by PIL, with the same RGB
            try:
                mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
                return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)
            except RuntimeError:
                pass  # PIL reads a few more kinds, and says better what is wrong
        if picture.mode == "F" or (picture.mode == "I" and picture.format == "TIFF"):  # convert() would clip them
            raise ValueError("its pixels are 32-bit numbers, and none is known to be white")
        if picture.mode.startswith("I"):  # 16 bits, which convert() would clip, too
            numbers = np.asarray(picture)
            levels = np.where(numbers == picture.info.get("transparency"), 255, numbers >> 8).astype(np.uint8)
            picture = Image.fromarray(levels)
        if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return tvf.pil_to_tensor(picture.convert("L" if channels == 1 else "RGB"))


def center_crop(image: Tensor, size: int) -> Tensor:
    """Resizes the short side of uint8 (C, H, W) to ``size`` and crops the centre, as ADM does: (C, size, size)."""
    lengths = list(image.shape[1:])
    if lengths == [size, size]:
        return image
    halvings = max(0, (min(lengths) // size).bit_length() - 1)
    halved = [length >> halvings for length in lengths]
    scale = size / min(halved)
    down, across = (_filter(n, round(n * scale), size) for n in halved)
    # Cut off what the crop doesn't need before the work. The halves of an odd length are no pairs of pixels.
    whole = [length % (1 << halvings) for length in lengths]
    rows, columns = (
        slice(0, n) if odd else slice(kept.start << halvings, kept.stop << halvings)
        for n, odd, (kept, *_) in zip(lengths, whole, (down, across), strict=True)
    )
    image = _halve(image[:, rows, columns], halvings)
    image = image[:, down[0] if whole[0] else slice(None), across[0] if whole[1] else slice(None)]
    crop = torch.empty(len(image), size, size, dtype=torch.uint8)
    for channel, levels in zip(crop, image, strict=True):  # one after another stay in a core's cache
        levels = _weighted_sums(levels.T, *across[1:])  # (size, rows): the columns first, as PIL does
        channel.copy_(_weighted_sums(levels.T, *down[1:]))
    return crop


def _halve(image: Tensor, times: int) -> Tensor:
    """Halves both sides of uint8 (C, H, W) so many times, as PIL's BOX filter does to the bit."""
    if not times:
        return image
    levels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    picture = Image.fromarray(levels.contiguous().numpy())  # which copies slowly what is not contiguous
    for _ in range(times):
        for factor in ((2, 1), (1, 2)):  # columns, then rows, each rounded, as resize() does
            half = (picture.width // factor[0], picture.height // factor[1])
            even = picture.size == (half[0] * factor[0], half[1] * factor[1])
            # reduce() is three times as fast, and the same where the pixels are pairs.
            picture = picture.reduce(factor) if even else picture.resize(half, Image.Resampling.BOX)
    return tvf.pil_to_tensor(picture)


@lru_cache(128)
def _filter(n: int, out: int, size: int) -> tuple[slice, Tensor, Tensor, Tensor]:
    """PIL's bicubic filter from ``n`` pixels to the ``size`` in the middle of ``out``.

    Returns:
        Which of the n it needs; and of each output, for `_weighted_sums`, the inputs' numbers among these and their
        weights, 2 ** 22 in all: the upper bits and the lower 11, as 2 ** -11 of them. (size, taps) each.
    """
    scale = n / out
    stretch = max(scale, 1.0)  # of the filter, which averages where the picture shrinks
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
    """Sums of weighted rows of uint8 (N, L), rounded to uint8 (M, L), as `_filter` says for M of them.

    A float32 has 24 bits, and PIL's sums take 31: so there are two, and both are exact.
    """
    table = levels.to(torch.float32, memory_format=torch.contiguous_format)
    carried = embedding_bag(taps, table, mode="sum", per_sample_weights=lower).floor_()
    sums = embedding_bag(taps, table, mode="sum", per_sample_weights=upper).add_(carried, alpha=1 / 2**11)
    return torch.from_numpy(sums.add_(0.5).clamp_(0, 255).numpy().astype(np.uint8))  # torch's conversion is slower
