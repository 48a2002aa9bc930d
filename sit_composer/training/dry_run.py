"""What a run would do and whether it could start, for `train.py --dry-run`. Nothing is trained or left behind.

It makes every check and prints each result on a line. It uses credentials and never prints them.
"""

import os
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sit_composer.autoencoder import find_subfolder
from sit_composer.checkpoint.folder import checkpoints, newest
from sit_composer.cli import is_remote
from sit_composer.config.composer_classes import build
from sit_composer.config.same_run import CONFIG, check_same_config
from sit_composer.config.schema import Config, ConfigError
from sit_composer.costs import estimate, tables
from sit_composer.data.spec import DataSpec
from sit_composer.data.stream import read_first_sample
from sit_composer.errors import USAGE, UserError, one_line
from sit_composer.storage import open_run_folder
from sit_composer.training.inputs import SECTIONS, check_gpu, check_specs, read_specs

PROBE = ".sit_composer-dry-run-"
SECRETS = ("KEY", "SECRET", "TOKEN", "PASSWORD")  # in the names of environment variables


def dry_run(config: Config) -> int:
    """Prints the run, its memory and its cost, and checks what it needs. Returns the exit code: 2 if a check failed.

    All ranks but the first do nothing and return 0.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0
    lines: list[str] = []
    failed: list[str] = []

    def make(name: str, check: Callable[..., str], *arguments: Any) -> None:
        try:
            result = f"ok: {check(*arguments)}"
        except Exception as error:  # of any kind: the remaining checks must still be made
            failed.append(name)
            prefix = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            result = f"failed: {prefix}{one_line(error)}"
        lines.append(f"  {name:<22} {result}")

    specs: dict[str, DataSpec] = {}
    for section in SECTIONS:
        if getattr(config, section) is not None:
            make(section, _data, config, section, specs)
    pixels = any(spec.kind == "pixels" for spec in specs.values())
    generates = config.sample_grid is not None or config.frechet is not None
    if config.autoencoder.name is not None and (pixels or generates):  # to encode images, or to decode them
        make("autoencoder.name", _autoencoder, config.autoencoder.name)
    if config.trainer.get("save_folder"):
        make("trainer.save_folder", lambda: _save_folder(save_folder(config)))
        make("earlier checkpoints", _earlier, config)
    for section in ("loggers", "callbacks", "algorithms", "scheduler"):
        if getattr(config, section):
            make(section, _build, section, getattr(config, section))
    if config.precision != "fp32":
        make("precision", check_gpu, config.precision)
    print(hide("\n".join([summary(config, specs), "", "checks:", *lines])), flush=True)
    return USAGE if failed else 0


def hide(text: str) -> str:
    """The text without the values of secret environment variables."""
    for name, value in os.environ.items():
        if len(value) >= 4 and any(word in name.upper() for word in SECRETS):
            text = text.replace(value, f"${name}")
    return text


def summary(config: Config, specs: dict[str, DataSpec]) -> str:
    """The resolved run, its checkpoints, its memory and its cost."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    batch, micro = config.data.global_batch_size, config.trainer.get("device_train_microbatch_size")
    spec = specs.get("data")
    samples = spec.samples if spec is not None else None
    lines = {"run": config.run_name, "network": tables.describe(config)}
    lines["objective"] = f"{config.transport.path_type}, {config.transport.prediction}"
    lines["data"] = config.data.remote or config.data.local
    if spec is not None:
        size = "" if spec.image_size is None else f" of {spec.image_size}²"
        lines["data"] += f": {spec.samples:,} {spec.kind}{size}, {spec.num_classes} classes"
    each = "" if micro is None else f", in microbatches of {micro}"
    lines["batch"] = f"{batch}: {batch // ranks} per rank, {ranks} rank{'s' if ranks > 1 else ''}{each}"
    lines["precision"] = f"{config.precision}, {'DDP' if config.fsdp is None else 'FSDP2'}"
    count = estimate.steps(config, samples)
    lines["length"] = str(config.trainer["max_duration"])
    if count is not None:
        lines["length"] += f": {count:,} steps" + (f", {count * batch / samples:.4g} epochs" if samples else "")
    lines["checkpoints"] = checkpoints_text(config, count, samples)
    encoder = estimate.encoder_memory(config) if spec is not None and spec.kind == "pixels" else (0, 0)
    cuda = config.precision != "fp32" or torch.cuda.is_available()
    counts = sorted({ranks, 8}) if cuda else [ranks]
    text = "\n".join(f"{name + ':':<13}{line}" for name, line in lines.items())
    text += "\n\n" + tables.memory_tables(config, counts, tables.MICROBATCHES, cuda, encoder)
    return text + "\n\n" + tables.cost_table(config, counts, 0.4, samples) if cuda else text


def checkpoints_text(config: Config, count: int | None, samples: int | None) -> str:
    """How many checkpoints there will be, how large, and where."""
    if not config.trainer.get("save_folder"):
        return "none: trainer.save_folder is not given"
    one = estimate.memory(replace(config, fsdp=None), 1, 1, cuda=False)  # a checkpoint holds the shards of all ranks
    size = (one.weights + one.optimizer + one.ema) / 1e9
    interval = config.trainer.get("save_interval", "1ep")  # Composer's default
    every = estimate.batches(interval, config.data.global_batch_size, samples)
    text = f"{size:.3g} GB, every {interval}"
    if count and every:
        number = -(-count // every)
        keep = config.trainer.get("save_num_checkpoints_to_keep", -1)
        kept = number if keep < 0 else min(keep, number)
        text += f": {number} in all, {kept} kept, {kept * size:.3g} GB"
    return f"{text}, in {save_folder(config)}"


def save_folder(config: Config) -> str:
    """trainer.save_folder, with the names that Composer puts into it. Composer itself would need a process group."""
    folder = str(config.trainer["save_folder"])
    names = {"run_name": config.run_name, "rank": 0, "local_rank": 0, "node_rank": 0}
    names |= {name: os.environ.get(name.upper(), 1) for name in ("world_size", "local_world_size")}
    try:
        return folder.format(**names)
    except (KeyError, IndexError, ValueError) as error:
        expected = ", ".join(names)
        raise ConfigError(f"trainer.save_folder: got {folder!r}, expected names of {expected}: {error}") from None


def _data(config: Config, section: str, specs: dict[str, DataSpec]) -> str:
    data = getattr(config, section)
    spec = read_specs(replace(config, data=data, eval_data=None))["data"]  # without what is wrong with the other one
    check_specs(config, {**specs, section: spec})
    specs[section] = spec
    shards, file = read_first_sample(spec, data.remote, data.local)
    return f"{spec.samples:,} samples in {shards} shard{'s' if shards > 1 else ''}; read {file}"


def _autoencoder(name: str) -> str:
    try:
        find_subfolder(name)
    except Exception as error:  # diffusers raises a dozen kinds
        raise ConfigError(f"{name}: no AutoencoderKL: {error}") from error
    return f"{name} has an AutoencoderKL's config (its weights are not loaded)"


def _save_folder(uri: str) -> str:
    folder, name = open_run_folder(uri), PROBE + uuid.uuid4().hex
    missing = [] if is_remote(uri) else [path for path in (Path(uri), *Path(uri).parents) if not path.exists()]
    folder.listing()  # first: in some stores, a write to a missing bucket creates it
    try:
        folder.write(name, b"")
        folder.delete([name])
    finally:
        for path in missing:
            if path.is_dir():
                path.rmdir()
    return f"wrote and deleted {'an object' if is_remote(uri) else 'a file'} in {uri}"


def _earlier(config: Config) -> str:
    folder = open_run_folder(save_folder(config))
    found = list(checkpoints(folder))
    if not config.trainer.get("autoresume"):
        if found and not config.trainer.get("save_overwrite"):
            advice = "set trainer.autoresume=true to resume, or choose another run_name"
            raise ConfigError(f"{folder.uri}: holds checkpoints ({found[-1]}); {advice}")
        return "none is resumed from"
    before = folder.read(CONFIG)
    if before is not None:
        check_same_config(config, before.decode(errors="replace"), f"{folder.uri}/{CONFIG}")
    name = newest(folder)
    return "none; the run begins anew" if name is None else f"resumes from {name}"


def _build(section: str, entries: dict) -> str:
    build(section, entries)  # only constructs them: they act on a Trainer, and there is none
    return ", ".join(entries)
