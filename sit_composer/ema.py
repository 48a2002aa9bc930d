"""The exponential moving average of the weights, on Composer's `EMA` algorithm.

What differs from Composer 0.32's own, and why:

- It starts from the initial weights, as SiT's does, where Composer's starts from those after the first batch.
- A checkpoint's ``state.model`` holds the training weights, always. Composer's swaps the average in before a save,
  so that whoever loads a checkpoint without the algorithm, or weights only, trains on from the average in silence.
- The average is kept by the callback `EMAWeights`: the state of algorithms is a list, which a sharded checkpoint
  stores as one pickled blob of rank 0's; the state of callbacks is a dict of tensors, each stored as what it is.
- The update is one fused call over all tensors, on whatever part of each this rank holds; nothing is gathered.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from composer.algorithms import EMA as ComposerEMA
from composer.core import Callback, Event, State
from composer.loggers import Logger
from torch import Tensor


class EMA(ComposerEMA):
    """After each batch: average ← decay · average + (1 - decay) · weights. Evaluation uses the average.

    Register ``ema.weights``, the callback that stores it, along with the algorithm.
    """

    def __init__(self, decay: float = 0.9999):
        super().__init__(half_life=None, smoothing=decay, update_interval="1ba")
        self.decay = decay
        self.weights = EMAWeights()

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.BEFORE_LOAD, Event.AFTER_LOAD, Event.BATCH_END, Event.EVAL_START, Event.EVAL_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.BEFORE_LOAD:  # the model is on its device, and sharded if it will be
            self.weights.start(state.model)
        elif event == Event.AFTER_LOAD:
            if not self.weights.loaded:  # weights came without an average, or none came: start from what is there
                self.weights.restart()
        elif event == Event.BATCH_END:
            self.weights.update(self.decay)
        else:
            self.weights.swap()

    def state_dict(self) -> dict[str, Any]:
        return {"repr": f"EMA(decay={self.decay})"}  # the tensors are EMAWeights'

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        pass


class EMAWeights(Callback):
    """The averaged weights, as Composer checkpoints them: ``params``, a tensor for each trained parameter's name."""

    def __init__(self) -> None:
        self.params: dict[str, Tensor] = {}  # name -> average, alike in place, shape and dtype to the parameter
        self.loaded = False
        self._trained: list[Tensor] = []  # the parameters that they are averages of, in the same order

    def start(self, model: torch.nn.Module) -> None:
        """Takes the model's trained parameters as they are."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._trained = [p.detach() for p in trained.values()]
        self.params = {name: p.detach().clone() for name, p in trained.items()}
        self.loaded = False

    def restart(self) -> None:
        """Sets the average to the weights."""
        torch._foreach_copy_(list(self.params.values()), self._trained)

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """average ← average + (1 - decay)(weights - average)."""
        torch._foreach_lerp_(list(self.params.values()), self._trained, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges average and weights, in place; twice is nothing, to the bit."""
        average = list(self.params.values())
        weights = [p.clone() for p in self._trained]
        torch._foreach_copy_(self._trained, average)
        torch._foreach_copy_(average, weights)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Within it, the model holds the average."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def state_dict(self) -> dict[str, Any]:
        return {"params": self.params}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        missing, unknown = self.params.keys() - state["params"].keys(), state["params"].keys() - self.params.keys()
        if missing or unknown:
            lacks, has = sorted(missing)[:3], sorted(unknown)[:3]
            raise ValueError(f"the checkpoint's EMA is of another model: it lacks {lacks} and has {has}")
        for name, average in self.params.items():
            average.copy_(state["params"][name])
        self.loaded = True
