"""Memory that a loader shares with its workers, so that a batch changes hands without a copy or a new file.

torch's own way makes a file in memory for each tensor, and passes its descriptor on by a socket: about a millisecond.
"""

import itertools
import math
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NUMBERS = itertools.count()
_OPEN: "weakref.WeakValueDictionary[int, Slots]" = weakref.WeakValueDictionary()  # those of this process


class Slots:
    """``each`` places of ``size`` bytes for each worker. A place is taken until nothing uses the tensor in it."""

    def __init__(self, workers: int, each: int, size: int) -> None:
        self.number = next(_NUMBERS)  # by which a tensor that comes from a worker finds its memory here
        self.size = -(-size // 64) * 64
        self._taken = _shared(workers, each)
        # Takes memory when it is first written to. At a multiple of 32, libjpeg-turbo would write past the caches.
        self._bytes = _shared(16 + workers * each * self.size)[16:].view(workers, each, self.size)
        _OPEN[self.number] = self

    def empty(self, worker: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in one of the worker's places; if all are taken, in shared memory of its own."""
        size = math.prod(shape) * dtype.itemsize
        taken = self._taken.numpy()[worker]
        free = np.flatnonzero(taken == 0)
        if size > self.size or not len(free):
            return _shared(size).view(dtype).view(shape)
        taken[free[0]] = 1
        return self._bytes[worker, free[0], :size].view(dtype).view(shape)

    def handed(self, tensor: Tensor) -> Any:
        """What a worker sends in place of a tensor that `empty` gave it, and that arrives as a tensor."""
        place, offset = divmod(tensor.data_ptr() - self._bytes.data_ptr(), self.size)
        return _Handed(self.number, place, tensor) if 0 <= place < self._taken.numel() and offset == 0 else tensor

    def open(self, place: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor in a place, which is free again once the tensor's memory is unused."""
        array = self._bytes.numpy().reshape(-1, self.size)[place]
        weakref.finalize(array, self._free, place).atexit = False
        return torch.from_numpy(array).view(dtype).as_strided(shape, strides)

    def _free(self, place: int) -> None:
        self._taken.numpy().reshape(-1)[place] = 0


class _Handed:
    def __init__(self, slots: int, place: int, tensor: Tensor) -> None:
        self.args = slots, place, tensor.shape, tensor.stride(), tensor.dtype

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, self.args


def _open(slots: int, *args: Any) -> Tensor:
    return _OPEN[slots].open(*args)


def _shared(*shape: int) -> Tensor:
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collation does; zeros
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
