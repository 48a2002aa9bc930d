"""What a run takes, in memory and in steps, computed from its config."""

import math
import os
import re
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sit_composer.autoencoder import SLICE_SIZE, find_subfolder
from sit_composer.config.schema import Config, network_arguments
from sit_composer.costs.live_bytes import Ledger, Step, low, peaks
from sit_composer.errors import UserError
from sit_composer.sit import SiT

GIB = 2**30
# Name: (GiB that torch sees, dense bf16 or fp16 TFLOP/s, the same in fp32), from the makers' data sheets.
GPUS = {
    "A100 40GB": (39.4, 312, 19.5),
    "A100 80GB": (79.1, 312, 19.5),
    "H100 80GB": (79.1, 989, 67),
    "H200 141GB": (139.7, 989, 67),
}
RESERVE = (0.08, 1.0)  # of a GPU's memory: a part of it, and GiB
RESERVE_TEXT = f"{RESERVE[0]:.0%} and {RESERVE[1]:g} GiB of the GPU left free"


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank. Those of the passes are the most that is held at once, gradients included."""

    weights: int
    optimizer: int  # AdamW's two moments
    ema: int
    buffers: int  # DDP's buckets, or what FSDP2 gathers and reduces
    encoder: int  # the autoencoder's weights, if pictures are encoded in the step
    gradients: int
    passes: int  # forward and backward
    update: int  # the optimizer's step, gradients included

    @property
    def total(self) -> int:
        """The larger peak, of the passes or of the optimizer's step."""
        kept = self.weights + self.optimizer + self.ema + self.buffers + self.encoder
        return kept + max(self.passes, self.update)

    @property
    def activations(self) -> int:
        """What the peak holds beyond the other parts: saved tensors, and what is computed just then."""
        return max(self.passes, self.update) - self.gradients


@cache
def parameters(network: tuple) -> tuple[tuple[str, torch.Size, bool], ...]:
    """Name, shape and whether it is trained, for each parameter of a `SiT` of these arguments."""
    with FakeTensorMode():
        return tuple((name, p.shape, p.requires_grad) for name, p in SiT(**dict(network)).named_parameters())


def memory(
    config: Config,
    ranks: int,
    microbatch: int,
    cuda: bool = True,
    encoder: tuple[int, int] = (0, 0),
    accumulated: bool | None = None,
) -> Memory:
    """The bytes of a rank, of ``ranks``, that trains so many samples at a time.

    Args:
        cuda: of a GPU; else of a CPU.
        encoder: what `encoder_memory` gives, if pictures are encoded in the step.
        accumulated: whether a step has several microbatches; None: as the config's batch says.
    """
    fsdp = config.fsdp
    network = tuple(sorted(network_arguments(config.model).items()))
    shards = ranks // fsdp.data_parallel_replicate_degree if fsdp is not None else 1
    everything, trained, block, rest, largest = 0, 0, 0, 0, 0
    for name, shape, is_trained in parameters(network):
        part = math.ceil(shape[0] / shards) * math.prod(shape[1:])  # FSDP2 splits the first axis, and pads
        everything += part
        trained += part * is_trained
        largest = max(largest, part)
        block += math.prod(shape) * name.startswith("blocks.0.")
        rest += math.prod(shape) * (not name.startswith("blocks."))
    fused = fsdp is None and config.precision != "amp_fp16"  # AdamW, on a GPU; else it makes temporaries
    compute = low(config.precision)
    step = Step(network, tuple(sorted(vars(config.transport).items())), config.precision, cuda=cuda)
    gathered = 0
    if fsdp is not None:
        sharded = torch.float32 if fsdp.mixed_precision == "FULL" else compute
        step = replace(
            step, sharded=sharded, checkpointing=fsdp.activation_checkpointing, offload=fsdp.activation_cpu_offload
        )
        reduced = compute if fsdp.mixed_precision == "PURE" else torch.float32
        depth = dict(network)["depth"]
        # Gathered: the root, which stays, and a block in use, one on its way and its buffer; or all blocks. Then the
        # gradients of the root and of a block, and the reduction's input, of this block and of the one before.
        blocks = min(2, depth) if fsdp.reshard_after_forward else depth
        gathered = sharded.itemsize * (rest + (blocks + 1) * block)
        gathered += sharded.itemsize * (rest + block) + 2 * reduced.itemsize * block
    elif ranks > 1:
        gathered = 4 * trained  # DDP's buckets: Composer doesn't make them views of the gradients
    if accumulated is None:
        accumulated = config.data.global_batch_size > ranks * microbatch
    passes = peaks(step).bytes(microbatch, accumulated)
    if fsdp is not None:
        passes += 4 * trained  # the gradients' shards
    weights, working = encoder
    passes = max(passes, working + 4 * trained * (accumulated or fsdp is not None))
    return Memory(
        weights=4 * everything,
        optimizer=8 * trained,
        ema=4 * trained if config.ema is not None else 0,
        buffers=gathered,
        encoder=weights,
        gradients=4 * trained,
        passes=passes,
        update=4 * trained + (8 * largest if not cuda else 0 if fused else 4 * trained),
    )


def encoder_memory(config: Config) -> tuple[int, int]:
    """Bytes of the autoencoder's weights (float32), and the most that encoding a slice of pictures takes beside them.

    A folder's own config is taken; a name on the hub is believed to be of Stable Diffusion's architecture.
    """
    from diffusers import AutoencoderKL

    name = config.autoencoder.name
    if name is None:
        return 0, 0
    widths = (128, 256, 512, 512)
    architecture = {
        "block_out_channels": widths, "layers_per_block": 2, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    }  # fmt: skip
    if os.path.isdir(name):
        try:
            architecture = AutoencoderKL.load_config(name, subfolder=find_subfolder(name))
        except ValueError as error:
            raise UserError(f"autoencoder.name: {name} holds no AutoencoderKL: {error}") from error
    with FakeTensorMode():
        vae = AutoencoderKL.from_config(architecture).requires_grad_(False).eval()
        weights = sum(p.numel() for p in vae.parameters()) * 4
        with Ledger(list(vae.parameters())) as ledger, torch.no_grad():
            side = config.model.input_size * 2 ** (len(vae.config.block_out_channels) - 1)  # pixels
            pictures = torch.empty(SLICE_SIZE, vae.config.in_channels, side, side)
            vae.encode(pictures)
    return weights, max(ledger.history)


def fits(config: Config, ranks: int, room: float, encoder: tuple[int, int] = (0, 0)) -> int:
    """The largest microbatch, of several in a step, for a GPU of so many GiB, less the reserve; 0 if none fits."""

    def within(microbatch: int) -> bool:
        total = memory(config, ranks, microbatch, encoder=encoder, accumulated=True).total
        return total <= (room * (1 - RESERVE[0]) - RESERVE[1]) * GIB

    least, most = 0, 1
    while within(most):
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if within(middle) else (least, middle)
    return least


def steps(config: Config, samples: int | None = None) -> int | None:
    """The steps of max_duration; None if they can't be told, as epochs can't without the number of samples."""
    return batches(config.trainer.get("max_duration", ""), config.data.global_batch_size, samples)


def batches(time: str | int, batch: int, samples: int | None = None) -> int | None:
    """A time such as 400000ba, 80ep or 1000sp, in batches; None if that can't be told."""
    match = re.fullmatch(r"(\d+)(ep|ba|sp)?", str(time))
    if match is None or (match[2] != "ba" and match[2] != "sp" and samples is None):
        return None
    count, unit = int(match[1]), match[2] or "ep"
    return {"ba": lambda: count, "sp": lambda: -(-count // batch), "ep": lambda: count * (samples // batch)}[unit]()
