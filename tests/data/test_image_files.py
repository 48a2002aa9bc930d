"""Which files are images, and what of folders is left out."""

import io
import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from sit_composer.data.folders import AGAIN, HIDDEN, below
from sit_composer.data.image_files import formats, images_below, is_image, suffixes
from sit_composer.data.pictures import decode_image
from tests.helpers.images import encode

LEVELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
Image.init()


@pytest.mark.parametrize("name", sorted({*formats(), "MPO"} & Image.SAVE.keys() - {"ICNS", "SPIDER"}))
def test_every_format_that_pillow_reads_is_decoded(name):
    image = Image.fromarray(LEVELS)
    for mode in ("RGB", "L", "1", "P"):
        try:
            data = encode(image.convert(mode), name)
        except Exception:  # the format has no such pixels
            continue
        with Image.open(io.BytesIO(data)) as stored:
            stored.load()
        levels = decode_image(data, 3)
        assert levels.shape == (3, stored.height, stored.width)
        if name not in ("JPEG", "MPO", "BLP"):  # torchvision's decoder; transparency
            assert np.array_equal(levels.permute(1, 2, 0), stored.convert("RGB"))
        return
    raise AssertionError("nothing was written")


def test_extensions_and_beginnings(tmp_path):
    assert {".jpg", ".jfif", ".jpe", ".mpo", ".jp2", ".png", ".tga", ".webp", ".avif"} <= suffixes()
    assert not {".eps", ".ps", ".wmf", ".pdf", ".h5", ".mpg", ".txt", ""} & suffixes()
    (tmp_path / "picture").write_bytes(encode(Image.fromarray(LEVELS), "WEBP"))
    (tmp_path / "README").write_text("P1ain text\n")
    os.mkfifo(tmp_path / "pipe")
    found = [name for name in ("a/b.JFIF", "c.txt", "picture", "README", "pipe", "gone") if is_image(tmp_path / name)]
    assert found == ["a/b.JFIF", "picture"]


def test_links_are_followed_and_loops_end(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / "a" / "b", elsewhere):
        folder.mkdir(parents=True)
        (folder / "0.png").touch()
    (root / "linked").symlink_to("../elsewhere")
    (root / "file.png").symlink_to("../elsewhere/0.png")
    for loop, target in (("a/up", ".."), ("a/b/self", "."), ("over", "../.."), ("elsewhere", "a")):
        (root / loop).symlink_to(target)
    (root / "snake").symlink_to("snake")
    (root / ".hidden").mkdir()
    (root / "linked" / "notes.txt").touch()
    left_out = Counter()
    found = [image.path for _, images in images_below(str(root), left_out) for image in images]
    assert found == [f"{root}/{name}" for name in ("a/b/0.png", "linked/0.png", "file.png")]
    assert left_out == {AGAIN: 4, HIDDEN: 1, "not an image (no extension)": 1, "not an image (.txt)": 1}
    assert list(below(str(root / "over"), left_out, str(root))) == []
