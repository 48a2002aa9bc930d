"""The checks of samples in `verify_mds.py`: of images, or of latents."""

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from convert.kinds import BadPicture
from convert.kinds.cropping import crop
from convert.kinds.pixels import decoded, read_file
from convert.kinds.statistics import doubt, overall, statistics_of, sums_of
from sit_composer.autoencoder import AutoencoderSpec, DiffusersAutoencoder, to_uint8
from sit_composer.captions import Cell, class_caption, draw_grid
from sit_composer.data.pictures import center_crop
from sit_composer.data.spec import SPEC_NAME, DataSpec
from sit_composer.errors import UserError

GRID = 40  # images, or 20 and their mirror images
COLUMNS = 8  # of the grid
TILE = 96  # pixels of an image in the grid
ALIKE = 0.5  # the share of images that may be their own mirror images
Row = dict[str, Any]  # a sample's columns
Rows = list[tuple[str, Row]]  # with the place of each sample


class Check(ABC):
    """Checks samples, and keeps some for a grid. ``fault`` is called with one line per fault."""

    def __init__(self, spec: DataSpec, fault: Callable[[str], None], room: int) -> None:
        self.spec, self.fault, self.room = spec, fault, room
        self.kept: list[Row] = []
        self.seen = 0

    @abstractmethod
    def tiles(self, row: Row) -> Iterator[tuple[Tensor, str]]:
        """The images that a grid shows of a sample, uint8 (C, H, W), with the ends of their captions."""

    def keep(self, row: Row) -> None:
        """Keeps a random subset of all samples, each equally likely, so that a sorted source shows many classes."""
        if len(self.kept) < self.room:
            self.kept.append(row)
        elif (place := int(np.random.default_rng(self.seen).integers(self.seen))) < self.room:
            self.kept[place] = row

    def write_grid(self, path: Path) -> bool:
        """Writes the images of the samples that were kept as a PNG; False if there are none."""
        tiles = [(*tile, int(row["label"])) for row in self.kept for tile in self.tiles(row)]
        if not tiles:
            return False
        cells = [self._cell(*tile) for tile in tiles]
        grid = draw_grid([cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)])
        with open(path, "xb") as file:
            grid.save(file, "PNG")
        return True

    def _cell(self, levels: Tensor, side: str, label: int) -> Cell:
        array = center_crop(levels, TILE).expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
        known = 0 <= label < len(self.spec.classes)
        name = class_caption(self.spec.classes[label], label) if known else f"label {label}"
        return [Image.fromarray(array)], name + side


class PixelCheck(Check):
    """Checks that images decode, and have the size in the spec."""

    def __init__(self, spec: DataSpec, fault: Callable[[str], None], grid: bool) -> None:
        super().__init__(spec, fault, GRID if grid else 0)
        self.pool = ThreadPoolExecutor(os.cpu_count() or 1)
        # Filters are shared by all threads: one that `opened` sets in a thread, another thread may undo.
        warnings.simplefilter("error", Image.DecompressionBombWarning)

    def check(self, rows: Rows) -> None:
        for (where, row), fault in zip(rows, self.pool.map(self._fault, rows), strict=True):
            self.seen += 1
            if fault:
                self.fault(f"{where}: {fault}")
            else:
                self.keep(row)

    def finish(self) -> list[str]:
        self.pool.shutdown()
        return [f"{self.seen} images decode"]

    def tiles(self, row: Row) -> Iterator[tuple[Tensor, str]]:
        yield crop(row["image"], self.spec.channels, None), ""

    def _fault(self, row: tuple[str, Row]) -> str | None:
        try:
            height, width = crop(read_file(row[1]["image"]), self.spec.channels, None).shape[-2:]
        except BadPicture as error:
            return str(error)
        if self.spec.channels == 1 and not decoded(row[1]["image"], load=False)[0]:
            return f"the image has colours; {SPEC_NAME} says 1 channel"
        size = self.spec.image_size
        if size is not None and (height, width) != (size, size):
            return f"the image is {width}x{height}; {SPEC_NAME} says {size}x{size}"
        return None


class LatentCheck(Check):
    """Checks that moments have their shape, are finite, and give latents such as training expects. ``vae`` (None: the
    spec's, for a grid only) decodes the grid, and is compared with the spec."""

    def __init__(self, spec: DataSpec, fault: Callable[[str], None], vae: str | None, grid: bool) -> None:
        super().__init__(spec, fault, GRID // 2 if grid else 0)
        self.of = AutoencoderSpec(**spec.autoencoder)
        self.autoencoder = None
        if vae or grid:
            try:
                self.autoencoder = DiffusersAutoencoder(vae or self.of.name, latents=self.of)
            except UserError as error:
                raise UserError(f"--vae: {str(error).removeprefix('autoencoder.name: ')}") from None
            for name in ("channels", "downsample", "scale", "shift", "mean", "std", "deterministic"):
                theirs, ours = getattr(self.autoencoder.spec, name), getattr(self.of, name)
                if not alike(theirs, ours):
                    fault(f"the autoencoder's {name} is {shortened(theirs)}; {SPEC_NAME} says {shortened(ours)}")
        side = (spec.image_size or 0) // self.of.downsample
        self.shape = (self.of.stored, side, side)
        self.sums = np.zeros((2, 3, self.of.channels))  # straight and mirrored, see `statistics`
        self.checked = self.same = self.turned = self.copied = 0

    def check(self, rows: Rows) -> None:
        for where, row in rows:
            self.seen += 1
            if fault := self._fault(row):
                self.fault(f"{where}: {fault}")
                continue
            for i, column in enumerate(("moments", "moments_flip")):
                self.sums[i] += sums_of(row[column], self.of.channels)
            self.checked += 1
            self.same += np.array_equal(row["moments"], row["moments_flip"])
            self.turned += np.array_equal(row["moments"][..., ::-1], row["moments_flip"])
            if self.spec.features is not None:
                self.copied += np.array_equal(row["features"], row["features_flip"])
            self.keep(row)

    def finish(self) -> list[str]:
        """Reports mean and standard deviation of standardized latents over all values."""
        if not self.checked:
            return []
        mean, std = zip(*(overall(self.of, sums) for sums in self.sums), strict=True)  # straight and mirrored
        for i, name in enumerate(("latents", "mirrored latents")):
            if fault := self.of.doubt(mean[i], std[i], name):
                self.fault(fault)
        if self.of.mean is not None:
            self._check_channels()
        if abs(mean[0] - mean[1]) > 0.1 * max(std) or abs(std[0] - std[1]) > 0.1 * max(std):
            found = f"means {mean[0]:.3g} and {mean[1]:.3g}, standard deviations {std[0]:.3g} and {std[1]:.3g}"
            self.fault(f"latents and mirrored latents differ: {found}")
        for count, what in ((self.same, "equal the straight moments"), (self.turned, "are the straight ones flipped")):
            if count > ALIKE * self.checked:
                self.fault(f"the mirrored moments of {count} samples {what}, expected those of the mirrored images")
        if self.copied > ALIKE * self.checked:
            what = f"the mirrored features of {self.copied} samples equal the straight ones"
            self.fault(f"{what}, expected those of the mirrored images")
        return [
            f"{self.seen} latents: mean {mean[0]:.3f}, standard deviation {std[0]:.3f} once standardized; "
            f"mirrored: {mean[1]:.3f} and {std[1]:.3f}"
        ]

    def _check_channels(self) -> None:
        """Checks the statistics of each channel, which were measured exactly if these are all samples."""
        sums = self.sums.sum(axis=0)
        if self.of.statistics == "data" and self.checked == self.spec.samples:
            for name, theirs in zip(("mean", "std"), statistics_of(sums), strict=True):
                if not alike(tuple(theirs.tolist()), getattr(self.of, name), 1e-6):
                    says = f"{SPEC_NAME} has {shortened(getattr(self.of, name))}"
                    self.fault(f"the latents' {name} per channel is {shortened(theirs.tolist())}; {says}")
        elif fault := doubt(self.of, sums):
            self.fault(fault)

    def tiles(self, row: Row) -> Iterator[tuple[Tensor, str]]:
        for column, side in (("moments", ""), ("moments_flip", ", mirrored")):
            mean = torch.from_numpy(row[column].astype(np.float32))[None, : self.of.channels]
            yield to_uint8(self.autoencoder.decode(self.of.standardize(mean)))[0], side

    def _fault(self, row: Row) -> str | None:
        for column in ("moments", "moments_flip"):
            moments = row[column]
            if moments.shape != self.shape:
                return f"{column} are {moments.shape}; {SPEC_NAME} says {self.shape}"
            if not np.isfinite(moments).all():
                return f"{column} have values that are NaN or infinite"
            if not (moments[self.of.channels :] > 0).all():  # there are none if it is deterministic
                return f"{column} have standard deviations that are not over 0"
        return None if self.spec.features is None else self._features_fault(row, self.spec.features)

    @staticmethod
    def _features_fault(row: Row, of: dict[str, Any]) -> str | None:
        expected = (of["grid"] ** 2, of["width"])
        for column in ("features", "features_flip"):
            if row[column].shape != expected:
                return f"{column} are {row[column].shape}; {SPEC_NAME} says {expected}"
            if not np.isfinite(row[column]).all():
                return f"{column} have values that are NaN or infinite"
            if not row[column].any(axis=1).all():
                return f"{column} have a token whose values are all 0, which has no direction"
        return None


def alike(one: Any, other: Any, tolerance: float = 0.0) -> bool:
    """Whether two numbers, or two tuples of them, are equal to rounding; ``tolerance`` is absolute."""
    if one is None or other is None or np.shape(one) != np.shape(other):
        return one is other
    return np.allclose(one, other, rtol=1e-6, atol=tolerance)
