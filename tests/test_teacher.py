"""Teachers: which models can be one, what images they see, and what is refused in a line."""

import json
from pathlib import Path

import pytest
import torch

from sit_composer import cli
from sit_composer.autoencoder import from_uint8
from sit_composer.errors import UserError
from sit_composer.teacher import Teacher
from tests.helpers.teachers import STATISTICS, write_timm, write_transformers
from tests.reference.repa import inputs

KINDS = ("Dinov2", "Dinov2WithRegisters", "ViT", "SiglipVision")


@pytest.mark.parametrize("kind", ["timm", *KINDS])
def test_a_token_of_each_patch_whatever_the_resolution(kind, tmp_path):
    name = write_timm(tmp_path) if kind == "timm" else write_transformers(tmp_path, kind)
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for grid in (4, 6):
        teacher = Teacher(name, grid)
        assert teacher.image_size == grid * (8 if kind == "timm" else 7)
        assert teacher.features(images).shape == (3, grid**2, teacher.width)
        assert teacher.as_dict() == {**Teacher(name, grid).as_dict(), "teacher": name}
    # A change in the last patch changes the last token the most: neither class token nor registers are among them.
    changed = images.clone()
    changed[:, :, -4:, -4:] = 0
    moved = (teacher.features(changed) - teacher.features(images)).norm(dim=-1)
    assert (moved.argmax(1) == grid**2 - 1).all()
    grey = images[:, :1]
    assert torch.equal(teacher.features(grey), teacher.features(grey.expand(-1, 3, -1, -1)))


def test_images_are_prepared_as_repas_code_does(reference, tmp_path):
    """For ImageNet's statistics, and DINOv2's 224 pixels for images of 256."""
    name = write_transformers(tmp_path)
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))
    teacher, seen = Teacher(name, 32), []  # its patches have 7 pixels
    assert teacher.image_size == 224
    teacher._tokens = lambda images: seen.append(images) or images
    teacher.features(from_uint8(inputs()["images"]))
    torch.testing.assert_close(seen[0][:, :, ::16, ::16], reference("repa")["preprocessed"], rtol=1e-4, atol=1e-4)


def test_mean_and_deviation_are_the_models_own(tmp_path):
    teacher = Teacher(write_transformers(tmp_path), 4)
    assert teacher.mean.flatten().tolist() == pytest.approx(STATISTICS["image_mean"])
    assert teacher.std.flatten().tolist() == pytest.approx(STATISTICS["image_std"])


def no_weights(folder: Path) -> str:
    name = write_transformers(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")  # which would be unpickled
    return name


def pickled(folder: Path) -> str:
    name = write_timm(folder)
    (folder / "model.safetensors").unlink()
    torch.save(Planted(folder / "ran"), folder / "pytorch_model.bin")
    return name


class Planted:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def with_code(folder: Path) -> str:
    name = write_transformers(folder)
    config = json.loads((folder / "config.json").read_text())
    added = {"model_type": "planted", "auto_map": {"AutoConfig": "planted.Config", "AutoModel": "planted.Model"}}
    (folder / "config.json").write_text(json.dumps({**config, **added}))
    (folder / "planted.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    return name


def no_statistics(folder: Path) -> str:
    name = write_transformers(folder)
    (folder / "preprocessor_config.json").unlink()
    return name


def no_tokens(folder: Path) -> str:
    import timm
    from timm.models import save_for_hf

    save_for_hf(timm.create_model("resnet10t"), folder, safe_serialization=True)
    return f"timm:{folder}"


def lacking(folder: Path) -> str:
    from safetensors.torch import load_file, save_file

    name = write_transformers(folder)
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.attention.attention.key.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: "dinov2", "expected timm:NAME or transformers:NAME"),
        (lambda _: "timm:no_such_model", "can't be loaded: Unknown model"),
        (lambda folder: f"timm:{folder}", "can't be loaded: "),
        (lambda folder: f"transformers:{folder}", "can't be loaded: "),
        (pickled, "can't be loaded: "),
        (with_code, "can't be loaded: "),
        (no_weights, "no file named model.safetensors"),
        (no_statistics, "preprocessor_config.json"),
        (no_tokens, "it has no tokens; expected a vision transformer"),
        (lacking, "its weights lack 1, as encoder.layer.1.attention.attention.key.bias"),
    ],
)
def test_what_is_no_teacher_is_refused_in_a_line(make, message, tmp_path):
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as error:
        Teacher(make(tmp_path), 4)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def test_without_timm_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    name = write_timm(tmp_path)
    monkeypatch.setattr(cli, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"the package timm is not installed; run pip install -e '\.\[alignment\]'"):
        Teacher(name, 4)
