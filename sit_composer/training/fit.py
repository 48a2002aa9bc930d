"""Builds what a config says and trains it."""

import pickle
import sys
from dataclasses import replace
from functools import partial

import composer
import torch
from composer.utils import dist, reproducibility
from omegaconf import OmegaConf
from torch.distributed.checkpoint.api import CheckpointException

from sit_composer.algorithms.ema import EMA
from sit_composer.autoencoder import AutoencoderSpec, load_autoencoder
from sit_composer.callbacks.run_record import RunRecord
from sit_composer.cli import say
from sit_composer.config.composer_classes import build
from sit_composer.config.data_fits import check_data, check_latents
from sit_composer.config.same_run import CONFIG
from sit_composer.config.schema import Config, ConfigError, network_arguments
from sit_composer.data.loader import build_loader
from sit_composer.data.stream import load_spec
from sit_composer.sit import SiT
from sit_composer.storage import RunFolder, StorageError, is_disk_full
from sit_composer.supervision.eviction import Evicted
from sit_composer.supervision.guard import excluded_algorithms, guard_composer
from sit_composer.supervision.supervisor import Supervision
from sit_composer.training.model import ComposerSiT
from sit_composer.training.quality import quality
from sit_composer.training.sharding import parallelism
from sit_composer.transport import Transport


def train(config: Config) -> bool:
    """Builds what the config says, and trains it to the end: True; or until a SIGTERM, after which it saves: False.

    Raises:
        ConfigError: for what the libraries, the data's spec or an earlier checkpoint refuse.
        data.DataError: if a shard is missing or broken.
    """
    if config.precision != "fp32" and not torch.cuda.is_available():
        raise ConfigError(f"precision: got {config.precision}; there is no GPU here, and a CPU takes fp32")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Longer than what one rank may wait for a store while the others wait for it; Composer's default is five minutes.
    timeout = config.trainer.get("dist_timeout", max(1800.0, 2 * config.supervision.patience))
    dist.initialize_dist("gpu" if device == "cuda" else "cpu", timeout)
    supervision = Supervision(config, timeout)
    try:
        return fit(config, device, supervision)
    finally:
        supervision.close()


def fit(config: Config, device: str, supervision: "Supervision") -> bool:
    """What `train` does, once the ranks know of each other."""
    resumption = supervision.start()

    # --- Data, and what lies between it and the network ---
    specs = {s: load_spec(d.remote, d.local) for s in ("data", "eval_data") if (d := getattr(config, s)) is not None}
    if "eval_data" in specs and specs["eval_data"].classes != specs["data"].classes:
        raise ConfigError("eval_data.local: its classes are not data's, or not in the same order")
    encoder, latents = None, next((s for s in specs.values() if s.kind == "latents"), None)
    if config.autoencoder.name is not None and any(spec.kind == "pixels" for spec in specs.values()):
        encoder = load_autoencoder(config.autoencoder.name, 3, device)
        specs = {
            name: replace(spec, channels=encoder.picture_channels) if spec.kind == "pixels" else spec
            for name, spec in specs.items()
        }
    if latents is not None:
        autoencoder = AutoencoderSpec(**latents.autoencoder)
        for spec in specs.values():
            if spec.kind == "latents":  # check_data looks at the names, of which one may be spelled in two ways
                other = AutoencoderSpec(**{**spec.autoencoder, "name": autoencoder.name})
                if other != autoencoder:
                    raise ConfigError(f"eval_data.local: its latents are of {other}, data's of {autoencoder}")
        if encoder is not None and encoder.spec != autoencoder:
            raise ConfigError(f"autoencoder.name: {encoder.spec} is not what the latents are of, {autoencoder}")
    else:
        autoencoder = encoder.spec if encoder else AutoencoderSpec(name=None, channels=specs["data"].channels)
    loaders = {}
    for section, spec in specs.items():
        data = getattr(config, section)
        check_data(config, spec, section)
        image_size = data.image_size or config.model.input_size * autoencoder.downsample
        check_latents(config, autoencoder.channels, autoencoder.downsample, image_size, section)
        loaders[section] = build_loader(
            data.remote,
            data.local,
            spec=spec,
            batch_size=data.global_batch_size // dist.get_world_size(),
            image_size=image_size if spec.kind == "pixels" else None,
            flip=data.flip and section == "data",
            shuffle=data.shuffle and section == "data",
            seed=config.seed,
            num_workers=data.num_workers,
            drop_last=section == "data",
            predownload=data.predownload,
            cache_limit=data.cache_limit,
            # Streaming's own choice is the nodes that a run starts on, and so another order on every cluster.
            num_canonical_nodes=data.num_canonical_nodes,
        )

    # --- Network, objective and optimizer ---
    reproducibility.seed_all(config.seed)  # the same on every rank: Composer doesn't spread rank 0's weights under FSDP
    network = SiT(**network_arguments(config.model))
    transport = Transport(**vars(config.transport))
    model = ComposerSiT(network, transport, autoencoder, encoder)
    # On a GPU, one pass over the weights; neither on shards, nor where amp_fp16's scaler would have it divide the
    # gradients, too, was that tried. None, and not False, is torch's choice of the rest.
    fused = (device == "cuda" and config.fsdp is None and config.precision != "amp_fp16") or None
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, **vars(config.optimizer), fused=fused)

    # --- Composer ---
    ema = [EMA(config.ema.decay)] if config.ema is not None else []
    record = {
        "model": network_arguments(config.model),
        "transport": vars(config.transport),
        "autoencoder": autoencoder.as_dict(),
        "classes": list(specs["data"].classes),
        "ema_decay": config.ema.decay if config.ema is not None else None,
    }
    run_record = RunRecord(record, partial(save_config, config, supervision.folder) if supervision.folder else None)
    callbacks = [*(e.weights for e in ema), run_record, *build("callbacks", config.callbacks)]
    algorithms, loggers = [*ema, *build("algorithms", config.algorithms)], build("loggers", config.loggers)
    (scheduler,) = build("scheduler", config.scheduler or {"constant": {}})
    if config.sample_grid is not None or config.frechet is not None:
        decoder = encoder or load_autoencoder(config.autoencoder.name, autoencoder.channels, device)
        callbacks += quality(config, decoder, ema[0].weights if ema else None, supervision.eviction.leave_if_told)
    arguments = {"load_exclude_algorithms": excluded_algorithms(), **config.trainer, **resumption}
    if "progress_bar" not in arguments and not sys.stderr.isatty():  # a bar's thousand lines are no use in a file
        lines = {"progress_bar": False, "log_to_console": True, "console_log_interval": "100ba"}
        arguments = {**lines, **arguments}
    arguments.pop("autoresume", None)
    if not config.trust_checkpoint:
        guard_composer()
    try:
        trainer = composer.Trainer(
            model=model,
            optimizers=optimizer,
            schedulers=scheduler,
            train_dataloader=loaders["data"],
            eval_dataloader=loaders.get("eval_data"),
            algorithms=algorithms,
            callbacks=callbacks,
            loggers=loggers,
            run_name=config.run_name,
            seed=config.seed,
            precision=config.precision,
            parallelism_config=parallelism(config.fsdp),
            **arguments,
        )
    except (
        *(ValueError, TypeError, OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError),
        CheckpointException,
    ) as error:
        # Of what Composer raises for arguments, folders and checkpoints that it can't use.
        source = arguments.get("load_path") or config.trainer.get("save_folder") or "trainer"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"trainer: {reason} (of {source})") from error
    try:
        supervision.attach(trainer)
        if trainer.state.timestamp >= trainer.state.max_duration:
            say(f"{config.run_name} is trained: {int(trainer.state.timestamp.batch)} batches")
        else:
            try:
                trainer.fit()
            except Evicted:
                for average in ema:
                    if average.weights.swapped:  # it left an evaluation in its middle
                        average.weights.swap()
                supervision.eviction.save(trainer.state, trainer.logger)
                return False
            supervision.finish()
    except (OSError, RuntimeError, CheckpointException) as error:
        if not is_disk_full(error):
            raise
        where = getattr(error, "filename", None) or resumption.get("save_folder") or supervision.uri
        raise StorageError(f"{where}: no space left on the disk; with some, the same command resumes") from error
    finally:
        for loader in loaders.values():
            loader.stop()  # Composer stops those of the training alone
        trainer.engine.close()  # trainer.close() then waits for all ranks, of which this one alone may have failed
    return True


def save_config(config: Config, folder: "RunFolder") -> None:
    """Writes the resolved config beside the run's checkpoints."""
    if dist.get_global_rank() == 0:
        folder.write(CONFIG, OmegaConf.to_yaml(OmegaConf.structured(config)).encode())
