"""What a run would do, and whether it could: for `train.py --dry-run`. Nothing is trained, and nothing is left behind.

Every check is made, and every fault told in its line; credentials are used, and never printed.
"""

import os
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from sit_composer import memory
from sit_composer.autoencoder import find_subfolder
from sit_composer.checkpoint.folder import checkpoints, newest
from sit_composer.config.composer_classes import build
from sit_composer.config.data_fits import check_data, check_latents
from sit_composer.config.same_run import CONFIG, check_same_config
from sit_composer.config.schema import Config, ConfigError, DataConfig
from sit_composer.data.spec import DataSpec
from sit_composer.data.stream import CheckedStream, DataError, load_spec, source
from sit_composer.errors import UserError
from sit_composer.storage import S3Folder, open_run_folder

PROBE = ".sit_composer-dry-run-"
SECRETS = ("KEY", "SECRET", "TOKEN", "PASSWORD")  # in the names of environment variables


def dry_run(config: Config) -> int:
    """Prints the run, its memory and its cost, and checks what it needs. Returns the exit code: 0, or 2 for a fault.

    Of several ranks, only the first does it; the others return 0.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0
    checks = Checks()
    specs: dict[str, DataSpec] = {}
    for section in ("data", "eval_data"):
        if getattr(config, section) is not None:
            checks.make(section, lambda section=section: _data(config, section, specs))
    if needs_autoencoder(config, specs):
        checks.make("autoencoder.name", lambda: _autoencoder(config))
    if config.trainer.get("save_folder"):
        checks.make("trainer.save_folder", lambda: _save_folder(save_folder(config)))
        checks.make("earlier checkpoints", lambda: _earlier(config))
    for section in ("loggers", "callbacks", "algorithms", "scheduler"):
        if getattr(config, section):
            checks.make(section, lambda section=section: _build(section, getattr(config, section)))
    if config.precision != "fp32":
        checks.make("precision", lambda: _gpu(config))
    print(hide(summary(config, specs)) + "\n\nchecks:\n" + "\n".join(checks.lines), flush=True)
    return 2 if checks.failed else 0


class Checks:
    """Makes checks, and keeps a line of each."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failed = 0

    def make(self, name: str, check: Callable[[], str]) -> None:
        """Calls check, which returns what it saw, or raises."""
        try:
            self.lines.append(hide(f"  {name:<22} ok: {check()}"))
        except Exception as error:  # whatever it is, the checks behind it are to be made
            self.failed += 1
            reason = " ".join(str(error).split()) or type(error).__name__
            prefix = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self.lines.append(hide(f"  {name:<22} failed: {prefix}{reason}"))


def hide(text: str) -> str:
    """The text without the values of secret environment variables."""
    for name, value in os.environ.items():
        if len(value) >= 4 and any(word in name.upper() for word in SECRETS):
            text = text.replace(value, f"${name}")
    return text


# --- What the run is ---


def summary(config: Config, specs: dict[str, DataSpec]) -> str:
    """The resolved run, its checkpoints, its memory and its cost."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    batch, micro = config.data.global_batch_size, config.trainer.get("device_train_microbatch_size")
    spec = specs.get("data")
    samples = spec.samples if spec is not None else None
    lines = {"run": config.run_name, "network": memory.describe(config)}
    lines["objective"] = f"{config.transport.path_type}, {config.transport.prediction}"
    lines["data"] = config.data.remote or config.data.local
    if spec is not None:
        size = "" if spec.image_size is None else f" of {spec.image_size}²"
        lines["data"] += f": {spec.samples:,} {spec.kind}{size}, {spec.num_classes} classes"
    each = "" if micro is None else f", in microbatches of {micro}"
    lines["batch"] = f"{batch}: {batch // ranks} on each of {ranks} rank{'s' * (ranks > 1)}{each}"
    lines["precision"] = f"{config.precision}, {'DDP' if config.fsdp is None else 'FSDP2'}"
    count = memory.steps(config, samples)
    epochs = f", {count * batch / samples:.4g} epochs" if count is not None and samples else ""
    lines["length"] = f"{config.trainer['max_duration']}{'' if count is None else f': {count:,} steps'}{epochs}"
    lines["checkpoints"] = checkpoints_text(config, count, samples)
    encoder = (0, 0)
    if spec is not None and spec.kind == "pixels" and config.autoencoder.name is not None:
        encoder = memory.encoder_memory(config)
    cuda = config.precision != "fp32" or _has_gpu()
    counts = sorted({ranks, 8}) if cuda else [ranks]
    tables = memory.memory_tables(config, counts, list(memory.MICROBATCHES), cuda, encoder)
    if cuda:
        tables += "\n\n" + memory.cost_table(config, counts, 0.4, samples)
    return "\n".join(f"{name + ':':<13}{text}" for name, text in lines.items()) + f"\n\n{tables}"


def checkpoints_text(config: Config, count: int | None, samples: int | None) -> str:
    """How many checkpoints there will be, how large, and where."""
    if not config.trainer.get("save_folder"):
        return "none: trainer.save_folder is not given"
    one = memory.memory(replace(config, fsdp=None), 1, 1, cuda=False)  # in a checkpoint, all shards are
    size = (one.weights + one.optimizer + one.ema) / 1e9
    interval = config.trainer.get("save_interval", "1ep")  # Composer's default
    every = memory.batches(interval, config.data.global_batch_size, samples)
    text = f"{size:.3g} GB, every {interval}"
    if count and every:
        number = -(-count // every)
        keep = config.trainer.get("save_num_checkpoints_to_keep", -1)
        kept = number if keep < 0 else min(keep, number)
        text += f": {number} in all, {kept} kept, {kept * size:.3g} GB"
    return f"{text}, in {save_folder(config)}"


def save_folder(config: Config) -> str:
    """trainer.save_folder, with the names that Composer puts into it."""
    names = {"run_name": config.run_name, "rank": 0, "local_rank": 0, "node_rank": 0}
    names |= {name: os.environ.get(name.upper(), 1) for name in ("world_size", "local_world_size")}
    try:
        return str(config.trainer["save_folder"]).format(**names)
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"trainer.save_folder: got {config.trainer['save_folder']!r}; no such name: {error}"
        ) from None


# --- Whether it could be ---


def needs_autoencoder(config: Config, specs: dict[str, DataSpec]) -> bool:
    """Whether the autoencoder's weights are loaded: to encode pictures, or to draw some."""
    pixels = any(spec.kind == "pixels" for spec in specs.values())
    draws = config.sample_grid is not None or config.frechet is not None
    return config.autoencoder.name is not None and (pixels or draws)


def _data(config: Config, section: str, specs: dict[str, DataSpec]) -> str:
    data: DataConfig = getattr(config, section)
    spec = load_spec(data.remote, data.local)
    check_data(config, spec, section)
    if "data" in specs and spec.classes != specs["data"].classes:
        raise ConfigError(f"{section}.local: its classes are not data's, or not in the same order")
    if spec.kind == "latents":
        theirs = spec.autoencoder
        side = data.image_size or config.model.input_size * theirs["downsample"]
        check_latents(config, theirs["channels"], theirs["downsample"], side, section)
    specs[section] = spec
    with tempfile.TemporaryDirectory() as folder:
        remote = source(data.remote, data.local)
        options = {"download_retry": 2, "download_timeout": 60.0, "validate_hash": None, "keep_zip": False}
        stream = CheckedStream(spec, remote=remote, local=folder if remote else data.local, **options)
        stream.apply_default({**options, "split": None})
        shards = stream.get_shards(None, False)
        if not shards:
            raise DataError(f"{remote or data.local} has no shard")
        if remote is not None:
            stream.prepare_shard(shards[0])
        elif fault := stream.fault(shards[0]):
            raise DataError(fault)
        shards[0].get_item(0)
        where = stream.where(shards[0])
    return f"{spec.samples:,} samples in {len(shards)} shard{'s' * (len(shards) > 1)}; read {where}"


def _autoencoder(config: Config) -> str:
    name = config.autoencoder.name
    try:
        find_subfolder(name)
    except Exception as error:  # diffusers raises a dozen kinds
        raise ConfigError(f"no AutoencoderKL of the name {name!r}: {error}") from error
    return f"{name} has an AutoencoderKL's config (its weights are not loaded)"


def _save_folder(uri: str) -> str:
    folder = open_run_folder(uri)
    if isinstance(folder, S3Folder):
        folder.listing()  # first: a write to a bucket that isn't there makes one, in some stores
        name = PROBE + uuid.uuid4().hex
        folder.write(name, b"")
        folder.delete([name])
        return f"wrote and deleted an object in {uri}"
    made = []
    for path in [Path(uri), *Path(uri).parents]:
        if path.exists():
            break
        made.insert(0, path)
    try:
        Path(uri).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=uri, prefix=PROBE):
            pass
    except OSError as error:
        raise ConfigError(f"{error.filename or uri}: {error.strerror or error}") from error
    finally:
        for path in reversed(made):
            if path.is_dir():
                path.rmdir()
    return f"wrote and deleted a file in {uri}"


def _earlier(config: Config) -> str:
    folder = open_run_folder(save_folder(config))
    found = list(checkpoints(folder))
    if not config.trainer.get("autoresume"):
        if found and not config.trainer.get("save_overwrite"):
            raise ConfigError(
                f"{folder.uri} holds some ({found[-1]}); trainer.autoresume=true goes on from there, or choose another "
                "run_name"
            )
        return "none is resumed from"
    before = folder.read(CONFIG)
    if before is not None:
        check_same_config(config, before.decode(errors="replace"), f"{folder.uri}/{CONFIG}")
    name = newest(folder)
    return "none; the run begins anew" if name is None else f"resumes from {name}"


def _build(section: str, entries: dict) -> str:
    build(section, entries)  # they begin with the Trainer, which there is none of
    return ", ".join(entries)


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _gpu(config: Config) -> str:
    if not _has_gpu():
        raise ConfigError(f"got {config.precision}; there is no GPU here, and a CPU takes fp32")
    return f"{config.precision} on {torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
