"""The precision in which the network computes: float32, or bfloat16 by autocast, on any device.

Weights, optimizer, loss and average stay float32.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import nn

from sit_composer.errors import UserError

Network = TypeVar("Network", bound=nn.Module)
# ``amp_bf16`` is ``bf16`` that needs a GPU; ``amp_fp16`` is Composer's, with its loss scaling.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


def has_bfloat16(device: str) -> bool:
    """Whether a device, cpu or cuda, multiplies bfloat16 matrices faster than float32 ones."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve(precision: str, device: str) -> str:
    """``auto`` as ``bf16`` where the device has it, else ``fp32``. Raises UserError if the device lacks a precision."""
    if precision == "auto":
        return "bf16" if has_bfloat16(device) else "fp32"
    if device != "cuda" and precision.startswith("amp"):
        raise UserError(f"precision: got {precision}, expected auto, bf16 or fp32: there is no GPU here")
    if device == "cuda" and precision.endswith("bf16") and not has_bfloat16(device):
        gpu = torch.cuda.get_device_name()
        raise UserError(f"precision: got {precision}, expected auto, amp_fp16 or fp32: {gpu} has no bfloat16")
    return precision


def for_gpu(precision: str) -> bool:
    """Whether a run of that precision is one for GPUs, wherever it is planned."""
    return precision.startswith("amp") or torch.cuda.is_available()


def autocast(precision: str, device: str) -> AbstractContextManager:
    """The context in which to call the network, for a precision that `resolve` returned."""
    in_float32 = _tf32 if device == "cuda" else nullcontext
    return in_float32() if precision == "fp32" else torch.autocast(device, DTYPES[precision])


@contextmanager
def _tf32() -> Iterator[None]:
    """Lets float32 products round to TF32, as Composer does in training, and the authors' scripts do."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def cast_once(network: Network, precision: str) -> Network:
    """The same network, whose matrices are in the precision of `autocast`, which then need not cast them in each call.

    It is for a network that isn't trained: float32 weights are lost. Its outputs keep their bits.
    """
    if precision == "bf16":
        for layer in network.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.to(torch.bfloat16)
    return network
