"""REPA and iREPA: their authors' numbers; features of shards against those of the teacher; where gradients stop."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from sit_composer.algorithms.projector import build_projector
from sit_composer.algorithms.repa import REPA, spatial_norm
from sit_composer.autoencoder import DiffusersAutoencoder, from_uint8
from sit_composer.config.schema import AlignmentConfig
from sit_composer.data.loader import build_loader
from sit_composer.data.stream import load_spec
from sit_composer.teacher import Teacher
from sit_composer.training.model import ComposerSiT
from sit_composer.transport import Transport
from tests.helpers.networks import small_network
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
