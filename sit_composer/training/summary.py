"""What a run is, on one screen: printed before it starts, and by `train.py --dry-run`."""

import math
import os
import time

import torch

from sit_composer.callbacks.progress import duration
from sit_composer.checkpoint.folder import CHECKPOINT
from sit_composer.checkpoint.record import on_meta
from sit_composer.choices import dimension_shift
from sit_composer.config.ranks import microbatch, save_folder
from sit_composer.config.schema import Config, averages, is_plain, network_arguments, transport_arguments
from sit_composer.costs import estimate, flops, tables
from sit_composer.costs.room import room
from sit_composer.data.spec import DataSpec
from sit_composer.precision import DTYPES, for_gpu

EFFICIENCY = 0.5  # of a device's rate of matrix products, assumed for a step


def summary(config: Config, specs: dict[str, DataSpec], checkpoint: str | None) -> dict[str, str]:
    """The run in a dozen lines, by their names; ``checkpoint`` is what it resumes from, None if it starts anew."""
    ranks, spec = int(os.environ.get("WORLD_SIZE", 1)), specs.get("data")
    batch, micro = config.data.global_batch_size, microbatch(config)
    samples = spec.samples if spec is not None else None
    total = estimate.steps(config, samples)
    match = CHECKPOINT.fullmatch(checkpoint or "")
    done = int(match[2]) if match else 0
    start = f"resumes at batch {done:,} of {total or '?':,} from {checkpoint}" if checkpoint else "starts anew"
    if total is not None and done >= total > 0:
        start = f"has trained {done:,} batches already, and {total:,} are asked for"
    lines = {"run": f"{config.run_name}, which {start}", "network": tables.describe(config)}
    if config.init_from is not None:
        read = ", which are not read again" if checkpoint else ""
        lines["start"] = f"from the {config.init_weights} weights of {config.init_from}{read}"
    lines["objective"] = f"{config.transport.path_type}, {config.transport.prediction}"
    if config.transport.time_shift == "auto":
        dims = transport_arguments(config)["dims"]
        lines["objective"] += f", time shift {dimension_shift(dims):.3g} for {dims:,} dimensions"
        lines["objective"] += "; below 4,096 it did harm, see docs/performance.md" if dims < 4096 else ""
    if not is_plain(names := averages(config)):
        lines["averages"] = f"{', '.join(names)}; evaluation and sampling in training use {names[0]}"
    if config.alignment is not None:
        lines["objective"] += f", and {config.alignment.name} of block {config.alignment.block}"
    kind = "Muon for the matrices of blocks, AdamW for the rest" if config.optimizer.name == "muon" else "AdamW"
    rate = f"{config.optimizer.lr:g} ({next(iter(config.scheduler), 'constant')})"
    lines["optimizer"] = f"{kind}; rate {rate}, weight decay {config.optimizer.weight_decay:g}, seed {config.seed}"
    lines["data"] = config.data.remote or config.data.local
    if spec is not None:
        size = "" if spec.image_size is None else f" of {spec.image_size}²"
        lines["data"] += f": {spec.samples:,} {spec.kind}{size}, {spec.num_classes} classes"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines["batch"] = f"{batch}: {ranks} rank{'s' if ranks > 1 else ''} × {batch // ranks}"
    lines["batch"] += f", in microbatches of {micro}" if micro != batch // ranks else ""
    lines["device"] = f"{device}, {config.precision}, {'DDP' if config.fsdp is None else 'FSDP2'}"
    if config.compile.lower() != "false":
        lines["device"] += ", compiled in the first steps, which may take minutes"
    lines["length"] = str(config.trainer["max_duration"])
    if total is not None:
        lines["length"] += f": {total:,} batches" + (f", {total * batch / samples:.4g} epochs" if samples else "")
    encoder = estimate.encoder_memory(config) if spec is not None and spec.kind == "pixels" else (0, 0)
    cuda = for_gpu(config.precision)
    if isinstance(micro, int):
        memory = estimate.memory(config, ranks, micro, cuda, encoder).total
        lines["memory"] = f"{memory / estimate.GIB:.3g} GiB per rank"
        if cuda == torch.cuda.is_available():  # the run's device, and not that of another machine
            lines["memory"] += f", of {room() / estimate.GIB:.3g}"
    lines["time"] = "unknown: the length in batches is"
    step_flops = batch * sample_flops(config)
    step_flops += flops.optimizer_flops(on_meta(**network_arguments(config.model)), config.optimizer)
    step = step_flops / ranks / (EFFICIENCY * device_flops(config))  # seconds
    if total is not None:
        left = duration(max(0, total - done) * step)
        lines["time"] = f"about {left} to train, if half of the device's speed is reached"
    lines["checkpoints"] = checkpoints_text(config, total, samples, step)
    return lines


def as_text(lines: dict[str, str]) -> str:
    return "\n".join(f"{name + ':':<13}{line}" for name, line in lines.items())


def sample_flops(config: Config) -> int:
    """FLOPs of a sample's training step."""
    return flops.sample_flops(on_meta(**network_arguments(config.model)), config.alignment, estimate.projector(config))


def device_flops(config: Config) -> float:
    """FLOP/s of this device for a product as in the network's MLP, measured in some milliseconds."""
    network, on_gpu = network_arguments(config.model), torch.cuda.is_available()
    tokens = (network["input_size"] // network["patch_size"]) ** 2
    rows, width = min(max(tokens * config.data.global_batch_size, 64), 4096), network["hidden_size"]
    options = {"device": "cuda" if on_gpu else "cpu", "dtype": DTYPES[config.precision]}
    a, b = torch.ones(rows, width, **options), torch.ones(width, 4 * width, **options)
    took = []
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        if on_gpu:
            torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
    return 2 * rows * width * 4 * width / min(took)


def checkpoints_text(config: Config, count: int | None, samples: int | None, step: float) -> str:
    """How many checkpoints there will be, how large, how often and where."""
    if not config.trainer.get("save_folder"):
        return "none: trainer.save_folder is not given"
    size = estimate.checkpoint_bytes(config) / 1e9
    every = save_every(config, samples)
    text = f"{size:.3g} GB, every {config.trainer.get('save_interval', '1ep')}"
    if every:
        text += f" (about {duration(every * step)})"
    if count and every:
        number = -(-count // every)
        keep = config.trainer.get("save_num_checkpoints_to_keep", -1)
        kept = number if keep < 0 else min(max(keep, 1), number)  # the newest stays
        text += f": {number} in all, {kept} kept, {kept * size:.3g} GB"
    return f"{text}, in {save_folder(config)}"


def save_every(config: Config, samples: int | None) -> int | None:
    """The batches between two checkpoints, if known; Composer's default is an epoch."""
    interval = str(config.trainer.get("save_interval", "1ep"))
    if interval.endswith("dur"):
        total = estimate.steps(config, samples)
        return None if total is None else math.ceil(float(interval.removesuffix("dur")) * total)
    return estimate.batches(interval, config.data.global_batch_size, samples)
