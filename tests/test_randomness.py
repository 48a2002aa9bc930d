import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sit_composer.randomness import DROP, MASK, TIME, X0, normal, sample_key, sample_keys, uniform

KEYS = torch.tensor([sample_key(seed, epoch, index) for seed in range(2) for epoch in range(4) for index in range(250)])


def splitmix64(state: int, count: int) -> list[int]:
    """The published generator, written out; its first number from 1234567 is a known one."""
    out = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        out.append(z ^ (z >> 31))
    return out


def test_the_numbers_are_splitmix64s_by_box_and_muller():
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]
    bits = splitmix64(1234567, 3)
    radius = [math.sqrt(-2 * math.log(((b >> 32) + 1) / 2**32)) for b in bits]
    angle = [2 * math.pi * (b & 0xFFFFFFFF) / 2**32 for b in bits]
    expected = [r * f(a) for f in (math.cos, math.sin) for r, a in zip(radius, angle, strict=True)]
    got = normal(torch.tensor([1234567]), X0, (2, 3))
    torch.testing.assert_close(got, torch.tensor(expected).reshape(1, 2, 3), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(uniform(torch.tensor([1234567]), X0)[0].item(), (bits[0] >> 40) / 2**24)


@given(st.integers(0, 2**32), st.integers(0, 10**6), st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
def test_the_keys_of_a_batch_are_those_of_its_samples(seed, epoch, indices):
    assert sample_keys(seed, epoch, torch.tensor(indices)).tolist() == [sample_key(seed, epoch, i) for i in indices]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 3))
def test_every_key_gives_finite_numbers_in_range(key, purpose):
    keys = torch.tensor([key])
    assert normal(keys, purpose, (33,)).isfinite().all()
    assert 0 <= uniform(keys, purpose)[0] < 1


@given(st.lists(st.integers(0, 2**70), min_size=1, max_size=4))
def test_a_key_fits_an_int64_tensor(words):
    assert torch.tensor([sample_key(*words)]).dtype == torch.int64


def test_keys_differ_in_each_word_and_their_bits_are_fair():
    assert len(set(KEYS.tolist())) == len(KEYS)
    assert sample_key(0, 1, 2) != sample_key(0, 2, 1)
    bits = (KEYS[:, None] >> torch.arange(64)) & 1  # (2000, 64)
    assert (bits.float().mean(0) - 0.5).abs().max() < 5 * 0.5 / len(KEYS) ** 0.5
    agree = (bits[1:] == bits[:-1]).float().mean(0)  # of neighbours
    assert (agree - 0.5).abs().max() < 5 * 0.5 / len(KEYS) ** 0.5


@pytest.mark.parametrize("keys", [KEYS, torch.arange(2000)], ids=["hashed", "counted"])
def test_normals_are_normal_within_and_across_samples(keys):
    x = normal(keys, X0, (4, 8, 8))
    assert x.shape == (2000, 4, 8, 8)
    flat = x.flatten(1).double().numpy()
    assert stats.kstest(flat.ravel()[::7], "norm").pvalue > 1e-3
    assert abs((flat**4).mean() - 3) < 5 * math.sqrt(96 / flat.size)
    for a, b in ((flat[:-1], flat[1:]), (flat[:, :-1], flat[:, 1:]), (flat[:, :128], flat[:, 128:])):
        assert abs((a * b).mean()) < 5 / math.sqrt(a.size)  # neighbours; and the two of one pair
    correlation = np.corrcoef(flat[:250])
    assert np.abs(correlation - np.eye(250)).max() < 6 / math.sqrt(256)


@pytest.mark.parametrize("keys", [KEYS, torch.arange(2000)], ids=["hashed", "counted"])
def test_purposes_are_independent_of_each_other_and_of_the_coin(keys):
    t, drop = uniform(keys, TIME), uniform(keys, DROP)
    noise = normal(keys, X0, (1,))[:, 0]
    for a in (t, drop):
        assert stats.kstest(a.numpy(), "uniform").pvalue > 1e-3
    table = np.corrcoef(torch.stack([t, drop, noise, (keys & 1).float()]).numpy())
    assert np.abs(table - np.eye(4)).max() < 5 / math.sqrt(len(keys))


def test_a_samples_numbers_do_not_depend_on_its_batch():
    x = normal(KEYS, X0, (3, 5))
    torch.testing.assert_close(normal(KEYS[7:9], X0, (3, 5)), x[7:9], rtol=0, atol=1e-6)
    assert torch.equal(uniform(KEYS[7:9], TIME), uniform(KEYS, TIME)[7:9])
