"""Makes averages of any length from those in a run's checkpoints: see `sit_composer.posthoc_ema` and `averages`."""

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sit_composer.averages import combine, std_of
from sit_composer.checkpoint.export import write_folder
from sit_composer.checkpoint.folder import CHECKPOINT, checkpoints, fetch_checkpoint, is_complete
from sit_composer.checkpoint.load import load_checkpoint
from sit_composer.checkpoint.record import EXPORTED, Checkpoint, digest, on_meta
from sit_composer.checkpoint.safe_load import CheckpointError
from sit_composer.choices import POWER
from sit_composer.cli import is_remote
from sit_composer.errors import UserError
from sit_composer.storage import open_run_folder, open_store


def run(args: argparse.Namespace) -> None:
    """Writes a folder for each of ``args.std``; raises UserError if that is impossible."""
    found, stds = choose(args), sorted(set(args.std))
    last = max(found)
    sums: list[dict[str, Tensor]] = [{} for _ in stds]
    source: dict[str, str] = {}
    with fetched(found[last]) as path:
        newest = load_checkpoint(path, "ema")
        names = power_averages(newest)
        trained = {name for name, p in on_meta(**newest.record.model).named_parameters() if p.requires_grad}
        newest = replace(newest, weights={name: w for name, w in newest.weights.items() if name not in trained})
        shares, errors = solve(list(found), names, stds)  # (checkpoints, names, stds)
        bar = tqdm(found.items(), unit="checkpoint", desc="averages", disable=None)
        for (batch, place), of_names in zip(bar, shares, strict=True):
            with fetched(place) if batch != last else nullcontext(path) as one:
                source[Path(one).name] = digest(one)
                for name, of_stds in zip(names, of_names, strict=True):
                    part = load_checkpoint(one, f"ema:{name}")
                    if (part.step, part.record) != (batch, newest.record):
                        raise CheckpointError(f"{place}: of another run than {found[last]}, expected one of the same")
                    for total, share in zip(sums, of_stds, strict=True):
                        add(total, part.weights, float(share))
    for std, total, error in zip(stds, sums, errors, strict=True):
        name = f"{POWER}{std}"
        which = f"ema:{name}"
        made = replace(newest, weights={**total, **newest.weights}, which=which, record=newest.record.with_only(which))
        print(f"{name}: profile off by {error:.2%} with {len(names)} averages of {len(found)} checkpoints")
        notes = {"made_of": names, "profile_off_by": error}
        write_folder(Path(args.out) / f"{name}-{last}", {EXPORTED["ema"]: made}, {}, source, notes)


def choose(args: argparse.Namespace) -> dict[int, str]:
    """The checkpoints to use, by their batches, in order: all until ``args.at``, or until the last one."""
    found: dict[int, str] = {}
    for path in (path for place in args.checkpoints for path in snapshots(place)):
        other = found.setdefault(batch_of(path), path)
        if os.path.abspath(other) != os.path.abspath(path):
            raise UserError(f"{path}: of the same batch as {other}, expected the checkpoints of one run")
    last = args.at or max(found, default=0)
    if found and last not in found:
        raise UserError(f"--at: got {last}, expected a checkpoint's batch, {', '.join(map(str, sorted(found)))}")
    batches = sorted(batch for batch in found if 0 < batch <= last)
    if len(batches) < 2:
        got = f"got {len(batches)} complete checkpoint{'' if len(batches) == 1 else 's'} until batch {last}"
        advice = "keep more by trainer.save_interval and trainer.save_num_checkpoints_to_keep=-1"
        raise UserError(f"{args.checkpoints[0]}: {got}, expected at least 2; {advice}")
    return {batch: found[batch] for batch in batches}


def batch_of(path: str) -> int:
    """The batch in the name of a checkpoint."""
    match = CHECKPOINT.fullmatch(path.rstrip("/").rpartition("/")[2])
    if match is None:
        raise UserError(f"{path}: expected a run's folder, or checkpoints such as ep0-ba100-rank0.pt")
    return int(match[2])


def snapshots(place: str) -> Iterator[str]:
    """The complete checkpoints in a run's folder; of a checkpoint, or another file, itself."""
    if CHECKPOINT.fullmatch(place.rstrip("/").rpartition("/")[2]) or Path(place).is_file():
        yield place
        return
    folder = open_run_folder(place)
    sizes = folder.listing()
    for name in checkpoints(folder, sizes):
        if is_complete(folder, name, sizes):
            yield f"{place.rstrip('/')}/{name}"


@contextmanager
def fetched(path: str) -> Iterator[str]:
    """Within it, the local path of a checkpoint; a copy from an object store is deleted afterwards."""
    if not is_remote(path):
        yield path
        return
    parent, _, name = path.rstrip("/").rpartition("/")
    with tempfile.TemporaryDirectory(prefix="sit_composer-checkpoint-", ignore_cleanup_errors=True) as place:
        fetch_checkpoint(open_store(parent), name, Path(place))
        yield f"{place}/{name}"


def power_averages(checkpoint: Checkpoint) -> list[str]:
    """The names of the power-function averages of a checkpoint; UserError if there are none."""
    names = [name for name in checkpoint.record.averages or [] if std_of(name) is not None]
    if not names:
        held = ", ".join(checkpoint.record.averages or [str(checkpoint.record.ema_decay)])
        expected = "expected averages of power functions; train with ema.power=[0.05, 0.1]"
        raise UserError(f"{checkpoint.source}: got the averages {held}, {expected}")
    return names


def solve(batches: list[int], names: list[str], stds: list[float]) -> tuple[np.ndarray, list[float]]:
    """The coefficients (batches, names, stds) of averages at the last batch, and by how much their profiles are off."""
    times, given = [b for b in batches for _ in names], [float(std_of(name) or 0) for name in names] * len(batches)
    solved = [combine(times, given, std) for std in stds]
    shares = np.stack([coefficients for coefficients, _ in solved], axis=1)
    return shares.reshape(len(batches), len(names), len(stds)), [error for _, error in solved]


def add(total: dict[str, Tensor], weights: dict[str, Tensor], share: float) -> None:
    """total += share · weights; an empty total is 0."""
    if not total:
        total |= {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    torch._foreach_add_([total[name] for name in weights], list(weights.values()), alpha=share)
