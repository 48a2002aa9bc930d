"""What a run takes, in memory and in time, computed from its config:   python -m sit_composer.memory YAML

Weights, gradients, AdamW's moments and the average are counted; what the passes hold is `live_bytes`'. The CUDA
context, NCCL's buffers, the operators' workspaces and fragmentation are not known: the reserve is for them. The sums
were compared with measured peaks of training on a CPU, FSDP2's on one rank (between several, a CPU's collectives
hold buffers that aren't counted), and never with a GPU's.
"""

import argparse
import math
import os
import re
import sys
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sit_composer.checks import check
from sit_composer.config import Config, FSDPConfig, load_config, network_arguments
from sit_composer.errors import UserError
from sit_composer.live_bytes import Ledger, Step, low, peaks
from sit_composer.names import SIZES
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
MICROBATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RANKS = (1, 8, 16, 32, 64)
# What memory doesn't depend on, so that a YAML whose data and folder are still to be given can be asked.
UNIMPORTANT = ("run_name=memory", "data.remote=null", "data.local=memory", "eval_data=null", "frechet=null",
               "trainer.save_folder=memory")  # fmt: skip


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

    from sit_composer.autoencoder import SLICE_SIZE, find_subfolder

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


def strategies(config: Config, ranks: list[int]) -> dict[str, tuple[Config, int]]:
    """The columns of a table: a name for each, with its config and its ranks.

    A config of DDP is shown as FSDP2's defaults, too. DDP's memory is the same on any number of ranks above 1, but that
    gradients aren't there yet when a rank's only microbatch begins.
    """
    ddp, fsdp = replace(config, fsdp=None), config.fsdp or FSDPConfig()
    columns = {}
    if 1 in ranks:
        columns["1 rank"] = (ddp, 1)
    several = [count for count in ranks if count > 1]
    if several:
        columns[f"DDP ×{several[0]}"] = (ddp, several[0])
    kind = "FSDP2" + ", checkpointing" * fsdp.activation_checkpointing + ", offload" * fsdp.activation_cpu_offload
    for count in several:
        if count % fsdp.data_parallel_replicate_degree == 0:
            columns[f"{kind} ×{count}"] = (replace(config, fsdp=fsdp), count)
    return columns


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table; all but the first column is of numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gib(size: float) -> str:
    """Bytes in GiB, to three digits."""
    return f"{size / GIB:.3g}"


def describe(config: Config) -> str:
    """The network in a line."""
    arguments = network_arguments(config.model)
    trained = sum(shape.numel() for _, shape, is_trained in parameters(tuple(sorted(arguments.items()))) if is_trained)
    sizes = ", ".join(f"{name} {arguments[name]}" for name in ("hidden_size", "depth", "num_heads", "patch_size"))
    return f"{config.model.name or 'a SiT'} ({sizes}) on {config.model.input_size}², {trained / 1e6:.1f} M parameters"


def memory_tables(
    config: Config, ranks: list[int], microbatches: list[int], cuda: bool = True, encoder: tuple[int, int] = (0, 0)
) -> str:
    """The parts of a config's memory, its sum by microbatch, and the largest microbatch by GPU."""
    columns = strategies(config, ranks)
    given = config.trainer.get("device_train_microbatch_size")  # without it, a rank's batch is its microbatch
    micro = {
        name: given if isinstance(given, int) else max(config.data.global_batch_size // count, 1)
        for name, (_, count) in columns.items()
    }
    parts = ("weights", "gradients", "optimizer", "ema", "buffers", "encoder", "activations", "total")
    sums = {name: memory(c, count, micro[name], cuda, encoder) for name, (c, count) in columns.items()}
    rows = [["microbatch", *map(str, micro.values())]]
    rows += [[part, *(gib(getattr(m, part)) for m in sums.values())] for part in parts]
    text = ["GiB a rank, as configured:", "", markdown(["part", *columns], rows)]
    rows = [
        [str(n), *(gib(memory(c, count, n, cuda, encoder).total) for c, count in columns.values())]
        for n in microbatches
    ]
    text += ["", "GiB a rank, by microbatch:", "", markdown(["microbatch", *columns], rows)]
    if cuda:
        rows = [
            [gpu, *(str(fits(c, count, room[0], encoder)) for c, count in columns.values())]
            for gpu, room in GPUS.items()
        ]
        text += ["", f"Largest microbatch ({RESERVE_TEXT}):", "", markdown(["GPU", *columns], rows)]
    return "\n".join(text)


def size_table(config: Config, ranks: int) -> str:
    """The largest microbatch of each of the four sizes, by GPU, under DDP, FSDP2 and FSDP2 with checkpointing."""
    kinds = {"DDP": None, "FSDP2": FSDPConfig(), "FSDP2, checkpointing": FSDPConfig(activation_checkpointing=True)}
    patch = network_arguments(config.model)["patch_size"]
    names = [f"SiT-{size}/{patch}" for size in SIZES]
    rows = []
    for kind, fsdp in kinds.items():
        for gpu, room in GPUS.items():
            row = [f"{gpu}, {kind}"]
            for name in names:
                model = replace(config.model, name=name, hidden_size=None, depth=None, num_heads=None)
                row.append(str(fits(replace(config, model=model, fsdp=fsdp), ranks, room[0])))
            rows.append(row)
    return f"Largest microbatch on {ranks} GPUs, {config.precision} ({RESERVE_TEXT}):\n\n" + markdown(
        ["GPU", *names], rows
    )


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


def cost_table(config: Config, ranks: list[int], mfu: float, samples: int | None = None) -> str:
    """What max_duration takes: hours by GPU and ranks, where a part ``mfu`` of the peak FLOP/s is reached."""
    with FakeTensorMode():
        flops = 6 * SiT(**network_arguments(config.model)).forward_macs() * config.data.global_batch_size
    count = steps(config, samples)
    text = f"{flops / 1e12:.4g} TFLOPs a step"
    if count is None:
        return f"{text}; how many steps {config.trainer.get('max_duration')} are, the data's size tells"
    total = flops * count
    text += f", {total / 1e15:.4g} PFLOPs in {count:,} steps. "
    text += f"Hours at {mfu:.0%} of the peak FLOP/s of {config.precision}:\n\n"
    rows = []
    for gpu, (_, low_peak, full_peak) in GPUS.items():
        peak = full_peak if config.precision == "fp32" else low_peak
        hours = total / (mfu * peak * 1e12) / 3600
        rows.append([gpu, f"{peak:g}", f"{hours:.3g}", *(f"{hours / n:.3g}" for n in ranks)])
    return text + markdown(
        ["GPU", "peak TFLOP/s", "GPU-hours", *(f"{n} GPUs" if n > 1 else "1 GPU" for n in ranks)], rows
    )


def numbers(text: str) -> list[int]:
    """1,8,16 as a list."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"got {text!r}; it takes whole numbers above 0, such as 1,8,16")
    return [int(number) for number in text.split(",")]


def fraction(text: str) -> float:
    """A number in (0, 1]."""
    if not re.fullmatch(r"\d*\.?\d+", text) or not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; it takes a number above 0, up to 1")
    return float(text)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake in the config."""
    parser = argparse.ArgumentParser(
        prog="python -m sit_composer.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("yaml", help="the run's config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="go over the YAML's")
    parser.add_argument("--ranks", type=numbers, help="numbers of GPUs [1,8,16,32,64]")
    parser.add_argument("--microbatch", type=numbers, help="samples a GPU at a time")
    parser.add_argument("--mfu", type=fraction, default=0.4, help="part of the peak FLOP/s that is reached [0.4]")
    parser.add_argument("--samples", type=int, help="of the data, where max_duration is in epochs")
    parser.add_argument("--cpu", action="store_true", help="the memory of training on a CPU")
    parser.add_argument("--encode", action="store_true", help="pictures are encoded in every step")
    parser.add_argument("--all-sizes", action="store_true", help="only the largest microbatch for S, B, L and XL")
    args = parser.parse_intermixed_args(argv)
    if args.all_sizes and (args.microbatch or args.samples or args.cpu or args.encode or len(args.ranks or [8]) > 1):
        parser.error("argument --all-sizes: goes with --ranks N [8], and nothing else")
    try:
        config = load_config(args.yaml, [*UNIMPORTANT, *args.overrides])
        check(config, ranks=max(1, config.fsdp.data_parallel_replicate_degree) if config.fsdp else 1)
        if args.all_sizes:
            print(size_table(config, (args.ranks or [8])[0]))
            return 0
        args.ranks, args.microbatch = args.ranks or list(RANKS), args.microbatch or list(MICROBATCHES)
        encoder = encoder_memory(config) if args.encode else (0, 0)
        print(describe(config) + "\n")
        print(memory_tables(config, args.ranks, args.microbatch, not args.cpu, encoder) + "\n")
        print(cost_table(config, args.ranks, args.mfu, args.samples))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
