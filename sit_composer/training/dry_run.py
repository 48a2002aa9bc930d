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

from sit_composer.autoencoder import AutoencoderSpec, find_autoencoder
from sit_composer.checkpoint.folder import checkpoints, newest
from sit_composer.checkpoint.load import forget_download
from sit_composer.cli import hide, is_remote
from sit_composer.config.composer_classes import build
from sit_composer.config.ranks import microbatch, save_folder
from sit_composer.config.same_run import CONFIG, check_same_config
from sit_composer.config.schema import Config, ConfigError
from sit_composer.costs import estimate, tables
from sit_composer.costs.room import check_room
from sit_composer.data.spec import DataSpec
from sit_composer.data.stream import read_first_sample
from sit_composer.errors import USAGE, UserError, one_line
from sit_composer.precision import for_gpu, resolve
from sit_composer.storage import open_run_folder
from sit_composer.training.compiling import find_backend
from sit_composer.training.fit import make_record
from sit_composer.training.inputs import SECTIONS, check_specs, open_teacher, read_specs
from sit_composer.training.start import read_weights
from sit_composer.training.summary import as_text, summary

PROBE = ".sit_composer-dry-run-"


def run(config: Config) -> int:
    """Prints the run, its memory and its cost, and checks what it needs. Returns the exit code: 2 if a check failed.

    All ranks but the first do nothing and return 0.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.precision == "auto":
        config = replace(config, precision=resolve("auto", device))
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
    found: list[str] = []  # the checkpoint to resume from
    for section in SECTIONS:
        if getattr(config, section) is not None:
            make(section, _data, config, section, specs)
    pixels = any(spec.kind == "pixels" for spec in specs.values())
    generates = config.sample_grid is not None or config.frechet is not None
    if config.autoencoder.name is not None and (pixels or generates):  # to encode images, or to decode them
        make("autoencoder.name", _autoencoder, config.autoencoder.name)
    if "data" in specs and config.alignment is not None and config.alignment.name == "repa":
        make("alignment.teacher", _teacher, config, specs)
    if config.trainer.get("save_folder"):
        make("trainer.save_folder", lambda: _save_folder(save_folder(config)))
        make("earlier checkpoints", lambda: _earlier(config, found))
    if config.init_from is not None and "data" in specs:
        make("init_from", _start, config, specs["data"], found)
    for section in ("loggers", "callbacks", "algorithms", "scheduler"):
        if getattr(config, section):
            make(section, _build, section, getattr(config, section))
    make("precision", resolve, config.precision, device)
    if "data" in specs and not config.precision.startswith("amp"):  # which a GPU will run, elsewhere
        encodes = config.autoencoder.name is not None and specs["data"].kind == "pixels"
        make("memory", check_room, config, encodes, int(os.environ.get("WORLD_SIZE", 1)), microbatch(config))
    if config.compile.lower() != "false":
        make("compile", find_backend, config.compile, device)
    text = [as_text(summary(config, specs, *found or [None])), "", *cost_tables(config, specs), "checks:", *lines]
    print(hide("\n".join(text)), flush=True)
    return USAGE if failed else 0


def cost_tables(config: Config, specs: dict[str, DataSpec]) -> list[str]:
    """Memory by microbatch, for this device; and for GPUs the time on several of them."""
    ranks, spec = int(os.environ.get("WORLD_SIZE", 1)), specs.get("data")
    encoder = estimate.encoder_memory(config) if spec is not None and spec.kind == "pixels" else (0, 0)
    cuda = for_gpu(config.precision)
    counts = sorted({ranks, 8}) if cuda else [ranks]
    memory = tables.memory_tables(config, counts, tables.MICROBATCHES, cuda, encoder)
    costs = [tables.cost_table(config, counts, 0.4, spec.samples if spec is not None else None), ""] if cuda else []
    return [memory, "", *costs]


def _data(config: Config, section: str, specs: dict[str, DataSpec]) -> str:
    data = getattr(config, section)
    spec = read_specs(replace(config, data=data, eval_data=None))["data"]  # without what is wrong with the other one
    check_specs(config, {**specs, section: spec})
    specs[section] = spec
    shards, file = read_first_sample(spec, data.remote, data.local)
    return f"{spec.samples:,} samples in {shards} shard{'s' if shards > 1 else ''}; read {file}"


def _autoencoder(name: str) -> str:
    try:
        kind = find_autoencoder(name)[1]
    except Exception as error:  # diffusers raises a dozen kinds
        raise ConfigError(f"{name}: no autoencoder: {error}") from error
    return f"{name} has an {kind}'s config (its weights are not loaded)"


def _teacher(config: Config, specs: dict[str, DataSpec]) -> str:
    teacher = open_teacher(config, specs, "cpu")
    if teacher is None:
        return f"the shards hold features of {specs['data'].features['teacher']}"
    return f"{teacher.name} gives {teacher.grid}x{teacher.grid} tokens of width {teacher.width}"


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


def _earlier(config: Config, resumed: list[str]) -> str:
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
    if name is None:
        return "none; the run starts anew"
    resumed.append(name)
    return f"resumes from {name}"


def _start(config: Config, spec: DataSpec, resumed: list[str]) -> str:
    if resumed:
        return f"not read, as the run resumes from {resumed[0]}"
    # If images are encoded in training, what their latents are is only known once the autoencoder is loaded.
    known = spec.kind == "latents" or config.autoencoder.name is None
    autoencoder = AutoencoderSpec(**(spec.autoencoder or {"name": None, "channels": spec.channels})) if known else None
    checkpoint, lines = read_weights(config, make_record(config, autoencoder, spec.classes))
    forget_download(checkpoint)
    return "; ".join(" ".join(line.split()) for line in lines)


def _build(section: str, entries: dict) -> str:
    build(section, entries)  # only constructs them: they act on a Trainer, and there is none
    return ", ".join(entries)
