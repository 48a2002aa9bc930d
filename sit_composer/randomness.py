"""Training's random numbers: a function of seed, epoch and sample alone.

A sample's key is a hash of the three, and its random numbers are hashes of the key and a counter. No generator's state
can be lost: a sample gets the same noise on any rank, in any microbatch, and after any interruption. The hash is
splitmix64 (Steele, Lea & Flood, OOPSLA 2014), whose output passes BigCrush.
"""

import math

import torch
from torch import Tensor

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
# The purposes of the numbers. Each has 2**40 of a key's counters.
X0, TIME, DROP, POSTERIOR, TEACHER_TIME = range(5)
PROJECTOR = -1  # for `sample_key` with a seed, where others have an epoch


def sample_key(*words: int) -> int:
    """A 64-bit hash of whole numbers, as a signed integer, which an int64 tensor can hold."""
    x = 0
    for word in words:
        x = (x + word + GOLDEN) & MASK
        for shift, factor in MIX:
            x = ((x ^ (x >> shift)) * factor) & MASK
        x ^= x >> 31
    return _signed(x)


def sample_keys(seed: int, epoch: int, indices: Tensor) -> Tensor:
    """`sample_key` of seed, epoch and each of the int64 indices (N,): int64 (N,)."""
    return _mix(indices + _signed((sample_key(seed, epoch) + GOLDEN) & MASK))


def normal(keys: Tensor, purpose: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, float32 (N, *shape), for int64 keys (N,), by the Box–Muller transform."""
    size = math.prod(shape)
    bits = _bits(keys, purpose, (size + 1) // 2)  # (N, size / 2): each gives two numbers
    radius = (-2 * ((_shifted(bits, 32) + 1).float() * 2.0**-32).log()).sqrt()
    angle = (bits & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32)
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return both[:, :size].reshape(-1, *shape)


def uniform(keys: Tensor, purpose: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 (N,), for int64 keys (N,)."""
    return _shifted(_bits(keys, purpose, 1)[:, 0], 40).float() * 2.0**-24


def _bits(keys: Tensor, purpose: int, count: int) -> Tensor:
    """64 random bits, int64 (N, count). int64 arithmetic wraps around, as the hash needs."""
    counter = torch.arange(1, count + 1, device=keys.device) + (purpose << 40)
    return _mix(keys[:, None] + counter * _signed(GOLDEN))


def _mix(x: Tensor) -> Tensor:
    """splitmix64's output of int64 states."""
    for shift, factor in MIX:
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)  # clears the sign bits, which torch's shift copies


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
