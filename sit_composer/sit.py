"""SiT, the network of "Scalable Interpolant Transformers" (arXiv 2401.08740): a DiT whose time runs over [0, 1].

The modules carry the names of the authors' release, so that its checkpoints load strictly and ours load there.
`python -m sit_composer.sit` prints the table of sizes.

In the shape comments N is the batch, C the channels, H = W the input's side, p the patch's side, T = (H/p)² the
tokens, and D the hidden size.
"""

import importlib
import re

import torch
from torch import Tensor, nn

from sit_composer.attention import attend
from sit_composer.blocks import BlockModulation, FinalLayer, SwiGLU, block_norm, head_norm, mlp, modulate, modulation
from sit_composer.choices import VARIANTS, check_blocks, check_sizes, variant
from sit_composer.embedders import LabelEmbedder, PatchEmbed, Rotations, TimestepEmbedder, rotate, sincos_positions
from sit_composer.linear import Linear

# The weights of a block that map tokens, and how many maps each stacks: q, k and v; SwiGLU's gate and value.
TOKEN_MAPS = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1, "mlp.w12": 2, "mlp.w3": 1}


def token_map(name: str) -> tuple[str, int] | None:
    """The kind of a block's map over the tokens, and how many it stacks, by a parameter's name; None for others."""
    match = re.fullmatch(r"(?:.+\.)?blocks\.\d+\.(.+)\.weight", name)
    return (match[1], TOKEN_MAPS[match[1]]) if match and match[1] in TOKEN_MAPS else None


def build_sit(name: str, **overrides) -> "SiT":
    """Builds a variant by name; further arguments of `SiT` override the variant's.

    >>> build_sit("SiT-XL/2", input_size=64)
    """
    return SiT(**{**variant(name), **overrides})


class Attention(nn.Module):
    """Self-attention of the tokens (N, T, D)."""

    attend = staticmethod(attend)

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool = False, rms_norm: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        width = hidden_size // num_heads
        self.q_norm = head_norm(width, rms_norm) if qk_norm else nn.Identity()
        self.k_norm = head_norm(width, rms_norm) if qk_norm else nn.Identity()
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        n, tokens, d = x.shape
        # Cut first, then shaped: so the gradients of q, k and v are joined in one pass, not stacked and permuted.
        parts = (part.view(n, tokens, self.num_heads, -1) for part in self.qkv(x).chunk(3, dim=-1))
        q, k, v = (part.transpose(1, 2) for part in parts)  # each (N, heads, T, D/heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(n, tokens, d))


class SiTBlock(nn.Module):
    """A transformer block whose norms and gates depend on the condition (adaLN-Zero, arXiv 2212.09748).

    The condition is c (N, D), or with shared_adaln the modulation (N, 6·D) that all blocks share.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        qk_norm: bool = False,
        rms_norm: bool = False,
        swiglu: bool = False,
        shared_adaln: bool = False,
    ):
        super().__init__()
        self.norm1 = block_norm(hidden_size, rms_norm)
        self.attn = Attention(hidden_size, num_heads, qk_norm, rms_norm)
        self.norm2 = block_norm(hidden_size, rms_norm)
        self.mlp = (SwiGLU if swiglu else mlp)(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = BlockModulation(hidden_size) if shared_adaln else modulation(hidden_size, 6)

    def forward(self, x: Tensor, c: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)  # each (N, D)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a), rotation)  # (N, T, D)
        x = x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))  # (N, T, D)
        return x


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

    The options of newer blocks, off by default; see `blocks`:
        qk_norm: normalize the queries and keys of each head.
        rms_norm: RMSNorm in the place of every layer norm.
        swiglu: SwiGLU in the place of the MLP, with as many parameters.
        rotary: rotate queries and keys by their positions, besides the sin-cos positions.
        class_tokens: that many copies of the label's embedding, each with a learned offset, join the tokens in the
            blocks from class_tokens_start on, as in JiT (arXiv 2511.13720).
        class_tokens_start: the block, from 0, that they join at.
        shared_adaln: one modulation for all blocks, and a learned offset in each.
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
        qk_norm: bool = False,
        rms_norm: bool = False,
        swiglu: bool = False,
        rotary: bool = False,
        class_tokens: int = 0,
        class_tokens_start: int = 0,
        shared_adaln: bool = False,
    ):
        super().__init__()
        check_sizes(hidden_size, num_heads, input_size, patch_size)
        check_blocks(hidden_size, depth, num_heads, rotary, class_tokens, class_tokens_start)
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.hidden_size = hidden_size
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.learn_sigma = learn_sigma
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.class_tokens = class_tokens
        self.class_tokens_start = class_tokens_start

        self.num_patches = (input_size // patch_size) ** 2
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # A frozen parameter, not a buffer: the release has it in its state dict and in named_parameters().
        self.pos_embed = nn.Parameter(torch.empty(1, self.num_patches, hidden_size), requires_grad=False)
        options = {"qk_norm": qk_norm, "rms_norm": rms_norm, "swiglu": swiglu, "shared_adaln": shared_adaln}
        self.blocks = nn.ModuleList(SiTBlock(hidden_size, num_heads, mlp_ratio, **options) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels, rms_norm)
        self.feat_rope = Rotations(hidden_size // num_heads, input_size // patch_size) if rotary else None
        self.in_context_posemb = nn.Parameter(torch.empty(1, class_tokens, hidden_size)) if class_tokens else None
        self.adaLN_modulation = modulation(hidden_size, 6) if shared_adaln else None
        self.initialize_weights()

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str, weights: str = "ema") -> "SiT":
        """The trained network of an exported folder, a checkpoint or a model on the Hugging Face Hub, in eval mode.

        Args:
            folder_or_hub_id: what `checkpoint.load.load_checkpoint` takes, or a Hub name such as "owner/name".
            weights: "ema", "training", or of several averages one such as "ema:0.999" or "ema:power0.05"; raises a
                UserError if there are no such weights.
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
        if self.in_context_posemb is not None:
            nn.init.normal_(self.in_context_posemb, std=0.02)
        modulations = [part for name, part in self.named_modules() if name.endswith("adaLN_modulation")]
        for parameter in [p for part in [*modulations, self.final_layer.linear] for p in part.parameters()]:
            nn.init.zeros_(parameter)

    @property
    def null_label(self) -> int | None:
        """The null class's label, or None if the network was trained without one."""
        return self.num_classes if self.class_dropout_prob > 0 else None

    def unpatchify(self, x: Tensor) -> Tensor:
        """Tokens (N, T, p²·C) to images (N, C, H, W)."""
        grid, p, c = self.input_size // self.patch_size, self.patch_size, self.out_channels
        x = x.reshape(-1, grid, grid, p, p, c)  # (N, H/p, W/p, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, c, grid * p, grid * p)  # (N, C, H, W)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, draws: Tensor | None = None, stop: int | None = None) -> Tensor:
        """The field at x (N, C, H, W) and times t (N,), for labels y (N,): (N, C, H, W).

        A solver that calls this often may embed its labels once: y is then what y_embedder gives, (N, D), as it is.
        In training, a label whose draw, of draws (N,) in [0, 1), is below class_dropout_prob becomes the null class.
        None uses torch's own generator. With ``stop``, the tokens after that many blocks are returned: (N, T, D).
        """
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        t = self.t_embedder(t)  # (N, D)
        y = y if y.is_floating_point() else self.y_embedder(y, self.training, draws)  # (N, D)
        c = t + y
        condition = c if self.adaLN_modulation is None else self.adaLN_modulation(c)  # (N, D) or (N, 6·D)
        rotation = None if self.feat_rope is None else self.feat_rope()
        for i, block in enumerate(self.blocks):
            if self.class_tokens and i == self.class_tokens_start:
                x = torch.cat([y.unsqueeze(1) + self.in_context_posemb, x], dim=1)  # (N, class_tokens + T, D)
                rotation = None if self.feat_rope is None else self.feat_rope(self.class_tokens)
            x = block(x, condition, rotation)
            if i + 1 == stop:
                return x[:, -self.num_patches :]  # (N, T, D)
        if self.class_tokens:
            x = x[:, self.class_tokens :]  # (N, T, D)
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

    def forward_macs(self, stop: int | None = None) -> int:
        """Multiply-accumulates of one forward pass over one sample, see `forward` (FLOPs are twice that).

        As usual, only matrix products are counted: T·D² for every D×D map over the tokens, 2·T²·D for attention.
        """
        d, p, tokens = self.hidden_size, self.patch_size, self.num_patches
        first = self.blocks[0].mlp.children() if len(self.blocks) else ()
        maps = 4 * d * d + sum(map_.in_features * map_.out_features for map_ in first if isinstance(map_, nn.Linear))
        depth = len(self.blocks) if stop is None else stop
        joined = max(depth - self.class_tokens_start, 0) if self.class_tokens else 0
        lengths = ((tokens, depth - joined), (tokens + self.class_tokens, joined))  # and the blocks of each
        blocks = sum(count * (length * maps + 2 * length * length * d) for length, count in lengths)
        modulations = depth if self.adaLN_modulation is None else 1
        embed = tokens * p * p * self.in_channels * d + TimestepEmbedder.frequency_size * d + d * d
        final = tokens * d * p * p * self.out_channels + 2 * d * d if stop is None else 0
        return blocks + modulations * 6 * d * d + embed + final


def size_table() -> str:
    """A Markdown table of all variants for 256² images: trained parameters, forward GMACs.

    The autoencoder is an 8× one with 4 channels; for LightningDiT, a 16× one with 32, as theirs.
    """
    lines = ["| model | parameters | GMACs, forward |", "| --- | ---: | ---: |"]
    for name in VARIANTS:
        latents = {"input_size": 16, "in_channels": 32} if name.startswith("LightningDiT") else {}
        with torch.device("meta"):
            network = build_sit(name, **latents)
        parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
        lines.append(f"| {name} | {parameters / 1e6:.1f} M | {network.forward_macs() / 1e9:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(size_table())
