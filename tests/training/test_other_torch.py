"""Checkpoints that move between releases of torch, both ways, as one file and as shards of two ranks:

    OTHER_TORCH=.venv-2.14.1 python -m pytest tests/training/test_other_torch.py

OTHER_TORCH is another environment, as `make install TORCH=VERSION` makes it; `make test-newest` gives it.
"""

import os
from pathlib import Path

import pytest
import torch

from sit_composer.checkpoint.load import load_checkpoint
from tests.helpers.runs import launch, losses

OTHER = os.environ.get("OTHER_TORCH")
pytestmark = [
    pytest.mark.nightly,  # two minutes, of three launches
    pytest.mark.skipif(not OTHER, reason="OTHER_TORCH names no other environment"),
]
WAYS = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def top(few_digits, tmp_path_factory) -> Path:
    """Runs of 14 batches: one without a break here, one that goes there after 4, and one that comes from there."""
    top = tmp_path_factory.mktemp("moves")
    composer = os.path.abspath(os.path.join(OTHER, "bin", "composer"))
    launch(2, few_digits, top, *(f"{way}:{name}" for way in WAYS for name in ("whole:14", "going:4")))
    steps = (f"{way}:{name}" for way in WAYS for name in ("going:14", "coming:4"))
    launch(2, few_digits, top, *steps, composer=composer)
    launch(2, few_digits, top, *(f"{way}:coming:14" for way in WAYS))
    return top


@pytest.mark.parametrize("weights", ["training", "ema"])
@pytest.mark.parametrize("move", ["going", "coming"])
@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_with_another_torch(top, way, move, weights):
    """Weights and losses are those of the run without a break, up to what two releases' kernels round."""
    expected = load_checkpoint(str(top / way / "whole"), weights)
    got = load_checkpoint(str(top / way / move), weights)
    assert got.step == expected.step == 14
    assert got.record == expected.record
    assert got.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        torch.testing.assert_close(got.weights[name], value, rtol=0, atol=1e-6, msg=name)
    logged = losses(top / way / move, 4, 14)
    assert len(logged) == 14
    assert logged == pytest.approx(losses(top / way / "whole", 14), abs=2e-4)
