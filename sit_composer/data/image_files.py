"""Which files are images: those that Pillow reads."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache

from PIL import Image

from sit_composer.data.folders import Listing, below, kind_of, suffix_of

USUAL = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # a file is tried as these first
# Their decoders start another program, open what is inside with any decoder, or only know the format's name.
NOT_READ = {"EPS", "WMF", "IPTC", "FPX", "MIC", "MPEG", "BUFR", "GRIB", "HDF5"}

BROAD = ("PNG", "PPM")  # Pillow's mode I holds 16 bits of these, and 32 of others


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return tuple(dict.fromkeys((*USUAL, *(name for name in Image.ID if name not in NOT_READ))))


@cache
def suffixes() -> frozenset[str]:
    """The lower-case extensions of images."""
    names = {*formats(), "MPO"}  # which the decoder of JPEG reads
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in names)


def is_image(path: str) -> bool:
    """Whether a file is an image by its extension or by how it begins."""
    return suffix_of(path) in suffixes() or _begins_as_image(path)


def images_of(files: Iterable[os.DirEntry[str]], left_out: Counter[str]) -> list[os.DirEntry[str]]:
    """The images among a folder's files. Others are counted, by extension."""
    images = []
    for file in files:
        if is_image(file.path):
            images.append(file)
        else:
            left_out[f"not an image ({kind_of(file.path)})"] += 1
    return images


def images_below(folder: str, left_out: Counter[str], root: str | None = None) -> Iterator[Listing]:
    """`below`, with the images of each folder."""
    return ((inner, images_of(files, left_out)) for inner, files in below(folder, left_out, root))


def enlargement(width: int, height: int, size: int | None) -> str | None:
    """Why an image, or its crop to ``size``, shows little: a reason to count it."""
    if width == height == 1:
        return "of 1x1 pixels"
    return "enlarged more than 2 times" if size and 2 * min(width, height) < size else None


@lru_cache(1 << 20)  # folders are listed again for each part of a conversion
def _begins_as_image(path: str) -> bool:
    return os.path.isfile(path) and opens(path)


def opens(file: object) -> bool:
    """Whether Pillow knows a file, or its path, by how it begins. Formats that begin in any way don't count."""
    try:
        with Image.open(file, formats=[name for name in formats() if Image.OPEN[name][1]]):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # Pillow's parsers raise any
        return False
