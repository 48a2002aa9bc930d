"""Builds what a config says and trains it."""

import sys
from pickle import UnpicklingError
from typing import Any

import torch
from composer import Trainer
from composer.utils import dist, reproducibility
from torch.distributed.checkpoint.api import CheckpointException

from sit_composer.algorithms.ema import EMA
from sit_composer.callbacks.run_record import RunRecord
from sit_composer.checkpoint.record import Record
from sit_composer.cli import say
from sit_composer.config.composer_classes import build
from sit_composer.config.schema import Config, ConfigError, network_arguments
from sit_composer.errors import one_line
from sit_composer.sit import SiT
from sit_composer.storage import StorageError, is_disk_full
from sit_composer.supervision.eviction import Evicted
from sit_composer.supervision.supervisor import Supervision, excluded_algorithms, guard_composer
from sit_composer.training.inputs import check_gpu, open_inputs
from sit_composer.training.model import ComposerSiT
from sit_composer.training.quality import quality_callbacks
from sit_composer.training.sharding import parallelism
from sit_composer.transport import Transport

# What Composer raises for arguments, folders and checkpoints that it can't use.
REFUSALS = (ValueError, TypeError, OSError, RuntimeError, EOFError, KeyError, UnpicklingError, CheckpointException)


def train(config: Config) -> bool:
    """Trains what the config describes. Returns False if a SIGTERM ended it, after saving; raises UserErrors."""
    if config.precision != "fp32":
        check_gpu(config.precision)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Longer than one rank may wait for a store while the others wait for it; Composer's default is five minutes.
    timeout = config.trainer.get("dist_timeout", max(1800.0, 2 * config.supervision.patience))
    dist.initialize_dist("gpu" if device == "cuda" else "cpu", timeout)
    supervision = Supervision(config, timeout)
    try:
        return fit(config, device, supervision)
    finally:
        supervision.close()


def fit(config: Config, device: str, supervision: Supervision) -> bool:
    """Does what `train` says, once the ranks are connected."""
    # --- Inputs ---
    resumption = supervision.start()
    inputs = open_inputs(config, device)

    # --- Network and objective ---
    reproducibility.seed_all(config.seed)  # alike on every rank: Composer doesn't broadcast rank 0's weights under FSDP
    network = SiT(**network_arguments(config.model))
    model = ComposerSiT(network, Transport(**vars(config.transport)), inputs.autoencoder, inputs.encoder)
    # One fused pass over the weights, where that was tried: on a GPU, but not on shards, nor with amp_fp16's scaler,
    # which would have it divide the gradients too. None lets torch choose foreach or a for-loop; False would not.
    fused = (device == "cuda" and config.fsdp is None and config.precision != "amp_fp16") or None
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, **vars(config.optimizer), fused=fused)

    ema = EMA(config.ema.decay) if config.ema is not None else None
    weights = ema.weights if ema is not None else None
    record = Record(
        model=network_arguments(config.model),
        transport=vars(config.transport),
        autoencoder=inputs.autoencoder,
        classes=list(inputs.specs["data"].classes),
        ema_decay=ema.decay if ema is not None else None,
    )
    # --- Trainer ---
    callbacks = [RunRecord(record, supervision.save_config), *build("callbacks", config.callbacks)]
    algorithms = build("algorithms", config.algorithms)
    if ema is not None:
        callbacks, algorithms = [weights, *callbacks], [ema, *algorithms]
    loggers = build("loggers", config.loggers)
    (scheduler,) = build("scheduler", config.scheduler or {"constant": {}})
    callbacks += quality_callbacks(config, inputs, weights, supervision.eviction.leave_if_told, device)
    trainer = build_trainer(
        config,
        resumption,
        model=model,
        optimizers=optimizer,
        schedulers=scheduler,
        train_dataloader=inputs.loaders["data"],
        eval_dataloader=inputs.loaders.get("eval_data"),
        algorithms=algorithms,
        callbacks=callbacks,
        loggers=loggers,
    )
    # --- Run ---
    try:
        supervision.attach(trainer)
        return run(trainer, config.run_name, ema, supervision)
    except (OSError, RuntimeError, CheckpointException) as error:
        if not is_disk_full(error):
            raise
        where = getattr(error, "filename", None) or resumption.get("save_folder") or supervision.uri
        raise StorageError(f"{where}: no space left on the disk; free some, then rerun to resume") from error
    finally:
        for loader in inputs.loaders.values():
            loader.stop()  # Composer stops the training's only
        trainer.engine.close()  # trainer.close() would then wait for all ranks, and maybe only this one failed


def build_trainer(config: Config, resumption: dict[str, Any], **parts: Any) -> Trainer:
    """Composer's Trainer of these parts, resumed if ``resumption`` says so."""
    arguments = {"load_exclude_algorithms": excluded_algorithms(), **config.trainer, **resumption}
    arguments.pop("autoresume", None)  # supervision does it
    if "progress_bar" not in arguments and not sys.stderr.isatty():  # in a file, a bar is a thousand lines
        arguments = {"progress_bar": False, "log_to_console": True, "console_log_interval": "100ba", **arguments}
    if not config.trust_checkpoint:
        guard_composer()
    parts |= {name: getattr(config, name) for name in ("run_name", "seed", "precision")}
    try:
        return Trainer(**parts, parallelism_config=parallelism(config.fsdp), **arguments)
    except REFUSALS as error:
        source = arguments.get("load_path") or config.trainer.get("save_folder") or "trainer"
        raise ConfigError(f"trainer: {one_line(error)} ({source})") from error


def run(trainer: Trainer, name: str, ema: EMA | None, supervision: Supervision) -> bool:
    """Trains to the end; returns False if a SIGTERM ended it, once that is saved."""
    if trainer.state.timestamp >= trainer.state.max_duration:
        say(f"{name}: already trained, {int(trainer.state.timestamp.batch)} batches")
        return True
    try:
        trainer.fit()
    except Evicted:
        if ema is not None and ema.weights.swapped:  # an evaluation or sampling was left in its middle
            ema.weights.swap()
        supervision.save_evicted(trainer)
        return False
    supervision.finish()
    return True
