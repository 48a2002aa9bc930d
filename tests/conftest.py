"""Fixtures that several tests share."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads a process, in several processes, stall each other

import pytest
import torch
from safetensors.torch import load_file

from sit_composer.sit import SiT

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture(scope="session")
def reference():
    """Loads the reference vectors of a name."""
    return lambda name: load_file(REFERENCE / f"{name}.safetensors")


@pytest.fixture(scope="session")
def meta() -> dict:
    return json.loads((REFERENCE / "meta.json").read_text())


@pytest.fixture
def tiny(reference, meta) -> SiT:
    """The reference's small network, in evaluation mode."""
    network = SiT(**meta["tiny_a"]["config"])
    network.load_state_dict(reference("tiny_a.weights"), strict=True)
    return network.eval()


@pytest.fixture(scope="session")
def digits_shards(tmp_path_factory) -> Path:
    """A folder of MDS shards of scikit-learn's digits, made by the converter as a user would."""
    out = tmp_path_factory.mktemp("digits") / "shards"
    command = [sys.executable, "convert/to_mds.py", "digits", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return out


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory) -> str:
    """A small AutoencoderKL, made and saved as the real ones are."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, scaling_factor=0.3, shift_factor=0.05,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return str(folder)
