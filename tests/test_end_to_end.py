"""From a Parquet file of real images to generated images, with shards of pixels and of latents."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from sit_composer import sample, train
from sit_composer.data.stream import load_spec
from tests.helpers.images import png
from tests.helpers.paths import ROOT

from convert.sources import parts  # isort: skip
from convert import verify_mds  # isort: skip

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_a_parquet_file_is_converted_verified_and_trained_on_and_images_are_generated(
    tmp_path, convert, monkeypatch, vae_folder, kind
):
    monkeypatch.setattr(parts, "PART", 500)
    digits = load_digits()
    table = {
        "picture": [{"bytes": png((image * 15).astype("uint8")), "path": None} for image in digits.images],
        "name": [NAMES[label] for label in digits.target],
    }
    pq.write_table(pa.table(table), tmp_path / "digits.parquet", row_group_size=100)
    made = ["--latents", "--vae", vae_folder] if kind == "latents" else []
    columns = ["--image-column", "picture", "--label-column", "name", "--image-size", 16, "--workers", 1]
    code, _, stderr = convert(tmp_path / "digits.parquet", "--out", tmp_path / "shards", *columns, *made)
    assert code == 0, stderr
    spec = load_spec(None, str(tmp_path / "shards"))
    assert spec.classes == sorted(NAMES)
    assert (spec.kind, spec.samples, spec.image_size) == (kind, 1797, 16)
    counts = dict(zip(spec.classes, spec.class_counts, strict=True))
    assert counts == {name: (digits.target == label).sum() for label, name in enumerate(NAMES)}
    assert verify_mds.main([str(tmp_path / "shards"), "--grid", str(tmp_path / "grid.png")]) == 0

    network = ["model.hidden_size=32", "model.depth=1", "model.num_heads=2", "model.num_classes=10"]
    if kind == "latents":
        network += ["model.input_size=8", "model.in_channels=4", f"autoencoder.name={vae_folder}"]
    else:
        network += ["model.input_size=16", "model.in_channels=1"]
    rest = [f"data.local={tmp_path / 'shards'}", "data.global_batch_size=256", "data.num_workers=0"]
    rest += ["trainer.max_duration=8ba", "trainer.progress_bar=false", f"trainer.save_folder={tmp_path / 'run'}"]
    rest += ["scheduler={constant: {}}"]
    assert train.main([str(ROOT / "yamls" / "quickstart.yaml"), *network, *rest]) == 0
    options = ["--classes", "seven,two", "--per-class", "2", "--num-steps", "5", "--sampling-method", "euler"]
    assert sample.main([str(tmp_path / "run"), "--out", str(tmp_path / "drawn"), *options]) == 0
    with Image.open(tmp_path / "drawn" / "000003.png") as picture:
        assert picture.size == (16, 16)
