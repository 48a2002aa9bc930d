"""Parts of the blocks: SiT's, and those of newer ones, each an option of `SiT` that is off by default.

LightningDiT (arXiv 2501.01423) has RMSNorm, SwiGLU and rotary positions. The modules carry the names of its release,
and of the SiT authors', so that their weights load strictly. In the shape comments N is the batch, T the tokens, and D
the hidden size.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from sit_composer.linear import Linear, LinearGELU


def block_norm(hidden_size: int, rms_norm: bool) -> nn.Module:
    """The norm before a modulation: layer norm, or RMSNorm with a gain (arXiv 1910.07467, equation 4)."""
    if rms_norm:
        return nn.RMSNorm(hidden_size, eps=1e-6)
    return nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)


def head_norm(width: int, rms_norm: bool) -> nn.Module:
    """The norm of a head's queries, or keys, which bounds the attention's logits (arXiv 2302.05442, section 2)."""
    return nn.RMSNorm(width, eps=1e-6) if rms_norm else nn.LayerNorm(width)


def modulation(hidden_size: int, parts: int) -> nn.Sequential:
    """The map of the condition (N, D) to shifts, scales and gates (N, parts·D)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, parts * hidden_size))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x · (1 + scale) + shift for every token of x (N, T, D), with a shift and scale (N, D) per sample."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def mlp(hidden_size: int, width: int) -> nn.Sequential:
    """A block's two-layer MLP."""
    return nn.Sequential(OrderedDict({"fc1": LinearGELU(hidden_size, width), "fc2": Linear(width, hidden_size)}))


class SwiGLU(nn.Module):
    """(SiLU(x W) · x V) W₂ (arXiv 2002.05202, equation 6), with biases, and W and V as one map.

    ``width`` is that of the MLP in whose place it stands; each map here has two thirds of it, so that both have about
    as many parameters.
    """

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        inner = 2 * width // 3
        self.w12 = Linear(hidden_size, 2 * inner)
        self.w3 = Linear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(silu(gate) * value)


class BlockModulation(nn.Module):
    """S + E: a modulation S (N, 6·D) that all blocks share, and a block's own table (arXiv 2310.00426, section 2.3)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6 * hidden_size))

    def forward(self, shared: Tensor) -> Tensor:
        return shared + self.table


class FinalLayer(nn.Module):
    """Maps each token (N, T, D) to the pixels of its patch (N, T, p²·out_channels)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, rms_norm: bool = False):
        super().__init__()
        self.norm_final = block_norm(hidden_size, rms_norm)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = modulation(hidden_size, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)  # each (N, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (N, T, p²·out_channels)
