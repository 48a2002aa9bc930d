"""The precision in which the network computes: float32, or bfloat16 by autocast, on any device.

Weights, optimizer, loss and average stay float32.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import nn

from sit_composer import choices
from sit_composer.errors import UserError

Network = TypeVar("Network", bound=nn.Module)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


def has_bfloat16(device: str) -> bool:
    """Whether a device multiplies bfloat16 matrices faster than float32 ones."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve(precision: str, device: str) -> str:
    """``auto`` as ``bf16`` or ``fp32``, whichever is faster there. A UserError if the device lacks the precision."""
    if precision == "auto":
        return "bf16" if has_bfloat16(device) else "fp32"
    if device == "cuda" and precision in ("bf16", "amp_bf16") and torch.cuda.get_device_capability() < (8, 0):
        name = torch.cuda.get_device_name()
        raise UserError(f"precision: got {precision}, expected fp32 or amp_fp16: {name} has no bfloat16")
    if device != "cuda" and precision in ("amp_bf16", "amp_fp16"):
        raise UserError(f"precision: got {precision}, expected {', '.join(choices.PRECISIONS)}: there is no GPU here")
    return precision


def autocast(precision: str, device: str) -> AbstractContextManager:
    """The context in which to call the network: of ``fp32`` or ``bf16``, see `resolve`."""
    return torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()


def cast_once(network: Network, precision: str) -> Network:
    """The same network, whose matrices are in the precision of `autocast`, which then need not cast them in each call.

    It is for a network that isn't trained: float32 weights are lost. Its outputs keep their bits.
    """
    if precision == "bf16":
        for layer in network.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.to(torch.bfloat16)
    return network
