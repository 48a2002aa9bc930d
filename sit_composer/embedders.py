"""Times, labels, patches and positions as vectors, as in the authors' release; and positions as rotations."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class TimestepEmbedder(nn.Module):
    """Embeds times (N,) as vectors (N, D): sinusoids, then a two-layer MLP."""

    frequency_size = 256

    def __init__(self, hidden_size: int):
        super().__init__()
        first, second = nn.Linear(self.frequency_size, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    @staticmethod
    def sinusoids(t: Tensor, size: int, max_period: float = 10000.0) -> Tensor:
        """cos, then sin, of t (N,) at ``size / 2`` frequencies from 1 down to 1 / max_period; float32 (N, size)."""
        half = size // 2
        exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[:, None] * torch.exp(-math.log(max_period) * exponent)  # (N, size/2)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.sinusoids(t, self.frequency_size).to(self.mlp[0].weight.dtype))  # (N, D)


class LabelEmbedder(nn.Module):
    """Embeds labels (N,) as vectors (N, D). Training replaces some by the null class, whose label is num_classes."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, labels: Tensor, train: bool, draws: Tensor | None = None) -> Tensor:
        if train and self.dropout_prob > 0:
            if draws is None:
                draws = torch.rand(labels.shape[0], device=labels.device)  # (N,)
            labels = torch.where(draws < self.dropout_prob, self.num_classes, labels)
        return self.embedding_table(labels)  # (N, D)


class PatchEmbed(nn.Module):
    """Maps each patch of images (N, C, H, W) to a token (N, T, D)."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous, as each operator of the blocks would otherwise stride over the tokens, and each norm copy them.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


def sincos_positions(dim: int, grid: int, spacing: float = 1.0) -> Tensor:
    """Sinusoids of the positions in a grid × grid image: (1, grid², dim), half for the column, half for the row.

    Positions are multiples of the spacing.
    """

    def one_axis(position: Tensor) -> Tensor:  # (grid²,) -> (grid², dim/2)
        omega = torch.arange(dim // 4, dtype=torch.float64) / (dim / 4)
        angles = position[:, None] / 10000**omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, column = torch.meshgrid(*[torch.arange(grid, dtype=torch.float64) * spacing] * 2, indexing="ij")
    return torch.cat([one_axis(column.flatten()), one_axis(row.flatten())], dim=1).float().unsqueeze(0)


class Rotations(nn.Module):
    """The rotations of queries and keys by their tokens' positions (arXiv 2104.09864, equation 15), in a square grid.

    The first half of a head's channels turns with the row, the second with the column, in pairs of neighbours.
    Positions are multiples of the spacing.
    """

    def __init__(self, head_width: int, grid: int, spacing: float = 1.0):
        super().__init__()
        axis = head_width // 2
        frequencies = 1 / 10000 ** (torch.arange(0, axis, 2).float() / axis)
        angles = spacing * torch.arange(grid)[:, None] * frequencies.repeat_interleave(2)  # (grid, axis)
        row, column = angles[:, None].expand(-1, grid, -1), angles[None].expand(grid, -1, -1)
        angles = torch.cat([row, column], dim=-1).flatten(0, 1)  # (T, head_width)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, before: int = 0) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each (before + T, head_width), for ``before`` tokens that don't turn and the grid's."""
        if before == 0:
            return self.freqs_cos, self.freqs_sin
        rows = (0, 0, before, 0)
        return pad(self.freqs_cos, rows, value=1.0), pad(self.freqs_sin, rows)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs of x's channels (N, heads, T, D/heads), of x's dtype (arXiv 2104.09864, equation 34)."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)
