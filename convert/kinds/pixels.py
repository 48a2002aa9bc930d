"""Images as shards of pixels keep them, with their own bytes; and what is read of image files."""

import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image, UnidentifiedImageError

from convert.kinds import BadPicture, Look, Row
from convert.sources.parts import Sample
from sit_composer.data.image_files import BROAD, enlargement, formats
from sit_composer.errors import one_line

GREY = {"1", "L", "I", "I;16", "I;16B", "I;16L"}  # PIL's modes
ENDS = (("JPEG", b"\xff\xd8", b"\xff\xd9"), ("PNG", b"\x89PNG", b"IEND"))  # how such files begin and end


class Pixels:
    """Samples of kind ``pixels``. ``check`` is whether to "decode" each image, or only to read its "header"."""

    columns: ClassVar[dict[str, str]] = {"image": "bytes", "label": "int"}

    def __init__(self, check: str = "decode") -> None:
        self.prepare = partial(checked, look=decoded if check == "decode" else glance)
        self.preload = ["PIL.Image"]

    def rows(self, images: Iterable[tuple[Sample, Any]]) -> Iterator[Row]:
        for sample, image in images:
            if isinstance(image, BadPicture):
                yield sample, image, None
            else:
                data, look = image
                yield sample, {"image": sample.image if data is None else data}, look

    def spec(self, grey: bool, sizes: list[list[int]], sums: list[list[float]]) -> dict[str, Any]:
        square = len(sizes) == 1 and sizes[0][0] == sizes[0][1]
        return {"kind": "pixels", "channels": 1 if grey else 3, "image_size": sizes[0][0] if square else None}


def checked(image: bytes | Path | None, look: Callable[[bytes], Look]) -> tuple[bytes | None, Look]:
    """The bytes of an image (None: as they were given), and the result of ``look`` on them."""
    data = read_file(image)
    return None if isinstance(image, bytes) else data, look(data)


def decoded(data: bytes, load: bool = True, image_size: int | None = None) -> Look:
    """Decodes an image to its last row, or only reads its header. Raises BadPicture if that fails."""
    with opened(data) as image:
        width, height = image.size
        if load:
            # A JPEG at an eighth of its size: libjpeg reads all coefficients and can fail only there, so it refuses
            # the same files, in two thirds of the time. Other formats have no draft.
            image.draft(None, (max(1, width // 8), max(1, height // 8)))
            image.load()
        return image.mode in GREY, width, height, enlargement(width, height, image_size)


def glance(data: bytes) -> Look:
    """Reads an image's header, and checks that its file has an end. This is about 17 times as fast as decoding."""
    for name, begin, end in ENDS:
        if data.startswith(begin) and end not in data[-1024:]:  # some cameras and tools append a little
            raise BadPicture(f"the image does not decode: the {name} file has no end, it is truncated")
    return decoded(data, load=False)


def read_file(image: bytes | Path | None) -> bytes:
    """An image file's bytes. Raises BadPicture if it is missing or empty."""
    if image is None:
        raise BadPicture("the image is null")
    try:
        data = image.read_bytes() if isinstance(image, Path) else image
    except (FileNotFoundError, PermissionError) as error:  # another OSError is the disk's fault, not the image's
        raise BadPicture(f"the image cannot be read: {error}") from None
    if not data:
        raise BadPicture("the image has zero bytes")
    return data


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """An image, not decoded yet. Raises BadPicture if it is broken, or may be an attack; for the body's errors, too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=formats())
        with image:
            if image.mode == "F" or (image.mode == "I" and image.format not in BROAD):  # as in `decode_image`
                raise BadPicture("the image's pixels are 32-bit numbers, and none is known to be white")
            yield image
    except UnidentifiedImageError:
        raise BadPicture(f"not an image that Pillow reads: it starts with {data[:12]!r}") from None
    except (BadPicture, MemoryError):
        raise
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error and more
        raise BadPicture(f"the image does not decode: {one_line(error)}") from None
