"""DINOv2's features, on random weights of its smallest network, against its published formulas."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import conv2d, gelu, interpolate, layer_norm, linear, softmax

from sit_composer import evaluate
from sit_composer.choices import check_features
from sit_composer.errors import UserError
from sit_composer.evaluation.dinov2 import resize_positions
from sit_composer.evaluation.features import load_extractor

WIDTH, HEADS, DEPTH = 384, 6, 12


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random, under the names of Meta's file dinov2_vits14_pretrain.pth."""
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    state = {name: torch.randn(value.shape) * 0.05 for name, value in network.state_dict().items()}
    state |= {name: 1 + value for name, value in state.items() if "norm" in name and name.endswith("weight")}
    return state | {"mask_token": torch.zeros(1, WIDTH)}


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("dinov2") / "dinov2_vits14_pretrain.pth"
    torch.save(weights, path)
    return str(path)


@pytest.fixture(scope="module")
def extractor(file):
    return load_extractor(f"dinov2:{file}")


def images(count: int, side: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (count, 3, 5, 5), generator=generator).float()
    return interpolate(small, (side, side), mode="bicubic").clamp(0, 255).to(torch.uint8)


def published(weights: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """The class token of DINOv2 (arXiv 2304.07193), with the transforms of Stein et al.'s code: PIL's bicubic resize
    to 224, ImageNet's mean and deviation; positions as in `interpolate_pos_encoding` of Meta's."""
    levels = [
        np.asarray(Image.fromarray(p.permute(1, 2, 0).numpy()).resize((224, 224), Image.BICUBIC)) for p in pictures
    ]
    x = torch.from_numpy(np.stack(levels)).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = conv2d(x, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=14)
    x = torch.cat((weights["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)), dim=1)
    grid = weights["pos_embed"][:, 1:].reshape(1, 37, 37, WIDTH).permute(0, 3, 1, 2)
    grid = interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic", antialias=False)
    x = x + torch.cat((weights["pos_embed"][:, :1], grid.permute(0, 2, 3, 1).reshape(1, 256, WIDTH)), dim=1)
    for i in range(DEPTH):
        part = {name.removeprefix(f"blocks.{i}."): w for name, w in weights.items() if name.startswith(f"blocks.{i}.")}
        h = layer_norm(x, (WIDTH,), part["norm1.weight"], part["norm1.bias"], 1e-6)
        qkv = linear(h, part["attn.qkv.weight"], part["attn.qkv.bias"])
        q, k, v = qkv.reshape(len(x), 257, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        h = softmax(q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS), dim=3) @ v
        h = linear(h.transpose(1, 2).reshape(x.shape), part["attn.proj.weight"], part["attn.proj.bias"])
        x = x + part["ls1.gamma"] * h
        h = layer_norm(x, (WIDTH,), part["norm2.weight"], part["norm2.bias"], 1e-6)
        h = gelu(linear(h, part["mlp.fc1.weight"], part["mlp.fc1.bias"]))
        x = x + part["ls2.gamma"] * linear(h, part["mlp.fc2.weight"], part["mlp.fc2.bias"])
    return layer_norm(x, (WIDTH,), weights["norm.weight"], weights["norm.bias"], 1e-6)[:, 0]


def test_the_features_are_those_of_the_published_formulas(extractor, weights):
    same = images(2, 224)  # not resized: equal to rounding
    expected = published(weights, same)
    assert expected.std(dim=0).mean() > 0.01  # the images differ in their features
    torch.testing.assert_close(torch.from_numpy(extractor(same)["features"]), expected, rtol=0, atol=1e-4)
    resized = images(2, 300)  # PIL rounds between its two passes: a level of difference
    found, expected = torch.from_numpy(extractor(resized)["features"]), published(weights, resized)
    assert (found - expected).norm() < 0.02 * (expected[0] - expected[1]).norm()


def test_positions_are_resized_as_metas_code_does_and_not_as_timms():
    positions = torch.randn(1, 1 + 37**2, 8, generator=torch.Generator().manual_seed(0))
    ours = resize_positions(positions)
    grid = positions[:, 1:].reshape(1, 37, 37, 8).permute(0, 3, 1, 2)
    other = interpolate(grid, (16, 16), mode="bicubic").flatten(2).transpose(1, 2)
    assert ours.shape == (1, 257, 8)
    assert torch.equal(ours[:, 0], positions[:, 0])
    assert (ours[:, 1:] - other).abs().max() > 0.01  # the offset counts


@pytest.mark.slow
def test_statistics_remember_which_weights_they_are_of(extractor, file, weights, tmp_path, capsys):
    for name, seed in (("samples", 0), ("real", 1)):
        np.savez(tmp_path / f"{name}.npz", arr_0=images(2, 16, seed).permute(0, 2, 3, 1).contiguous().numpy())
    samples, real, stored, out = (str(tmp_path / name) for name in ("samples.npz", "real.npz", "s.npz", "o.json"))
    features = ["--features", f"dinov2:{file}"]
    assert evaluate.main([samples, "--reference", real, *features, "--save-statistics", stored, "--out", out]) == 0
    whole = json.loads((tmp_path / "o.json").read_text())
    assert set(whole["metrics"]) == {"fid", "kid", "kid_std"}  # precision and recall need more images
    assert whole["features"] == {"name": "dinov2-small", "of": extractor.identity, "dimension": WIDTH}
    assert evaluate.main([samples, "--reference", stored, *features, "--out", out]) == 0
    assert json.loads((tmp_path / "o.json").read_text())["metrics"]["fid"] == pytest.approx(whole["metrics"]["fid"])
    assert "| FD |" in capsys.readouterr().out  # FDD is of the large one

    other = tmp_path / "other.pth"
    torch.save(weights | {"norm.bias": weights["norm.bias"] + 1}, other)
    assert evaluate.main([samples, "--reference", stored, "--features", f"dinov2:{other}"]) == 2
    assert f"{stored}: got statistics of {extractor.identity}, expected dinov2-small:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("cls_token"), "no 'cls_token'"),
        (lambda w: w.pop("blocks.3.ls1.gamma"), "blocks.3.ls1.gamma"),
        (lambda w: w.update(pos_embed=w["pos_embed"][:, :257]), "expected 1370 positions and no registers"),
        (lambda w: w.update(register_tokens=torch.zeros(1, 4, WIDTH)), "expected 1370 positions and no registers"),
    ],
)
def test_other_weights_are_refused_in_one_line(weights, tmp_path, change, message):
    wrong = dict(weights)
    change(wrong)
    path = tmp_path / "wrong.pth"
    torch.save(wrong, path)
    with pytest.raises(UserError, match="expected DINOv2's weights, and they can't be loaded") as error:
        load_extractor(f"dinov2:{path}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"cls_token": print}, tmp_path / "code.pth")
    with pytest.raises(UserError, match="can't be loaded"):
        load_extractor(f"dinov2:{tmp_path / 'code.pth'}")


def test_a_missing_file_is_refused_before_anything_is_loaded():
    check_features("--features", "dinov2")
    with pytest.raises(UserError, match=r"--features: none\.pth is no file; expected inception, dinov2, dinov2:FILE"):
        check_features("--features", "dinov2:none.pth")
