"""The estimates as Markdown tables."""

from dataclasses import replace

from torch._subclasses.fake_tensor import FakeTensorMode

from sit_composer.choices import SIZES
from sit_composer.config.schema import Config, FSDPConfig, network_arguments
from sit_composer.costs.estimate import GIB, GPUS, RESERVE_TEXT, fits, memory, parameters, steps
from sit_composer.sit import SiT

MICROBATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


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
