"""Averages of the weights over training: exponential ones, and EDM2's power functions, from which others follow.

A power function's average after t batches is ∫ p(τ) θ(τ) dτ with p(τ) = (γ + 1) / t · (τ / t)^γ up to t: its profile
stretches with training. It is named by its profile's standard deviation relative to t, EDM2's σ_rel. The best
combination of snapshots for another profile is a least-squares problem of inner products in closed form, so that an
average of any length can be made after training. Source: Karras et al. 2024, arXiv 2312.02696, section 3.1 and
appendix C. They count images, which is the same at a constant batch size.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

from sit_composer.choices import POWER


def std_of(name: str) -> float | None:
    """The relative standard deviation of an average, such as power0.05; None for an exponential one, such as 0.999."""
    return float(name.removeprefix(POWER)) if name.startswith(POWER) else None


def decay_at(name: str, batch: int) -> float:
    """An average's decay in the update after that batch, counted from 1: average ← decay · average + …

    For a power function (1 - 1/t)^(γ + 1), equation 127: 0 after the first batch, and close to 1 in the end.
    """
    std = std_of(name)
    return float(name) if std is None else float((1 - 1 / batch) ** (exponent(std) + 1))


@cache
def exponent(std: float) -> float:
    """γ of the profile with this relative standard deviation, of at most 1/√12, that of a uniform profile (γ = 0).

    With a = γ + 1, std² = a / ((a + 1)² (a + 2)), equation 123. It falls from a = 0.62 on: the largest root is the one.
    """
    return float(np.roots([1, 4, 5 - std**-2, 2]).real.max()) - 1


def inner_product(times: np.ndarray, powers: np.ndarray, others: np.ndarray, others_powers: np.ndarray) -> np.ndarray:
    """∫ p q dτ of profiles that end at these times and have these γ, float64, broadcast; equation 151."""
    a, b, last = powers + 1, others_powers + 1, np.maximum(times, others)
    later = np.where(times < others, b, a) - 1  # γ of the profile that ends later
    return a * b / (a + b - 1) * (np.minimum(times, others) / last) ** later / last


def combine(times: Sequence[int], stds: Sequence[float], std: float) -> tuple[np.ndarray, float]:
    """How to make an average of another std, at the last of the times, of averages with these times and stds.

    Returns:
        Their coefficients, float64 (N,) with the sum 1, by algorithm 3; and by how much the profile of the combination
        differs from the one asked for: the norm of the difference divided by the norm of the profile.
    """
    t, powers = np.asarray(times, np.float64), np.array([exponent(one) for one in stds])
    end, power = t.max(keepdims=True), np.array([exponent(std)])  # (1,)
    gram = inner_product(t[:, None], powers[:, None], t, powers)
    products, norm = inner_product(t, powers, end, power), inner_product(end, power, end, power)
    # Normal equations, as published; the profiles are scaled to unit norm, which conditions them ten times better.
    scale = np.diag(gram) ** -0.5
    found = scale * np.linalg.solve(gram * scale * scale[:, None], products * scale)
    found /= found.sum()
    error = norm - 2 * found @ products + found @ gram @ found
    return found, float(np.sqrt(np.maximum(error, 0) / norm).item())
