"""SiT, the network of "Scalable Interpolant Transformers" (arXiv 2401.08740): a DiT whose time runs over [0, 1].

The modules carry the names of the authors' release, so that its checkpoints load strictly and ours load there.
`python -m sit_composer.sit` prints the table of sizes.

In the shape comments N is the batch, C the channels, H = W the input's side, p the patch's side, T = (H/p)² the
tokens, and D the hidden size.
"""

import importlib
import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sit_composer.choices import VARIANTS, check_sizes, variant


def build_sit(name: str, **overrides) -> "SiT":
    """Builds a variant by name; further arguments of `SiT` override the variant's.

    >>> build_sit("SiT-XL/2", input_size=64)
    """
    return SiT(**{**variant(name), **overrides})


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x · (1 + scale) + shift for every token of x (N, T, D), with a shift and scale (N, D) per sample."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


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


class Attention(nn.Module):
    """Self-attention of the tokens (N, T, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, d = x.shape
        # Cut first, then shaped: so the gradients of q, k and v are joined in one pass, not stacked and permuted.
        parts = (part.view(n, tokens, self.num_heads, -1) for part in self.qkv(x).chunk(3, dim=-1))
        q, k, v = (part.transpose(1, 2) for part in parts)  # each (N, heads, T, D/heads)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, d))


class SiTBlock(nn.Module):
    """A transformer block whose layer norms and gates depend on the condition (adaLN-Zero, arXiv 2212.09748)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        width = int(hidden_size * mlp_ratio)
        layers = {"fc1": nn.Linear(hidden_size, width), "act": nn.GELU("tanh"), "fc2": nn.Linear(width, hidden_size)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)  # each (N, D)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))  # (N, T, D)
        x = x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))  # (N, T, D)
        return x


class FinalLayer(nn.Module):
    """Maps each token (N, T, D) to the pixels of its patch (N, T, p²·out_channels)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)  # each (N, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (N, T, p²·out_channels)


class SiT(nn.Module):
    """The transformer. ``forward(x, t, y)`` returns the predicted field, of x's shape.

    Args:
        input_size: the side of the latents (or images), in latent pixels.
        patch_size: the side of a token's patch; divides input_size.
        in_channels: channels of the latents.
        hidden_size: width D; a multiple of num_heads and of 4.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of a block's MLP, divided by D.
        class_dropout_prob: the probability that training replaces a label by the null class. With 0, there is no null
            class, and no guidance.
        num_classes: number of labels; the null class, if any, is label num_classes.
        learn_sigma: keep the release's unused second half of the output channels. The released weights have it; it is
            computed and dropped, without effect on the loss, and a new network may omit it.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ):
        super().__init__()
        check_sizes(hidden_size, num_heads, input_size, patch_size)
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.hidden_size = hidden_size
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.learn_sigma = learn_sigma
        self.out_channels = in_channels * 2 if learn_sigma else in_channels

        self.num_patches = (input_size // patch_size) ** 2
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # A frozen parameter, not a buffer: the release has it in its state dict and in named_parameters().
        self.pos_embed = nn.Parameter(torch.empty(1, self.num_patches, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(SiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str, weights: str = "ema") -> "SiT":
        """The trained network of an exported folder, a checkpoint or a model on the Hugging Face Hub, in eval mode.

        Args:
            folder_or_hub_id: what `checkpoint.load.load_checkpoint` takes, or a Hub name such as "owner/name".
            weights: "ema" or "training"; raises a UserError if there are no such weights.
        """
        checkpoints = importlib.import_module("sit_composer.checkpoint.load")  # which itself imports this module
        checkpoint = checkpoints.load_checkpoint(checkpoints.fetch(folder_or_hub_id), weights)
        network = cls(**checkpoint.record.model)
        network.load_state_dict(checkpoint.weights)
        return network.eval()

    def initialize_weights(self) -> None:
        """The release's initialization: every block starts as the identity, and the output is zero (adaLN-Zero)."""
        for layer in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.pos_embed.data.copy_(sincos_positions(self.hidden_size, self.input_size // self.patch_size))
        projection = self.x_embedder.proj  # a convolution, initialized as a linear layer
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        nn.init.zeros_(projection.bias)
        for embedder in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(embedder.weight, std=0.02)
        modulations = [block.adaLN_modulation[-1] for block in [*self.blocks, self.final_layer]]
        for layer in [*modulations, self.final_layer.linear]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def null_label(self) -> int | None:
        """The null class's label, or None if the network was trained without one."""
        return self.num_classes if self.class_dropout_prob > 0 else None

    def unpatchify(self, x: Tensor) -> Tensor:
        """Tokens (N, T, p²·C) to images (N, C, H, W)."""
        grid, p, c = self.input_size // self.patch_size, self.patch_size, self.out_channels
        x = x.reshape(-1, grid, grid, p, p, c)  # (N, H/p, W/p, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, c, grid * p, grid * p)  # (N, C, H, W)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, draws: Tensor | None = None) -> Tensor:
        """The field at x (N, C, H, W) and times t (N,), for labels y (N,): (N, C, H, W).

        A solver that calls this often may embed its labels once: y is then what y_embedder gives, (N, D), as it is.
        In training, a label whose draw, of draws (N,) in [0, 1), is below class_dropout_prob becomes the null class.
        None uses torch's own generator.
        """
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + (y if y.is_floating_point() else self.y_embedder(y, self.training, draws))  # (N, D)
        for block in self.blocks:
            x = block(x, c)  # (N, T, D)
        x = self.unpatchify(self.final_layer(x, c))  # (N, out_channels, H, W)
        return x[:, : self.in_channels]  # without learn_sigma's second half

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Guidance as released, for parity: x (2N, …) is a batch twice, y (2N,) its labels, then null labels.

        It guides only the first three channels, as the release does; `guidance.Guidance` guides all.
        """
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)  # (2N, C, H, W)
        conditional, unconditional = out[:, :3].chunk(2)  # each (N, 3, H, W)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([guided, guided]), out[:, 3:]], dim=1)

    def forward_macs(self) -> int:
        """Multiply-accumulates of one forward pass over one sample (FLOPs are twice that).

        As usual, only matrix products are counted: T·D² for every D×D map over the tokens, 2·T²·D for attention.
        """
        d, p, tokens = self.hidden_size, self.patch_size, self.num_patches
        hidden = self.blocks[0].mlp.fc1.out_features if len(self.blocks) else 0
        block = tokens * (4 * d * d + 2 * d * hidden) + 2 * tokens * tokens * d + 6 * d * d
        embed = tokens * p * p * self.in_channels * d + TimestepEmbedder.frequency_size * d + d * d
        final = tokens * d * p * p * self.out_channels + 2 * d * d
        return len(self.blocks) * block + embed + final


def sincos_positions(dim: int, grid: int) -> Tensor:
    """Sinusoids of the positions in a grid × grid image: (1, grid², dim), half for the column, half for the row."""

    def one_axis(position: Tensor) -> Tensor:  # (grid²,) -> (grid², dim/2)
        omega = torch.arange(dim // 4, dtype=torch.float64) / (dim / 4)
        angles = position[:, None] / 10000**omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, column = torch.meshgrid(*[torch.arange(grid, dtype=torch.float64)] * 2, indexing="ij")
    return torch.cat([one_axis(column.flatten()), one_axis(row.flatten())], dim=1).float().unsqueeze(0)


def size_table() -> str:
    """A Markdown table of all variants for 256² images and an 8× autoencoder: trained parameters, forward GMACs."""
    lines = ["| model | parameters | GMACs, forward |", "| --- | ---: | ---: |"]
    for name in VARIANTS:
        with torch.device("meta"):
            network = build_sit(name)
        parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
        lines.append(f"| {name} | {parameters / 1e6:.1f} M | {network.forward_macs() / 1e9:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(size_table())
