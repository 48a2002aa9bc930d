"""Captions in grids: nothing is cut, nothing overlaps, and what the font cannot draw has its label."""

import numpy as np
import pytest
from PIL import Image

from sit_composer.captions import FONT, class_caption, draw_grid, wrap

LONG = "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias"
NAMES = [
    LONG,
    "Megaptera_novaeangliae_the_humpback_whale",
    "Pneumonoultramicroscopicsilicovolcanoconiosis",
    "黑猫" * 20,
]


@pytest.mark.parametrize("name", [*NAMES, "a", ""])
@pytest.mark.parametrize("width", [1, 44, 92, 500])
def test_lines_fit_their_width_and_lose_nothing(name, width):
    lines = wrap(name, width)
    assert "".join("".join(lines).split()) == "".join(name.split())
    assert all(len(line) == 1 or FONT.getlength(line) <= width for line in lines)


def test_words_stay_whole_where_they_fit():
    assert wrap("tiger shark, Galeocerdo cuvieri", 60) == ["tiger shark,", "Galeocerdo", "cuvieri"]
    assert wrap("grey_whale", 40) == ["grey_", "whale"]


def test_captions_stay_below_their_images():
    image = Image.new("RGB", (48, 48), "red")
    cells = [([image], name) for name in NAMES]
    grid = np.asarray(draw_grid([cells, [([image] * 2, LONG)]]))
    assert (grid == (255, 0, 0)).all(-1).sum() == 6 * 48 * 48  # no letter is on an image
    ink = (np.asarray(draw_grid([cells])) < 200).any(-1)[50:]
    assert [bool(ink[:, x : x + 48].any()) for x in range(0, 200, 52)] == [True] * 4
    assert not any(ink[:, x + 46 : x + 52].any() for x in range(0, 150, 52))  # each caption is below its own image


@pytest.mark.parametrize(
    ("name", "caption"),
    [("tench", "tench"), (" two\nlines\x00", "two lines"), ("黑猫", "7 黑猫"), ("", "7"), ("a\ud800", "a")],
)
def test_a_name_that_the_font_cannot_draw_follows_its_label(name, caption):
    assert class_caption(name, 7) == caption
