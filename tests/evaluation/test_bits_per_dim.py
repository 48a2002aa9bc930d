"""Bits a dimension of the digits under small networks that a few batches trained."""

import contextlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from streaming import MDSWriter

from sit_composer import bits_per_dim
from sit_composer.autoencoder import AutoencoderSpec, DiffusersAutoencoder, from_uint8
from sit_composer.checkpoint.load import load_checkpoint
from sit_composer.checkpoint.record import Record
from sit_composer.data.loader import build_loader
from sit_composer.data.spec import SPEC_NAME, DataSpec
from sit_composer.data.stream import load_spec
from sit_composer.evaluation.bits import check_fit
from sit_composer.likelihood import dequantize, log_likelihood
from tests.helpers.paths import ROOT
from tests.helpers.runs import train_at_once

SMALL = ["model.hidden_size=32", "model.depth=1", "model.num_heads=2", "scheduler={constant: {}}"]
FIXED = ("--sampling-method", "heun", "--num-steps", "4")


def trained(shards, folder, *overrides: str):
    places = [f"data.local={shards}", f"trainer.save_folder={folder}", "trainer.progress_bar=false"]
    assert train_at_once([str(ROOT / "yamls" / "quickstart.yaml"), *SMALL, *places, *overrides]) == 0
    return folder


@pytest.fixture(scope="module")
def checkpoints(digits_shards, tmp_path_factory):
    return trained(digits_shards, tmp_path_factory.mktemp("pixels"), "trainer.max_duration=60ba")


@pytest.fixture(scope="module")
def latent_checkpoints(digits_shards, vae_folder, tmp_path_factory):
    """A network on latents, trained from pictures that are encoded in each step."""
    network = ["model.input_size=4", "model.in_channels=4", f"autoencoder.name={vae_folder}"]
    return trained(digits_shards, tmp_path_factory.mktemp("latents"), "trainer.max_duration=2ba", *network)


@pytest.fixture(scope="module")
def latent_shards(digits_shards, vae_folder, tmp_path_factory):
    """The first 40 digits' moments, by the same autoencoder."""
    vae, pixels = DiffusersAutoencoder(vae_folder), load_spec(None, str(digits_shards))
    dataset = build_loader(None, str(digits_shards), spec=pixels, batch_size=8, shuffle=False).dataset
    folder = tmp_path_factory.mktemp("moments") / "shards"
    columns = {"moments": "ndarray:float16", "moments_flip": "ndarray:float16", "label": "int"}
    counts = [0] * 10
    with MDSWriter(out=str(folder), columns=columns, hashes=["xxh64"]) as writer:
        for i in range(40):
            picture = from_uint8(dataset[i]["image"]).expand(1, 3, 8, 8)
            both = [vae.moments(p)[0].numpy().astype(np.float16) for p in (picture, picture.flip(-1))]
            writer.write({"moments": both[0], "moments_flip": both[1], "label": dataset[i]["label"]})
            counts[dataset[i]["label"]] += 1
    kind = {"kind": "latents", "channels": 4, "samples": 40, "class_counts": counts, "autoencoder": vae.spec.as_dict()}
    (folder / SPEC_NAME).write_text(DataSpec(**vars(pixels) | kind).to_json())
    return folder


@pytest.fixture
def measure(checkpoints, digits_shards, tmp_path):
    """Runs the command, and gives what it wrote."""

    def measure(*options: str, checkpoint=checkpoints, data=digits_shards):
        out = tmp_path / "result.json"
        assert bits_per_dim.main([str(checkpoint), "--data", str(data), "--out", str(out), *options]) == 0
        return json.loads(out.read_text())

    return measure


def test_the_digits_bits_are_log_ps_of_the_network_given_their_classes(measure, checkpoints, digits_shards, capsys):
    result = measure("--num-images", "12", "--exact", "--seed", "3", "--weights", "training", *FIXED)
    line = capsys.readouterr().out
    assert line.startswith(f"{result['bits_per_dim']:.4f} ± {result['standard_error']:.4f} bits/dim of 8-bit pictures")
    assert line.count("\n") == 1
    checkpoint = load_checkpoint(str(checkpoints), "training")
    network, transport = checkpoint.build_network(), checkpoint.record.build_transport()
    spec = load_spec(None, str(digits_shards))
    dataset = build_loader(None, str(digits_shards), spec=spec, batch_size=1).dataset
    rows = [dataset[i] for i in result["pictures"]]
    noise = [np.random.default_rng((3, i)).random((1, 8, 8), dtype=np.float32) for i in result["pictures"]]
    x = dequantize(torch.stack([row["image"] for row in rows]), torch.from_numpy(np.stack(noise)))
    y = torch.tensor([row["label"] for row in rows])
    solver = {"sampling_method": "heun", "num_steps": 4}
    log_p = log_likelihood(transport, network, x, y=y, exact=True, **solver)
    torch.testing.assert_close(torch.tensor(result["log_p"]), log_p, rtol=1e-4, atol=1e-2)
    bits = (math.log(127.5) - log_p / 64) / math.log(2)
    assert result["bits_per_dim"] == pytest.approx(bits.mean().item(), abs=1e-3)
    assert result["standard_error"] == pytest.approx(bits.std().item() / math.sqrt(12), rel=1e-2)
    others = log_likelihood(transport, network, x, y=(y + 1) % 10, exact=True, **solver)
    assert not torch.allclose(others, log_p, rtol=1e-4, atol=1e-2)  # the class counts
    assert result["checkpoint"]["weights"] == "training"
    assert result["checkpoint"]["step"] == 60
    assert len(result["checkpoint"]["sha256"]) == 64
    assert result["evaluations"] == 6
    assert (result["dims"], result["data"]["count"], result["data"]["of"]) == (64, 12, 1797)
    wanted = {"num_steps": 4, "atol": None, "probes": None, "exact": True, "seed": 3, "interval": [0.0, 1.0]}
    assert wanted.items() <= result["settings"].items()


def test_a_picture_has_the_same_value_whatever_the_batch(measure):
    options = ["--num-images", "7", "--probes", "2", *FIXED]
    whole = measure("--batch-size", "7", *options)
    parts = measure("--batch-size", "3", *options)
    assert len(set(whole["pictures"])) == 7
    assert parts["pictures"] == whole["pictures"]
    assert parts["log_p"] == pytest.approx(whole["log_p"], abs=1e-2)
    other = measure("--num-images", "7", "--seed", "1", "--probes", "2", *FIXED)
    assert other["pictures"] != whole["pictures"]


def test_probes_average_to_the_exact_trace_and_adaptive_solvers_agree(measure):
    exact = measure("--num-images", "8", "--exact")
    probed = measure("--num-images", "8", "--probes", "32")
    assert {"atol": 1e-5, "rtol": 1e-5, "num_steps": None}.items() <= exact["settings"].items()
    assert probed["bits_per_dim"] == pytest.approx(exact["bits_per_dim"], abs=0.05)
    fine = measure("--num-images", "8", "--exact", "--sampling-method", "rk4", "--num-steps", "20")
    assert fine["log_p"] == pytest.approx(exact["log_p"], abs=0.05)


def test_latents_bits_are_called_theirs(measure, latent_checkpoints, latent_shards, digits_shards, capsys):
    both = ["--exact", *FIXED]
    stored = measure(*both, checkpoint=latent_checkpoints, data=latent_shards)
    assert "bits/dim of latents, not pictures (40 of 40; heun, 6 evaluations, exact trace)" in capsys.readouterr().out
    assert stored["settings"]["dequantization"] is None
    assert stored["bits_per_dim"] == pytest.approx(-stored["nats"] / 64 / math.log(2))
    assert stored["pictures"] == list(range(40))
    encoded = measure(*both, "--num-images", "100", checkpoint=latent_checkpoints, data=digits_shards)
    assert encoded["data"]["kind"] == "pixels"
    pairs = [(v, stored["log_p"][i]) for i, v in zip(encoded["pictures"], encoded["log_p"], strict=True) if i < 40]
    assert pairs
    for value, of_stored in pairs:  # the same noise of the same posterior, which shards round to float16
        assert value == pytest.approx(of_stored, abs=0.5)


def refused(capsys, *arguments: str) -> str:
    with contextlib.suppress(SystemExit):  # argparse's way out
        assert bits_per_dim.main(list(map(str, arguments))) == 2
    out, err = capsys.readouterr()
    assert not out
    (error,) = (line for line in err.splitlines() if "error: " in line)
    return error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "SDE"], "unrecognized arguments: --mode SDE"),
        (["--sampling-method", "Euler"], "--sampling-method: got 'Euler', expected euler"),
        (["--num-steps", "9"], "argument --num-steps: has no effect without a fixed-step solver (euler"),
        (
            ["--sampling-method", "rk4", "--rtol", "1"],
            "argument --rtol: has no effect without an adaptive solver",
        ),
        (["--probes", "0"], "argument --probes: got '0', expected a whole number of at least 1"),
        (["--exact", "--probes", "2"], "argument --probes: has no effect with --exact"),
        (["--atol", "nan"], "argument --atol: got 'nan', expected a number above 0"),
        (["--num-images", "1798"], "--num-images: got 1798, expected at most the 1797"),
        (["--out", "result.txt"], "--out: got result.txt, expected a file name that ends in .json"),
    ],
)
def test_a_wrong_option_is_named_in_one_line(checkpoints, digits_shards, capsys, options, message):
    assert message in refused(capsys, checkpoints, "--data", digits_shards, *options)


def test_a_launcher_is_refused(checkpoints, digits_shards, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs as one process" in refused(capsys, checkpoints, "--data", digits_shards)


def test_a_trace_of_too_many_dimensions_is_refused(checkpoints, digits_shards, capsys, monkeypatch):
    monkeypatch.setattr("sit_composer.evaluation.bits.EXACT_DIMS", 63)
    message = "--exact: got a network of 64 dimensions, expected at most 63"
    assert message in refused(capsys, checkpoints, "--data", digits_shards, "--exact")


def test_a_solver_that_gives_up_is_told(checkpoints, digits_shards, capsys):
    tight = ["--atol", "1e-30", "--rtol", "1e-30", "--num-images", "1"]
    assert bits_per_dim.main([str(checkpoints), "--data", str(digits_shards), *tight]) == 2
    assert "error: sampling_method: the solver gave up (underflow in dt" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 3}, "got images of 3 channels, expected 1 as for {checkpoint}"),
        ({"image_size": 16}, "got pixels of images of size 16, expected 8 as for {checkpoint}"),
        (
            {"num_classes": 9, "classes": list("012345678"), "class_counts": [1] * 9},
            "got 9 classes, expected 10 as for {checkpoint}",
        ),
    ],
)
def test_shards_that_do_not_fit_are_refused(checkpoints, digits_shards, tmp_path, capsys, change, message):
    spec = DataSpec(**vars(load_spec(None, str(digits_shards))) | change)
    (tmp_path / SPEC_NAME).write_text(spec.to_json())
    assert message.format(checkpoint=checkpoints) in refused(capsys, checkpoints, "--data", tmp_path)


def test_latents_of_another_autoencoder_are_refused(latent_checkpoints, latent_shards, checkpoints, tmp_path, capsys):
    wanted = f"expected pixels as for {checkpoints}"
    assert wanted in refused(capsys, checkpoints, "--data", latent_shards)
    spec = load_spec(None, str(latent_shards))
    other = DataSpec(**vars(spec) | {"autoencoder": spec.autoencoder | {"scale": 0.5}})
    (tmp_path / SPEC_NAME).write_text(other.to_json())
    assert "expected latents of" in refused(capsys, latent_checkpoints, "--data", tmp_path)


def test_names_of_classes_must_agree_unless_they_are_numbers():
    names = {"a": ["a", "b"], "b": ["b", "a"], "numbers": ["0", "1"]}
    model = {"input_size": 8, "in_channels": 1}

    def check(ours: str, theirs: str) -> None:
        args = bits_per_dim.parse(["run", "--data", "shards"])
        spec = DataSpec("pixels", 1, 8, 2, names[theirs], [1, 1], 2)
        check_fit(args, Record(model, {}, AutoencoderSpec(None, 1), names[ours]), spec)

    for pair in (("a", "a"), ("a", "numbers"), ("numbers", "b")):
        check(*pair)
    with pytest.raises(ValueError, match="shards: got the class 'b', expected 'a' as for run"):
        check("a", "b")


def test_a_wrong_option_is_told_at_once():
    code = "from sit_composer.bits_per_dim import main; main(['x', '--data', 'y', '--sampling-method', 'SDE'])"
    command = [sys.executable, "-c", f"import sys; {code}; print('torch' in sys.modules)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr.startswith("error: --sampling-method: got 'SDE', expected euler")
    assert done.stdout == "False\n"  # nothing heavy was imported
