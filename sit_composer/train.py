"""Trains a SiT:   composer [-n RANKS] sit_composer/train.py YAML [key=value ...]

Run the same command again to resume, or to be told that the run is finished.
"""

import argparse
import os
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

# A script run by its path finds its own folder first, where config.py, data.py and others would shadow modules of
# those names in other packages.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]

from omegaconf import OmegaConf

from sit_composer.checks import CONFIG, check, check_data, check_latents, check_same_run, local_spec
from sit_composer.config import Config, ConfigError, DrawingConfig, documentation, load_config, network_arguments
from sit_composer.errors import UserError
from sit_composer.names import EVICTED

if TYPE_CHECKING:
    from composer.core import Callback

    from sit_composer.autoencoder import Autoencoder
    from sit_composer.ema import EMAWeights
    from sit_composer.storage import RunFolder
    from sit_composer.supervision import Supervision


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 when trained, 2 for a mistake in the config or the data that it names."""
    parser = argparse.ArgumentParser(
        prog="composer sit_composer/train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys of the YAML, with defaults (???: must be given):\n" + documentation(),
    )
    parser.add_argument("yaml", help="the run's config, such as yamls/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="go over the YAML's, such as data.local=/data"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the run, its memory and its cost, check what it needs, and start nothing",
    )
    args = parser.parse_intermixed_args(argv)
    try:
        config = load_config(args.yaml, args.overrides)
        check(config)
        if args.dry_run:
            from sit_composer.dry_run import dry_run

            return dry_run(config)
        check_same_run(config)
        for section in ("data", "eval_data"):
            data = getattr(config, section)
            if data is not None and (spec := local_spec(data, section)) is not None:
                check_data(config, spec, section)
        if not train(config):  # from here on, torch is imported
            say(f"{config.run_name}: told to end; saved. The same command goes on")
            return EVICTED
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes, from the last checkpoint", file=sys.stderr)
        return 130
    except UserError as error:
        if os.environ.get("RANK", "0") != "0" and "torch" not in sys.modules:
            # All ranks of a node have the same to say. Let rank 0 say it: the launcher ends the others when the first
            # one exits, and would make rank 0's "terminated" its own exit code. Another node may have its own mistake.
            time.sleep(60)
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train(config: Config) -> bool:
    """Builds what the config says, and trains it to the end: True; or until a SIGTERM, after which it saves: False.

    Raises:
        ConfigError: for what the libraries, the data's spec or an earlier checkpoint refuse.
        data.DataError: if a shard is missing or broken.
    """
    import torch
    from composer.utils import dist

    from sit_composer.supervision import Supervision

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
    import composer
    import torch
    from composer.utils import dist, reproducibility
    from torch.distributed.checkpoint.api import CheckpointException

    from sit_composer.autoencoder import AutoencoderSpec, load_autoencoder
    from sit_composer.callbacks import RunRecord
    from sit_composer.data import build_loader, load_spec
    from sit_composer.ema import EMA
    from sit_composer.eviction import Evicted
    from sit_composer.model import ComposerSiT
    from sit_composer.safe_load import guard_composer
    from sit_composer.sharding import parallelism
    from sit_composer.sit import SiT
    from sit_composer.storage import StorageError, is_disk_full
    from sit_composer.supervision import excluded_algorithms
    from sit_composer.transport import Transport

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


def quality(
    config: Config, autoencoder: "Autoencoder", weights: "EMAWeights | None", before_each: Callable[[], None]
) -> "list[Callback]":
    """The callbacks that draw pictures during training: to look at, and to measure."""
    import torch
    from composer.utils import dist, format_name_with_dist

    from sit_composer.callbacks import Drawing, FrechetDistance, SampleGrid
    from sit_composer.evaluate import check_statistics
    from sit_composer.features import load_extractor
    from sit_composer.generate import Sampling
    from sit_composer.picture_sets import STATISTICS, open_set

    def drawing(section: DrawingConfig, labels: list[int]) -> Drawing:
        options = {name: getattr(section, name) for name in ("sampling_method", "num_steps", "cfg_scale", "seed")}
        return Drawing(labels, Sampling(**options), autoencoder, weights, section.batch_size, before_each)

    callbacks = []
    grid, frechet, classes = config.sample_grid, config.frechet, config.model.num_classes
    folder = config.trainer.get("save_folder")
    folder = None if folder is None or "://" in folder else format_name_with_dist(folder, config.run_name)
    if grid is not None:
        chosen = grid.labels or [i * classes // 10 for i in range(min(10, classes))]
        labels = [label for label in chosen for _ in range(grid.per_class)]
        callbacks.append(SampleGrid(grid.interval, drawing(grid, labels), folder and f"{folder}/samples"))
    if frechet is not None:
        with dist.run_local_rank_zero_first():  # it fetches Inception's weights
            try:
                extractor = load_extractor(frechet.features)
            except UserError as error:
                raise ConfigError(str(error).replace("--features", "frechet.features")) from error
        reference = open_set(frechet.reference)
        check_statistics(reference, extractor)
        if "mu" not in reference.statistics:
            raise ConfigError(
                f"frechet.reference: {frechet.reference} has no statistics of {frechet.features}; "
                "sit_composer.evaluate --save-statistics writes some"
            )
        side = config.model.input_size * autoencoder.spec.downsample
        probe = extractor(torch.zeros(2, 3, side, side, dtype=torch.uint8))["features"]  # now, not in ten hours
        if reference.statistics["mu"].shape != probe.shape[1:]:
            raise ConfigError(
                f"frechet.reference: {frechet.reference} is of {reference.statistics['mu'].size} features; "
                f"{frechet.features} gives {probe.shape[1]}"
            )
        labels = [i * classes // frechet.num_images for i in range(frechet.num_images)]
        real = tuple(reference.statistics[name] for name in STATISTICS["features"])
        file = folder and f"{folder}/frechet.json"
        callbacks.append(FrechetDistance(frechet.interval, drawing(frechet, labels), extractor, real, file))
    return callbacks


def build(section: str, entries: dict) -> list:
    """The objects of Composer's that a section of the YAML names."""
    import importlib

    from sit_composer.composer_api import find_class

    built = []
    for name, arguments in entries.items():
        class_name, module = find_class(section, name)
        try:
            built.append(getattr(importlib.import_module(module), class_name)(**(arguments or {})))
        except Exception as error:  # whatever the class thinks of its arguments, or of a package that it misses
            raise ConfigError(f"{section}.{name}: {' '.join(str(error).split())}") from error
    return built


def save_config(config: Config, folder: "RunFolder") -> None:
    """Writes the resolved config beside the run's checkpoints."""
    from composer.utils import dist

    if dist.get_global_rank() == 0:
        folder.write(CONFIG, OmegaConf.to_yaml(OmegaConf.structured(config)).encode())


def say(message: str) -> None:
    """Prints a line, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


if __name__ == "__main__":
    sys.exit(main())
