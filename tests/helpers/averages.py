"""Averages in closed form, to compare with."""

import torch
from composer.core import Callback

from sit_composer.averages import exponent

DECAY = 0.9


class History(Callback):
    """The trained parameters before the first batch, and after each."""

    def __init__(self):
        self.weights = []

    def _note(self, state, logger):
        model = state.model.module if hasattr(state.model, "module") else state.model
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})

    fit_start = batch_end = _note


def closed_form(history: History, decay: float = DECAY) -> dict[str, torch.Tensor]:
    """d^n w_0 + (1 - d) Σ d^(n-i) w_i, in float64."""
    n = len(history.weights) - 1
    return weighted(history, [decay**n, *((1 - decay) * decay ** (n - i) for i in range(1, n + 1))])


def power_function(history: History, std: float) -> dict[str, torch.Tensor]:
    """Σ ((i/n)^a - ((i-1)/n)^a) w_i with a = γ + 1, in float64: the profile's integrals over the batches."""
    n, a = len(history.weights) - 1, exponent(std) + 1
    return weighted(history, [0.0, *((i / n) ** a - ((i - 1) / n) ** a for i in range(1, n + 1))])


def weighted(history: History, factors: list[float]) -> dict[str, torch.Tensor]:
    return {
        k: sum(f * w[k].double() for f, w in zip(factors, history.weights, strict=True)) for k in history.weights[0]
    }
