"""What `make.py` and the test of its fixtures have in common: the commands' arguments, and how results are compared."""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE",
}  # fmt: skip
MODIFIED = 1_700_000_000  # of the sources, in seconds since 1970
TRAINING = [
    "run_name=earlier", "data.local=shards", "data.global_batch_size=16", "data.flip=true", "data.num_workers=0",
    "model.hidden_size=16", "model.depth=1", "model.num_heads=2", "callbacks={}",
    "scheduler={linear: {t_max: 40ba}}", "trainer.progress_bar=false",
]  # fmt: skip
LATENT_TRAINING = [*TRAINING, "data.local=latents", "autoencoder.name=/proc/self/cwd/vae", "model.in_channels=4"]
PIXELS = ["/proc/self/cwd/digits.parquet"]
LATENTS = [*PIXELS, "--limit", "32", "--image-size", "16", "--latents", "--vae", "/proc/self/cwd/vae"]
CONVERSION = ["/proc/self/cwd/conversion/source"]
SAMPLING = ["--num-images", "8", "--sampling-method", "heun", "--num-steps", "5", "--cfg-scale", "1.5"]
SAMPLING += ["--batch-size", "4"]


def training(folder: str, stop: int, save: int, of: list[str] = TRAINING) -> list[str]:
    """The training command's overrides, for a run until a batch that saves every so many."""
    return [*of, f"trainer.save_folder={folder}", f"trainer.max_duration={stop}ba", f"trainer.save_interval={save}ba"]


def train(arguments: list[str], note: Callable[[float], float] = float) -> list[float]:
    """Runs the training command in this process. Gives each batch's loss, which Composer's files of them round.

    ``note`` gives something else for each batch, from its loss.
    """
    from composer.loggers import InMemoryLogger

    from sit_composer.train import main

    found = []

    def log_metrics(self: Any, metrics: dict[str, Any], step: int | None = None) -> None:
        found.extend([note(float(metrics["loss/train/total"]))] if "loss/train/total" in metrics else [])

    with patch.object(InMemoryLogger, "log_metrics", log_metrics):
        if main([*arguments, "loggers={in_memory: {}}"]):
            raise SystemExit("the training failed")
    return found


def settle(copy: Path) -> None:
    """Makes a copy of this folder what was left where it was made."""
    for file in copy.rglob("*.parquet"):
        os.utime(file, (MODIFIED, MODIFIED))


def hashes(folder: Path, pattern: str = "*") -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob(pattern))}


def load_checkpoint(place: Path, weights: str) -> Any:
    """The documented function of that name, wherever the code has it."""
    try:
        from sit_composer import load_checkpoint
    except ImportError:
        from sit_composer.checkpoint import load_checkpoint
    return load_checkpoint(str(place), weights)


def trained(place: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a checkpoint, by their names: the weights of both kinds, and the optimizer's."""
    kinds = {kind: load_checkpoint(place, kind).weights for kind in ("training", "ema")}
    return {**kinds, "optimizer": sharded_optimizer(place) if place.is_dir() else optimizer(place)}


def optimizer(file: Path) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {}

    def walk(node: Any, name: str) -> None:
        if isinstance(node, torch.Tensor):
            found[name] = node
        for key, value in node.items() if isinstance(node, dict) else ():
            walk(value, f"{name}/{key}")

    walk(torch.load(file, weights_only=False)["state"]["optimizers"], "")
    return found


def sharded_optimizer(folder: Path) -> dict[str, Any]:
    import torch
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    entries = {n: e for n, e in entries.items() if n.startswith("state.optimizers.") and hasattr(e, "size")}
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def bits(tensors: dict[str, Any]) -> str:
    """The sha256 of tensors' bytes, in the order of their names."""
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()


def processor() -> str:
    """What tells a processor from others."""
    keys = ("model name", "cpu family", "model", "stepping")
    text = Path("/proc/cpuinfo").read_text()
    return ", ".join(
        f"{key} {found[1]}" for key in keys if (found := re.search(rf"^{key}\s*: (.*)", text, re.MULTILINE))
    )
