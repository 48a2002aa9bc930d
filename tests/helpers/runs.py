"""Runs of the quickstart's YAML on a tiny network, and their bits."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch

from sit_composer import train
from sit_composer.checkpoint.folder import fetch_checkpoint, newest
from sit_composer.storage import S3Folder
from sit_composer.supervision import lease
from tests.helpers.paths import ROOT

QUICKSTART = str(ROOT / "yamls" / "quickstart.yaml")
COMPOSER = os.path.join(os.path.dirname(sys.executable), "composer")
TINY = ["model.hidden_size=32", "model.depth=1", "model.num_heads=2"]
REMOTE = ["trainer.save_folder=s3://sit/runs/{run_name}", "trainer.save_interval=2ba", "data.flip=true"]
FOLDER = "s3://sit/runs/quickstart"


def train_at_once(arguments: list[str], command: Callable[[list[str]], int] = train.main) -> int:
    """The training command's exit code. At its start it looks for another run's beats for a twentieth of a second."""
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: time.sleep(seconds / 20))
    with patch.object(lease, "time", clock):
        return command(arguments)


def runner(shards: Path, top: Path) -> Callable[..., int]:
    """Returns a function that trains a tiny network on the shards in a folder of top; it returns the exit code."""

    def run(*overrides: str, folder: str = "run") -> int:
        places = [f"data.local={shards}", f"trainer.save_folder={top / folder}"]
        rest = ["trainer.progress_bar=false", "trainer.save_interval=10ba", "scheduler={constant: {}}"]
        return train_at_once([QUICKSTART, *TINY, *places, *rest, *overrides])

    return run


def state_of(folder) -> dict:
    return torch.load(folder / "latest-rank0.pt", weights_only=False)["state"]


def differences(a, b, path="") -> list[str]:
    """Where two nested states differ in a bit; times on the clock aside."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return [d for k in a if "wct" not in str(k) for d in differences(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, list | tuple):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(np.all(a == b))
    return [] if same else [path]


def bits(folder) -> dict:
    state = state_of(folder)
    average = state["callbacks"]["EMAWeights"]
    names = ("model", "optimizers", "schedulers", "timestamp", "dataset_state")
    rng = torch.load(folder / "latest-rank0.pt", weights_only=False)["rng"]
    return {**{name: state[name] for name in names}, "ema": average, "rng": rng}


def fetched(tmp_path) -> dict:
    folder, place = S3Folder(FOLDER), tmp_path / "fetched"
    name = newest(folder)
    fetch_checkpoint(folder, name, place)
    (place / "latest-rank0.pt").unlink(missing_ok=True)
    (place / "latest-rank0.pt").symlink_to(name)
    return bits(place)


def launch(ranks: int, shards: Path, top: Path, *steps: str, composer: str = COMPOSER) -> None:
    """Runs of tests.helpers.resume_bits, on that many ranks, with the launcher of an environment."""
    command = [composer, "-n", str(ranks), "-m", "tests.helpers.resume_bits", str(shards), str(top), *steps]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def losses(folder: Path, *batches: int) -> list[float]:
    """Every batch's, in order; a resumed run logs only the batches that it trains."""
    logs = [Path(f"{folder}-{n}.log").read_text() for n in batches]
    return [float(loss) for log in logs for loss in re.findall(r"loss/train/total: (\S+)", log)]
