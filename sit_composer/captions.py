"""Grids of images with captions, which are wrapped to the width of what they belong to: none is cut, none overlaps."""

import math
import re
from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

GAP = 4  # pixels between images
LINE, SPACE = 13, 6  # pixels of a line of text, and below the last one
FONT = ImageFont.load_default(10)
Cell = tuple[Sequence[Image.Image], str]  # images side by side, and the caption below them


def draw_grid(rows: Sequence[Sequence[Cell]], title: str = "") -> Image.Image:
    """The rows of cells, one below the other, on white; the title, if there is one, above them."""
    strips = [_join([_captioned(*cell) for cell in row]) for row in rows]
    grid = _join(strips, down=True)
    return _join([_text(title, grid.width), grid], down=True) if title else grid


def draw_samples(
    images: list[Image.Image],
    labels: list[int],
    classes: list[str],
    cfg_scale: float,
    columns: int = 10,
    rows: int = 10,
) -> Image.Image:
    """A grid of the images, small ones enlarged, with their classes: one row per class if all have several images."""
    side = images[0].width * max(1, 48 // images[0].width)
    shown = list(dict.fromkeys(labels))[:rows]
    cells = [[i for i, label in enumerate(labels) if label == c][:columns] for c in shown]
    several = min(map(len, cells)) > 1
    if not several:  # fill the rows
        count = min(len(labels), rows * columns)
        width = min(math.ceil(math.sqrt(count)), columns)
        cells = [list(range(i, min(i + width, count))) for i in range(0, count, width)]

    def cell(indices: list[int]) -> Cell:
        label = labels[indices[0]]
        return [images[i].resize((side, side), Image.NEAREST) for i in indices], class_caption(classes[label], label)

    return draw_grid([[cell(row)] if several else [cell([i]) for i in row] for row in cells], f"guidance {cfg_scale:g}")


def class_caption(name: str, label: int) -> str:
    """A class's name, after its label if the font lacks some of the name's characters."""
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return name if name and all(map(_has_glyph, name)) else f"{label} {name}".strip()


def wrap(text: str, width: int) -> list[str]:
    """The lines of a text, none wider than ``width`` pixels; a word that is wider continues on the next line."""

    def fits(line: str) -> bool:
        return FONT.getlength(line.rstrip()) <= width

    lines = [""]
    for word in re.findall(r"[^\s_/,-]*[\s_/,-]*", text):
        if not fits(lines[-1] + word):
            lines.append("")
        for character in word:
            if not fits(lines[-1] + character):
                lines.append("")
            lines[-1] += character
    return [line.strip() for line in lines if line.strip()]


def _captioned(images: Sequence[Image.Image], caption: str) -> Image.Image:
    return _join([strip := _join(images), _text(caption, strip.width)], down=True)


def _text(text: str, width: int) -> Image.Image:
    lines = wrap(text, width - GAP)  # so that it stands apart from the next one
    image = Image.new("RGB", (width, LINE * len(lines) + SPACE), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(image).text((0, i * LINE), line, fill="black", font=FONT)
    return image


def _join(images: Sequence[Image.Image], down: bool = False) -> Image.Image:
    """The images side by side, or one below the other."""
    sizes = [image.size[::-1] if down else image.size for image in images]
    along, across = sum(length + GAP for length, _ in sizes) - GAP, max(breadth for _, breadth in sizes)
    joined, place = Image.new("RGB", (across, along) if down else (along, across), "white"), 0
    for image, (length, _) in zip(images, sizes, strict=True):
        joined.paste(image, (0, place) if down else (place, 0))
        place += length + GAP
    return joined


@cache
def _has_glyph(character: str) -> bool:
    """Whether the font draws the character, and not the box that it has for unknown ones."""
    return bytes(FONT.getmask(character)) != bytes(FONT.getmask("\uffff"))
