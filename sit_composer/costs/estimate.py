"""The memory and the number of steps of a run, computed from its config."""

import math
import os
from bisect import bisect
from collections import defaultdict
from dataclasses import astuple, dataclass, replace
from functools import cache
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sit_composer.algorithms.projector import build_projector
from sit_composer.autoencoder import SLICE_SIZE, find_autoencoder
from sit_composer.autoencoder_config import read_layout
from sit_composer.config.schema import Config, averages, network_arguments, transport_arguments
from sit_composer.config.times import parse_time
from sit_composer.costs.live_bytes import DTYPES, Ledger, Step, peak
from sit_composer.errors import UserError
from sit_composer.freezing import freeze
from sit_composer.sit import SiT, token_map

GIB = 2**30
RESERVE = (0.08, 1.0)  # of a GPU's memory: a part of it, and GiB
RESERVE_TEXT = f"{RESERVE[0]:.0%} and {RESERVE[1]:g} GiB of the GPU left free"
STABLE_DIFFUSION = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes per rank at the larger peak, of the passes or of the optimizer's step."""

    weights: int
    optimizer: int  # AdamW's two moments, or Muon's momentum of a matrix
    ema: int
    buffers: int  # DDP's buckets, or what FSDP2 gathers and reduces
    encoder: int  # the autoencoder's weights, if images are encoded in the step
    gradients: int
    activations: int  # the rest: saved tensors, and what is being computed

    @property
    def total(self) -> int:
        return sum(astuple(self))


@cache
def parameters(network: tuple, frozen: tuple[str, ...] = ()) -> tuple[tuple[str, torch.Size, bool], ...]:
    """Name, shape and whether it is trained, for each parameter of a `SiT` with these arguments."""
    with FakeTensorMode():
        model = SiT(**dict(network))
        freeze(model, frozen)
        return tuple((name, p.shape, p.requires_grad) for name, p in model.named_parameters())


def projector(config: Config) -> nn.Module | None:
    """An alignment's projector, if there is one, without memory for its weights."""
    if config.alignment is None:
        return None
    with FakeTensorMode():
        return build_projector(config.alignment, network_arguments(config.model)["hidden_size"])


def memory(
    config: Config,
    ranks: int,
    microbatch: int,
    cuda: bool = True,
    encoder: tuple[int, int] = (0, 0),
    accumulated: bool | None = None,
) -> Memory:
    """The memory of each of ``ranks`` ranks that train ``microbatch`` samples at a time, on GPUs or else on CPUs.

    ``encoder`` is from `encoder_memory`, if images are encoded in the step. ``accumulated``: whether a step has several
    microbatches; None: as for the config's batch size.
    """
    fsdp = config.fsdp
    network = tuple(sorted(network_arguments(config.model).items()))
    shards = ranks // fsdp.data_parallel_replicate_degree if fsdp is not None else 1
    # FSDP2 splits the first axis, and pads.
    extra = () if config.alignment is None else projector(config).named_parameters(prefix="projector")
    own = parameters(network, tuple(config.freeze))
    everywhere = (*own, *((name, p.shape, True) for name, p in extra))
    parts = [(math.ceil(p[0] / shards) * math.prod(p[1:]), is_trained) for _, p, is_trained in everywhere]
    everything, largest = sum(part for part, _ in parts), max(part for part, _ in parts)
    trained = sum(part for part, is_trained in parts if is_trained)
    if accumulated is None:
        accumulated = config.data.global_batch_size > ranks * microbatch
    averaged = sum(part for part, is_trained in parts[: len(own)] if is_trained)
    transport = tuple(sorted(transport_arguments(config).items()))
    step = Step(network, transport, config.precision, cuda=cuda, frozen=tuple(config.freeze))
    if config.alignment is not None:
        step = replace(step, alignment=tuple(vars(config.alignment).items()))
    buffers = 4 * trained if ranks > 1 else 0  # DDP's buckets: in Composer they aren't views of the gradients
    if fsdp is not None:
        gathered = torch.float32 if fsdp.mixed_precision == "FULL" else DTYPES[config.precision]
        checkpointing, offload = fsdp.activation_checkpointing, fsdp.activation_cpu_offload
        step = replace(step, sharded=gathered, checkpointing=checkpointing, offload=offload)
        block = sum(p.numel() for name, p, _ in own if name.startswith("blocks.0."))
        rest = sum(p.numel() for name, p, _ in everywhere if not name.startswith("blocks."))
        depth = dict(network)["depth"]
        # Gathered: the root, which stays, and a block in use, the next one and its buffer; or all blocks. Then the
        # gradients of the root and of a block, and the reduction's input, of this block and of the one before.
        blocks = min(2, depth) if fsdp.reshard_after_forward else depth
        reduced = DTYPES[config.precision] if fsdp.mixed_precision == "PURE" else torch.float32
        buffers = gathered.itemsize * (2 * rest + (blocks + 2) * block) + 2 * reduced.itemsize * block
    passes = peak(step, microbatch, accumulated) + (0 if fsdp is None else 4 * trained)  # the gradients' shards
    fused = fsdp is None and config.precision != "amp_fp16"  # AdamW on a GPU; else it makes temporaries
    temporaries = 8 * largest if not cuda else 0 if fused else 4 * trained
    matrices, step_bytes = _muon(config, network, ranks, shards, cuda) if config.optimizer.name == "muon" else (0, 0)
    weights, working = encoder
    encoding = working + 4 * trained * (accumulated or fsdp is not None)
    return Memory(
        weights=4 * everything,
        optimizer=8 * trained - 4 * matrices,
        ema=4 * averaged * len(averages(config)),
        buffers=buffers,
        encoder=weights,
        gradients=4 * trained,
        activations=max(passes, encoding, 4 * trained + max(temporaries, step_bytes)) - 4 * trained,
    )


def _muon(config: Config, network: tuple, ranks: int, shards: int, cuda: bool) -> tuple[int, int]:
    """The elements of a rank's matrices that Muon trains, and the most bytes that a step of one kind of them holds."""
    kinds = defaultdict(list)
    for name, shape, is_trained in parameters(network, tuple(config.freeze)):
        kinds[token_map(name) if is_trained else None].append(shape)
    size, total, most = 2 if config.precision.endswith("bf16") else 4, 0, 0
    for (_, maps), shapes in ((kind, shapes) for kind, shapes in kinds.items() if kind is not None):
        n, (rows, columns) = len(shapes), shapes[0]
        own = n * math.ceil(rows / shards) * columns
        whole = math.ceil(n / (ranks if config.fsdp is None else shards)) * rows * columns  # its part of the work
        sides = sorted((rows // maps, columns))
        copies = 2 if ranks == 1 else 3 if config.fsdp is None else 4  # the iteration's, and those that ranks exchange
        held = own + copies * whole + 2 * whole * sides[0] // sides[1]
        if ranks > 1 and config.fsdp is None:  # all ranks' results are gathered, by Gloo through a copy
            held = max(held, own + whole + ranks * whole * (1 if cuda else 2))
        total, most = total + own, max(most, size * held, 8 * own)
    return total, most


def encoder_memory(config: Config) -> tuple[int, int]:
    """Bytes of the autoencoder's weights (float32), and the peak of encoding a slice of images besides them."""
    name = config.autoencoder.name
    return (0, 0) if name is None else _encoder_memory(name, config.model.input_size)


@cache
def _encoder_memory(name: str, latent_side: int) -> tuple[int, int]:
    import diffusers  # takes seconds to import, and is rarely needed

    kind, architecture = diffusers.AutoencoderKL, STABLE_DIFFUSION  # assumed for a name on the Hub
    if os.path.isdir(name):
        try:
            where, found = find_autoencoder(name)
            kind = getattr(diffusers, found)
            architecture = kind.load_config(name, subfolder=where)
        except ValueError as error:
            raise UserError(f"autoencoder.name: {name} holds no autoencoder: {error}") from error
    # Newer torch draws again what is out of bounds, which tensors without data can't tell.
    with FakeTensorMode(), patch("torch.nn.init.trunc_normal_", lambda tensor, *_, **__: tensor):
        vae = kind.from_config(architecture).requires_grad_(False).eval()
        weights = sum(p.numel() for p in vae.parameters()) * 4
        with Ledger(list(vae.parameters())) as ledger, torch.no_grad():
            layout = read_layout(kind.__name__, vae.config)
            side = latent_side * layout.downsample  # pixels
            vae.encode(torch.empty(SLICE_SIZE, layout.image_channels, side, side))
    return weights, max(ledger.history)


def checkpoint_bytes(config: Config) -> int:
    """The size of a checkpoint, which holds the shards of all ranks."""
    one = memory(replace(config, fsdp=None), 1, 1, cuda=False)
    return one.weights + one.optimizer + one.ema


def fits(config: Config, ranks: int, room: float, encoder: tuple[int, int] = (0, 0), cuda: bool = True) -> int:
    """The largest microbatch, with several per step, for a device of ``room`` GiB less the reserve; 0 if none fits."""
    available = (room * (1 - RESERVE[0]) - RESERVE[1]) * GIB
    return bisect(range(1, 2**32), available, key=lambda n: memory(config, ranks, n, cuda, encoder, True).total)


def steps(config: Config, samples: int | None = None) -> int | None:
    """The steps of max_duration; None if unknown, as for epochs without the number of samples."""
    return batches(config.trainer.get("max_duration", ""), config.data.global_batch_size, samples)


def batches(time: str, batch: int, samples: int | None = None) -> int | None:
    """A time such as 400000ba, 80ep or 1000sp, in batches; None if unknown."""
    number, unit = parse_time(time)
    count = int(number)
    if unit not in ("ba", "sp", "ep") or (unit == "ep" and samples is None):
        return None
    return count if unit == "ba" else -(-count // batch) if unit == "sp" else count * (samples // batch)
