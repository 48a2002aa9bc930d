"""The bytes that a training step's passes hold, for any microbatch, from a step on tensors without content.

The bytes alive after each operator are recorded for batches of 2 and of 4; at each moment, they are on a line. So the
peak of any batch is known, to the byte, for all that operators return, and for one of their workspaces. For a GPU,
autocast follows CUDA's rules, and attention keeps q, k, v, the output and a number per token, as its fused kernels do.
"""

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention, smooth_l1_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sit_composer.algorithms.projector import build_projector, tokens_after
from sit_composer.config.schema import AlignmentConfig
from sit_composer.freezing import freeze
from sit_composer.precision import DTYPES
from sit_composer.sit import SiT
from sit_composer.transport import Transport


class Ledger(TorchDispatchMode):
    """After each operator, the bytes of the storages that operators made and that are still alive."""

    def __init__(self, known: list[Tensor], onednn: bool = False):
        super().__init__()
        self.live, self.onednn = 0, onednn
        self.history: list[int] = []
        self._seen: dict[int, weakref.ref] = {}
        for tensor in known:  # views of these take no bytes
            self._note(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            self._note(storage, storage.nbytes())
        # Before oneDNN returns a weight's gradient, there are two more of it; see `sit_composer.linear`.
        copies = 2 * args[2].nbytes if self.onednn and func is torch.ops.aten.convolution_backward.default else 0
        self.history.append(self.live + copies)
        return out

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self._seen:

            def freed(_: weakref.ref) -> None:
                self.live -= size
                del self._seen[key]

            self._seen[key] = weakref.ref(storage, freed)  # torch keeps a storage's Python object as long as it lives
            self.live += size


@dataclass(frozen=True)
class Step:
    """The part of a config that decides the memory of its passes."""

    network: tuple  # `SiT`'s arguments, as sorted pairs
    transport: tuple  # `Transport`'s arguments, as sorted pairs
    precision: str  # of the Trainer
    sharded: torch.dtype | None = None  # FSDP2's dtype of gathered weights; None for DDP
    checkpointing: bool = False  # as in FSDPConfig
    offload: bool = False  # as in FSDPConfig
    alignment: tuple | None = None  # `AlignmentConfig`'s pairs
    frozen: tuple[str, ...] = ()  # patterns of the weights that are not trained
    cuda: bool = True  # autocast follows CUDA's rules; else the CPU's


def peak(step: Step, microbatch: int, accumulated: bool) -> int:
    """The most bytes that the passes hold at once besides the weights."""
    return int((np.concatenate(_lines(step, accumulated)) @ [1, microbatch]).max())


@cache
def _lines(step: Step, accumulated: bool) -> list[np.ndarray]:
    """For a first and, if accumulated, a later microbatch, (moments, 2): bytes at 0 samples, and bytes per sample."""
    # Whole numbers below 2**53, so that the halves are exact. Unequal lengths raise.
    both = _histories(step, 2, accumulated), _histories(step, 4, accumulated)
    pairs = [np.array(pair, dtype=np.float64) for pair in zip(*both, strict=True)]
    return [np.stack([2 * two - four, (four - two) / 2], axis=1) for two, four in pairs]


def _histories(step: Step, samples: int, accumulated: bool) -> list[list[int]]:
    """The ledger of a first and, if accumulated, of a later microbatch, which finds gradients."""
    collecting = gc.isenabled()
    gc.disable()  # so that only a last use frees a tensor, alike for 2 samples and 4
    try:
        with FakeTensorMode(), torch.random.fork_rng(devices=[]):
            network, transport = _network(step), Transport(**dict(step.transport))
            alignment = None if step.alignment is None else AlignmentConfig(**dict(step.alignment))
            projector = None if alignment is None else build_projector(alignment, network.hidden_size)
            microbatch = partial(_microbatch, network, transport, step.precision, samples, alignment, projector)
            known = [] if projector is None else [*projector.parameters()]
            with Ledger([*network.parameters(), *network.buffers(), *known], not step.cuda) as ledger:
                microbatch()
                first = len(ledger.history)
                if accumulated and step.sharded is None:
                    microbatch()
        return [part for part in (ledger.history[:first], ledger.history[first:]) if part]
    finally:
        if collecting:
            gc.enable()


def _network(step: Step) -> SiT:
    """The network as the Trainer would wrap it."""
    network = SiT(**dict(step.network)).train()
    freeze(network, step.frozen)
    if step.sharded is not None:
        _cast(network, step.sharded)
        for module in [network, *network.blocks]:  # FSDP2 casts the inputs of each unit
            module.register_forward_pre_hook(_caster(step.sharded))
        for parameter in network.parameters():  # FSDP2 takes the gradients away: their shards are counted apart
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    if step.cuda and step.precision != "fp32":
        for module in network.modules():
            if isinstance(module, nn.LayerNorm):  # CUDA's autocast computes it in float32, the CPU's does not
                module.register_forward_pre_hook(_caster(torch.float32))
    for i, block in enumerate(network.blocks):
        block.attn.attend = scaled_dot_product_attention  # as on a GPU; a CPU in bfloat16 holds a little less
        if step.checkpointing:
            network.blocks[i] = block = checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        if step.offload:
            block.forward = _offloaded(block.forward, step.cuda)
    return network


def _microbatch(
    network: SiT,
    transport: Transport,
    precision: str,
    samples: int,
    alignment: AlignmentConfig | None,
    projector: nn.Module | None,
) -> None:
    """Forward and backward, as the Trainer does them."""
    shape = (samples, network.in_channels, network.input_size, network.input_size)
    x1, x0, t, draws = torch.empty(shape), torch.empty(shape), torch.empty(samples), torch.empty(samples)
    labels = torch.zeros(samples, dtype=torch.long)
    with nullcontext() if precision == "fp32" else torch.autocast("cpu", DTYPES[precision]):
        xt = transport.path.interpolate(t, x0, x1)[0]
        if alignment is not None and alignment.name == "sra":
            with torch.no_grad():
                target = network(xt, t, labels, draws, alignment.teacher_block).float()
        with tokens_after(network, alignment.block) if alignment is not None else nullcontext() as tokens:
            out = network(xt, t, labels, draws)
        loss = transport.loss(out.float(), t, x0, x1).mean()
        if alignment is not None:
            projected = projector(tokens[0]).float()
            if alignment.name == "sra":
                loss = loss + smooth_l1_loss(projected, target, reduction="none").mean()
            else:  # the features, from the shards
                loss = loss - cosine_similarity(projected, torch.empty_like(projected), dim=-1).mean()
    loss.backward()


def _cast(network: SiT, dtype: torch.dtype) -> None:
    """Casts the parameters, as ``network.to(dtype)`` would; which torch 2.14 can't do to tensors without content."""
    for module in network.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.detach().to(dtype), p.requires_grad))


def _caster(dtype: torch.dtype) -> Callable:
    return lambda _, args: tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, args)


def _offloaded(forward: Callable[..., Tensor], cuda: bool) -> Callable[..., Tensor]:
    """A block's forward pass, whose saved tensors are offloaded; if the CPU trains, they are copies there."""
    away = (lambda x: (x.shape, x.dtype)) if cuda else (lambda x: x.detach().clone())
    back = (lambda kept: torch.empty(kept[0], dtype=kept[1])) if cuda else (lambda kept: kept)

    def run(*args: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(away, back):
            return forward(*args)

    return run
