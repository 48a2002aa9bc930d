"""The exponential moving average of the weights, on Composer's `EMA` algorithm.

How it differs from Composer 0.32's own:
- It starts from the initial weights, as SiT's does; Composer's starts from those after the first batch.
- A checkpoint's ``state.model`` always holds the training weights; Composer's swaps the average in before a save.
- The callback `EMAWeights` keeps the average: a sharded checkpoint stores callbacks' state tensor by tensor, but
  algorithms' as one pickled blob of rank 0's.
- The update is one fused call over the part of each tensor that this rank holds; nothing is gathered.
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


class EMA(ComposerEMA):
    """After each batch: average ← decay · average + (1 - decay) · weights, kept by the callback ``ema.weights``."""

    def __init__(self, decay: float = 0.9999):
        super().__init__(half_life=None, smoothing=decay, update_interval="1ba")
        self.decay = decay
        self.weights = EMAWeights()

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.BEFORE_LOAD, Event.AFTER_LOAD, Event.BATCH_END, Event.EVAL_START, Event.EVAL_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.BEFORE_LOAD:  # the model is on its device, and sharded if it will be
            self.weights.start(state)
        elif event == Event.AFTER_LOAD:
            if not self.weights.loaded:  # no checkpoint, or one without an average: start from the weights
                self.weights.restart()
        elif event == Event.BATCH_END:
            self.weights.update(self.decay)
        else:
            self.weights.swap()

    def state_dict(self) -> dict[str, Any]:
        return {"repr": f"EMA(decay={self.decay})"}  # EMAWeights has the tensors

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        pass


class EMAWeights(Callback):
    """The averaged weights, as Composer checkpoints them: ``params``, a tensor by each trained parameter's name."""

    def __init__(self) -> None:
        self.params: dict[str, Tensor] = {}  # name -> average, with the parameter's sharding and dtype
        self.loaded = False
        self.swapped = False  # whether the model holds the average, and params the weights
        self._state: State | None = None
        self._trained: list[Tensor] = []  # the parameters, in the order of params

    def start(self, state: State) -> None:
        """Starts from the network's trained parameters as they are."""
        named = [(name, p) for name, p in state.model.named_parameters() if p.requires_grad and _is_networks(name)]
        self._state = state
        self._trained = [p for _, p in named]
        # Activation checkpointing inserts a module, which is no part of a parameter's name.
        self.params = {name.replace("_checkpoint_wrapped_module.", ""): p.detach().clone() for name, p in named}
        self.loaded = self.swapped = False

    def _local(self) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's part of the averages, and of the parameters."""
        # Not kept: FSDP2 moves uneven shards to other storage before its first forward pass.
        return [_shard(average) for average in self.params.values()], [_shard(p) for p in self._trained]

    @torch.no_grad()
    def restart(self) -> None:
        """Sets the average to the weights."""
        torch._foreach_copy_(*self._local())

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """average ← average + (1 - decay)(weights - average)."""
        average, weights = self._local()
        torch._foreach_lerp_(average, weights, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges average and weights in place, one by one; a second call restores every bit."""
        # After a forward pass with no backward pass, FSDP2 keeps the gathered weights, and would use them again.
        for module in self._state.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for average, weight in zip(*self._local(), strict=True):
            copy = weight.clone()  # of one at a time; storages stay, which FSDP2 and compiled graphs hold on to
            weight.copy_(average)
            average.copy_(copy)
        self.swapped = not self.swapped

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Within it, the model holds the average."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def state_dict(self) -> dict[str, Any]:
        if self._state is None or self._state.fsdp_sharded_state_dict_enabled:
            return {"params": self.params}  # each rank stores its shards
        # All ranks gather; rank 0 writes.
        return {"params": {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in self.params.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        theirs, ours = state["params"].keys(), self.params.keys()
        if theirs != ours:
            lacks, has = sorted(ours - theirs)[:3], sorted(theirs - ours)[:3]
            raise ValueError(f"the checkpoint's EMA is of another model: it lacks {lacks} and has {has}")
        for name, average in self.params.items():
            stored = state["params"][name]
            if isinstance(average, DTensor) and not isinstance(stored, DTensor):  # each rank has read all of it
                where = average.device_mesh, average.placements
                stored = distribute_tensor(stored.to(average.device), *where, src_data_rank=None)
            average.copy_(stored)
        self.loaded = True


def _is_networks(name: str) -> bool:
    return not name.startswith("projector.")  # which only training has, see `algorithms.alignment`


def _shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
