"""What is kept of an image in a shard."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from convert.sources.parts import Sample

MEASURE = "measure"  # the value of --statistics for those of the data
# Whether an image is grey, its width and its height, and why it is counted as too small, if it is.
Look = tuple[bool, int, int, str | None]


class BadPicture(Exception):
    """Why an image cannot be trained on: the reason by which it is counted, and after a colon what is its own."""


Row = tuple[Sample, dict[str, Any] | BadPicture, Look | None]  # with a column "sums" if those are measured


class Kind(Protocol):
    """A kind of data, which makes the columns of a shard from images."""

    prepare: Callable[[bytes | Path | None], Any]  # `Sample.image` to what `rows` takes; it may run in another process
    preload: list[str]  # the modules that `prepare` needs

    @property
    def columns(self) -> dict[str, str]:
        """Names and MDS encodings."""

    def rows(self, images: Iterable[tuple[Sample, Any]]) -> Iterator[Row]:
        """Each sample with its columns except the label, or with what is wrong with its image; in order."""

    def spec(self, grey: bool, sizes: list[list[int]], sums: list[list[float]]) -> dict[str, Any]:
        """What `DataSpec` says of images that are all grey or not, and have those (width, height) and `statistics`'
        sums, if any. Raises InputError if they can't be used."""
