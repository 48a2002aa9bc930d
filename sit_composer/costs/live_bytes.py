"""The bytes that a training step's passes hold at once, for any microbatch, by running a step that has no numbers.

A step is run on fake tensors, which have shapes and no content, and the bytes alive after each operator are noted. For
a batch of 2 and of 4 the operators are the same, and each moment's bytes are a line through both: so the peak of any
batch is known, to the byte, of all that operators return. What an operator needs for itself alone (such as a matrix
product's workspace) is not in it.

The operators are the CPU's. For a GPU, autocast follows CUDA's rules, and attention is one of the kernels that keep q,
k, v, the output and a number a token (flash and efficient do; torch's last resort keeps the T×T matrix, too).
"""

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sit_composer.sit import SiT
from sit_composer.transport import Transport


class Ledger(TorchDispatchMode):
    """The bytes of the storages that operators made and that are still alive, after each operator."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.live = 0
        self.history: list[int] = []
        self._seen: dict[int, weakref.ref] = {}
        for tensor in known:  # of these, views are made, and no bytes
            self._note(tensor, counted=False)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        self.history.append(self.live)
        return out

    def _note(self, tensor: Tensor, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counted else 0
        if key not in self._seen:

            def freed(_: weakref.ref) -> None:
                self.live -= size
                del self._seen[key]

            self._seen[key] = weakref.ref(storage, freed)  # torch keeps a storage's Python object as long as it lives
            self.live += size


@dataclass(frozen=True)
class Peaks:
    """Bytes that forward and backward passes hold besides the weights, as lines over the microbatch's size."""

    first: np.ndarray  # (moments, 2), of a step's first microbatch: bytes at 0 samples, and bytes a sample
    later: np.ndarray  # (moments, 2), of those after it, which find gradients there (not under FSDP2: the same)

    def bytes(self, microbatch: int, accumulated: bool) -> int:
        """The most that is held at once; accumulated: there is more than one microbatch in a step."""
        moments = np.concatenate([self.first, self.later]) if accumulated else self.first
        return int((moments @ [1, microbatch]).max())


@dataclass(frozen=True)
class Step:
    """What of a config bears on the memory of its step.

    Args:
        network: `SiT`'s arguments, as sorted pairs.
        transport: `Transport`'s, too.
        precision: of the Trainer.
        sharded: FSDP2's dtype of gathered weights, or None under DDP.
        checkpointing, offload: as in FSDPConfig.
        cuda: the rules of CUDA's autocast; else the CPU's.
    """

    network: tuple
    transport: tuple
    precision: str
    sharded: torch.dtype | None = None
    checkpointing: bool = False
    offload: bool = False
    cuda: bool = True


def low(precision: str) -> torch.dtype:
    """The compute dtype."""
    return {"fp32": torch.float32, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}[precision]


@cache
def peaks(step: Step) -> Peaks:
    """Runs the step's two kinds of microbatch on fake tensors, with 2 samples and with 4."""
    histories = {n: _histories(step, n) for n in (2, 4)}
    lines = []
    for two, four in zip(histories[2], histories[4], strict=True):
        two, four = np.array(two, dtype=np.float64), np.array(four, dtype=np.float64)  # unequal lengths would raise
        slope = (four - two) / 2
        lines.append(np.stack([two - 2 * slope, slope], axis=1))
    return Peaks(*lines)


def _histories(step: Step, samples: int) -> tuple[list[int], list[int]]:
    """The ledger of a first and of a later microbatch."""
    collecting = gc.isenabled()
    gc.disable()  # so that nothing is freed but by its last use, alike for 2 samples and 4
    try:
        with FakeTensorMode(), torch.random.fork_rng(devices=[]):
            network = SiT(**dict(step.network)).train()
            parameters = list(network.parameters())
            if step.sharded is not None:
                network.to(step.sharded)
                for module in [network, *network.blocks]:  # FSDP2 casts what goes into each unit
                    module.register_forward_pre_hook(_caster(step.sharded))
                for parameter in filter(
                    lambda p: p.requires_grad, parameters
                ):  # and takes the gradients away: their shards are counted apart
                    parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            if step.cuda and step.precision != "fp32":
                for module in network.modules():
                    if isinstance(module, nn.LayerNorm):  # CUDA's autocast computes it in float32, the CPU's does not
                        module.register_forward_pre_hook(_caster(torch.float32))
            for i, block in enumerate(network.blocks):
                if step.checkpointing:
                    block = checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
                network.blocks[i] = Offloaded(block, step.cuda) if step.offload else block
            transport = Transport(**dict(step.transport))
            histories = []
            with Ledger(parameters) as ledger:
                for _ in range(2 if step.sharded is None else 1):
                    begin = len(ledger.history)
                    _microbatch(network, transport, step, samples)
                    histories.append(ledger.history[begin:])
        return histories[0], histories[-1]
    finally:
        if collecting:
            gc.enable()


def _microbatch(network: SiT, transport: Transport, step: Step, samples: int) -> None:
    shape = (samples, network.in_channels, network.input_size, network.input_size)
    x1, x0, t, draws = torch.empty(shape), torch.empty(shape), torch.empty(samples), torch.empty(samples)
    labels = torch.zeros(samples, dtype=torch.long)
    precision = low(step.precision)
    amp = torch.autocast("cpu", precision) if precision != torch.float32 else nullcontext()
    with amp:
        xt = transport.path.interpolate(t, x0, x1)[0]
        loss = transport.loss(network(xt, t, labels, draws).float(), t, x0, x1).mean()
    loss.backward()


def _caster(dtype: torch.dtype) -> Callable:
    def cast(leaf):
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return lambda module, args: tree_map(cast, args)


class Offloaded(nn.Module):
    """A block whose saved tensors lie elsewhere until its backward pass, as Composer's activation_cpu_offload.

    Where the CPU trains, it copies them to no other place, but copies them.
    """

    def __init__(self, block: nn.Module, cuda: bool):
        super().__init__()
        self.block = block
        self.away = (lambda x: (x.shape, x.dtype)) if cuda else (lambda x: x.detach().clone())
        self.back = (lambda kept: torch.empty(kept[0], dtype=kept[1])) if cuda else (lambda kept: kept)

    def forward(self, *args: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(self.away, self.back):
            return self.block(*args)
