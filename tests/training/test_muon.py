"""Muon's step against its formula, an SVD and AdamW's own, on one rank and on several."""

import copy
import math
import subprocess

import pytest
import torch
from torch.distributed.checkpoint import state_dict
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from sit_composer.choices import NEWTON_SCHULZ
from sit_composer.sit import token_map
from sit_composer.supervision.loading import guard_composer
from sit_composer.training.muon import QUINTIC, Muon, orthogonalize
from tests.helpers.networks import NEWER, small_network
from tests.helpers.paths import ROOT
from tests.helpers.runs import COMPOSER

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def with_gradients(seed: int = 0, **arguments):
    network = small_network(**arguments)
    torch.manual_seed(seed)
    for p in network.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    return network


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 32, 128), (2, 128, 32)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s.clamp(min=0.05 * s[..., :1])  # within what the iteration is made for
    result = orthogonalize((u * s.unsqueeze(1) @ vh).float()).double()
    expected = s / s.norm(dim=1, keepdim=True)
    for _ in range(NEWTON_SCHULZ):
        expected = sum(c * expected**power for c, power in zip(QUINTIC, (1, 3, 5), strict=True))
    assert ((expected > 0.67) & (expected < 1.21)).all()
    torch.testing.assert_close(result, u * expected.unsqueeze(1) @ vh, rtol=1e-5, atol=1e-5)
    polar = u @ vh
    cosine = (result * polar).sum((1, 2)) / (result.norm(dim=(1, 2)) * polar.norm(dim=(1, 2)))
    assert cosine.min() > 0.97


def test_bfloat16_orthogonalizes_too_and_zero_stays_zero():
    torch.manual_seed(0)
    matrices = torch.randn(2, 32, 96)
    values = torch.linalg.svdvals(orthogonalize(matrices.bfloat16()).float())
    assert values.min() > 0.65
    assert values.max() < 1.25
    assert torch.equal(orthogonalize(torch.zeros(1, 3, 5)), torch.zeros(1, 3, 5))


def test_steps_are_those_of_the_formula():
    """Two steps, matrix by matrix and map by map; the rest is AdamW's to the bit."""
    network, by_hand = with_gradients(), with_gradients()
    optimizer = Muon(network, momentum=0.9, **OPTIONS)
    rest = [p for name, p in by_hand.named_parameters() if p.requires_grad and token_map(name) is None]
    adamw = torch.optim.AdamW(rest, **OPTIONS)
    momenta: dict[str, torch.Tensor] = {}
    for seed in (1, 2):
        gradients = {n: p.grad for n, p in with_gradients(seed).named_parameters()}
        for each in (network, by_hand):
            for name, p in each.named_parameters():
                p.grad = gradients[name]
        optimizer.step()
        adamw.step()
        for name, p in by_hand.named_parameters():
            if (kind := token_map(name)) is not None:
                b = momenta[name] = 0.9 * momenta.get(name, 0) + 0.1 * p.grad
                parts = (0.9 * b + 0.1 * p.grad).chunk(kind[1])
                o = torch.cat([orthogonalize(part[None])[0] for part in parts])
                factor = 0.2 * math.sqrt(max(parts[0].shape))
                p.data = (1 - 0.01 * 0.1) * p.data - 0.01 * factor * o
    for (name, got), expected in zip(network.named_parameters(), by_hand.parameters(), strict=True):
        exact = token_map(name) is None
        torch.testing.assert_close(got, expected, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6, msg=name)


def test_a_matrix_moves_about_as_far_as_adamw_moves_it():
    """Root mean square 0.2 · lr."""
    network = with_gradients()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    Muon(network, lr=0.01).step()
    for name, p in network.named_parameters():
        if token_map(name) is not None:
            assert 0.7 < (p - before[name]).square().mean().sqrt() / (0.2 * 0.01) < 1.2, name


@pytest.mark.parametrize("options", [{}, NEWER], ids=["as released", "newer blocks"])
def test_matrices_are_the_blocks_maps_of_tokens(options):
    """Not the modulations, whose input is one vector per image, and not what embeds or reads out."""
    network = small_network(**options)
    optimizer = Muon(network, lr=0.01)
    [rest, *groups] = optimizer.param_groups
    names = {id(p): name for name, p in network.named_parameters()}
    matrices = sorted(names[id(p)] for group in groups for p in group["params"])
    inner = ("mlp.w12", "mlp.w3") if options else ("mlp.fc1", "mlp.fc2")
    assert matrices == sorted(
        f"blocks.{i}.{name}.weight" for i in range(2) for name in ("attn.qkv", "attn.proj", *inner)
    )
    trained = sum(p.requires_grad for p in network.parameters())
    assert len(rest["params"]) + len(matrices) == trained
    assert {group["maps"] for group in groups} == ({1, 2, 3} if options else {1, 3})


def test_its_state_goes_to_a_fresh_one_without_a_step(monkeypatch):
    monkeypatch.setattr(state_dict, "_init_optim_state", state_dict._init_optim_state)  # restored afterwards
    guard_composer()
    network, other = with_gradients(), with_gradients(1)
    stepped, fresh = Muon(network, momentum=0.8, **OPTIONS), Muon(other, lr=1.0)
    stepped.step()
    monkeypatch.setattr(fresh, "step", lambda *_, **__: pytest.fail("it made a step"))
    for p in other.parameters():
        p.grad = None
    stored = copy.deepcopy(get_optimizer_state_dict(network, stepped))  # its tensors are the optimizer's own
    set_optimizer_state_dict(other, fresh, stored)
    monkeypatch.undo()
    other.load_state_dict(network.state_dict())
    for trained, optimizer in ((network, stepped), (other, fresh)):
        for p, q in zip(trained.parameters(), with_gradients(2).parameters(), strict=True):
            p.grad = q.grad
        optimizer.step()
    assert {group["lr"] for group in fresh.param_groups} == {0.01}
    for p, q in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "ranks",
    [pytest.param(3, marks=pytest.mark.slow, id="replicated and sharded"),
     pytest.param(4, marks=pytest.mark.nightly, id="copies of shards")],
)  # fmt: skip
def test_several_ranks_step_as_one_does(ranks):
    """With rows that three doesn't divide, and fewer matrices of a kind than ranks."""
    command = [COMPOSER, "-n", str(ranks), "-m", "tests.helpers.muon_ranks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"steps of {ranks} ranks are those of one" in done.stdout
