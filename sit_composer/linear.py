"""The blocks' linear maps of the tokens, by the faster of torch's two libraries for float32 matrices on a CPU.

torch takes MKL for linear maps and oneDNN for convolutions. AMD's processors since Zen 5 compute on 512 bits at a time,
and there oneDNN is the faster by far (`tests/benchmarks/step.py` prints the limits with both).
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, linear

from sit_composer.precision import has_bfloat16

ZEN_5 = 26  # AMD's number of the family
SMALL = 20480  # numbers of a single sample, up to which torch would take a slow convolution of its own


def prefers_convolutions(cpuinfo: str) -> bool:
    """Whether the content of Linux's /proc/cpuinfo tells of a processor on which oneDNN is faster than MKL."""
    family = re.search(r"^cpu family\s*: (\d+)$", cpuinfo, re.MULTILINE)
    return family is not None and int(family[1]) >= ZEN_5 and "AuthenticAMD" in cpuinfo


CPUINFO = Path("/proc/cpuinfo")
CONVOLUTIONS = CPUINFO.exists() and prefers_convolutions(CPUINFO.read_text()) and torch.backends.mkldnn.is_available()
FUSED = has_bfloat16("cpu") and torch.backends.mkldnn.is_available()


class Linear(nn.Linear):
    """x Wᵀ + b of tokens (N, T, D). In float32 on such a CPU it is a convolution over images of T pixels in a row.

    The tokens are such an image as they are, with the channels last: neither they nor the result is copied. A kernel of
    one pixel has nothing to dilate, but with a dilation torch takes oneDNN for any number of threads.
    """

    def forward(self, x: Tensor) -> Tensor:
        is_float = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if CONVOLUTIONS and is_float and x.device.type == "cpu" and (len(x) > 1 or x.numel() > SMALL):
            pixels = x.transpose(1, 2).unsqueeze(2)  # (N, D, 1, T)
            weight = self.weight[:, None, None].permute(0, 3, 1, 2)  # (D_out, D, 1, 1), channels last
            return conv2d(pixels, weight, self.bias, dilation=(2, 1)).squeeze(2).transpose(1, 2)
        return linear(x, self.weight, self.bias)


class LinearGELU(Linear):
    """GELU(x Wᵀ + b), in its form with tanh (arXiv 1606.08415, section 2).

    In bfloat16 on a CPU torch's GELU takes as long as the product. Without gradients, oneDNN does both in one pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        alone = not torch.is_grad_enabled() and not torch.compiler.is_compiling()  # which joins them by itself
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        if FUSED and alone and dtype == torch.bfloat16 and x.device.type == "cpu":
            operands = (tensor.to(dtype) for tensor in (x, self.weight, self.bias))
            return torch.ops.mkldnn._linear_pointwise(*operands, "gelu", [], "tanh")
        return gelu(super().forward(x), approximate="tanh")
