"""Latents of any class of autoencoder: what shards hold, and statistics per channel from the data or from a file."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from streaming.base.format import reader_from_json

from convert import verify_mds
from convert.engine import conversion
from convert.kinds.statistics import read_statistics, statistics_of, sums_of
from convert.sources import parts
from convert.sources.parts import InputError
from sit_composer.autoencoder import AutoencoderSpec, DiffusersAutoencoder
from sit_composer.config.load import load_config
from sit_composer.data.loader import build_loader
from sit_composer.data.stream import load_spec
from tests.helpers.images import png
from tests.helpers.paths import ROOT

COUNT = 60


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Digits in colors, of 16x16 pixels; one image is broken."""
    path, random = tmp_path_factory.mktemp("source") / "t.parquet", np.random.default_rng(0)
    digits = load_digits()
    levels = np.kron(digits.images[:COUNT, None] * 15, np.ones((1, 1, 2, 2))) * random.random((COUNT, 3, 1, 1))
    images = [png(levels[i].transpose(1, 2, 0).astype(np.uint8)) for i in range(COUNT)]
    images[37] = b"<html>404</html>"
    pq.write_table(pa.table({"image": images, "label": digits.target[:COUNT]}), path, row_group_size=10)
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(parts, "PART", 10)


def options(source, out, vae, *more):
    fixed = ["--latents", "--vae", vae, "--encode-dtype", "float32", "--batch-size", 4, "--workers", 0]
    return [source, "--out", out, *fixed, *more]


def rows(folder):
    shards = json.loads((folder / "index.json").read_text())["shards"]
    return [row for shard in shards for row in reader_from_json(str(folder), None, shard)]


def values(folder, channels):
    """Means and deviations of all images and mirror images, float64 (N, C, ...); deviations are None if not stored."""
    moments = np.stack([row[name] for row in rows(folder) for name in ("moments", "moments_flip")]).astype(np.float64)
    return moments[:, :channels], moments[:, channels:] if moments.shape[1] > channels else None


@pytest.mark.parametrize("kind", ["flux2", "dc", "rae", pytest.param("per_channel", marks=pytest.mark.slow)])
def test_shards_of_each_class_are_verified_trained_on_and_sampled(source, vae_of_kind, kind, tmp_path, convert):
    from sit_composer import sample, train
    from sit_composer.supervision.supervisor import Supervision
    from sit_composer.training.inputs import open_inputs
    from sit_composer.training.quality import quality_callbacks

    vae, out = vae_of_kind(kind), tmp_path / "shards"
    code, _, stderr = convert(*options(source, out, vae, "--skip-bad", "--statistics", "measure"))
    assert code == 0, stderr
    encoder, spec = DiffusersAutoencoder(vae), load_spec(None, str(out))
    of = AutoencoderSpec(**spec.autoencoder)
    stored, side = encoder.spec.stored, 16 // of.downsample
    assert (spec.channels, of.statistics, of.scale) == (encoder.spec.channels, "data", 1.0)
    assert rows(out)[0]["moments"].shape == (stored, side, side)

    mean, std = values(out, spec.channels)
    variance = mean.var((0, 2, 3)) + (0 if std is None else np.square(std).mean((0, 2, 3)))
    np.testing.assert_allclose(of.mean, mean.mean((0, 2, 3)), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(of.std, np.sqrt(variance), rtol=1e-9)
    batch = next(iter(build_loader(None, str(out), spec=spec, batch_size=50, shuffle=False)))["moments"].float()
    latents = of.latents(batch, torch.randn(50, spec.channels, side, side))
    assert latents.std((0, 2, 3)).sub(1).abs().max() < 0.2
    assert verify_mds.main([str(out), "--vae", vae]) == 0

    network = ["model.hidden_size=32", "model.depth=1", "model.num_heads=2", f"model.input_size={side}"]
    network += [f"model.in_channels={spec.channels}", f"autoencoder.name={vae}", "model.patch_size=1"]
    data = [f"data.local={out}", "data.global_batch_size=5", "scheduler={constant: {}}"]
    grid = ["sample_grid={interval: 2ba, num_steps: 2, per_class: 1, sampling_method: euler}"]
    run = [f"trainer.save_folder={tmp_path / 'run'}", "trainer.max_duration=2ba", "trainer.progress_bar=false"]
    assert train.main([str(ROOT / "yamls" / "quickstart.yaml"), *network, *data, *grid, *run]) == 0
    config = load_config(str(ROOT / "yamls" / "quickstart.yaml"), [*network, *data, *grid])
    (callback,) = quality_callbacks(config, open_inputs(config, "cpu"), None, Supervision(config, 60.0), "cpu")
    assert callback.drawing.autoencoder.spec == of  # what the run's grids decode
    few = ["--classes", "1", "--per-class", "1", "--num-steps", "2", "--sampling-method", "euler"]
    assert sample.main([str(tmp_path / "run"), "--out", str(tmp_path / "images"), *few]) == 0
    with Image.open(tmp_path / "images" / "000000.png") as image:
        assert image.size == (16, 16)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_measured_statistics_are_the_same_bytes_for_any_workers_and_after_an_error(
    source, vae_of_kind, tmp_path, convert, monkeypatch, workers
):
    vae, measure = vae_of_kind("per_channel"), ["--statistics", "measure"]
    code, _, stderr = convert(*options(source, tmp_path / "resumed", vae, *measure))
    assert (code, "row 37" in stderr) == (2, True)
    assert len(list((tmp_path / "resumed.partial").glob("part.*.json"))) == 3
    code, _, stderr = convert(*options(source, tmp_path / "resumed", vae, *measure, "--skip-bad"))
    assert (code, "resumes: 3 of 6 parts" in stderr) == (0, True)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(5))  # batches that are encoded at a time
    assert convert(*options(source, tmp_path / "workers", vae, *measure, "--skip-bad", "--workers", workers))[0] == 0
    texts = {(tmp_path / name / "spec.json").read_text() for name in ("resumed", "workers")}
    assert len(texts) == 1
    assert '"statistics": "data"' in texts.pop()
    assert (
        "is another conversion (statistics 'measure' there, None now)"
        in convert(*options(source, tmp_path / "workers", vae, "--skip-bad"))[2]
    )


def test_verify_sees_statistics_that_are_not_the_datas(source, vae_of_kind, tmp_path, convert, capsys):
    out = tmp_path / "shards"
    assert convert(*options(source, out, vae_of_kind("dc"), "--skip-bad", "--statistics", "measure"))[0] == 0
    content = json.loads((out / "spec.json").read_text())
    content["autoencoder"]["std"][2] *= 1.001
    (out / "spec.json").write_text(json.dumps(content))
    assert verify_mds.main([str(out)]) == 1
    (fault,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fault: ")]
    assert fault.startswith("fault: the latents' std per channel is [")
    content["autoencoder"]["std"][2] *= 10
    (out / "spec.json").write_text(json.dumps(content))
    assert verify_mds.main([str(out), "--sample", "30"]) == 1
    assert "fault: the latents of channel 2 have a standard deviation of 0.1" in capsys.readouterr().out


def test_statistics_of_a_file_are_used_and_those_of_another_autoencoder_refused(
    source, vae_of_kind, tmp_path, convert, monkeypatch
):
    """As LightningDiT's latents_stats.pt for VA-VAE: mean and std (1, C, 1, 1)."""
    vae, out = vae_of_kind("per_channel"), tmp_path / "shards"
    measured = tmp_path / "measured"
    assert convert(*options(source, measured, vae, "--skip-bad", "--statistics", "measure"))[0] == 0
    spec = load_spec(None, str(measured)).autoencoder
    torch.save({name: torch.tensor(spec[name]).view(1, 4, 1, 1) for name in ("mean", "std")}, tmp_path / "stats.pt")
    command = options(source, out, vae, "--skip-bad", "--statistics")
    for file in (tmp_path / "stats.pt", measured / "spec.json"):
        code, _, stderr = convert(*command, file, "--overwrite")
        assert code == 0, stderr
        used = AutoencoderSpec(**load_spec(None, str(out)).autoencoder)
        assert used.statistics == "file"
        torch.testing.assert_close(torch.tensor([used.mean, used.std]), torch.tensor([spec["mean"], spec["std"]]))
        assert file.suffix != ".json" or used == AutoencoderSpec(**spec)  # to the bit, as evaluation compares
        assert verify_mds.main([str(out)]) == 0
    for name, content, message in (
        ("other", {"mean": spec["mean"], "std": [value * 20 for value in spec["std"]]}, "of channel 0 have a standard"),
        ("fewer", {"mean": [0.0] * 3, "std": [1.0] * 3}, "got 3 means and 3 deviations, expected 4, one per channel"),
        ("zero", {"mean": [0.0] * 4, "std": [0.0] * 4}, "expected numbers over 0"),
        ("none", {"scale": 3}, "got no mean and std"),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        code, _, stderr = convert(*command, tmp_path / f"{name}.json", "--overwrite")
        assert (code, message in stderr, stderr.splitlines()[-1][:19]) == (2, True, "error: --statistics")
    monkeypatch.setattr(conversion, "ENOUGH", 1)  # images; then the first part is enough
    early = options(source, tmp_path / "early", vae, "--skip-bad", "--statistics")
    _, _, stderr = convert(*early, tmp_path / "other.json")
    assert "the latents of a part have a standard deviation" in stderr
    assert "expected a file of statistics, or 'measure'" in convert(*command, tmp_path / "nowhere.pt")[2]


class Planted:
    def __reduce__(self):
        return (open, ("planted", "w"))


def test_a_file_of_torch_runs_no_code_and_has_the_usual_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"mean": torch.zeros(2), "std": torch.ones(2), "more": Planted()}, "planted.pt")
    with pytest.raises(InputError, match=r"planted\.pt: can't be read \(UnpicklingError\)"):
        read_statistics("planted.pt", 2)
    assert not (tmp_path / "planted").exists()
    scale = torch.tensor([2.0, 4.0]).view(1, 2, 1, 1)  # as REPA-E's, z = (x - bias) · scale
    torch.save({"latents_bias": torch.tensor([1.0, 2.0]).bfloat16().view(1, 2, 1, 1), "latents_scale": scale}, "r.pt")
    assert read_statistics("r.pt", 2) == ([1.0, 2.0], [0.5, 0.25])


@given(st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_sums_give_numpys_mean_and_deviation(channels, images, deterministic, seed):
    random = np.random.default_rng(seed)
    moments = random.standard_normal((images, channels * (1 if deterministic else 2), 3, 4)) * 3 + 20
    moments = moments.astype(np.float16)
    mean, std = statistics_of(sum(sums_of(one, channels) for one in moments))
    exact = moments.astype(np.float64)
    variance = exact[:, :channels].var((0, 2, 3))
    if not deterministic:
        variance += np.square(exact[:, channels:]).mean((0, 2, 3))
    np.testing.assert_allclose(mean, exact[:, :channels].mean((0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(std, np.sqrt(variance), rtol=1e-10)
