"""to_mds.py --features: what it stores is the teacher's, and stays so after an interruption."""

import json
import shutil

import numpy as np
import pytest
from streaming import StreamingDataset

from convert import to_mds, verify_mds
from convert.kinds.checks import LatentCheck
from sit_composer.data.loader import build_loader
from sit_composer.data.shared_names import one_job_at_a_time
from sit_composer.data.stream import load_spec
from tests.helpers.shards import contents
from tests.helpers.tables import ROWS
from tests.helpers.teachers import write_transformers

from convert.engine import pipeline  # isort: skip
from convert.engine import shards  # isort: skip
from convert.sources import parts  # isort: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return write_transformers(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def options(vae_folder, teacher, monkeypatch) -> list[str]:
    """Parts of 25 images, shards of about ten."""
    monkeypatch.setattr(parts, "PART", 25)
    monkeypatch.setattr(shards, "SHARD_BYTES", 9000)
    known = ["--latents", "--vae", vae_folder, "--features", teacher, "--features-grid", "2", "--workers", "0"]
    return [*known, "--limit", "150", "--encode-dtype", "float32"]


def test_the_spec_describes_the_teacher_and_rows_have_one_size(tmp_path, table, options, teacher, convert):
    assert convert(table, "--out", tmp_path / "out", *options)[0] == 0
    spec = load_spec(None, str(tmp_path / "out"))
    assert {name: value for name, value in spec.features.items() if name != "digest"} == {
        "teacher": teacher, "image_size": 14, "grid": 2, "width": 20,
    }  # fmt: skip
    assert spec.source["teacher_digest"] == spec.features["digest"]
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    sizes = dict(zip(index["shards"][0]["column_names"], index["shards"][0]["column_sizes"], strict=True))
    assert sizes == {"features": 160, "features_flip": 160, "label": 8, "moments": 256, "moments_flip": 256}
    given = {"spec": spec, "batch_size": 8, "flip": True}
    plain = next(iter(build_loader(None, str(tmp_path / "out"), **given)))
    asked = next(iter(build_loader(None, str(tmp_path / "out"), **given, features=True)))
    assert sorted(plain) == ["index", "key", "label", "moments"]
    assert asked["features"].shape == (8, 4, 20)
    assert all(np.array_equal(plain[name], asked[name]) for name in plain)


def test_stopped_and_continued_it_comes_to_the_same_bytes(tmp_path, table, options, convert, monkeypatch):
    assert ROWS >= 150
    assert convert(table, "--out", tmp_path / "whole", *options)[0] == 0
    finish_part = pipeline.Output.finish_part

    def finish(self, record):
        finish_part(self, record)
        if record["part"] == 2:
            raise SystemExit(143)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Output, "finish_part", finish)
        with pytest.raises(SystemExit):
            convert(table, "--out", tmp_path / "out", *options)
    code, _, stderr = convert(table, "--out", tmp_path / "out", *options)
    assert code == 0, stderr
    assert "resumes: 3 of " in stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert "already converted" in convert(table, "--out", tmp_path / "out", *options)[1]


def test_another_teacher_or_grid_is_another_conversion(tmp_path, table, options, teacher, convert):
    assert convert(table, "--out", tmp_path / "out", *options)[0] == 0
    code, _, stderr = convert(table, "--out", tmp_path / "out", *[o if o != "2" else "3" for o in options])
    assert (code, "features_grid 2 there, 3 now" in stderr) == (2, True)
    code, _, stderr = convert(table, "--out", tmp_path / "out", *options[:3], *options[7:])
    assert (code, f"features '{teacher}' there, None now" in stderr) == (2, True)


def test_verify_checks_features(tmp_path, table, options, convert, capsys):
    out = tmp_path / "out"
    assert convert(table, "--out", out, *options)[0] == 0
    assert verify_mds.main([str(out)]) == 0
    assert "2x2 tokens of 20" in capsys.readouterr().out
    for change, message in (
        ({"grid": 3}, "features are (4, 20); spec.json says (9, 20)"),
        ({"width": 0}, "features.width: got 0, expected a whole number of at least 1"),
        ({"author": "x"}, "features.author: got 'x', expected nothing"),
    ):
        broken = tmp_path / "broken"
        shutil.copytree(out, broken, dirs_exist_ok=True)
        content = json.loads((broken / "spec.json").read_text())
        content["features"] |= change
        (broken / "spec.json").write_text(json.dumps(content))
        assert verify_mds.main([str(broken)]) == 1
        assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {"features_flip": row["features"]}, "the mirrored features of 8 samples equal the straight ones"),
        (
            lambda row: {"features": row["features"] * np.float16("nan")},
            "features have values that are NaN or infinite",
        ),
        (lambda row: {"features_flip": row["features_flip"] * [[1], [0], [1], [1]]}, "a token whose values are all 0"),
    ],
)
def test_verify_doubts_features_that_no_teacher_gives(tmp_path, table, options, convert, change, message):
    assert convert(table, "--out", tmp_path / "out", *options)[0] == 0
    spec, faults = load_spec(None, str(tmp_path / "out")), []
    check = LatentCheck(spec, faults.append, None, grid=False)
    with one_job_at_a_time():
        dataset = StreamingDataset(local=str(tmp_path / "out"), batch_size=1)
    rows = [dataset[i] for i in range(8)]
    check.check((f"sample {i}", {**row, **change(row)}) for i, row in enumerate(rows))
    check.finish()
    assert message in " ".join(faults)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--features", "timm:x"], "--features: only for --latents"),
        (["--latents", "--vae", "VAE", "--features", "dinov2"], "--features: got 'dinov2', expected timm:NAME or"),
        (
            ["--latents", "--vae", "VAE", "--features", "timm:x"],
            "--image-size: got none, expected a multiple of 16",
        ),
        (["--latents", "--vae", "VAE", "--features-grid", "2"], "--features-grid: only for --features"),
        (
            ["--latents", "--vae", "VAE", "--features", "timm:no_such_model", "--features-grid", "2"],
            "--features: timm:no_such_model: can't be loaded: Unknown model",
        ),
    ],
)
def test_options_that_make_no_features_are_refused(tmp_path, vae_folder, given, message, capsys):
    command = ["digits", "--out", str(tmp_path / "out"), *[vae_folder if o == "VAE" else o for o in given]]
    assert to_mds.main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
