"""to_mds.py --latents: what it keeps is what an encoder in the training loop would have made of the same pictures."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convert import to_mds
from sit_composer.autoencoder import DiffusersAutoencoder, from_uint8
from sit_composer.data.loader import build_loader, coin
from sit_composer.data.pictures import center_crop, decode_image
from sit_composer.data.stream import load_spec
from tests.helpers.paths import ROOT

SIZES = [(24, 20), (16, 16), (40, 18), (17, 33), (64, 64)]  # width, height


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten made pictures of two classes, in several sizes, none its own mirror image, one grey."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(10):
        folder = root / ("ant", "bee")[number % 2]
        folder.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        picture = coarse.resize(SIZES[number % 5], Image.Resampling.BICUBIC)
        picture = picture.convert("L") if number == 3 else picture
        picture.save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def latents(pictures, vae_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "shards"
    assert to_mds.main([*latent_options(pictures, out, vae_folder), "--image-size", "16", "--batch-size", "4"]) == 0
    return out


def latent_options(source, out, vae):
    return [str(source), "--out", str(out), "--latents", "--vae", str(vae), "--encode-dtype", "float32"]


def files(root):
    return [path for folder in sorted(root.iterdir()) for path in sorted(folder.iterdir())]


def cropped(path, size=16):
    return center_crop(decode_image(path.read_bytes(), 3), size)


def rows(folder):
    from streaming.base.format import reader_from_json

    shards = json.loads((folder / "index.json").read_text())["shards"]
    return [row for shard in shards for row in reader_from_json(str(folder), None, shard)]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_hold_the_moments_of_pictures_and_of_their_mirror_images(pictures, latents, vae_folder):
    vae, kept = DiffusersAutoencoder(vae_folder), rows(latents)
    assert len(kept) == 10
    for path, row in zip(files(pictures), kept, strict=True):
        assert row["label"] == ("ant", "bee").index(path.parent.name)
        picture = from_uint8(cropped(path)[None])
        for column, side in (("moments", picture), ("moments_flip", picture.flip(-1))):
            assert row[column].dtype == np.float16
            assert row[column].shape == (8, 8, 8)
            expected = vae.moments(side)[0]
            torch.testing.assert_close(torch.tensor(row[column]).float(), expected, rtol=1e-3, atol=1e-5)
        assert not np.allclose(row["moments"], row["moments_flip"], atol=1e-2)


def test_the_spec_names_the_autoencoder_with_its_scale_and_shift(latents, vae_folder):
    spec = load_spec(None, str(latents))
    assert (spec.kind, spec.channels, spec.image_size, spec.samples) == ("latents", 4, 16, 10)
    assert spec.class_counts == [5, 5]
    assert spec.autoencoder == {"name": vae_folder, "channels": 4, "downsample": 2, "scale": 0.3, "shift": 0.05}
    made = {key: spec.source.get(key) for key in ("image_size", "vae", "encode_dtype")}
    assert made == {"image_size": 16, "vae": vae_folder, "encode_dtype": "float32"}


def test_training_on_latents_is_training_with_the_encoder_in_the_loop(pictures, latents, vae_folder, tmp_path):
    from sit_composer.training.model import ComposerSiT
    from sit_composer.transport import Transport
    from tests.helpers.networks import small_network

    assert to_mds.main([str(pictures), "--out", str(tmp_path / "pixels")]) == 0
    encoder = DiffusersAutoencoder(vae_folder)
    network = small_network()
    online = ComposerSiT(network, Transport(), encoder.spec, encoder)
    offline = ComposerSiT(network, Transport(), encoder.spec)
    results = []
    for folder, model in ((tmp_path / "pixels", online), (latents, offline)):
        spec = load_spec(None, str(folder))
        size = 16 if spec.kind == "pixels" else None
        loader = build_loader(None, str(folder), spec=spec, batch_size=10, image_size=size, flip=True, seed=1)
        (batch,) = loader
        losses = model.train()(batch)
        model.zero_grad()
        losses.mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((batch, losses.detach(), gradient))
    (pixels, expected, slope), (moments, losses, gradient) = results
    assert "image" in pixels
    assert "moments" in moments
    for name in ("index", "key", "label"):
        assert torch.equal(pixels[name], moments[name])
    assert 2 < sum(map(coin, moments["key"].tolist())) < 8  # of both kinds
    torch.testing.assert_close(losses, expected, rtol=2e-3, atol=1e-4)
    assert (gradient - slope).norm() < 2e-3 * slope.norm()


def test_a_network_trains_on_them_and_draws(latents, vae_folder, tmp_path):
    from sit_composer import sample, train

    network = ["model.hidden_size=32", "model.depth=1", "model.num_heads=2", "model.num_classes=2"]
    network += ["model.input_size=8", "model.in_channels=4", f"autoencoder.name={vae_folder}"]
    data = [f"data.local={latents}", "data.global_batch_size=5", "data.flip=true"]
    rest = ["trainer.max_duration=2ba", f"trainer.save_folder={tmp_path / 'run'}", "trainer.progress_bar=false"]
    rest += ["scheduler={constant: {}}"]
    assert train.main([str(ROOT / "yamls" / "quickstart.yaml"), *network, *data, *rest]) == 0
    out = tmp_path / "drawn"
    options = ["--classes", "1", "--per-class", "1", "--num-steps", "3", "--sampling-method", "euler"]
    assert sample.main([str(tmp_path / "run"), "--out", str(out), *options]) == 0
    with Image.open(out / "000000.png") as picture:
        assert (picture.size, picture.mode) == ((16, 16), "RGB")


def test_a_second_run_writes_the_same_bytes_and_another_encoder_is_not_resumed(
    pictures, latents, vae_folder, tmp_path, convert
):
    again = [*latent_options(pictures, tmp_path / "again", vae_folder), "--image-size", 16, "--batch-size", 4]
    assert convert(*again)[0] == 0
    assert contents(tmp_path / "again") == contents(latents)
    assert "already converted" in convert(*again)[1]
    for options, message in (
        (["--encode-dtype", "bfloat16"], "encode_dtype 'float32' there, 'bfloat16' now"),
        (["--vae", "some/other"], "now"),
        (["--image-size", 18], "image_size 16 there, 18 now"),
    ):
        code, _, stderr = convert(*again, *options)
        assert code == 2
        assert message in stderr


def test_an_autoencoder_that_changes_on_the_hub_is_another_one(pictures, vae_folder, tmp_path, convert, monkeypatch):
    """From the Hub's own cache, laid out as huggingface_hub does, so that no network is needed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    cached, commits = tmp_path / "cache" / "models--someone--pipeline", ["0" * 40, "1" * 40]
    for commit in commits:
        shutil.copytree(vae_folder, cached / "snapshots" / commit / "vae")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commits[0])
    command = [*latent_options(pictures, tmp_path / "out", "someone/pipeline"), "--image-size", 16]
    code, _, stderr = convert(*command)
    assert code == 0, stderr
    assert load_spec(None, str(tmp_path / "out")).source["vae_commit"] == commits[0]
    assert "already converted" in convert(*command)[1]
    (cached / "refs" / "main").write_text(commits[1])
    code, _, stderr = convert(*command)
    assert (code, f"vae_commit '{commits[0]}' there, '{commits[1]}' now" in stderr) == (2, True)
    code, _, stderr = convert(*latent_options(pictures, tmp_path / "new", "someone/else"), "--image-size", 16)
    assert (code, "--vae: 'someone/else' is not a folder here, and the Hub" in stderr) == (2, True)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("cores", [2, 5])
def test_any_number_of_cores_gives_the_same_bits_in_the_same_order(pictures, vae_folder, cores, two_threads):
    from convert.kinds.latents import Latents
    from convert.sources.registry import Sample

    def rows(cores):
        kind = Latents(str(vae_folder), 16, True, "float32", 2, cores)
        assert torch.cuda.is_available() or kind.pool.submit(torch.get_num_threads).result() == 1
        samples = [Sample(str(path), None, 0) for path in files(pictures)] * 3
        prepared = ((sample, kind.prepare(Path(sample.where))) for sample in samples)
        return [
            (sample.where, row["moments"].tobytes(), row["moments_flip"].tobytes())
            for sample, row, _ in kind.rows(prepared)
        ]

    assert rows(cores) == rows(1)


def test_the_dtype_is_the_encoders_own(pictures, latents, vae_folder, tmp_path, convert):
    out = tmp_path / "bfloat16"
    code, _, stderr = convert(
        *latent_options(pictures, out, vae_folder), "--image-size", 16, "--encode-dtype", "bfloat16"
    )
    assert code == 0, stderr
    errors = [np.abs(a["moments"].astype(float) - b["moments"]) for a, b in zip(rows(out), rows(latents), strict=True)]
    assert 1e-3 < np.max(errors) < 0.2
    if not torch.cuda.is_available():
        assert convert(str(pictures), "--out", out, "--latents", "--vae", vae_folder, "--image-size", 16)[0] == 2


def scaled(vae_folder, factor, out):
    """The autoencoder with means so many times larger, which says that it does with float16."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(vae_folder, force_upcast=False)
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= factor
        vae.quant_conv.bias[:4] *= factor
    vae.save_pretrained(out)
    return out


@pytest.mark.parametrize(
    ("dtype", "message"),
    [("float32", "over 65504, float16's largest number"), ("float16", "in float16 to NaN or infinite values")],
)
def test_a_picture_whose_moments_overflow_is_named_or_left_out(pictures, vae_folder, tmp_path, convert, dtype, message):
    vae, paths = DiffusersAutoencoder(vae_folder), files(pictures)
    levels = from_uint8(torch.stack([cropped(path) for path in paths]))
    means = torch.stack([vae.moments(side)[:, :4] for side in (levels, levels.flip(-1))], dim=1)
    below, above = means.abs().amax((1, 2, 3, 4)).sort().values[-2:].tolist()
    worst = paths[int(means.abs().amax((1, 2, 3, 4)).argmax())]
    broken = scaled(vae_folder, 65504 / (below * above) ** 0.5, tmp_path / "vae")  # one picture goes over
    options = [*latent_options(pictures, tmp_path / "out", broken), "--image-size", 16, "--batch-size", 4]
    options += ["--encode-dtype", dtype]
    code, _, stderr = convert(*options)
    assert code == 2
    assert len(stderr.splitlines()) == 1
    assert stderr.startswith(f"error: {worst}: ")
    assert message in stderr
    assert sorted(os.listdir(tmp_path)) == ["vae"]
    code, stdout, stderr = convert(*options, "--skip-bad")
    assert code == 0
    assert "9 images, 2 classes, 1 skipped" in stdout
    assert [row["label"] for row in rows(tmp_path / "out")] == [
        ("ant", "bee").index(path.parent.name) for path in paths if path != worst
    ]


def test_bad_pictures_are_left_out_of_the_batches(pictures, latents, vae_folder, tmp_path, convert):
    root = tmp_path / "pictures"
    for number, path in enumerate(files(pictures)):
        folder = root / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
        if number % 3 == 1:
            (folder / f"{path.stem}-bad.png").write_bytes(path.read_bytes()[:60])
    options = [*latent_options(root, tmp_path / "out", vae_folder), "--image-size", 16, "--batch-size", 4]
    code, _, stderr = convert(*options)
    assert code == 2
    assert "ant/2-bad.png: the image does not decode" in stderr
    assert convert(*options, "--skip-bad")[0] == 0
    spec = load_spec(None, str(tmp_path / "out"))
    assert (spec.samples, spec.skipped) == (10, 3)
    name = "shard.00000.00000.mds"
    # The same pictures in the same batches; beside the data, a shard has its size limit and columns alone.
    assert (tmp_path / "out" / name).read_bytes() == (latents / name).read_bytes()


def test_pictures_of_one_size_need_no_image_size(vae_folder, tmp_path, convert):
    assert convert(*latent_options("digits", tmp_path / "out", vae_folder), "--limit", 5)[0] == 0
    spec = load_spec(None, str(tmp_path / "out"))
    assert (spec.image_size, spec.samples, spec.source["limit"]) == (8, 5, 5)
    assert rows(tmp_path / "out")[0]["moments"].shape == (8, 4, 4)


def test_pictures_or_an_autoencoder_that_do_not_fit_are_refused_in_a_line(pictures, vae_folder, tmp_path, convert):
    def made(width, height):
        root = tmp_path / f"{width}x{height}"
        (root / "all").mkdir(parents=True)
        Image.new("RGB", (width, height)).save(root / "all" / "0.png")
        return root

    for source, vae, options, message in (
        (pictures, vae_folder, [], "ant/0.png: the image is 24x20, expected a square; crop with --image-size"),
        (
            pictures / "bee",
            vae_folder,
            ["--label-column", "none"],
            "17x33, expected 16x16, as the first is; crop with --image-size",
        ),
        (made(9, 9), vae_folder, [], "--image-size: got 9, expected a multiple of 2"),
        (pictures, vae_folder, ["--image-size", 15], "--image-size: got 15, expected a multiple of 2"),
        (pictures, tmp_path / "nowhere", ["--image-size", 16], "nowhere', expected an existing folder, or a name on"),
        (pictures, pictures, ["--image-size", 16], "has no autoencoder: No such file"),
    ):
        before = sorted(os.listdir(tmp_path))
        code, stdout, stderr = convert(*latent_options(source, tmp_path / "out", vae), *options)
        assert code == 2
        assert stdout == ""
        assert message in stderr
        assert len(stderr.splitlines()) == 1
        assert sorted(os.listdir(tmp_path)) == before
