"""The exponential moving average in closed form, to compare with."""

import torch
from composer.core import Callback

DECAY = 0.9


class History(Callback):
    """The trained parameters before the first batch, and after each."""

    def __init__(self):
        self.weights = []

    def _note(self, state, logger):
        model = state.model.module if hasattr(state.model, "module") else state.model
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})

    fit_start = batch_end = _note


def closed_form(history: History) -> dict[str, torch.Tensor]:
    """d^n w_0 + (1 - d) Σ d^(n-i) w_i, in float64."""
    n = len(history.weights) - 1
    factors = [DECAY**n, *((1 - DECAY) * DECAY ** (n - i) for i in range(1, n + 1))]
    return {
        k: sum(f * w[k].double() for f, w in zip(factors, history.weights, strict=True)) for k in history.weights[0]
    }
