"""The crop against ADM's own by PIL, and files of every kind, sound and broken."""

import base64
import io
import struct
import warnings
import zlib
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from convert.kinds import BadPicture, cropping, pixels
from sit_composer.data import pictures
from sit_composer.data.pictures import center_crop, decode_image
from tests.helpers.images import adm_center_crop, encode

HEADS = [
    ("RGB", {}),
    ("L", {"comment": b"hello"}),
    ("RGB", {"progressive": True, "icc_profile": bytes(30)}),
    ("CMYK", {}),
]  # a JPEG's mode, and what else is in its head
PHOTOGRAPH = Image.fromarray(load_sample_images().images[1]).resize((60, 40))


# --- the crop ------------------------------------------------------------------------------------------------------


def differences(levels: np.ndarray, size: int) -> np.ndarray:
    """How many levels of 255 the crop of uint8 (H, W, C) is from ADM's."""
    ours = center_crop(torch.from_numpy(levels).permute(2, 0, 1), size).permute(1, 2, 0).numpy()
    theirs = adm_center_crop(Image.fromarray(levels.squeeze(-1) if levels.shape[-1] == 1 else levels), size)
    return np.abs(ours.astype(int) - theirs.reshape(ours.shape))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 64, 213, 214, 256, 300, 427, 512])
@pytest.mark.parametrize("photograph", [0, 1])
def test_the_crop_is_adms(photograph, size, channels):
    """To the bit: of 427 x 640 photographs, halved first up to five times, or enlarged."""
    picture = Image.fromarray(load_sample_images().images[photograph]).convert("L" if channels == 1 else "RGB")
    for side in (picture, picture.transpose(Image.Transpose.TRANSPOSE)):
        assert not differences(np.array(side).reshape(side.height, side.width, channels), size).any()


def made(kind: str, height: int, width: int, channels: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    if kind == "noise":
        return random.integers(0, 256, (height, width, channels), dtype=np.uint8)
    coarse = random.choice([0, 255], (height // 5 + 1, width // 5 + 1, channels)).astype(np.uint8)
    if kind == "stripes":  # rows that are alike; here sums of float32 are two levels off, as their errors add up
        coarse[:] = coarse[:1]
    return coarse.repeat(5, 0).repeat(5, 1)[:height, :width]


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["noise", "blocks", "stripes"]),
    st.integers(1, 700),
    st.integers(1, 700),
    st.integers(1, 300),
    st.sampled_from([1, 3]),
    st.integers(0, 1 << 30),
)
def test_the_crop_of_any_picture_is_adms_to_the_bit(kind, height, width, size, channels, seed):
    assume(size**2 * max(height, width) < 1e6 * min(height, width))  # ADM's makes all of a long and thin one
    off = differences(made(kind, height, width, channels, seed), size)
    assert off.shape == (size, size, channels)
    assert not off.any()


@pytest.mark.parametrize("kind", ["noise", "blocks", "stripes"])
@pytest.mark.parametrize("shape", [(300, 400), (375, 500), (150, 200), (280, 280), (1027, 771)])
def test_no_value_of_a_hundred_thousand_is_another(shape, kind):
    assert not any(differences(made(kind, *shape, 3, seed), 256).any() for seed in range(4))


def test_a_long_and_thin_picture_takes_little_memory():
    levels = torch.arange(256, dtype=torch.uint8).repeat_interleave(250).view(1, 1, -1)
    crop = center_crop(levels, 64)  # ADM's makes 64 x 4,096,000 pixels of this first
    assert crop.shape == (1, 64, 64)
    assert crop.min() >= 127
    assert crop.max() <= 128


def test_a_picture_of_the_size_is_left_alone():
    levels = torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8)
    assert center_crop(levels, 24) is levels


# --- kinds of files ------------------------------------------------------------------------------------------------

# By `jpegtran -arithmetic`, which PIL cannot write: 24 x 16 of a photograph.
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUVDA8XGB"
    "YUGBIUFRT/2wBDAQMEBAUEBQkFBQkUDQsNFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBT/yQARCAAQ"
    "ABgDASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/AOgLvg/BZsrziq0M0qwpSHAFlpfxXqS1LoigEgPtcq3TZh4xVlNfawVDWm"
    "b86d1XeYy8gpwiM/FXvEXfm4wCjTK5ZZWQxY61OhV3FnYgOQWWlHBJ/wCysM40V7a7qLlNfCWrLavBO742FBlmsHb5Vet79St4yWH6bq6PbO+p"
    "lzGqvfeRD3ttLElcLWDVek7npGUkcI8QFwAZNPxiT1tujASHKoEPJH01sHAhcMPcpmvIV4TG7+1KUmuE9x4c3k9mFFwMGL85zGyDhlD3XU7eC9"
    "houduOtM78ChtK6KLDB1T1UhqT+Pu8YVKnWO8wx9UlxgFGnZ7ZqpjcN+NqncWbb/6bzmfA/9k="
)


def png16(array: np.ndarray, color: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG of uint16 (H, W, C), which PIL writes for C = 1 alone; ``color`` is its colour type."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, color, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    framed = (struct.pack(">I", len(b)) + a + b + struct.pack(">I", zlib.crc32(a + b)) for a, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def tiff16(array: np.ndarray, order: str = "<") -> bytes:
    """A TIFF of uint16 (H, W, 3), which PIL does not write."""
    bits = struct.pack(order + "3H", 16, 16, 16)
    data = array.astype(order + "u2").tobytes()
    entries = [(256, 4, 1, array.shape[1]), (257, 4, 1, array.shape[0]), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2)]
    entries += [(273, 4, 1, 14), (277, 3, 1, 3), (278, 4, 1, array.shape[0]), (279, 4, 1, len(data))]
    packed = b""
    for tag, kind, count, value in entries:
        packed += struct.pack(order + "HHI", tag, kind, count)
        packed += struct.pack(
            order + ("HH" if kind == 3 and count == 1 else "I"), *[value, 0][: 1 + (kind * count == 3)]
        )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 14 + len(data))
    return head + bits + data + struct.pack(order + "H", len(entries)) + packed + bytes(4)


@cache
def jpegs() -> dict[str, bytes]:
    """JPEGs of every kind, which must be as PIL reads them."""
    inks = np.random.default_rng(0).integers(0, 256, (5, 8, 4), dtype=np.uint8)
    inks = Image.frombytes("CMYK", (8, 5), inks.tobytes()).resize((60, 40))  # black among them
    cmyk = encode(inks, "JPEG", quality=95)
    adobe = cmyk.index(b"Adobe")  # of PIL: the inks are inverted, as Photoshop's are
    turned = Image.Exif()
    turned[0x112] = 6
    return {
        "JPEG": encode(PHOTOGRAPH, "JPEG", quality=95),
        "grey": encode(PHOTOGRAPH.convert("L"), "JPEG"),
        "progressive": encode(PHOTOGRAPH, "JPEG", progressive=True),
        "arithmetic": ARITHMETIC,
        "RGB without YCbCr": encode(PHOTOGRAPH, "JPEG", keep_rgb=True),
        "CMYK": cmyk,
        "CMYK, not Adobe's": cmyk[: adobe - 4] + cmyk[adobe + 12 :],
        "YCCK": cmyk[: adobe + 11] + b"\x02" + cmyk[adobe + 12 :],
        "rotated by EXIF": encode(PHOTOGRAPH, "JPEG", exif=turned),
        "with garbage behind": encode(PHOTOGRAPH, "JPEG") + b"garbage",
        "of one pixel": encode(PHOTOGRAPH.resize((1, 1)), "JPEG"),
        "of several pictures": encode(PHOTOGRAPH, "MPO", save_all=True, append_images=[Image.new("RGB", (60, 40))]),
    }


@pytest.mark.parametrize("kind", jpegs())
def test_a_jpeg_of_any_kind_is_as_pil_reads_it(kind):
    data = jpegs()[kind]
    with Image.open(io.BytesIO(data)) as picture:
        wanted, luma = np.array(picture.convert("RGB")), np.array(picture.convert("L"))
    assert np.array_equal(decode_image(data, 3).permute(1, 2, 0).numpy(), wanted)
    grey = decode_image(data, 1).numpy()
    assert grey.shape == (1, *luma.shape)
    assert np.abs(grey[0] - luma.astype(int)).mean() < 0.5  # its own luma hasn't been through RGB and its clipping
    with pixels.opened(pixels.read_file(data)) as picture:
        picture.load()
        assert (picture.height, picture.width) == wanted.shape[:2]  # a rotation by EXIF is left alone here, too


@pytest.mark.parametrize("size", [32, 30, 33])  # rows of whole words of eight bytes, of two, and of single bytes
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_decoded_into_a_batch_as_alone(monkeypatch, channels, size):
    square, batch = PHOTOGRAPH.crop((0, 0, size, size)), np.zeros((2, size, size, channels), np.uint8)
    cut = encode(square, "JPEG", quality=95)[:-100]
    files = [encode(square, "JPEG", quality=95), encode(square.convert("CMYK"), "JPEG"), encode(square, "PNG")]
    for data in (*files, encode(PHOTOGRAPH, "JPEG"), *jpegs().values()):
        if min(decode_image(data, channels).shape[1:]) >= size:
            alone = center_crop(decode_image(data, channels), size)
            for flip, wanted in ((False, alone), (True, alone.flip(2))):
                pictures.decode_into(batch[1], data, flip)
                assert np.array_equal(batch[1], wanted.permute(1, 2, 0).numpy())
            assert not batch[0].any()
    with pytest.raises(OSError, match="truncated"):
        pictures.decode_into(batch[1], cut)
    monkeypatch.setattr(pictures, "center_crop", None)  # a JPEG of that size needs none
    for flip in (False, True):
        pictures.decode_into(batch[1], files[0], flip)


def test_the_black_of_cmyk_is_black():
    inks = Image.new("CMYK", (16, 16), (0, 0, 0, 255))
    assert decode_image(encode(inks, "JPEG", quality=100), 3).max() <= 1
    assert decode_image(encode(Image.new("CMYK", (16, 16)), "JPEG", quality=100), 3).min() >= 254
    cyan = decode_image(encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100), 3)
    assert cyan[:, 8, 8].tolist() == pytest.approx([0, 255, 255], abs=1)


@cache
def others() -> dict[str, tuple[bytes, np.ndarray]]:
    """Other files, and the RGB that each should give."""
    photograph = PHOTOGRAPH
    rgb = np.array(photograph)
    grey = np.array(photograph.convert("L"))
    left = np.arange(60) < 30  # is transparent
    alpha = photograph.copy()
    alpha.putalpha(Image.fromarray(np.where(left, 0, 255).astype(np.uint8) * np.ones((40, 1), np.uint8)))
    over_white = np.where(left[:, None], 255, rgb)
    palette = photograph.quantize(16)
    p_rgb = np.array(palette.convert("RGB"))
    hole = np.where(np.array(palette)[..., None] == 3, 255, p_rgb)
    half = np.where(np.array(palette)[..., None] == 3, np.round(255 - 128 / 255 * (255.0 - p_rgb)), p_rgb)
    sixteen = grey.astype(np.uint16) * 256 + 200  # the upper 8 bits are taken
    rgb16 = rgb.astype(np.uint16) * 256 + 200
    opacity = np.where(left, 0, 65535).astype(np.uint16) * np.ones((40, 1, 1), np.uint16).transpose(0, 2, 1)
    opacity = opacity.reshape(40, 60, 1)
    three = np.repeat(grey[..., None], 3, -1)
    red = Image.new("RGB", (60, 40), "red")
    turned = Image.Exif()
    turned[0x112] = 6
    p5 = b"P5 60 40 65535\n" + sixteen.astype(">u2").tobytes()
    return {
        "PNG": (encode(photograph, "PNG"), rgb),
        "PNG, rotated by EXIF": (encode(photograph, "PNG", exif=turned), rgb),
        "PNG, animated": (encode(photograph, "PNG", save_all=True, append_images=[red]), rgb),
        "PNG of one pixel": (encode(photograph.crop((7, 8, 8, 9)), "PNG"), rgb[8:9, 7:8]),
        "grey PNG": (encode(photograph.convert("L"), "PNG"), three),
        "grey PNG with a transparent level": (
            encode(photograph.convert("L"), "PNG", transparency=int(grey[5, 5])),
            np.where(three == grey[5, 5], 255, three),
        ),
        "1-bit PNG": (encode(Image.fromarray(grey > 99), "PNG"), np.where(three > 99, 255, 0)),
        "16-bit grey PNG": (encode(Image.fromarray(sixteen), "PNG"), three),
        "16-bit grey PNG with a transparent level": (
            encode(Image.fromarray(sixteen), "PNG", transparency=int(sixteen[5, 5])),
            np.where(three == grey[5, 5], 255, three),
        ),
        "16-bit LA PNG": (
            png16(np.concatenate([sixteen[..., None], opacity], 2), 4),
            np.where(left[:, None], 255, three),
        ),
        "16-bit RGB PNG": (png16(rgb16, 2), rgb),
        "16-bit RGBA PNG": (png16(np.concatenate([rgb16, opacity], 2), 6), over_white),
        "RGBA PNG": (encode(alpha, "PNG"), over_white),
        "LA PNG": (encode(alpha.convert("LA"), "PNG"), np.where(left[:, None], 255, three)),
        "palette PNG": (encode(palette, "PNG"), p_rgb),
        "palette PNG with transparency": (encode(palette, "PNG", transparency=3), hole),
        "palette PNG with half transparency": (
            encode(palette, "PNG", transparency=b"\xff\xff\xff\x80" + b"\xff" * 12),
            half,
        ),
        "GIF": (encode(palette, "GIF"), p_rgb),
        "GIF with transparency": (encode(palette, "GIF", transparency=3), hole),
        "GIF, animated": (encode(palette, "GIF", save_all=True, append_images=[red.quantize(2)]), p_rgb),
        "BMP": (encode(photograph, "BMP"), rgb),
        "WebP": (encode(photograph, "WEBP", lossless=True), rgb),
        "WebP, animated": (encode(photograph, "WEBP", lossless=True, save_all=True, append_images=[red]), rgb),
        "WebP with transparency": (encode(alpha, "WEBP", lossless=True, exact=True), over_white),
        "TIFF": (encode(photograph, "TIFF"), rgb),
        "CMYK TIFF": (encode(photograph.convert("CMYK"), "TIFF"), rgb),
        "16-bit grey TIFF": (encode(Image.fromarray(sixteen), "TIFF"), three),
        "16-bit RGB TIFF": (tiff16(rgb16), rgb),
        "16-bit RGB TIFF, big-endian": (tiff16(rgb16, ">"), rgb),
        "PPM": (encode(photograph, "PPM"), rgb),
        "16-bit PGM": (p5, three),
        "16-bit PPM": (b"P6 60 40 65535\n" + (rgb.astype(np.uint16) * 257).astype(">u2").tobytes(), rgb),
    }


@pytest.mark.parametrize("kind", others())
def test_a_picture_of_any_kind_becomes_rgb_or_grey(kind):
    data, wanted = others()[kind]
    got = decode_image(data, 3)
    assert got.dtype == torch.uint8
    off = np.abs(got.permute(1, 2, 0).numpy().astype(int) - wanted)
    assert off.max() <= (1 if "half" in kind else 0)
    grey = decode_image(data, 1)
    assert grey.shape == (1, *wanted.shape[:2])
    assert np.abs(grey[0].numpy() - wanted @ [0.299, 0.587, 0.114]).max() <= 1
    with pixels.opened(pixels.read_file(data)) as picture:
        picture.load()
    assert torch.equal(cropping.crop(data, 3, 16), center_crop(got, 16))


def test_a_files_name_says_nothing(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(PHOTOGRAPH, "JPEG"))
    data = pixels.read_file(tmp_path / "a.png")
    assert torch.equal(decode_image(data, 3), decode_image(encode(PHOTOGRAPH, "JPEG"), 3))
    with pixels.opened(data) as picture:
        assert picture.format == "JPEG"


# --- Files that are not images ---

NO_IMAGE = "not an? (image|picture)"


def large_jpeg(side: int) -> bytes:
    """The JPEG of a small picture that says it has so many pixels a side."""
    data = encode(Image.new("L", (8, 8)), "JPEG")
    frame = data.index(b"\xff\xc0") + 5
    return data[:frame] + struct.pack(">HH", side, side) + data[frame + 4 :]


@cache
def broken() -> dict[str, tuple[bytes, str, str]]:
    """Files, and what `decode_image` and the conversion say of each."""
    photograph = encode(PHOTOGRAPH, "JPEG", quality=95)
    numbers = Image.fromarray(np.linspace(0, 1, 2400, dtype=np.float32).reshape(40, 60))
    wide = Image.fromarray(np.arange(2400, dtype=np.int32).reshape(40, 60) << 18)
    return {
        "cut JPEG": (photograph[:-300], "truncated", "truncated"),
        "head of a JPEG": (photograph[:20], NO_IMAGE, NO_IMAGE),
        "cut PNG": (encode(PHOTOGRAPH, "PNG")[:-300], "truncated", "truncated"),
        "cut GIF": (encode(PHOTOGRAPH.quantize(16), "GIF")[:-200], "truncated", "truncated"),
        "cut WebP": (encode(PHOTOGRAPH, "WEBP")[:-100], ".", "does not decode"),
        "cut TIFF": (encode(PHOTOGRAPH, "TIFF")[:-100], ".", f"does not decode|{NO_IMAGE}"),
        "nothing": (b"", NO_IMAGE, "zero bytes"),
        "zeros": (bytes(1000), NO_IMAGE, NO_IMAGE),
        "HTML": (b"<html>404</html>", "starts with b'<html>404</h'", "starts with b'<html>404</h'"),
        "format of another program": (encode(PHOTOGRAPH, "EPS"), NO_IMAGE, NO_IMAGE),
        "floats": (encode(numbers, "TIFF"), "32-bit", "32-bit"),
        "32-bit integers": (encode(wide, "TIFF"), "32-bit", "32-bit"),
        "JPEG bomb": (large_jpeg(65_000), "bomb", "bomb"),
        "PNG bomb": (encode(Image.new("1", (20_000, 20_000)), "PNG"), "bomb", "bomb"),
    }


@pytest.mark.parametrize("kind", broken())
def test_a_broken_file_is_told_by_what_is_wrong_with_it(kind):
    data, message, told = broken()[kind]
    for channels in (1, 3):
        with pytest.raises(Exception, match=message) as caught:
            decode_image(data, channels)
        assert " at 0x" not in str(caught.value)

    def load():
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # as to_mds.py does
            with pixels.opened(pixels.read_file(data)) as picture:
                picture.load()

    with pytest.raises(BadPicture, match=told) as caught:
        load()
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged EXIF
def test_pil_would_open_what_is_decoded_without_it(monkeypatch):
    """Heads with one damaged byte have the same levels, or the same error."""

    def outcome(data: bytes, channels: int) -> object:
        try:
            return decode_image(data, channels).numpy().tobytes()
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    usual, small = pictures.usual_jpeg, PHOTOGRAPH.resize((24, 20))
    for mode, options in HEADS:
        file = encode(small.convert(mode), "JPEG", **options)
        assert usual(file) == (None if mode == "CMYK" else (20, 24))
        tables = file.index(b"\xff\xc4")
        reserved = file[:tables] + b"\xff\x01" + file[tables:]  # which PIL alone refuses
        damaged = [file[:at] + b"\0" + file[at + 1 :] for at in range(2, tables + 40, 7)]
        for data in (file, reserved, *damaged):
            found = outcome(data, 3)
            with monkeypatch.context() as patch:
                patch.setattr(pictures, "usual_jpeg", lambda data: None)
                assert outcome(data, 3) == found


def test_the_benchmark_prints_its_table(capsys, monkeypatch):
    from tests.benchmarks import crop

    monkeypatch.setattr(crop, "SIZES", [(300, 260), (640, 520)])
    assert crop.main(["--seconds", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| image", "| ---", "| 300 × 260", "| 640 × 520"]
    assert all(line.endswith(" | 0 |") for line in lines[2:])
