"""What a conversion writes into spec.json is what its readers take: names of classes from any source, and numbers."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convert import verify_mds
from sit_composer.data.stream import load_spec
from tests.helpers.images import png
from tests.helpers.sources import write_folder, write_parquet

IMAGES = [png(np.full((8, 8), 40 * k, np.uint8)) for k in range(6)]


def folder(root, labels):
    return write_folder(root / "folder", **{f"n{label}": [IMAGES[label]] for label in labels})


def numbers(root, labels):
    return write_parquet(root / "numbers.parquet", [IMAGES[label] for label in labels], list(labels))


def strings(root, labels):
    return write_parquet(root / "strings.parquet", [IMAGES[k] for k in labels], [f"n{k}" for k in labels])


def tar(root, labels):
    with tarfile.open(root / "t.tar", "w") as archive:
        for k in labels:
            for name, data in ((f"{k}.png", IMAGES[k]), (f"{k}.cls", b"%d" % k)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return root / "t.tar"


@pytest.mark.parametrize("make", [folder, numbers, strings, tar])
def test_names_of_classes_are_given_for_each_source(tmp_path, convert, make, capsys):
    source, names = make(tmp_path, range(3)), tmp_path / "names.txt"
    names.write_text("n0 wolf\nn1 crane\nn2 crane\n")
    command = [source, "--out", tmp_path / "out", "--workers", 0, "--class-names", names]
    assert convert(*command)[0] == 0
    spec = load_spec(None, str(tmp_path / "out"))
    assert spec.classes == ["wolf", "crane (n1)", "crane (n2)"]
    assert (spec.class_counts, spec.source["class_ids"]) == ([1, 1, 1], ["n0", "n1", "n2"])
    assert verify_mds.main([str(tmp_path / "out"), "--source"]) == 0
    assert "source: 3 images" in capsys.readouterr().out
    assert "already converted" in convert(*command)[1]
    names.write_text("n0 wolf\nn1 ant\nn2 crane\n")
    code, _, stderr = convert(*command)
    assert (code, "is another conversion (class_names " in stderr) == (2, True)
    assert "class_ids" not in stderr
    assert convert(*command, "--overwrite")[0] == 0


@pytest.mark.parametrize("make", [numbers, tar])
def test_a_number_beyond_the_names_is_told_by_its_row(tmp_path, convert, make):
    names = tmp_path / "names.json"
    names.write_text(json.dumps({str(k): f"digit {k}" for k in range(3)}))
    code, _, stderr = convert(make(tmp_path, [0, 3]), "--out", tmp_path / "out", "--class-names", names)
    told = "--class-names: " if make is numbers else "sample 3: label 3 is not a class, expected 0 to 2"
    assert (code, told in stderr, (tmp_path / "out").exists()) == (2, True, False)


def test_names_that_no_reader_takes_are_refused_before_any_image_is_read(tmp_path, convert):
    def write(names):
        note = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
        table = pa.table({"image": [b"no image"] * 2, "label": [0, 1]})
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(note)}), tmp_path / "t.parquet")

    for names in (["a", "a"], [4, "4"], ["a", None], ["a", True]):
        write(names)
        code, _, stderr = convert(tmp_path / "t.parquet", "--out", tmp_path / "out")
        assert (code, len(stderr.splitlines())) == (2, 1)
        assert "no image" not in stderr
    # They may be given instead.
    pq.write_table(pq.read_table(tmp_path / "t.parquet").set_column(0, "image", [IMAGES[:2]]), tmp_path / "t.parquet")
    (tmp_path / "names.txt").write_text("0 yes\n1 no\n")
    command = [tmp_path / "t.parquet", "--out", tmp_path / "out", "--class-names", tmp_path / "names.txt"]
    assert convert(*command)[0] == 0
    assert load_spec(None, str(tmp_path / "out")).classes == ["yes", "no"]


def test_an_autoencoder_whose_numbers_no_reader_takes_is_refused_before_the_work(tmp_path, convert, vae_folder):
    import shutil

    vae = tmp_path / "vae"
    shutil.copytree(vae_folder, vae)
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "scaling_factor": None}))
    options = ["--latents", "--vae", vae, "--image-size", 8, "--limit", 2]
    code, _, stderr = convert("digits", "--out", tmp_path / "out", *options)
    assert (code, "autoencoder.scale: got None, expected int or float" in stderr) == (2, True)


def test_names_for_images_without_labels_are_refused(tmp_path, convert):
    options = ["--class-names", "imagenet", "--label-column", "none"]
    code, _, stderr = convert("digits", "--out", tmp_path / "out", *options)
    assert (code, "--class-names: only for labelled images" in stderr) == (2, True)
