"""REPA and iREPA: their authors' numbers; features of shards against those of the teacher; where gradients stop."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from convert import to_mds
from sit_composer import export
from sit_composer.algorithms.projector import build_projector
from sit_composer.algorithms.repa import REPA, spatial_norm
from sit_composer.autoencoder import DiffusersAutoencoder, from_uint8
from sit_composer.checkpoint.load import load_checkpoint
from sit_composer.config.schema import AlignmentConfig
from sit_composer.data.loader import build_loader
from sit_composer.data.stream import load_spec
from sit_composer.sit import SiT
from sit_composer.teacher import Teacher
from sit_composer.training.model import ComposerSiT
from sit_composer.transport import Transport
from tests.helpers.networks import small_network
from tests.helpers.runs import bits, differences, state_of
from tests.helpers.teachers import write_timm
from tests.reference.blocks import fill_network
from tests.reference.repa import FEATURES, WIDTH, inputs


@pytest.fixture(scope="module")
def teacher_name(tmp_path_factory) -> str:
    return write_timm(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Twelve made images of two classes, none its own mirror image."""
    root, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for number in range(12):
        folder = root / ("ant", "bee")[number % 2]
        folder.mkdir(exist_ok=True)
        coarse = torch.randint(0, 256, (4, 4, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(coarse).resize((16, 16), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return root


def repa(**options) -> REPA:
    return REPA(AlignmentConfig(name="repa", **options), WIDTH, FEATURES)


def test_losses_are_those_of_the_authors_code(reference):
    theirs, given = reference("repa"), inputs()
    plain, improved = repa(), repa(spatial_norm=0.6)
    for alignment, name in ((plain, "loss"), (improved, "irepa loss")):
        target = alignment.teach({"features": given["features"]}, None)
        distances = alignment.distance(given["projected"], target)
        assert distances.shape == (3,)
        torch.testing.assert_close(distances.mean(), theirs[name], rtol=1e-5, atol=1e-6)
    assert (plain.weight, improved.weight) == (0.5, 0.5)
    for gamma in (0.6, 1.0):
        found = spatial_norm(given["features"], gamma)
        torch.testing.assert_close(found, theirs[f"spatial_norm {gamma}"], rtol=1e-5, atol=1e-5)
    assert (plain.distance(given["projected"], 3 * given["projected"]) + 1).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_projectors_are_those_of_the_authors_code(reference, kind):
    projector = build_projector(AlignmentConfig(name="repa", projector=kind), WIDTH, FEATURES)
    fill_network(projector.conv if kind == "conv" else projector)
    torch.testing.assert_close(projector(inputs()["tokens"]), reference("repa")[kind], rtol=1e-5, atol=1e-6)


def models(source, vae_folder, teacher_name, tmp_path, convert, **options):
    """For images with encoder and teacher in the loop, and for latents with features: a model, and a batch."""
    latents = [source, "--out", tmp_path / "latents", "--image-size", 16, "--latents", "--vae", vae_folder]
    latents += ["--features", teacher_name, "--features-grid", 4, "--encode-dtype", "float32", "--workers", 0]
    assert convert(*latents)[0] == 0
    assert convert(source, "--out", tmp_path / "pixels", "--workers", 0)[0] == 0
    encoder, teacher = DiffusersAutoencoder(vae_folder), Teacher(teacher_name, 4)
    for folder, online in (("pixels", True), ("latents", False)):
        spec, network = load_spec(None, str(tmp_path / folder)), small_network()
        config = AlignmentConfig(name="repa", block=1, **options)
        alignment = REPA(config, network.hidden_size, teacher.width, teacher if online else None)
        given = encoder if online else None
        model = ComposerSiT(network, Transport(), encoder.spec, given, alignment=alignment)
        size = 16 if online else None
        loading = {"image_size": size, "flip": True, "seed": 1, "features": not online}
        (batch,) = build_loader(None, str(tmp_path / folder), spec=spec, batch_size=12, **loading)
        yield model, batch


def test_features_of_shards_are_those_of_the_teacher_in_the_loop(source, vae_folder, teacher_name, tmp_path, convert):
    found = []
    for model, batch in models(source, vae_folder, teacher_name, tmp_path, convert, projector="conv", spatial_norm=0.6):
        losses = model.train()(batch)
        distances = model.alignment.distances
        (losses + distances).mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((batch, distances.detach(), gradient))
    (images, expected, slope), (latents, distances, gradient) = found
    assert torch.equal(images["key"], latents["key"])
    assert 0 < (images["key"] & 1).sum() < 12  # images and mirror images
    features = Teacher(teacher_name, 4).features(from_uint8(images["image"]))
    assert latents["features"].dtype == torch.float16
    torch.testing.assert_close(latents["features"].float(), features, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(distances, expected, rtol=2e-3, atol=1e-4)
    assert (gradient - slope).norm() < 2e-3 * slope.norm()


def test_gradients_reach_projector_and_early_blocks_alone(source, vae_folder, teacher_name, tmp_path, convert):
    (model, batch), _ = models(source, vae_folder, teacher_name, tmp_path, convert)
    model.train()(batch)
    model.alignment.distances.mean().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"projector.0.weight", "projector.4.bias", "network.x_embedder.proj.weight"} <= reached
    assert not [name for name in reached if name.startswith(("network.blocks.1", "network.final_layer"))]
    assert not any(p.requires_grad or p.grad is not None for p in model.alignment.teacher.network.parameters())
    teachers = {id(p) for p in model.alignment.teacher.network.parameters()}
    assert not teachers & {id(p) for p in model.parameters()}
    assert not [name for name in model.state_dict() if "teacher" in name]


ALIGNED = "alignment={{name: repa, block: 1, teacher: '{}', projector: conv, spatial_norm: 0.6}}"
COARSE = "model.patch_size=2"  # the digits' 8 pixels as 4x4 tokens


def test_a_run_on_images_resumes_to_the_bit_and_its_projector_is_in_no_export(run, teacher_name, tmp_path):
    aligned = [ALIGNED.format(teacher_name), COARSE, "trainer.device_train_microbatch_size=24"]
    assert run("trainer.max_duration=4ba", *aligned, folder="whole") == 0
    assert run("trainer.max_duration=2ba", *aligned) == 0
    assert run("trainer.max_duration=4ba", *aligned) == 0
    assert differences(bits(tmp_path / "whole"), bits(tmp_path / "run")) == []
    held = [name for name in state_of(tmp_path / "run")["model"] if not name.startswith("network.")]
    assert held == ["projector.conv.weight", "projector.conv.bias"]
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "export")]) == 0
    loaded = load_checkpoint(str(tmp_path / "run"), "ema").build_network()  # strictly
    exported = SiT.from_pretrained(str(tmp_path / "export" / "checkpoint-4"), "ema")
    assert differences(loaded.state_dict(), exported.state_dict()) == []


def test_runs_on_latents_need_the_features_of_their_teacher_and_grid(run, teacher_name, vae_folder, tmp_path, capsys):
    def train(shards, *overrides, folder):
        capsys.readouterr()
        latents = ["model.in_channels=4", "model.input_size=4", f"autoencoder.name={vae_folder}", "eval_data=null"]
        places = [f"data.local={shards}", "data.global_batch_size=16", "trainer.max_duration=1ba", "data.num_workers=0"]
        code = run(*latents, *places, "sample_grid=null", *overrides, folder=folder)
        return code, capsys.readouterr().err

    options = ["--latents", "--vae", vae_folder, "--limit", "200", "--workers", "0"]
    for name, features in (("none", []), ("two", ["--features", teacher_name, "--features-grid", "2"])):
        assert to_mds.main(["digits", "--out", str(tmp_path / name), *options, *features]) == 0
    code, stderr = train(tmp_path / "two", ALIGNED.format(teacher_name), "model.patch_size=2", folder="trained")
    assert code == 0, stderr
    other = write_timm(tmp_path / "other")
    cases = (
        ("none", teacher_name, 2, "none has latents without features; convert with --features timm:"),
        ("two", other, 2, f"got {other}, expected {teacher_name}, whose features are in"),
        ("two", teacher_name, 1, "two are of 2x2 tokens, expected the network's 4x4; convert with --features"),
    )
    for shards, teacher, patch, message in cases:
        overrides = [ALIGNED.format(teacher), f"model.patch_size={patch}"]
        code, stderr = train(tmp_path / shards, *overrides, folder="refused")
        assert code == 2
        (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert line.startswith("error: alignment.teacher: ")
        assert message in line


def test_a_teacher_that_cannot_be_loaded_ends_the_run_in_a_line(run, tmp_path, capsys):
    assert run(ALIGNED.format(f"transformers:{tmp_path}"), COARSE) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: alignment.teacher: transformers:{tmp_path}: can't be loaded: ")
