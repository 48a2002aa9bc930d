"""The check of images decodes JPEGs at an eighth of their size, and refuses exactly what a whole decoding refuses."""

import io
import random

import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from convert.kinds import BadPicture
from convert.kinds.pixels import decoded, opened
from tests.helpers.images import encode

PHOTOGRAPH = Image.fromarray(load_sample_images().images[0])
SMALL = PHOTOGRAPH.resize((61, 43))  # the last blocks of both sides are cut
FILES = {
    "baseline": encode(SMALL, "JPEG", quality=95),
    "chroma in full, with restarts": encode(SMALL, "JPEG", subsampling=0, restart_marker_blocks=2),
    "progressive": encode(SMALL, "JPEG", quality=80, progressive=True),
    "progressive, with restarts": encode(SMALL, "JPEG", progressive=True, restart_marker_rows=1),
    "grey": encode(SMALL.convert("L"), "JPEG", optimize=True),
    "CMYK": encode(SMALL.convert("CMYK"), "JPEG"),
    "several": encode(SMALL, "MPO", save_all=True, append_images=[SMALL]),
    "in several reads": encode(PHOTOGRAPH.resize((400, 300)), "JPEG", quality=97),
}
SAMPLING = [0x11, 0x12, 0x13, 0x14, 0x21, 0x22, 0x23, 0x24, 0x31, 0x32, 0x33, 0x41, 0x42, 0x44]


def damage(data: bytes, rng: random.Random) -> bytes:
    """Cuts a file off, changes how its chroma is sampled, or changes, inserts or removes some bytes."""
    file, kind = bytearray(data), rng.random()
    if kind < 0.25:
        return data[: rng.randrange(2, len(data))]
    frame = max(file.find(b"\xff\xc0"), file.find(b"\xff\xc2"))
    if kind < 0.4:
        for component in range(file[frame + 9]):
            file[frame + 11 + 3 * component] = rng.choice(SAMPLING)
        return bytes(file)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        place = rng.randrange(2, min(len(file), rng.choice([700, len(file)])))
        change = rng.choice([b"", b"\xff", b"\xff\xd9", b"\xff\xd3", b"\xff\xda", b"\xff\xc4", rng.randbytes(1)])
        file[place : place + rng.choice([0, 1, len(change), len(change), 5])] = change
    return bytes(file)


def whole(data: bytes) -> tuple[int, int]:
    with opened(data) as image:
        image.load()
        return image.size


def verdict(way, data: bytes) -> str:
    try:
        return str(way(data))
    except BadPicture as error:
        return str(error)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged EXIF
@pytest.mark.parametrize("kind", FILES)
def test_a_draft_refuses_exactly_what_a_whole_decoding_refuses(kind):
    rng = random.Random(0)
    seen = set()
    for _ in range(100 if kind == "in several reads" else 1500):
        data = damage(FILES[kind], rng)
        try:
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > 1 << 22:
                    continue  # a size that the damage made takes seconds
        except Exception:  # `opened` says what is wrong
            pass
        told = verdict(whole, data)
        assert verdict(lambda data: decoded(data)[1:3], data) == told
        seen.add(told.split(" (")[0])
    assert {"the image does not decode: image file is truncated", str(Image.open(io.BytesIO(FILES[kind])).size)} <= seen
    assert any("broken data stream" in told for told in seen)
