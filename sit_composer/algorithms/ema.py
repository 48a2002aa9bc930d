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
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


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
            self.weights.start(state)
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
        self.params: dict[str, Tensor] = {}  # name -> average, alike in place, sharding and dtype to the parameter
        self.loaded = False
        self.swapped = False  # whether the model holds the average, and params the weights
        self._state: State | None = None
        self._trained: list[Tensor] = []  # the parameters that they are averages of, in the same order

    def start(self, state: State) -> None:
        """Takes the model's trained parameters as they are."""
        trained = {clean_name(name): p for name, p in state.model.named_parameters() if p.requires_grad}
        self._state = state
        self._trained = list(trained.values())
        self.params = {name: p.detach().clone() for name, p in trained.items()}
        self.loaded = self.swapped = False

    @torch.no_grad()
    def _local(self) -> tuple[list[Tensor], list[Tensor]]:
        """What this rank holds of the averages, and of the parameters."""
        # Asked anew each time: FSDP2 moves the uneven shards to other storage before its first forward pass.
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
        """Exchanges average and weights, in place; twice is nothing, to the bit."""
        # FSDP2 leaves what it gathered for a forward pass without a backward one; the next would use that again.
        for module in self._state.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        average, weights = self._local()
        copies = [p.clone() for p in weights]
        torch._foreach_copy_(weights, average)
        torch._foreach_copy_(average, copies)
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
        # Every rank takes part in gathering; rank 0 writes.
        return {"params": {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in self.params.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        missing, unknown = self.params.keys() - state["params"].keys(), state["params"].keys() - self.params.keys()
        if missing or unknown:
            lacks, has = sorted(missing)[:3], sorted(unknown)[:3]
            raise ValueError(f"the checkpoint's EMA is of another model: it lacks {lacks} and has {has}")
        for name, average in self.params.items():
            stored = state["params"][name]
            if isinstance(average, DTensor) and not isinstance(stored, DTensor):  # each rank has read all of it
                stored = distribute_tensor(
                    stored.to(average.device), average.device_mesh, average.placements, src_data_rank=None
                )
            average.copy_(stored)
        self.loaded = True


def clean_name(name: str) -> str:
    """A parameter's name without what activation checkpointing puts into it."""
    return name.replace("_checkpoint_wrapped_module.", "")


def _shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
