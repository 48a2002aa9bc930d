"""What saving and resuming cost in memory, beside what is saved."""

import json
import re
import subprocess

import pytest
import torch
from torch.distributed.checkpoint import state_dict
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from sit_composer.supervision.loading import guard_composer
from tests.helpers.digits import write_digits
from tests.helpers.paths import ROOT
from tests.helpers.runs import COMPOSER, QUICKSTART


@pytest.mark.parametrize("fused", [None, True])
def test_an_optimizer_is_loaded_without_a_step(fused, monkeypatch):
    """Torch makes one, with gradients and temporaries as large as the weights."""
    monkeypatch.setattr(state_dict, "_init_optim_state", state_dict._init_optim_state)  # restored afterwards
    guard_composer()
    before, after = (torch.nn.Linear(4, 3) for _ in range(2))
    stepped, fresh = (torch.optim.AdamW(network.parameters(), fused=fused) for network in (before, after))
    before(torch.ones(2, 4)).sum().backward()
    stepped.step()
    monkeypatch.setattr(fresh, "step", lambda *_, **__: pytest.fail("it made a step"))
    set_optimizer_state_dict(after, fresh, get_optimizer_state_dict(before, stepped))
    assert all(weight.grad is None for weight in after.parameters())
    for ours, theirs in zip(fresh.state.values(), stepped.state.values(), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_sharded_checkpoints_cost_less_than_a_second_copy(tmp_path):
    write_digits(tmp_path / "shards")
    keys = [
        f"data.local={tmp_path / 'shards'}", "data.global_batch_size=8", "model.hidden_size=384", "model.num_heads=6",
        "model.depth=6", "fsdp={}", f"trainer.save_folder={tmp_path / 'run'}", "trainer.save_interval=1ba",
        "trainer.progress_bar=false", "callbacks={}", "scheduler={constant: {}}",
    ]  # fmt: skip
    told = []
    for batches in (1, 2):
        module = ["-m", "tests.helpers.checkpoint_memory", QUICKSTART, f"trainer.max_duration={batches}ba"]
        done = subprocess.run([COMPOSER, "-n", "2", *module, *keys], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told += map(json.loads, re.findall(r'^\{"event".*\}$', done.stdout, re.MULTILINE))
    assert [line["event"] for line in told] == ["save", "resume", "save"]  # of rank 0, which alone prints
    for line in told:
        assert line["resident"] < 1.1 * (line["weights"] + line["optimizer"] + line["ema"])
