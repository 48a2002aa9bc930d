"""The command that trains a small autoencoder, for a few steps. tests/test_docs.py trains it to the end."""

import os

import torch

from sit_composer.autoencoder import DiffusersAutoencoder, from_uint8
from sit_composer.tiny_autoencoder import main
from sit_composer.training.tiny_autoencoder import read_images
from tests.helpers.digits import write


def test_the_digits_autoencoder_is_one_that_conversion_and_training_take(digits_shards, tmp_path, capsys):
    before = os.umask(0o027)
    try:
        assert main([str(digits_shards), "--out", str(tmp_path / "new" / "vae"), "--steps", "5"]) == 0
    finally:
        os.umask(before)
    folder = tmp_path / "new" / "vae"
    assert [path.name for path in folder.parent.iterdir()] == ["vae"]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}
    assert f"{folder}: the mean error of a pixel is " in capsys.readouterr().out
    autoencoder = DiffusersAutoencoder(str(folder))
    assert (autoencoder.spec.channels, autoencoder.spec.downsample, autoencoder.picture_channels) == (4, 2, 1)
    images = from_uint8(read_images(str(digits_shards)))
    assert images.shape == (1797, 1, 8, 8)
    latents = autoencoder.encode(images[:300], torch.randn(300, 4, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert 0.9 < latents.std() < 1.1


def test_what_it_cannot_train_on_is_named(digits_shards, tmp_path, capsys):
    assert main([str(digits_shards), "--out", str(tmp_path)]) == 2
    assert f"--out: {tmp_path} exists, expected a new folder" in capsys.readouterr().err
    spec = {"kind": "pixels", "channels": 1, "image_size": None}
    write(tmp_path / "sizes", {"image": "bytes", "label": "int"}, [{"image": b"", "label": 0}] * 10, spec)
    assert main([str(tmp_path / "sizes"), "--out", str(tmp_path / "vae")]) == 2
    assert f"{tmp_path / 'sizes'}: expected shards of images of one size" in capsys.readouterr().err
    assert not (tmp_path / "vae").exists()
