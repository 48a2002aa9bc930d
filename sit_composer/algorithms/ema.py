"""The exponential moving average of the weights, on Composer's `EMA` algorithm.

How it differs from Composer 0.32's own:
- It starts from the initial weights, as SiT's does; Composer's starts from those after the first batch.
- A checkpoint's ``state.model`` always holds the training weights; Composer's swaps the average in before a save.
- The callback `EMAWeights` keeps the average: a sharded checkpoint stores callbacks' state tensor by tensor, but
  algorithms' as one pickled blob of rank 0's.
- The update is one fused call over the part of each tensor that this rank holds; nothing is gathered.
- There may be several averages, and each may be exponential or a power function's; see `averages`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from composer.algorithms import EMA as ComposerEMA
from composer.core import Callback, Event, State
from composer.loggers import Logger
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from sit_composer.averages import decay_at
from sit_composer.choices import TRAINING_ONLY
from sit_composer.config.schema import is_plain


class EMA(ComposerEMA):
    """After each batch: average ← decay · average + (1 - decay) · weights, kept by the callback ``ema.weights``.

    Each of the averages is a decay such as 0.999, or a name such as "power0.05"; the first is evaluated and sampled.
    """

    def __init__(self, *averages: float | str):
        super().__init__(half_life=None, smoothing=0.0, update_interval="1ba")  # Composer's own, which isn't used
        self.names = [str(average) for average in averages or (0.9999,)]
        self.weights = EMAWeights(*self.names)

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.BEFORE_LOAD, Event.AFTER_LOAD, Event.BATCH_END, Event.EVAL_START, Event.EVAL_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.BEFORE_LOAD:  # the model is on its device, and sharded if it will be
            self.weights.start(state)
        elif event == Event.AFTER_LOAD:
            if not self.weights.loaded:  # no checkpoint, or one without an average: start from the weights
                self.weights.restart()
        elif event == Event.BATCH_END:
            batch = int(state.timestamp.batch)  # which counts the one that has just ended
            self.weights.update(*(decay_at(name, batch) for name in self.names))
        else:
            self.weights.swap()

    def state_dict(self) -> dict[str, Any]:
        return {"repr": f"EMA(decay={', '.join(self.names)})"}  # EMAWeights has the tensors

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        pass


class EMAWeights(Callback):
    """The averaged weights, as Composer checkpoints them: a tensor by each trained parameter's name.

    In a checkpoint they are ``params`` if there is one exponential average, else ``averages``, by their names.
    """

    def __init__(self, *names: str) -> None:
        self.averages: dict[str, dict[str, Tensor]] = {name: {} for name in names or ("0.9999",)}
        self.loaded = False
        self.swapped = False  # whether the model holds the first average, and params the weights
        self.keep: Tensor | None = None  # on the device: 1, or 0 for a batch that is skipped; None: each one counts
        self._state: State | None = None
        self._trained: list[Tensor] = []  # the parameters, in the order of params

    @property
    def params(self) -> dict[str, Tensor]:
        """The first average, which is evaluated and sampled: with each parameter's sharding and dtype."""
        return next(iter(self.averages.values()))

    def start(self, state: State) -> None:
        """Starts from the network's trained parameters as they are."""
        named = [
            (name, p)
            for name, p in state.model.named_parameters()
            if p.requires_grad and not name.startswith(TRAINING_ONLY)
        ]
        self._state = state
        self._trained = [p for _, p in named]
        # Activation checkpointing inserts a module, which is no part of a parameter's name.
        named = [(name.replace("_checkpoint_wrapped_module.", ""), p.detach()) for name, p in named]
        self.averages = {average: {name: p.clone() for name, p in named} for average in self.averages}
        self.loaded = self.swapped = False

    def _local(self) -> tuple[list[list[Tensor]], list[Tensor]]:
        """This rank's part of each average, and of the parameters."""
        # Not kept: FSDP2 moves uneven shards to other storage before its first forward pass.
        averages = [[local_part(p) for p in params.values()] for params in self.averages.values()]
        return averages, [local_part(p) for p in self._trained]

    @torch.no_grad()
    def restart(self) -> None:
        """Sets each average to the weights."""
        averages, weights = self._local()
        for average in averages:
            torch._foreach_copy_(average, weights)

    @torch.no_grad()
    def update(self, *decays: float) -> None:
        """average ← average + (1 - decay)(weights - average), with a decay for each average."""
        averages, weights = self._local()
        for average, decay in zip(averages, decays, strict=True):
            part = 1 - decay
            torch._foreach_lerp_(average, weights, part if self.keep is None else [self.keep * part] * len(average))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the first average and the weights in place, one by one; a second call restores every bit."""
        # After a forward pass with no backward pass, FSDP2 keeps the gathered weights, and would use them again.
        for module in self._state.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        (first, *_), weights = self._local()
        for average, weight in zip(first, weights, strict=True):
            copy = weight.clone()  # of one at a time; storages stay, which FSDP2 and compiled graphs hold on to
            weight.copy_(average)
            average.copy_(copy)
        self.swapped = not self.swapped

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Within it, the model holds the first average."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def state_dict(self) -> dict[str, Any]:
        averages = self.averages
        if self._state is not None and not self._state.fsdp_sharded_state_dict_enabled:
            averages = {name: _gathered(params) for name, params in averages.items()}  # by all ranks; rank 0 writes
        return {"params": next(iter(averages.values()))} if is_plain(list(averages)) else {"averages": averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        alike = is_plain(list(self.averages)) and "params" in state  # whatever the decay was
        stored = dict.fromkeys(self.averages, state["params"]) if alike else state.get("averages", {})
        if stored.keys() != self.averages.keys():
            got = ", ".join(stored) or "one exponential average"
            raise ValueError(f"ema: got {', '.join(self.averages)}, expected the checkpoint's averages: {got}")
        for name, average in self.averages.items():
            _load(average, stored[name])
        self.loaded = True


def _gathered(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in params.items()}


def _load(params: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    """Fills an average with a checkpoint's; ValueError if it is of another model."""
    theirs, ours = stored.keys(), params.keys()
    if theirs != ours:
        lacks, has = sorted(ours - theirs)[:3], sorted(theirs - ours)[:3]
        raise ValueError(f"the checkpoint's EMA is of another model: it lacks {lacks} and has {has}")
    for name, average in params.items():
        value = stored[name]
        if isinstance(average, DTensor) and not isinstance(value, DTensor):  # each rank has read all of it
            where = average.device_mesh, average.placements
            value = distribute_tensor(value.to(average.device), *where, src_data_rank=None)
        average.copy_(value)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
