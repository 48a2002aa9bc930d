"""Pictures as shards of pixels keep them: their own bytes, or cropped and encoded again.

Nothing heavy is imported before the first picture.
"""

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from sources import Sample

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

T = TypeVar("T")
PICTURES = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # other decoders of PIL are not for unknown files
GREY = {"1", "L", "I", "I;16", "I;16B", "I;16L"}  # PIL's modes
MAX_PIXELS = 1 << 26  # of a picture whose short side is resized, before it is cropped


class BadPicture(Exception):
    """Why a picture cannot be trained on."""


class Pixels:
    """Samples of kind ``pixels``.

    Args:
        image_size: side in pixels to which pictures are cropped, as training does; None keeps their bytes.
        quality: of the JPEG that a cropped picture becomes, 1 to 100; None makes a PNG, which loses nothing.
    """

    columns: ClassVar[dict[str, str]] = {"image": "bytes", "label": "int"}

    def __init__(self, image_size: int | None = None, quality: int | None = None) -> None:
        self.image_size, self.quality = image_size, quality
        self.modes: set[bool] = set()  # of the pictures seen so far: whether they are grey
        self.sizes: set[tuple[int, int]] = set()

    def rows(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, dict[str, Any] | BadPicture]]:
        """Each sample with its columns but for the label, or with what is wrong with it; in the samples' order."""
        with closing(ahead(self._row, samples) if self.image_size else _now(self._row, samples)) as pictures:
            for sample, picture in pictures:
                if isinstance(picture, BadPicture):
                    yield sample, picture
                    continue
                data, grey, size = picture
                self.modes.add(grey)
                self.sizes.add(size)
                yield sample, {"image": data}

    def spec(self) -> dict[str, Any]:
        """What `DataSpec` says of these pictures."""
        width, height = next(iter(self.sizes))
        one_size = width == height and len(self.sizes) == 1
        channels = 1 if self.modes == {True} else 3
        return {"kind": "pixels", "channels": channels, "image_size": width if one_size else None}

    def _row(self, image: bytes | Path | None) -> tuple[bytes, bool, tuple[int, int]]:
        """A picture's bytes, whether it is grey, and (width, height)."""
        data = read_file(image)
        if self.image_size is None:
            with opened(data) as picture:
                picture.load()  # to its last row
                return data, picture.mode in GREY, picture.size
        with opened(data) as picture:
            grey = picture.mode in GREY
        cropped = crop(data, 1 if grey else 3, self.image_size)
        return encode(cropped, self.quality), grey, (self.image_size, self.image_size)


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
def opened(data: bytes) -> Iterator["Image"]:
    """The picture, by PIL; its pixels are not decoded yet.

    Raises:
        BadPicture: if it is broken, or no picture; or, where Image.DecompressionBombWarning is an error, over 89
            million pixels, so that it may be an attack. The body's exceptions become one too.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=PICTURES) as picture:
            yield picture
    except UnidentifiedImageError:
        kinds = ", ".join(PICTURES)
        raise BadPicture(f"not a picture ({kinds}): it starts with {data[:12]!r}") from None
    except BadPicture:
        raise
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error and more
        raise BadPicture(f"the picture does not decode: {error}") from None


def crop(data: bytes, channels: int, image_size: int | None) -> "Tensor":
    """A picture as training sees it: uint8 (channels, H, W), with H and W ``image_size`` unless that is None.

    Raises:
        BadPicture: as `opened`; also if it would fill the memory before it is cropped, as a long and thin one can.
    """
    from sit_composer.pictures import center_crop, decode_image

    with opened(data) as picture:
        width, height = picture.size
        if image_size and image_size**2 * max(width, height) > MAX_PIXELS * min(width, height):
            raise BadPicture(f"the picture, {width}x{height}, is too large with a short side of {image_size}")
        levels = decode_image(data, channels)
        return levels if image_size is None else center_crop(levels, image_size)


def encode(levels: "Tensor", quality: int | None) -> bytes:
    """The file of a picture, uint8 (1 or 3, H, W): a PNG or, of that quality, a JPEG."""
    from PIL import Image

    file = io.BytesIO()
    picture = Image.fromarray(levels[0].numpy() if len(levels) == 1 else levels.permute(1, 2, 0).numpy())
    if quality is None:
        picture.save(file, "PNG")
    else:
        picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def ahead(
    function: Callable[[bytes | Path | None], T], samples: Iterable[Sample], count: int = 0
) -> Iterator[tuple[Sample, T | BadPicture]]:
    """Each sample with the function of its picture, or why that failed, in order. Threads work ahead of who reads.

    ``count`` results more than the threads need are kept ready. Close it to end the threads.
    """
    threads = os.cpu_count() or 1
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Any] = deque()
    try:
        for sample in samples:
            waiting.append((sample, pool.submit(_attempt, function, sample.image)))
            if len(waiting) > 2 * threads + count:
                sample, future = waiting.popleft()
                yield sample, future.result()
        while waiting:
            sample, future = waiting.popleft()
            yield sample, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _now(
    function: Callable[[bytes | Path | None], T], samples: Iterable[Sample]
) -> Iterator[tuple[Sample, T | BadPicture]]:
    """As `ahead`, in this thread, and no sample is read before it is asked for."""
    for sample in samples:
        yield sample, _attempt(function, sample.image)


def _attempt(function: Callable[[bytes | Path | None], T], image: bytes | Path | None) -> T | BadPicture:
    try:
        return function(image)
    except BadPicture as error:
        return error
