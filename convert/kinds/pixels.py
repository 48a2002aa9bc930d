"""Pictures as shards of pixels keep them: their own bytes, or cropped and encoded again.

Nothing heavy is imported before the first picture.
"""

import io
import struct
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image, UnidentifiedImageError

from convert.sources.registry import Sample
from sit_composer.choices import IMAGE_FORMATS

if TYPE_CHECKING:  # torch: pictures that keep their bytes don't need it
    from numpy import ndarray
    from torch import Tensor

GREY = {"1", "L", "I", "I;16", "I;16B", "I;16L"}  # PIL's modes
BOMB = 89_478_485  # pixels of a picture that may be an attack; PIL's Image.MAX_IMAGE_PIXELS
MAX_PIXELS = 1 << 26  # of a picture whose short side is resized, before it is cropped
Look = tuple[bool, int, int]  # whether a picture is grey, its width and its height


class BadPicture(Exception):
    """Why a picture cannot be trained on."""


class Pixels:
    """Samples of kind ``pixels``.

    Args:
        image_size: side in pixels to which pictures are cropped, as training does; None keeps their bytes.
        quality: of the JPEG that a cropped picture becomes, 1 to 100; None makes a PNG, which loses nothing.
        check: of pictures that keep their bytes: "decode" each, or only read its "header".

    Attributes:
        prepare: makes of a picture (`Sample.image`) what `rows` takes, and may run in another process.
        preload: the modules that it needs.
    """

    columns: ClassVar[dict[str, str]] = {"image": "bytes", "label": "int"}

    def __init__(self, image_size: int | None = None, quality: int | None = None, check: str = "decode") -> None:
        self.image_size = image_size
        if image_size is not None:
            self.prepare = partial(cropped, image_size=image_size, quality=quality)
            self.preload = ["sit_composer.pictures"]
        else:
            self.prepare = partial(checked, look=decoded if check == "decode" else glance)
            self.preload = ["PIL.Image"]

    def rows(
        self, pictures: Iterable[tuple[Sample, Any]]
    ) -> Iterator[tuple[Sample, dict[str, Any] | BadPicture, Look | None]]:
        """Each sample with its columns but for the label, or with what is wrong with it; in the samples' order."""
        for sample, picture in pictures:
            if isinstance(picture, BadPicture):
                yield sample, picture, None
            else:
                data, look = picture
                yield sample, {"image": sample.image if data is None else data}, look

    def spec(self, grey: bool, sizes: list[list[int]]) -> dict[str, Any]:
        """What `DataSpec` says of pictures that are all grey or not, and have those (width, height)."""
        square = len(sizes) == 1 and sizes[0][0] == sizes[0][1]
        return {"kind": "pixels", "channels": 1 if grey else 3, "image_size": sizes[0][0] if square else None}


def checked(image: bytes | Path | None, look: Any) -> tuple[bytes | None, Look]:
    """A picture's bytes (None: those that it was given), and what ``look`` says of them."""
    data = read_file(image)
    return None if isinstance(image, bytes) else data, look(data)


def decoded(data: bytes) -> Look:
    """Decodes a picture to its last row.

    Raises:
        BadPicture: if it can't be.
    """
    with opened(data) as picture:
        picture.load()
        return picture.mode in GREY, *picture.size


def glance(data: bytes) -> Look:
    """Reads a picture's header, and looks whether its file has an end. A hundred times as fast as to decode it.

    Raises:
        BadPicture: if it has none, or is larger than PIL takes without a warning.
    """
    look = _glance_jpeg(data) if data[:2] == b"\xff\xd8" else _glance_png(data) if data[:4] == b"\x89PNG" else None
    if look is None:  # another format, or an unusual one: PIL knows
        with opened(data) as picture:
            return picture.mode in GREY, *picture.size
    if look[1] * look[2] > BOMB:
        raise BadPicture(f"the picture has {look[1]}x{look[2]} pixels, over {BOMB}: it may be an attack")
    return look


def _glance_jpeg(data: bytes) -> Look | None:
    """Goes from segment to segment to the frame header (ITU-T T.81, B.2.2)."""
    if data[-2:] != b"\xff\xd9" and b"\xff\xd9" not in data[-1024:]:  # some cameras and tools append a little
        raise BadPicture("the picture does not decode: the JPEG file has no end, it is truncated")
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width, channels = struct.unpack_from(">HHB", data, at + 5)
            return (channels == 1, width, height) if height and width else None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _glance_png(data: bytes) -> Look | None:
    """The first chunk (PNG specification, 11.2.1)."""
    if b"IEND" not in data[-1024:]:
        raise BadPicture("the picture does not decode: the PNG file has no end, it is truncated")
    if data[12:16] != b"IHDR" or len(data) < 26:
        return None
    width, height, _, colour = struct.unpack_from(">IIBB", data, 16)
    return (colour == 0, width, height) if width and height else None


def cropped(image: bytes | Path | None, image_size: int, quality: int | None) -> tuple[bytes, Look]:
    """The file of a picture, cropped, and what it looks like."""
    data = read_file(image)
    with opened(data) as picture:
        grey = picture.mode in GREY
    levels = crop(data, 1 if grey else 3, image_size)
    return encode(levels, quality), (grey, image_size, image_size)


def levels(image: bytes | Path | None, channels: int, image_size: int | None) -> "ndarray":
    """A picture as the encoder is to see it: uint8 (C, H, W), cropped to a square unless the size is None."""
    return crop(read_file(image), channels, image_size).numpy()  # torch would pass it on in a file of its own


def read_file(image: bytes | Path | None) -> bytes:
    """A picture file's bytes.

    Raises:
        BadPicture: if it is missing or empty.
    """
    if image is None:
        raise BadPicture("the picture is null")
    try:
        data = image.read_bytes() if isinstance(image, Path) else image
    except (FileNotFoundError, PermissionError) as error:  # another OSError is the disk's fault, not the picture's
        raise BadPicture(f"the picture cannot be read: {error}") from None
    if not data:
        raise BadPicture("the picture has zero bytes")
    return data


@contextmanager
def opened(data: bytes) -> Iterator["Image.Image"]:
    """The picture, by PIL; its pixels are not decoded yet.

    Raises:
        BadPicture: if it is broken, no picture, one of 32-bit numbers, which training refuses, or one of over 89
            million pixels, so that it may be an attack. The body's exceptions become one too.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        with picture:
            if picture.mode == "F" or (picture.mode == "I" and picture.format == "TIFF"):  # as `decode_image` does
                raise BadPicture("the picture's pixels are 32-bit numbers, and none is known to be white")
            yield picture
    except UnidentifiedImageError:
        kinds = ", ".join(IMAGE_FORMATS)
        raise BadPicture(f"not a picture ({kinds}): it starts with {data[:12]!r}") from None
    except (BadPicture, MemoryError):
        raise
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error and more
        raise BadPicture(f"the picture does not decode: {error}") from None


def crop(data: bytes, channels: int, image_size: int | None) -> "Tensor":
    """A picture as training sees it: uint8 (channels, H, W), with H and W ``image_size`` unless that is None.

    Raises:
        BadPicture: as `opened`; also if it would fill the memory before it is cropped, as a long and thin one can.
    """
    from sit_composer.data.pictures import center_crop, decode_image

    with opened(data) as picture:
        width, height = picture.size
        if image_size and image_size**2 * max(width, height) > MAX_PIXELS * min(width, height):
            raise BadPicture(f"the picture, {width}x{height}, is too large with a short side of {image_size}")
        levels = decode_image(data, channels)
        return levels if image_size is None else center_crop(levels, image_size)


def encode(levels: "Tensor", quality: int | None) -> bytes:
    """The file of a picture, uint8 (1 or 3, H, W): a PNG or, of that quality, a JPEG."""
    file = io.BytesIO()
    picture = Image.fromarray(levels[0].numpy() if len(levels) == 1 else levels.permute(1, 2, 0).contiguous().numpy())
    if quality is None:
        picture.save(file, "PNG")
    else:
        picture.save(file, "JPEG", quality=quality)
    return file.getvalue()
