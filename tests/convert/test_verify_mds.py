"""verify_mds.py passes what is whole, and says of each thing that is broken what it is."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from streaming import MDSWriter

from convert import to_mds, verify_mds
from sit_composer import storage
from sit_composer.data.spec import DataSpec
from tests.helpers.images import encode

CLASSES = ["ant", "bee", "cat"]


def write(folder, columns, rows, **spec):
    with MDSWriter(out=str(folder), columns=columns, hashes=["xxh64"], size_limit=4096) as writer:
        for row in rows:
            writer.write(row)
    counts = [sum(row["label"] == label for row in rows) for label in range(3)]
    whole = {"num_classes": 3, "classes": CLASSES, "class_counts": counts, "samples": len(rows)} | spec
    (folder / "spec.json").write_text(DataSpec(**whole).to_json())
    return folder


def picture(index, size=16):
    levels = np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return encode(Image.fromarray(levels).resize((size, size)), "PNG")


def pixel_rows():
    return [{"image": picture(i), "label": i % 3} for i in range(20)]


def write_pixels(folder, rows=None, **spec):
    spec = {"kind": "pixels", "channels": 3, "image_size": 16} | spec
    return write(folder, {"image": "bytes", "label": "int"}, rows or pixel_rows(), **spec)


def latent_rows(scale=1.0):
    random = np.random.default_rng(0)
    rows = []
    for i in range(20):
        moments = random.standard_normal((2, 8, 4, 4)) * scale
        moments[:, 4:] = np.abs(moments[:, 4:]) * 0.1 + 1e-3
        straight, mirrored = moments.astype(np.float16)
        rows.append({"moments": straight, "moments_flip": mirrored, "label": i % 3})
    return rows


def write_latents(folder, rows=None, **spec):
    vae = {"name": "some/vae", "scale": 1.0, "shift": 0.0, "channels": 4, "downsample": 2}
    spec = {"kind": "latents", "channels": 4, "image_size": 8, "autoencoder": vae} | spec
    columns = {"moments": "ndarray:float16", "moments_flip": "ndarray:float16", "label": "int"}
    return write(folder, columns, rows or latent_rows(), **spec)


@pytest.fixture
def run(capsys):
    """Runs the command in this process: (exit code, the faults, all of stdout, stderr)."""

    def run(*arguments):
        capsys.readouterr()
        code = verify_mds.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        faults = [line.removeprefix("fault: ") for line in out.splitlines() if line.startswith("fault: ")]
        assert (code == 1) == bool(faults)
        return code, faults, out, err

    return run


def shards(folder):
    return sorted(folder.glob("shard.*.mds"))


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- what is whole -------------------------------------------------------------------------------------------------


def test_whole_pictures_pass(tmp_path, run):
    folder = write_pixels(tmp_path / "shards")
    before = sorted(path.name for path in folder.iterdir())
    code, _, out, _ = run(folder, "--grid", tmp_path / "grid.png")
    assert code == 0
    assert f"20 samples (pixels) in {len(shards(folder))} shards" in out
    assert len(shards(folder)) > 2
    assert "3 classes of 6 to 7 samples; 0 skipped" in out
    assert "20 images decode" in out
    assert out.endswith("all is well\n")
    assert sorted(path.name for path in folder.iterdir()) == before
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (796, 365)  # 8 x 3
        expected = Image.open(io.BytesIO(picture(0))).convert("RGB")
        assert np.abs(np.array(grid)[:96, :96].mean((0, 1)) - np.array(expected).mean((0, 1))).max() < 3
        assert (np.array(grid)[100:113, :30] < 100).any()  # the name of its class


def test_whole_latents_pass(tmp_path, run):
    code, _, out, _ = run(write_latents(tmp_path / "shards"))
    assert code == 0
    rows = latent_rows()
    for name, column in (("mean ", "moments"), ("mirrored: ", "moments_flip")):
        mean, std = np.stack([row[column].astype(float) for row in rows]).reshape(20, 2, -1).swapaxes(0, 1)
        deviation = np.sqrt(mean.var() + np.square(std).mean())
        between = ", standard deviation " if name == "mean " else " and "
        assert f"{name}{mean.mean():.3f}{between}{deviation:.3f}" in out


def test_a_sample_looks_into_so_many_but_counts_all(tmp_path, run):
    rows = pixel_rows()
    rows[1]["image"] = b"<html>"
    folder = write_pixels(tmp_path / "shards", rows)
    code, _, out, _ = run(folder, "--sample", 4)
    assert code == 0
    assert "4 images decode" in out
    assert "20 samples" in out
    assert run(folder, "--sample", 20)[1] == [
        f"{shards(folder)[0].name} sample 1: not an image that Pillow reads: it starts with b'<html>'"
    ]


def test_what_to_mds_writes_passes(tmp_path, run, vae_folder):
    for label, name in enumerate(("ant", "bee")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "pictures" / name / f"{i}.png").write_bytes(picture(10 * label + i, 24))
    assert to_mds.main([str(tmp_path / "pictures"), "--out", str(tmp_path / "pixels"), "--image-size", "16"]) == 0
    options = ["--image-size", "16", "--latents", "--vae", vae_folder, "--encode-dtype", "float32"]
    assert to_mds.main([str(tmp_path / "pictures"), "--out", str(tmp_path / "latents"), *options]) == 0
    assert run(tmp_path / "pixels")[0] == 0
    # Random weights know no scale: let the spec's be the one that makes the deviation about 1.
    from diffusers import AutoencoderKL

    _, faults, _, _ = run(tmp_path / "latents", "--vae", vae_folder, "--grid", tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (796, 242)  # 6 pictures and their mirror images
    assert all("after scale 0.3" in fault for fault in faults)
    AutoencoderKL.from_pretrained(vae_folder, scaling_factor=0.5).save_pretrained(tmp_path / "other")
    _, faults, _, _ = run(tmp_path / "latents", "--vae", tmp_path / "other")
    assert faults[0] == "the autoencoder's scale is 0.5; spec.json says 0.3"


def test_the_grid_shows_latents_decoded_beside_their_mirror_images(tmp_path, vae_folder):
    from convert.kinds.checks import LatentCheck
    from sit_composer.autoencoder import DiffusersAutoencoder, from_uint8, to_uint8
    from sit_composer.data.pictures import center_crop, decode_image

    vae = DiffusersAutoencoder(vae_folder)
    levels = from_uint8(decode_image(picture(0), 3))[None]
    straight, mirrored = (vae.moments(side)[0].half().numpy() for side in (levels, levels.flip(-1)))
    spec = DataSpec("latents", 4, 16, 1, ["ant"], [1], 1, autoencoder=vae.spec.as_dict())
    check = LatentCheck(spec, print, None, True)
    check.check([("0", {"moments": straight, "moments_flip": mirrored, "label": 0})])
    assert check.write_grid(tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        grid = np.array(image)
    for x, moments in ((0, straight), (100, mirrored)):
        latents = (torch.from_numpy(moments[None, :4]).float() - vae.spec.shift) * vae.spec.scale
        expected = center_crop(to_uint8(vae.decode(latents))[0], 96).permute(1, 2, 0).numpy()
        assert np.abs(grid[:96, x : x + 96].astype(int) - expected).max() <= 1


# --- what is broken ------------------------------------------------------------------------------------------------


def flip_a_byte(folder):
    path = shards(folder)[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_a_shard(folder):
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-1])


def change_spec(**values):
    return lambda folder: edit(folder / "spec.json", lambda spec: spec.update(values))


def change_index(change):
    return lambda folder: edit(folder / "index.json", lambda index: change(index["shards"]))


BROKEN = {
    "a flipped byte": (flip_a_byte, ["shard.00001.mds has been changed: its xxh64 is not what index.json says"]),
    "a cut shard": (cut_a_shard, ["shard.00001.mds has "]),
    "a lost shard": (lambda folder: shards(folder)[0].unlink(), ["shard.00000.mds is missing"]),
    "a stray shard": (
        lambda folder: shutil.copy(shards(folder)[0], folder / "again-shard.00004.00007.mds"),
        ["again-shard.00004.00007.mds is not in index.json"],
    ),
    "no index": (lambda folder: (folder / "index.json").unlink(), ["index.json is missing: the conversion was not"]),
    "no spec": (lambda folder: (folder / "spec.json").unlink(), ["spec.json is missing: the conversion was not"]),
    "half an index": (lambda folder: (folder / "index.json").write_text('{"shards": ['), ["index.json: not a whole"]),
    "a text for a count": (
        change_spec(samples="20"),
        ["spec.json is not a shard spec: samples: got '20', expected a whole"],
    ),
    "texts for counts": (change_spec(class_counts=["7", 7, 6]), ["class_counts[0]: got '7', expected a whole number"]),
    "a number for a class": (change_spec(classes=["ant", "bee", 3]), ["classes: expected names as text"]),
    "no source": (change_spec(source=None), ["source: got None, expected an object"]),
    "a class twice": (change_spec(classes=["ant", "bee", "ant"]), ["spec.json names a class twice"]),
    "seven channels": (change_spec(channels=7), ["channels: got 7, expected 1 or 3"]),
    "one channel": (change_spec(channels=1), ["the image has colours; spec.json says 1 channel"] * 20),
    "a text for bytes": (change_index(lambda index: index[0]["raw_data"].update(bytes="x")), ["bytes is 'x'"]),
    "a hash less": (
        change_index(lambda index: index[0]["raw_data"].update(hashes={})),
        ["shard.00000.mds has no hash in the index"],
    ),
    "half a spec": (lambda folder: (folder / "spec.json").write_text("{"), ["spec.json is not a shard spec"]),
    "a name that leads out": (
        change_index(lambda index: index[0]["raw_data"].update(basename="../x")),
        ["'../x' leads out of the folder"],
    ),
    "an absolute name": (
        change_index(lambda index: index[0]["raw_data"].update(basename="/etc/passwd")),
        ["'/etc/passwd' leads out of the folder"],
    ),
    "pickles": (change_index(lambda index: index[0].update(column_encodings=["pkl", "int"])), ["unsafe type"]),
    "another number of samples": (change_spec(samples=21), ["index.json lists 20 samples; spec.json says 21"]),
    "other counts": (
        change_spec(class_counts=[6, 8, 6]),
        ["class 0 (ant) has 7 samples in the shards; spec.json says 6", "class 1 (bee) has 7 samples in the shards"],
    ),
    "a shard less": (
        change_index(lambda index: index.pop()),
        ["is not in index.json", "samples; spec.json says 20", "class 0 (ant)", "class 1 (bee)", "class 2 (cat)"],
    ),
    "a number in the index": (
        change_index(lambda index: index[1].update(samples=1)),
        ["index.json lists", "is no MDS"],
    ),
    "too few classes": (
        change_spec(num_classes=2, classes=["ant", "bee"], class_counts=[13, 7]),
        [*["the label is 2, but there are 2 classes"] * 6, "class 0 (ant) has 7 samples"],
    ),
    "another size": (change_spec(image_size=24), ["the image is 16x16; spec.json says 24x24"] * 20),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_fault_has_a_line_of_its_own(tmp_path, run, case):
    spoil, expected = BROKEN[case]
    folder = write_pixels(tmp_path / "shards")
    spoil(folder)
    code, faults, out, _ = run(folder)
    assert code == 1
    assert len(faults) == len(expected), faults
    for fault, part in zip(faults, expected, strict=True):
        assert part in fault
    assert f"{folder}: {len(expected)} fault" in out.splitlines()[-1]
    assert not (tmp_path / "x").exists()


def test_of_many_faults_twenty_are_shown(tmp_path, run):
    rows = [{"image": b"<html>", "label": 0} for _ in range(50)]
    code, faults, out, _ = run(write_pixels(tmp_path / "shards", rows))
    assert code == 1
    assert len(faults) == 20
    assert out.splitlines()[-1].endswith("50 faults, of which 20 are shown")


def test_a_broken_table_of_samples_is_seen_behind_a_right_hash(tmp_path, run):
    from streaming.base.hashing import get_hash

    folder = write_pixels(tmp_path / "shards")
    path = shards(folder)[0]
    data = bytearray(path.read_bytes())
    data[4:8] = b"\xff\xff\xff\x7f"
    path.write_bytes(data)
    change_index(lambda index: index[0]["raw_data"]["hashes"].update(xxh64=get_hash("xxh64", bytes(data))))(folder)
    assert run(folder)[1] == [f"{path} is no MDS shard of these columns (its table of samples is broken)"]


def spoiled(change):
    def spoil():
        rows = latent_rows()
        change(rows)
        return rows

    return spoil


def put(column, place, value):
    def change(rows):
        rows[7][column][place] = value

    return spoiled(change)


LATENTS = {
    "NaN": (put("moments", (0, 0, 0), np.nan), {}, ["moments have values that are NaN or infinite"]),
    "infinity": (put("moments_flip", (7, 3, 3), np.inf), {}, ["moments_flip have values that are NaN or infinite"]),
    "no deviation": (put("moments", (4, 0, 0), 0), {}, ["moments have standard deviations that are not over 0"]),
    "another shape": (
        spoiled(lambda rows: rows[7].update(moments=np.ones((8, 2, 2), np.float16))),
        {},
        ["moments are (8, 2, 2); spec.json says (8, 4, 4)"],
    ),
    "a scale that is in the moments": (
        lambda: latent_rows(0.18215),
        {},
        [
            "the latents have a standard deviation of 0.18",
            "the mirrored latents have a standard deviation of 0.18",
        ],
    ),
    "a scale that is too small": (
        latent_rows,
        {"scale": 0.18215},
        ["the latents have a standard deviation of 0.18", "the mirrored latents have a"],
    ),
    "a shift": (latent_rows, {"shift": 3.0}, ["the latents have a mean of -2.9", "the mirrored latents have a mean"]),
    "one side alike": (
        spoiled(lambda rows: [row.update(moments_flip=row["moments"]) for row in rows]),
        {},
        ["the mirrored moments of 20 samples equal the straight moments"],
    ),
    "turned moments": (
        spoiled(lambda rows: [row.update(moments_flip=row["moments"][..., ::-1].copy()) for row in rows]),
        {},
        ["the mirrored moments of 20 samples are the straight ones flipped"],
    ),
    "one side larger": (
        spoiled(lambda rows: [row.update(moments_flip=row["moments"] * np.float16(1.5)) for row in rows]),
        {},
        ["latents and mirrored latents differ"],
    ),
}


@pytest.mark.parametrize("case", LATENTS)
def test_a_fault_of_latents_has_a_line_of_its_own(tmp_path, run, case):
    rows, values, expected = LATENTS[case]
    folder = write_latents(tmp_path / "shards", rows())
    edit(folder / "spec.json", lambda spec: spec["autoencoder"].update(values))
    code, faults, _, _ = run(folder)
    assert code == 1
    assert len(faults) == len(expected), faults
    for fault, part in zip(faults, expected, strict=True):
        assert part in fault


def test_a_mistaken_command_is_one_line(tmp_path, run, capsys):
    folder = write_pixels(tmp_path / "shards")
    for arguments, message in (
        ((tmp_path / "nothing",), "no such folder"),
        ((folder, "--vae", "some/vae"), "--vae: only for latents"),
        (("ftp://server/x",), "ftp://: an unknown object store, expected s3://"),
    ):
        code, _, _, err = run(*arguments)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
    (tmp_path / "mine.png").write_bytes(b"mine")
    for arguments, message in (
        ((folder, "--sample", "0"), "got '0', expected a whole number of at least 1"),
        ((folder, "--grid", tmp_path / "mine.png"), "exists, expected a new file"),
    ):
        with pytest.raises(SystemExit) as caught:
            run(*arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "mine.png").read_bytes() == b"mine"
    code, _, _, err = run(write_latents(tmp_path / "latents"), "--vae", tmp_path / "nowhere")
    assert code == 2
    assert err.startswith("error: --vae: got ")


def test_s3_is_read_a_shard_at_a_time(tmp_path, run, s3, monkeypatch):
    folder = write_pixels(tmp_path / "shards")
    for path in folder.iterdir():
        s3.client.upload_file(str(path), "sit", f"set/{path.name}")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    most = []
    real = storage.S3Folder.download

    def download(self, name, file):
        real(self, name, file)
        most.append(len(list(temporary.rglob("shard.*"))))

    monkeypatch.setattr(storage.S3Folder, "download", download)
    code, _, out, _ = run("s3://sit/set")
    assert code == 0, out
    assert most == [1] * len(shards(folder))
    assert not list(temporary.iterdir())
    flip_a_byte(folder)
    s3.client.upload_file(str(shards(folder)[1]), "sit", "set/shard.00001.mds")
    s3.client.delete_object(Bucket="sit", Key="set/shard.00000.mds")
    s3.client.put_object(Bucket="sit", Key="set/shard.00009.mds", Body=b"")
    assert run("s3://sit/set")[1] == [
        "s3://sit/set/shard.00009.mds is not in index.json: delete it, or convert again",
        "s3://sit/set/shard.00000.mds is missing",
        "s3://sit/set/shard.00001.mds has been changed: its xxh64 is not what index.json says",
    ]
    s3.client.put_object(Bucket="sit", Key="set/shard.00000.mds", Body=shards(folder)[0].read_bytes())
    gone = lambda self, name, file: real(self, name.replace("shard.00000", "gone"), file)  # noqa: E731
    monkeypatch.setattr(storage.S3Folder, "download", gone)
    assert run("s3://sit/set")[1][1].startswith("s3://sit/set/gone.mds: ")
    code, _, _, err = run("s3://sit/none")
    assert code == 2
    assert err == "error: s3://sit/none: no object below it\n"


def test_the_sources_pictures_are_counted_by_class(tmp_path, run):
    from convert.sources.registry import describe

    root = tmp_path / "pictures"
    for i in range(20):
        (root / CLASSES[i % 3]).mkdir(parents=True, exist_ok=True)
        (root / CLASSES[i % 3] / f"{i}.png").write_bytes(picture(i))
    folder = write_pixels(tmp_path / "shards", source=describe(str(root)))
    code, _, out, _ = run(folder, "--source")
    assert code == 0, out
    assert f"source: 20 images in {root}, 0 skipped" in out
    (root / "ant" / "0.png").unlink()
    (root / "bee" / "new.png").write_bytes(picture(0))
    assert run(folder, "--source")[1] == [
        "class 0 (ant) has 7 samples in the shards; the source says 6",
        "class 1 (bee) has 7 samples in the shards; the source says 8",
    ]
    (root / "bee" / "newer.png").write_bytes(picture(0))
    edit(folder / "spec.json", lambda spec: spec.update(skipped=1))
    (fault,) = run(folder, "--source")[1]
    assert fault == "the source has 21 images; spec.json says 20, and 1 skipped"
    (root / "ant" / "0.png").write_bytes(picture(0))
    (root / "bee" / "newer.png").unlink()
    assert run(folder, "--source")[0] == 0  # one more there, which was skipped
    (root / "dog").mkdir()
    (root / "dog" / "0.png").write_bytes(picture(0))
    assert "the source's classes are" in run(folder, "--source")[1][0]
    shutil.rmtree(root)
    code, _, _, err = run(folder, "--source")
    assert code == 2
    assert err.startswith("error: --source: cannot read it again")
    assert err.count("\n") == 1
