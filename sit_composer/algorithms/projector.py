"""What alignment has of modules: the projector, and how a block's tokens are had. Light, as the costs use it too."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from sit_composer import randomness
from sit_composer.config.schema import AlignmentConfig
from sit_composer.sit import SiT

HIDDEN = 2048  # the width of REPA's projector
FEATURES = 768  # the width of a vision transformer's features, for estimates: DINOv2-B's


def build_projector(alignment: AlignmentConfig, width: int, features: int = FEATURES) -> nn.Module:
    """The projector of a network's tokens of that width: SRA's is the head of two maps that its authors released. To a
    teacher's features, it is REPA's of three maps, or iREPA's convolution."""
    if alignment.name == "sra":
        return mlp(width, 2 * width, width)
    return mlp(width, HIDDEN, HIDDEN, features) if alignment.projector == "mlp" else Convolution(width, features)


class Convolution(nn.Module):
    """A convolution of 3×3 tokens, with zeros around the image."""

    def __init__(self, width: int, features: int):
        super().__init__()
        self.conv = nn.Conv2d(width, features, kernel_size=3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        side = round(tokens.shape[1] ** 0.5)
        maps = tokens.transpose(1, 2).unflatten(2, (side, side))  # (N, D, side, side)
        return self.conv(maps).flatten(2).transpose(1, 2)  # (N, T, D')


def mlp(*widths: int) -> nn.Sequential:
    """Linear maps from width to width, with SiLU between them."""
    return nn.Sequential(*[layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.SiLU())][:-1])


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A projector whose weights the seed alone determines; torch's own generator stays as it was.

    Linear maps get Xavier's uniform numbers and biases of 0, a convolution torch's usual ones, as in the authors' code.
    """
    with torch.random.fork_rng(devices=[]):
        projector = make()
    generator = torch.Generator().manual_seed(randomness.sample_key(seed, randomness.PROJECTOR))
    for layer in projector.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)
            bound = layer.weight[0].numel() ** -0.5
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return projector


@contextmanager
def tokens_after(network: SiT, block: int) -> Iterator[list[Tensor]]:
    """Within it, each forward pass of the network appends what its block of that number, from 1, gives: (N, T, D).

    The hook lies around activation checkpointing's wrapper, so that a recomputation appends nothing, and outside of a
    compiled block's graph. Tokens of the class are left out.
    """
    found: list[Tensor] = []
    hook = network.blocks[block - 1].register_forward_hook(lambda _, args, out: found.append(out))
    try:
        yield found
    finally:
        hook.remove()
        found[:] = [tokens[:, -network.num_patches :] for tokens in found]
