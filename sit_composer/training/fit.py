"""Builds what a config says and trains it."""

import socket
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from composer.core import Callback
from composer.utils import dist, reproducibility
from torch.distributed.checkpoint.api import CheckpointException

from sit_composer.algorithms.alignment import Alignment
from sit_composer.algorithms.ema import EMA, EMAWeights
from sit_composer.algorithms.repa import REPA
from sit_composer.algorithms.sra import SRA
from sit_composer.autoencoder import AutoencoderSpec
from sit_composer.averages import std_of
from sit_composer.callbacks.guard import Guard, NotFinite
from sit_composer.callbacks.latent_check import LatentCheck
from sit_composer.callbacks.loss_by_time import LossByTime
from sit_composer.callbacks.metrics_log import MetricsLog
from sit_composer.callbacks.progress import Progress
from sit_composer.callbacks.run_record import RunRecord
from sit_composer.checkpoint.folder import newest
from sit_composer.checkpoint.record import Record
from sit_composer.cli import say
from sit_composer.config.composer_classes import build
from sit_composer.config.ranks import microbatch
from sit_composer.config.schema import Config, ConfigError, averages, is_plain, network_arguments, transport_arguments
from sit_composer.costs import estimate, gpus
from sit_composer.costs.room import check_room, too_large
from sit_composer.errors import first_line, one_line
from sit_composer.freezing import freeze
from sit_composer.outputs import commit, versions
from sit_composer.precision import resolve
from sit_composer.sit import SiT
from sit_composer.storage import StorageError, is_disk_full
from sit_composer.supervision.eviction import Evicted
from sit_composer.supervision.loading import excluded_algorithms, guard_composer
from sit_composer.supervision.supervisor import Supervision
from sit_composer.training.compiling import compile_blocks, find_backend
from sit_composer.training.inputs import Inputs, open_inputs
from sit_composer.training.model import ComposerSiT
from sit_composer.training.muon import Muon
from sit_composer.training.quiet import silence
from sit_composer.training.sharding import parallelism, prefetch
from sit_composer.training.start import start_from
from sit_composer.training.summary import as_text, sample_flops, save_every, summary
from sit_composer.training.trainer import Trainer
from sit_composer.transport import Transport

# What Composer raises for arguments, folders and checkpoints that it can't use.
REFUSALS = (ValueError, TypeError, OSError, RuntimeError, EOFError, KeyError, UnpicklingError, CheckpointException)


def run(config: Config) -> int:
    """Trains what the config describes. Returns the exit code, which tells whether a signal ended it; or UserError."""
    silence()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = replace(config, precision=resolve(config.precision, device))
    backend = find_backend(config.compile, device)
    # Longer than one rank may wait for a store while the others wait for it; Composer's default is five minutes.
    timeout = config.trainer.get("dist_timeout", max(1800.0, 2 * config.supervision.patience))
    dist.initialize_dist("gpu" if device == "cuda" else "cpu", timeout)
    supervision = Supervision(config, timeout)
    try:
        return fit(config, device, backend, supervision)
    finally:
        supervision.close()


def fit(config: Config, device: str, backend: str | None, supervision: Supervision) -> int:
    """Trains to the end or to a signal, once the ranks are connected; returns the exit code."""
    # --- Inputs ---
    resumption = supervision.start()
    inputs = open_inputs(config, device)
    found = Path(resumption["load_path"]).name if "load_path" in resumption else None
    lines = summary(config, inputs.specs, found) if dist.get_global_rank() == 0 else {}
    if lines:
        print(as_text(lines), flush=True)
    memory = config, inputs.encoder is not None, dist.get_world_size(), microbatch(config)
    check_room(*memory)

    # --- Network and objective ---
    reproducibility.seed_all(config.seed)  # alike on every rank: Composer doesn't broadcast rank 0's weights under FSDP
    network = SiT(**network_arguments(config.model))
    record = make_record(config, inputs.autoencoder, inputs.specs["data"].classes)
    if config.init_from is not None and "load_path" not in resumption:
        start_from(config, record, network, device)
    freeze(network, config.freeze)
    if backend is not None:
        compile_blocks(network, backend)
    transport = Transport(**transport_arguments(config))
    names = averages(config)
    ema = EMA(*names) if names else None
    weights = ema.weights if ema is not None else None
    alignment = make_alignment(config, network, transport, weights, inputs)
    model = ComposerSiT(network, transport, inputs.autoencoder, inputs.encoder, config.precision, alignment)
    # --- Trainer ---
    guard = Guard(config.on_nan, config.on_nan_limit, config.optimizer.clip_norm, weights, config.run_name)
    callbacks = make_callbacks(config, inputs, guard, weights, supervision, record, device)
    algorithms = [*filter(None, [ema]), *build("algorithms", config.algorithms), *filter(None, [alignment])]
    loggers = build("loggers", config.loggers)
    (scheduler,) = build("scheduler", config.scheduler or {"constant": {}})
    trainer = build_trainer(
        config,
        resumption,
        model=model,
        optimizers=make_optimizer(model, config),
        schedulers=scheduler,
        train_dataloader=inputs.loaders["data"],
        eval_dataloader=inputs.loaders.get("eval_data"),
        algorithms=algorithms,
        callbacks=callbacks,
        loggers=loggers,
        host_timeout=supervision.eviction.timeout,
    )
    if config.fsdp is not None:
        prefetch(trainer.state.model.network)
    # --- Run ---
    try:
        supervision.attach(trainer)
        if supervision.folder is not None:
            trainer.log_to(metrics := make_metrics(config, lines, supervision))
            supervision.flush_metrics = metrics.flush
        supervision.before_save = guard.before_save
        guard.last_checkpoint, guard.go_back = supervision.last, partial(supervision.go_back, trainer)
        return train(trainer, config, inputs, ema, supervision)
    except NotFinite:  # on all ranks
        supervision.finish()
        raise
    except (OSError, RuntimeError, CheckpointException) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise too_large(*memory, "and the GPU ran out of memory") from error
        if str(error).startswith("DataLoader worker"):  # killed: no mistake, for which a scheduler would not try again
            advice = "if memory ran out, lower num_workers; rerun to resume"
            print(f"error: {first_line(error).rstrip('. ')}; {advice}", file=sys.stderr, flush=True)
            return 1
        if not is_disk_full(error):
            raise
        where = getattr(error, "filename", None) or resumption.get("save_folder") or supervision.uri
        raise StorageError(f"{where}: no space left on the disk; free some, then rerun to resume") from error
    finally:
        for loader in inputs.loaders.values():
            loader.stop()  # Composer stops the training's only
        trainer.engine.close()  # trainer.close() would then wait for all ranks, and maybe only this one failed


def make_callbacks(
    config: Config,
    inputs: Inputs,
    guard: Guard,
    weights: EMAWeights | None,
    supervision: Supervision,
    record: Record,
    device: str,
) -> list[Callback]:
    """The callbacks of the run and of the config, in the order in which they are called."""
    saved = RunRecord(record, supervision.save_config)
    callbacks = [*filter(None, [weights]), guard, saved, *build("callbacks", config.callbacks)]
    if config.autoencoder.name is not None:
        callbacks.append(LatentCheck(config.data.remote or config.data.local))
    if config.loss_by_time is not None:
        callbacks.append(LossByTime(config.loss_by_time.bins, config.loss_by_time.interval))
    if config.sample_grid is not None or config.frechet is not None:
        from sit_composer.training.quality import quality_callbacks  # diffusers and torch-fidelity take seconds

        callbacks += quality_callbacks(config, inputs, weights, supervision, device)
    return callbacks


def make_record(config: Config, autoencoder: AutoencoderSpec, classes: list[str]) -> Record:
    """What the checkpoints say about the network."""
    names = averages(config)
    return Record(
        model=network_arguments(config.model),
        transport=transport_arguments(config),
        autoencoder=autoencoder,
        classes=list(classes),
        ema_decay=float(names[0]) if names and std_of(names[0]) is None else None,
        averages=None if is_plain(names) else names,
    )


def make_alignment(
    config: Config, network: SiT, transport: Transport, weights: EMAWeights | None, inputs: Inputs
) -> Alignment | None:
    """The algorithm of the alignment section, if there is one."""
    if config.alignment is None:
        return None
    if config.alignment.name == "sra":
        return SRA(config.alignment, network, transport, weights, config.precision, config.seed)
    width = inputs.teacher.width if inputs.teacher is not None else inputs.specs["data"].features["width"]
    return REPA(config.alignment, network.hidden_size, width, inputs.teacher, config.seed)


def make_optimizer(model: ComposerSiT, config: Config) -> torch.optim.Optimizer:
    """AdamW over the weights that are trained, or Muon with it."""
    # One fused pass over the weights, except with amp_fp16's scaler, which would have it divide the gradients too. None
    # lets torch choose foreach or a for-loop. A checkpoint holds the choice, so a run goes on as it began, to the bit.
    options = {"fused": config.precision != "amp_fp16" or None, **vars(config.optimizer)}
    name, momentum = options.pop("name"), options.pop("momentum")
    del options["clip_norm"]  # `Guard` clips
    if name == "muon":
        dtype = torch.bfloat16 if config.precision.endswith("bf16") else torch.float32
        return Muon(model, momentum=momentum, dtype=dtype, **options)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **options)


def build_trainer(config: Config, resumption: dict[str, Any], **parts: Any) -> Trainer:
    """Composer's Trainer of these parts, resumed if ``resumption`` says so."""
    arguments = {"load_exclude_algorithms": excluded_algorithms(), **config.trainer, **resumption}
    arguments.pop("autoresume", None)  # supervision does it
    arguments |= {"progress_bar": False, "log_to_console": False}  # `Progress` does what they say
    for name in ("console_log_interval", "console_stream"):
        arguments.pop(name, None)
    if not config.trust_checkpoint:
        guard_composer()
    parts |= {"run_name": config.run_name, "seed": config.seed}
    # `ComposerSiT` computes in bfloat16 by itself. Composer's own is refused on a CPU, and casts more than the network.
    parts["precision"] = "amp_fp16" if config.precision == "amp_fp16" else "fp32"
    try:
        return Trainer(**parts, parallelism_config=parallelism(config.fsdp, config.precision), **arguments)
    except REFUSALS as error:
        source = arguments.get("load_path") or config.trainer.get("save_folder") or "trainer"
        if error.args == ("state",):  # Composer's first key
            what = f"{source} is not a run's checkpoint; released weights can be sampled and exported, not trained on"
            raise ConfigError(f"trainer.load_path: {what}") from error
        raise ConfigError(f"trainer: {one_line(error)} ({source})") from error


def train(trainer: Trainer, config: Config, inputs: Inputs, ema: EMA | None, supervision: Supervision) -> int:
    """Trains to the end; or to a signal, and saves then. Returns the exit code."""
    name = config.run_name
    if trainer.state.timestamp >= trainer.state.max_duration:
        say(f"{name}: already trained, {int(trainer.state.timestamp.batch)} batches")
        return 0
    progress = make_progress(config, inputs.specs["data"].samples)
    trainer.state.callbacks.append(progress)
    try:
        trainer.fit()
    except Evicted as evicted:
        if ema is not None and ema.weights.swapped:  # an evaluation or sampling was left in its middle
            ema.weights.swap()
        saved, batch = supervision.save_evicted(trainer), int(trainer.state.timestamp.batch)
        where = f"saved at batch {batch}; the same command resumes" if saved else f"stopped at batch {batch}; not saved"
        say(f"{name}: {where}")
        return 128 + evicted.number
    supervision.finish()
    say(f"{name}: {progress.summary(trainer.state)}")
    if supervision.folder is not None and dist.get_global_rank() == 0:
        say(f"checkpoint: {supervision.uri}/{newest(supervision.folder)}")
        say(f"next: python -m sit_composer.sample {supervision.uri} --out samples")
    return 0


def make_metrics(config: Config, lines: dict[str, str], supervision: Supervision) -> MetricsLog:
    """What writes the run's metrics, on rank 0; ``lines`` are its summary's."""
    if dist.get_global_rank() > 0:
        return MetricsLog(None, {})
    peak = gpus.peak_flops(config.precision)
    attempt = {
        "about": {name: line for name, line in lines.items() if name not in ("run", "time", "checkpoints")},
        "host": socket.gethostname(),
        "ranks": dist.get_world_size(),
        "commit": commit(),
        "versions": versions("torch", "mosaicml", "mosaicml-streaming", "sit-composer"),
        "peak": None if peak is None else dist.get_world_size() * peak / sample_flops(config),  # images/s
    }
    return MetricsLog(supervision.append_metrics, attempt)


def make_progress(config: Config, samples: int) -> Progress:
    """The callback that shows how the run goes, as the trainer's keys for that say."""
    options, on_rank_0 = config.trainer, dist.get_global_rank() == 0
    bar = on_rank_0 and options.get("progress_bar", sys.stderr.isatty())
    lines = on_rank_0 and options.get("log_to_console", not bar)
    peak = gpus.peak_flops(config.precision)
    return Progress(
        estimate.steps(config, samples),
        save_every(config, samples) if options.get("save_folder") else None,
        None if peak is None else dist.get_world_size() * peak / sample_flops(config),
        bar,
        options.get("console_log_interval", "100ba") if lines else None,
        options.get("console_stream", "stderr"),
    )
