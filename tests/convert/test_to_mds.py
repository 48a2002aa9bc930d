"""convert/to_mds.py: every source in, every failure out. Most tests call it in this process: streaming loads slowly."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from convert import verify_mds
from sit_composer import storage
from sit_composer.data.shared_names import one_job_at_a_time
from tests.helpers.shards import read
from tests.helpers.sources import write_folder, write_parquet

SCRIPT = Path(__file__).parents[2] / "convert" / "to_mds.py"


@pytest.fixture(scope="session")
def jpegs():
    """Six small photographs, as JPEG files' bytes."""
    from sklearn.datasets import load_sample_images

    crops = [photo[y : y + 48, 100:148] for photo in load_sample_images().images for y in (50, 150, 250)]
    return [encode(Image.fromarray(crop), "JPEG") for crop in crops]


def encode(picture, format):
    file = io.BytesIO()
    picture.save(file, format)
    return file.getvalue()


# --- sources -------------------------------------------------------------------------------------------------------


def test_digits_from_the_command_line_stream_back_as_scikit_learn_ships_them(tmp_path):
    from sklearn.datasets import load_digits

    out = tmp_path / "new" / "digits"
    command = [sys.executable, SCRIPT, "digits", "--out", out]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary, uri = done.stdout.splitlines()[-2:]
    assert summary.startswith("1797 images, 10 classes, 0 skipped; 1 shard, 0.2 MB")
    assert uri == str(out)
    assert sorted(os.listdir(out)) == ["index.json", "shard.00000.00000.mds", "spec.json"]

    digits = load_digits()
    spec, samples = read(out)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image))) for image, _ in samples])
    assert np.array_equal(pixels, np.round(digits.images * 255 / 16))
    assert [label for _, label in samples] == digits.target.tolist()
    assert (spec.kind, spec.channels, spec.image_size, spec.samples) == ("pixels", 1, 8, 1797)
    assert spec.class_counts == np.bincount(digits.target).tolist()
    assert (spec.source["format"], spec.source["path"], spec.source["files"]["count"]) == ("digits", "digits", 1)

    from streaming import StreamingDataset

    with one_job_at_a_time():
        data = StreamingDataset(local=str(out), batch_size=1, shuffle=False, validate_hash="xxh64")
    assert len(data) == 1797
    assert data[1796] == {"image": samples[-1][0], "label": 8}


def test_image_folder_in_many_formats(tmp_path, convert, jpegs):
    root = write_folder(tmp_path / "pictures", wolf=[jpegs[0]], ant=[])
    photo = Image.open(io.BytesIO(jpegs[1]))
    files = {f"{f}.{f}": encode(photo, f.upper()) for f in ("png", "webp", "bmp", "gif", "tiff", "ppm")}
    files["CMYK.JPEG"] = encode(photo.convert("CMYK"), "JPEG")
    for name, data in files.items():
        (root / "ant" / name).write_bytes(data)
    (root / "ant" / "notes.txt").write_text("not a picture")
    (root / "ant" / ".hidden.png").write_text("not a picture")
    (root / ".git").mkdir()
    assert convert(root, "--out", tmp_path / "out")[0] == 0
    spec, samples = read(tmp_path / "out")
    assert samples == [(files[name], 0) for name in sorted(files)] + [(jpegs[0], 1)]
    assert (spec.classes, spec.class_counts, spec.channels) == (["ant", "wolf"], [7, 1], 3)


@pytest.mark.parametrize(
    ("modes", "sizes", "channels", "image_size"),
    [
        (["L", "1", "I;16"], [(9, 9)], 1, 9),
        (["L", "RGB"], [(9, 9)], 3, 9),
        (["L", "LA"], [(9, 9)], 3, 9),
        (["P"], [(9, 9)], 3, 9),
        (["RGB"], [(9, 9), (8, 8)], 3, None),
        (["RGB"], [(9, 8)], 3, None),
    ],
)
def test_spec_says_whether_all_are_grey_and_of_one_square_size(tmp_path, convert, modes, sizes, channels, image_size):
    images = [encode(Image.new(mode, size), "PNG") for mode in modes for size in sizes]
    write_parquet(tmp_path / "t.parquet", images, [0] * len(images))
    assert convert(tmp_path / "t.parquet", "--out", tmp_path / "out")[0] == 0
    spec, _ = read(tmp_path / "out")
    assert (spec.channels, spec.image_size) == (channels, image_size)


# --- bad input -----------------------------------------------------------------------------------------------------


def bad_labels(labels, *messages):
    def case(tmp_path, jpegs):
        return write_parquet(tmp_path / "t.parquet", jpegs[: len(labels)], labels), ("--skip-bad",), messages

    return case


def bad_picture(data, *messages):
    def case(tmp_path, jpegs):
        images = [jpegs[0], data(jpegs[1]), jpegs[2]]
        return (
            write_parquet(tmp_path / "t.parquet", images, [0, 0, 0]),
            (),
            ["t.parquet row 1", "--skip-bad", *messages],
        )

    return case


def as_eps(jpeg):
    return encode(Image.open(io.BytesIO(jpeg)), "EPS")  # which Pillow would give to Ghostscript


def bad_picture_file(tmp_path, jpegs):
    return write_folder(tmp_path / "d", a=[jpegs[0], jpegs[1][:-300]]), (), ["a/1.jpg", "truncated"]


def missing_picture_file(tmp_path, jpegs):
    images = pa.array([{"path": "no.jpg"}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": images, "label": [0]}), tmp_path / "t.parquet")
    return tmp_path / "t.parquet", (), ["row 0", "no.jpg"]


def all_bad(tmp_path, jpegs):
    return write_folder(tmp_path / "d", a=[b"x", b"y"]), ("--skip-bad",), ["none of 2 images can be used", "a/0.jpg"]


def huge_picture(tmp_path, jpegs):
    return write_folder(tmp_path / "d", a=[encode(Image.new("1", (10_000, 9_000)), "PNG")]), (), ["decompression bomb"]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(bad_labels([0, 1, -1], "t.parquet row 2", "label -1"), id="negative_label"),
        pytest.param(bad_picture(lambda good: good[:-300], "truncated"), id="truncated_picture"),
        pytest.param(bad_picture(lambda good: b"", "zero bytes"), id="empty_picture"),
        pytest.param(bad_picture(lambda good: None, "null"), id="null_picture"),
        pytest.param(bad_picture(lambda good: b"<html>404</html>", "starts with b'<html>"), id="html_picture"),
        pytest.param(bad_picture(as_eps, "not an image that Pillow reads: it starts with b'%!PS"), id="program"),
        bad_picture_file,
        missing_picture_file,
        all_bad,
        huge_picture,
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, convert, jpegs, case):
    source, options, messages = case(tmp_path, jpegs)
    before = set(os.listdir(tmp_path))
    code, stdout, stderr = convert(source, "--out", tmp_path / "out", *options)
    assert code == 2
    assert stdout == ""
    error = stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert len(stderr.splitlines()) == 1
    for message in messages:
        assert message in error
    assert set(os.listdir(tmp_path)) == before


def test_skip_bad_leaves_out_and_counts(tmp_path, convert, jpegs):
    images = [b"<html>", jpegs[0], None, jpegs[1], *[jpegs[2][:400]] * 6]
    write_parquet(tmp_path / "t.parquet", images, [0, 1, 0, 2] + [0] * 6)
    code, stdout, stderr = convert(tmp_path / "t.parquet", "--out", tmp_path / "out", "--skip-bad")
    assert code == 0
    assert "2 images, 3 classes, 8 skipped" in stdout
    assert "1 of 3 classes have no image: 0" in stderr
    assert "skipped 8 images" in stderr
    assert stderr.count("t.parquet row ") == 5
    spec, samples = read(tmp_path / "out")
    assert samples == [(jpegs[0], 1), (jpegs[1], 2)]
    assert (spec.samples, spec.skipped, spec.class_counts) == (2, 8, [0, 1, 1])


def test_what_is_left_out_and_what_is_small_is_counted_by_reason(tmp_path, convert, jpegs, capsys):
    root = write_folder(tmp_path / "d", ant=jpegs[:3], bee=[b"<html>", jpegs[3][:-300]])
    for name, size in (("dot", (1, 1)), ("thin.jp2", (99, 20))):
        encoded = encode(Image.new("RGB", size), "JPEG2000")
        (root / "bee" / name).write_bytes(encoded)
    (root / "beside.png").write_bytes(b"")
    (root / "notes.txt").touch()
    code, stdout, stderr = convert(root, "--out", tmp_path / "out", "--image-size", 48, "--skip-bad")
    assert (code, "5 images, 2 classes, 2 skipped" in stdout) == (0, True)
    spec, samples = read(tmp_path / "out")
    files = {"an image beside the classes' folders": 1, "not an image (.txt)": 1}
    assert spec.left_out == {**files, "not an image that Pillow reads": 1, "the image does not decode": 1}
    assert spec.small == {"of 1x1 pixels": 1, "enlarged more than 2 times": 1}
    assert "left out: an image beside the classes' folders: 1; " in stderr
    assert "small images: enlarged more than 2 times: 1; of 1x1 pixels: 1" in stderr
    assert len(samples) == 5
    (root / "new.jpg").touch()
    assert verify_mds.main([str(tmp_path / "out"), "--source"]) == 0
    report = capsys.readouterr().out
    assert "left out: an image beside the classes' folders: 1; not an image (.txt): 1; not an image that" in report
    assert "2 skipped; left out: an image beside the classes' folders: 2; not an image (.txt): 1" in report


NO_VAE = ["digits", "--out", "x", "--latents", "--vae", "no/vae/here"]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["nowhere/t.parquet", "--out", "x"], ["digits", "--out", "done"], NO_VAE]
)
def test_a_command_that_needs_no_library_waits_for_none(tmp_path, arguments):
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "something").touch()
    command = [sys.executable, "-X", "importtime", SCRIPT, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == (0 if arguments == ["--help"] else 2)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "argparse" in loaded
    assert not loaded & {"streaming", "torch", "datasets", "pyarrow", "sklearn", "numpy"}
    if "done" not in arguments:  # the output is looked at by the body of the command
        assert not loaded & {"boto3", "PIL", "tqdm"}


@pytest.mark.parametrize("limit", ["0", "-1", "1.5", "many"])
def test_a_limit_is_a_positive_number(convert, limit):
    with pytest.raises(SystemExit, match="2"):
        convert("digits", "--out", "unused", f"--limit={limit}")


@pytest.mark.parametrize("option", ["--out", "--vae"])
def test_an_empty_name_is_refused(convert, capsys, option):
    with pytest.raises(SystemExit, match="2"):
        convert("digits", "--out", "unused", f"{option}=")
    assert f"argument {option}: it is empty" in capsys.readouterr().err


# --- output --------------------------------------------------------------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def pictures(tmp_path, jpegs):
    return write_folder(tmp_path / "pictures", ant=jpegs[:3], bee=jpegs[3:])


@pytest.fixture
def small_shards(convert, monkeypatch):
    """Shards of about three small photographs."""
    from convert.engine import shards

    monkeypatch.setattr(shards, "SHARD_BYTES", 5000)


def test_a_second_run_writes_the_same_bytes(tmp_path, convert, pictures, small_shards):
    assert convert(pictures, "--out", tmp_path / "a")[0] == 0
    assert convert(pictures, "--out", tmp_path / "b")[0] == 0
    assert len(contents(tmp_path / "a")) > 3
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_output_that_exists_is_left_alone_or_overwritten(tmp_path, convert, jpegs, pictures):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is as good as none
    assert convert(pictures, "--out", out)[0] == 0
    first = contents(out)
    code, stdout, _ = convert(pictures, "--out", out)
    assert code == 0
    assert "already converted" in stdout
    code, _, stderr = convert(pictures, "--out", out, "--limit", 2)
    assert code == 2
    assert "limit None there, 2 now" in stderr
    assert contents(out) == first

    assert convert(pictures, "--out", out, "--overwrite", "--limit", 2)[0] == 0
    assert read(out)[1] == [(jpegs[0], 0), (jpegs[1], 0)]
    (out / "shard.00000.00000.mds").write_bytes(b"damaged")
    code, _, stderr = convert(pictures, "--out", out, "--limit", 2)
    assert code == 2
    assert "is damaged" in stderr
    assert convert(pictures, "--out", out, "--limit", 2, "--overwrite")[0] == 0
    assert read(out)[1] == [(jpegs[0], 0), (jpegs[1], 0)]
    assert sorted(os.listdir(tmp_path)) == ["out", "pictures"]


def test_a_failed_overwrite_keeps_what_was_there(tmp_path, convert, pictures):
    assert convert(pictures, "--out", tmp_path / "out")[0] == 0
    first = contents(tmp_path / "out")
    (pictures / "bee" / "3.jpg").write_bytes(b"broken")
    code, _, stderr = convert(pictures, "--out", tmp_path / "out", "--overwrite")
    assert code == 2
    assert "bee/3.jpg" in stderr
    assert contents(tmp_path / "out") == first
    assert sorted(os.listdir(tmp_path)) == ["out", "pictures"]


@pytest.mark.parametrize("option", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", ["thesis.tex", "index.json", "shard.00000.mds"])
def test_a_folder_of_other_files_is_never_replaced(tmp_path, convert, pictures, option, name):
    # An index or shards without spec.json are MDS data of another program.
    for folder in ("out", "other.partial"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("{}")
    assert convert(pictures, "--out", tmp_path / "out", *option)[0] == 2
    assert contents(tmp_path / "out") == {name: b"{}"}
    if name == "thesis.tex":
        code, _, stderr = convert(pictures, "--out", tmp_path / "other", *option)
        assert code == 2
        assert "other.partial" in stderr
        assert contents(tmp_path / "other.partial") == {name: b"{}"}


def test_output_that_cannot_be(tmp_path, convert, pictures):
    (tmp_path / "file").write_text("kept")
    cases = [
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "out", "cannot be made"),
        (pictures / "shards", "is inside the source"),
        ("/proc", "mount point"),
        ("ftp://server/x", "ftp://: an unknown object store, expected s3://"),
    ]
    for out, message in cases:
        code, _, stderr = convert(pictures, "--out", out)
        assert code == 2
        assert message in stderr
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(os.listdir(pictures)) == ["ant", "bee"]


def test_a_picture_larger_than_a_shard_leaves_no_empty_shard(tmp_path, convert, pictures, monkeypatch):
    from convert.engine import shards

    monkeypatch.setattr(shards, "SHARD_BYTES", 500)
    assert convert(pictures, "--out", tmp_path / "out")[0] == 0
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [shard["samples"] for shard in index["shards"]] == [1] * 6
    assert len(read(tmp_path / "out")[1]) == 6


class Pipe:
    """A picture that is a named pipe: the conversion waits in the middle until it is fed."""

    def __init__(self, path):
        self.path = path
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    def feed(self, data):
        """Waits for the reader, then gives it the picture."""
        self.path.write_bytes(data)

    def wait(self):
        """Returns when the reader has opened the pipe; keep what it returns until the reader may go on."""
        return os.open(self.path, os.O_WRONLY)


def test_ctrl_c_in_the_first_part_leaves_nothing(tmp_path, convert, pictures, small_shards):
    pipe = Pipe(pictures / "bee" / "2.jpg")
    seen = []

    def interrupt():
        held = pipe.wait()
        seen.extend(os.listdir(tmp_path / "out.partial"))
        os.kill(os.getpid(), signal.SIGINT)
        os.close(held)

    thread = threading.Thread(target=interrupt)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # Composer, if a test used it, put in its own
    thread.start()
    code, _, stderr = convert(pictures, "--out", tmp_path / "out")
    thread.join()
    signal.signal(signal.SIGINT, handler)
    assert code == 130
    assert stderr == "\ninterrupted; run the same command again to resume\n"
    assert seen  # it was in the middle
    assert "index.json" not in seen
    assert sorted(os.listdir(tmp_path)) == ["pictures"]


def test_a_killed_run_is_started_again_but_not_beside_a_living_one(tmp_path, convert, jpegs, pictures):
    pipe = Pipe(pictures / "ant" / "0.jpg")
    command = [sys.executable, SCRIPT, pictures, "--out", tmp_path / "out"]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        held = pipe.wait()
        (tmp_path / "out.partial" / "shard.00000.00000.mds").write_bytes(b"half a sha")
        code, _, stderr = convert(pictures, "--out", tmp_path / "out")
        assert code == 2
        assert ": another conversion is writing to it" in stderr
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    os.close(held)
    assert {"plan.json", "shard.00000.00000.mds"} <= set(os.listdir(tmp_path / "out.partial"))
    pipe.path.unlink()
    pipe.path.write_bytes(jpegs[0])
    code, _, stderr = convert(pictures, "--out", tmp_path / "out")
    assert code == 2
    assert f"the source's files have changed: {pipe.path.parent} has changed" in stderr
    assert convert(pictures, "--out", tmp_path / "out", "--overwrite")[0] == 0
    assert [image for image, _ in read(tmp_path / "out")[1]] == jpegs
    assert sorted(os.listdir(tmp_path)) == ["out", "pictures"]


def test_a_signal_while_streaming_loads_leaves_nothing(tmp_path, pictures):
    command = [sys.executable, "-X", "importtime", SCRIPT, pictures, "--out", tmp_path / "out"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in child.stderr:  # a line for each module, once it is loaded
        if line.endswith(" numpy._core._string_helpers\n"):
            child.terminate()  # torch swallows what interrupts its import of numpy
            break
    stderr = child.communicate()[1]
    assert child.returncode == 143, stderr[-2000:]
    assert "Traceback" not in stderr
    assert os.listdir(tmp_path) == ["pictures"]


# --- cropped pictures ----------------------------------------------------------------------------------------------


@pytest.fixture
def many_kinds(tmp_path, jpegs):
    """Pictures of several sizes and modes, some grey."""
    photo = Image.open(io.BytesIO(jpegs[0]))
    files = [encode(photo.crop((0, 0, 48, 30)), "JPEG"), encode(photo.convert("L").crop((0, 0, 20, 48)), "JPEG")]
    files += [encode(photo.crop((0, 0, 47, 33)).convert(mode), "PNG") for mode in ("L", "1", "RGB", "RGBA", "P")]
    files += [encode(photo.resize((16, 16)), "PNG"), encode(photo.resize((9, 7)), "BMP")]
    return write_folder(tmp_path / "kinds", some=files)


def load(folder, image_size):
    from sit_composer.data.loader import build_loader
    from sit_composer.data.stream import load_spec

    spec = load_spec(None, str(folder))
    loader = build_loader(
        None, str(folder), spec=spec, batch_size=3, shuffle=False, drop_last=False, image_size=image_size
    )
    return np.concatenate([batch["image"].numpy() for batch in loader])


def test_cropped_pictures_are_those_that_training_would_crop(tmp_path, convert, many_kinds):
    assert convert(many_kinds, "--out", tmp_path / "own")[0] == 0
    code, stdout, stderr = convert(many_kinds, "--out", tmp_path / "cropped", "--image-size", 16)
    assert code == 0, stderr
    assert "9 images, 1 classes, 0 skipped" in stdout
    spec, samples = read(tmp_path / "cropped")
    assert (spec.kind, spec.channels, spec.image_size, spec.source["image_size"]) == ("pixels", 3, 16, 16)
    assert all(image.startswith(b"\x89PNG") for image, _ in samples)
    own, cropped = load(tmp_path / "own", 16), load(tmp_path / "cropped", None)
    assert cropped.shape == (9, 3, 16, 16)
    assert np.array_equal(own, cropped)


def test_cropped_grey_pictures_stay_grey(tmp_path, convert):
    assert convert("digits", "--out", tmp_path / "own", "--limit", 20)[0] == 0
    assert convert("digits", "--out", tmp_path / "cropped", "--limit", 20, "--image-size", 4)[0] == 0
    assert read(tmp_path / "cropped")[0].channels == 1
    assert np.array_equal(load(tmp_path / "own", 4), load(tmp_path / "cropped", None))


def test_cropped_pictures_as_jpeg_have_the_quality_that_was_asked_for(tmp_path, convert, many_kinds):
    for quality in (50, 95):
        assert convert(many_kinds, "--out", tmp_path / f"{quality}", "--image-size", 16, "--quality", quality)[0] == 0
    assert convert(many_kinds, "--out", tmp_path / "png", "--image-size", 16)[0] == 0
    exact = [Image.open(io.BytesIO(image)) for image, _ in read(tmp_path / "png")[1]]
    for quality in (50, 95):
        spec, samples = read(tmp_path / f"{quality}")
        assert spec.source["quality"] == quality
        for picture, (image, _) in zip(exact, samples, strict=True):
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=quality)
            assert image == file.getvalue()


def test_a_conversion_with_another_size_or_quality_is_not_resumed(tmp_path, convert, many_kinds):
    out = ("--out", tmp_path / "out")
    assert convert(many_kinds, *out, "--image-size", 16, "--quality", 90)[0] == 0
    assert "already converted" in convert(many_kinds, *out, "--image-size", 16, "--quality", 90)[1]
    for options, message in (
        (["--image-size", 8, "--quality", 90], "image_size 16 there, 8 now"),
        (["--image-size", 16], "quality 90 there, None now"),
        ([], "image_size 16 there, None now; quality 90 there, None now"),
    ):
        code, _, stderr = convert(many_kinds, *out, *options)
        assert code == 2
        assert message in stderr


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda good: good[:-300], "a/7.jpg: the image does not decode"),
        (lambda good: b"<html>404</html>", "a/7.jpg: not an image"),
        (lambda good: b"", "a/7.jpg: the image has zero bytes"),
        (lambda good: encode(Image.new("1", (10_000, 9_000)), "PNG"), "decompression bomb"),
        (lambda good: encode(Image.new("1", (1, 60_000)), "PNG"), "1x60000, too large with a short side of 48"),
    ],
)
def test_a_bad_picture_is_not_cropped_but_named_or_left_out(tmp_path, convert, jpegs, bad, message):
    root = write_folder(tmp_path / "d", a=[*jpegs, jpegs[0], bad(jpegs[1]), *jpegs])
    before = sorted(os.listdir(tmp_path))
    code, _, stderr = convert(root, "--out", tmp_path / "out", "--image-size", 48)
    assert code == 2
    assert message in stderr
    assert len(stderr.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == before
    assert convert(root, "--out", tmp_path / "out", "--image-size", 48, "--skip-bad", "--limit", 12)[0] == 0
    spec, samples = read(tmp_path / "out")
    assert (spec.samples, spec.skipped) == (11, 1)  # of the source's first twelve
    names = sorted(path.name for path in (root / "a").iterdir() if path.name != "7.jpg")[:11]
    levels = [np.asarray(Image.open(io.BytesIO(image))) for image, _ in samples]
    expected = [np.asarray(Image.open(root / "a" / name)) for name in names]
    assert all(np.abs(a.astype(int) - b).max() <= 4 for a, b in zip(levels, expected, strict=True))  # two decoders


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quality", "90"], "--quality: only for images that --image-size crops"),
        (["--latents"], "--latents and --vae: each needs the other"),
        (["--vae", "some/vae"], "--latents and --vae: each needs the other"),
        (["--image-size", "8", "--batch-size", "2"], "--batch-size: only for --latents"),
        (["--encode-dtype", "float32"], "--encode-dtype: only for --latents"),
        (["--latents", "--vae", "x", "--image-size", "8", "--quality", "9"], "--quality: only for images"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, convert, options, message):
    code, _, stderr = convert("digits", "--out", tmp_path / "out", *options)
    assert code == 2
    assert message in stderr
    assert len(stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []


# --- a real S3 -----------------------------------------------------------------------------------------------------


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """An empty folder for temporary files."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def read_bucket(s3, prefix, folder):
    folder.mkdir()
    for name, data in s3.contents(prefix).items():
        (folder / name).write_bytes(data)
    return read(folder)


def test_s3(tmp_path, convert, jpegs, pictures, s3, small_shards, temporary, monkeypatch):
    expected = list(zip(jpegs, [0, 0, 0, 1, 1, 1], strict=True))

    # The same files as in a folder.
    assert convert(pictures, "--out", tmp_path / "out")[0] == 0
    code, stdout, stderr = convert(pictures, "--out", "s3://sit/a/b/")
    assert code == 0, stderr
    assert stdout.splitlines()[-1] == "s3://sit/a/b/"
    assert s3.contents("a/b") == contents(tmp_path / "out")

    # What is there is left alone, or replaced; a failure loses none of it.
    code, stdout, _ = convert(pictures, "--out", "s3://sit/a/b")
    assert code == 0
    assert "already converted" in stdout
    assert convert(pictures, "--out", "s3://sit/a/b", "--limit", 2)[0] == 2
    code, _, stderr = convert(pictures, "--out", "s3://sit/a", "--overwrite")
    assert code == 2
    assert "b/index.json" in stderr
    (pictures / "bee" / "3.jpg").write_bytes(b"broken")
    assert convert(pictures, "--out", "s3://sit/a/b", "--overwrite")[0] == 2
    assert s3.contents("a/b") == contents(tmp_path / "out")
    assert convert(pictures, "--out", "s3://sit/new")[0] == 2
    assert s3.contents("new") == {}
    (pictures / "bee" / "3.jpg").unlink()
    for times, prefix in enumerate(("again-shard", "shard")):
        assert convert(pictures, "--out", "s3://sit/a/b", "--overwrite", "--limit", 5)[0] == 0
        assert read_bucket(s3, "a/b", tmp_path / f"copy{times}")[1] == expected[:5]
        names = [name for name in s3.contents("a/b") if name.endswith(".mds")]
        assert names
        assert all(name.startswith(prefix + ".") for name in names)

    # Interrupted between the old index and the new one, there is none, and the same command goes on.
    write = storage.S3Folder.write

    def interrupted(store, name, content):
        if name == "index.json":
            assert not {"index.json"} & set(s3.contents("a/b"))
            raise KeyboardInterrupt
        write(store, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(storage.S3Folder, "write", interrupted)
        assert convert(pictures, "--out", "s3://sit/a/b", "--overwrite")[0] == 130
    assert "index.json" not in s3.contents("a/b")
    code, _, stderr = convert(pictures, "--out", "s3://sit/a/b")
    assert code == 0
    assert "resumes: 1 of 1 parts" in stderr
    assert read_bucket(s3, "a/b", tmp_path / "copy2")[1] == expected
    assert os.listdir(temporary) == []
    code, _, stderr = convert(pictures, "--out", "s3://no-such-bucket/c")
    assert code == 2
    assert "NoSuchBucket" in stderr or "does not exist" in stderr


def test_shards_wait_for_a_slow_s3(tmp_path, convert, jpegs, s3, temporary, monkeypatch, caplog):
    from convert.engine import pipeline, shards

    monkeypatch.setattr(shards, "SHARD_BYTES", 500)  # a shard for each picture
    root = write_folder(tmp_path / "pictures", a=[*jpegs[:1] * 40, b"broken"])
    (root / "a" / "40.jpg").rename(root / "a" / "z.jpg")
    pipe = Pipe(root / "a" / "0.jpg")
    waiting = []

    def freeze():
        held = pipe.wait()
        os.killpg(s3.process.pid, signal.SIGSTOP)
        os.write(held, jpegs[0])
        os.close(held)
        for _ in range(30):
            time.sleep(0.05)
            waiting.append(sum(len(files) for _, _, files in os.walk(temporary)))
        os.killpg(s3.process.pid, signal.SIGCONT)

    thread = threading.Thread(target=freeze)
    thread.start()
    code, _, stderr = convert(root, "--out", "s3://sit/slow")
    thread.join()
    assert code == 2
    assert "z.jpg" in stderr
    assert pipeline.UPLOADS < max(waiting) <= 2 * pipeline.UPLOADS + 1
    assert not [record for record in caplog.records if record.name.startswith(("concurrent", "streaming"))]
    assert s3.contents("slow") == {}
