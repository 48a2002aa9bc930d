"""The estimates as Markdown tables."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch._subclasses.fake_tensor import FakeTensorMode

from sit_composer.bounds import choose
from sit_composer.choices import LIGHTNING, VARIANTS
from sit_composer.config.schema import Config, FSDPConfig, network_arguments
from sit_composer.costs.estimate import GIB, RESERVE_TEXT, fits, memory, parameters, projector, steps
from sit_composer.costs.flops import optimizer_flops, sample_flops
from sit_composer.costs.gpus import GPUS
from sit_composer.sit import SiT

MICROBATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def strategies(config: Config, ranks: Sequence[int]) -> dict[str, tuple[Config, int]]:
    """The columns of a table: for each name, a config and its number of ranks.

    A DDP config is also shown with FSDP2's defaults. DDP has one column for all numbers of ranks above 1, because the
    number matters only for whether a rank has several microbatches per step.
    """
    ddp, fsdp = replace(config, fsdp=None), config.fsdp or FSDPConfig()
    several = [n for n in ranks if n > 1]
    columns = {"1 rank": (ddp, 1)} if 1 in ranks else {}
    columns |= {f"DDP ×{n}": (ddp, n) for n in several[:1]}
    options = {", checkpointing": fsdp.activation_checkpointing, ", offload": fsdp.activation_cpu_offload}
    kind = "FSDP2" + "".join(name for name, chosen in options.items() if chosen)
    shown = [n for n in several if n % fsdp.data_parallel_replicate_degree == 0]
    return columns | {f"{kind} ×{n}": (replace(config, fsdp=fsdp), n) for n in shown}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table whose columns but the first hold numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe(config: Config) -> str:
    """The network in a line."""
    arguments = network_arguments(config.model)
    network = tuple(sorted(arguments.items()))

    def count(frozen: tuple[str, ...]) -> float:
        return sum(shape.numel() for _, shape, is_trained in parameters(network, frozen) if is_trained) / 1e6

    all_, trained = count(()), count(tuple(config.freeze))
    frozen = f", of which {all_ - trained:.1f} M are frozen" if config.freeze else ""
    sizes = ", ".join(f"{name} {arguments[name]}" for name in ("hidden_size", "depth", "num_heads", "patch_size"))
    return f"{config.model.name or 'a SiT'} ({sizes}) on {config.model.input_size}², {all_:.1f} M parameters{frozen}"


def memory_tables(
    config: Config, ranks: Sequence[int], microbatches: Sequence[int], cuda: bool, encoder: tuple[int, int]
) -> str:
    """The parts of a config's memory, its total by microbatch, and the largest microbatch by GPU."""
    columns = strategies(config, ranks)
    given = config.trainer.get("device_train_microbatch_size")  # without it, a rank's batch is its microbatch
    parts = ("weights", "gradients", "optimizer", "ema", "buffers", "encoder", "activations", "total")
    cells = [["microbatch", *parts]]
    for column, count in columns.values():
        size = given if isinstance(given, int) else max(config.data.global_batch_size // count, 1)
        sizes = memory(column, count, size, cuda, encoder)
        cells.append([str(size), *(f"{getattr(sizes, part) / GIB:.3g}" for part in parts)])
    rows = [list(row) for row in zip(*cells, strict=True)]
    text = ["GiB per rank, as configured:", "", markdown(["part", *columns], rows)]
    rows = []
    for n in microbatches:
        totals = (memory(column, count, n, cuda, encoder).total for column, count in columns.values())
        rows.append([str(n), *(f"{total / GIB:.3g}" for total in totals)])
    text += ["", "GiB per rank, by microbatch:", "", markdown(["microbatch", *columns], rows)]
    if cuda:
        rows = [_largest(gpu, gpu, columns.values(), encoder) for gpu in GPUS]
        text += ["", f"Largest microbatch ({RESERVE_TEXT}):", "", markdown(["GPU", *columns], rows)]
    return "\n".join(text)


def size_table(config: Config, ranks: int) -> str:
    """The largest microbatch of each of the named sizes, by GPU, under DDP, FSDP2 and FSDP2 with checkpointing."""
    kinds = {"DDP": None, "FSDP2": FSDPConfig(), "FSDP2, checkpointing": FSDPConfig(activation_checkpointing=True)}
    arguments = network_arguments(config.model)
    family, patch = "LightningDiT" if LIGHTNING.items() <= arguments.items() else "SiT", arguments["patch_size"]
    choose("model.name", f"{family}-XL/{patch}", VARIANTS)
    names = [name for name in VARIANTS if re.fullmatch(rf"{family}-\w+/{patch}", name)]
    rows = []
    for kind, fsdp in kinds.items():
        models = [replace(config.model, name=name, hidden_size=None, depth=None, num_heads=None) for name in names]
        # Without an alignment, whose blocks are of one depth.
        columns = [(replace(config, model=model, fsdp=fsdp, alignment=None), ranks) for model in models]
        rows += [_largest(f"{gpu}, {kind}", gpu, columns, (0, 0)) for gpu in GPUS]
    without = ", without alignment" if config.alignment is not None else ""
    title = f"Largest microbatch on {ranks} GPUs, {config.precision}{without} ({RESERVE_TEXT}):"
    return f"{title}\n\n{markdown(['GPU', *names], rows)}"


def _largest(name: str, gpu: str, columns: Iterable[tuple[Config, int]], encoder: tuple[int, int]) -> list[str]:
    """A row: its name, and each column's largest microbatch on a GPU."""
    return [name, *(str(fits(config, ranks, GPUS[gpu][0], encoder)) for config, ranks in columns)]


def cost_table(config: Config, ranks: Sequence[int], mfu: float, samples: int | None = None) -> str:
    """The cost of max_duration: hours by GPU and ranks, at a fraction ``mfu`` of the peak FLOP/s."""
    with FakeTensorMode():
        network = SiT(**network_arguments(config.model))
    flops = sample_flops(network, config.alignment, projector(config)) * config.data.global_batch_size
    flops += optimizer_flops(network, config.optimizer)
    count = steps(config, samples)
    text = f"{flops / 1e12:.4g} TFLOPs per step"
    if count is None:
        return f"{text}; the number of steps in {config.trainer.get('max_duration')} depends on the data's size"
    total = flops * count
    rows = []
    for gpu, (_, low_peak, full_peak) in GPUS.items():
        peak = full_peak if config.precision == "fp32" else low_peak
        hours = total / (mfu * peak * 1e12) / 3600
        rows.append([gpu, f"{peak:g}", f"{hours:.3g}", *(f"{hours / n:.3g}" for n in ranks)])
    header = ["GPU", "peak TFLOP/s", "GPU-hours", *("1 GPU" if n == 1 else f"{n} GPUs" for n in ranks)]
    text += f", {total / 1e15:.4g} PFLOPs in {count:,} steps. Hours at {mfu:.0%} of the peak FLOP/s of "
    return f"{text}{config.precision}:\n\n{markdown(header, rows)}"
