"""Trains up to a batch again and shows it: `train.py … --replay BATCH` finds what made a loss or gradient not finite.

It begins with the last checkpoint before the batch, trains as the run did, and saves nothing. Blocks aren't compiled.
"""

import hashlib
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import Callback, Precision, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn

from sit_composer import randomness
from sit_composer.algorithms.ema import local_part
from sit_composer.checkpoint.folder import checkpoints, is_complete
from sit_composer.cli import say
from sit_composer.config.same_run import CONFIG, check_same_config
from sit_composer.config.schema import Config
from sit_composer.errors import UserError
from sit_composer.precision import resolve
from sit_composer.supervision.supervisor import Supervision, from_rank_0
from sit_composer.training.fit import fit
from sit_composer.training.quiet import silence

SHOWN = 16  # samples
NOT_SAVED: dict[str, Any] = {"sample_grid": None, "frechet": None, "eval_data": None, "callbacks": {}, "loggers": {}}


class Replayed(Exception):
    """The batch has been shown."""


def run(arguments: tuple[Config, int]) -> int:
    """Trains up to a batch of that number, the first being 1, and shows it; returns the exit code, or UserError."""
    config, batch = arguments
    silence()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.initialize_dist("gpu" if device == "cuda" else "cpu", config.trainer.get("dist_timeout", 1800.0))
    supervision = Replaying(config, batch)
    kept = {name: value for name, value in config.trainer.items() if not re.match("save_|autoresume$", name)}
    config = replace(config, trainer=kept, compile="false", precision=resolve(config.precision, device), **NOT_SAVED)
    try:
        if code := fit(config, device, None, supervision):  # Ctrl-C, or a killed worker
            return code
    except Replayed:
        return 0
    finally:
        supervision.close()
    raise UserError(f"--replay: got {batch}, but {config.run_name} ends before that batch")


class Replaying(Supervision):
    """Resumes from the last checkpoint before a batch, and leaves the run's folder alone, even while the run lives."""

    def __init__(self, config: Config, batch: int):
        super().__init__(config, 1800.0)
        self.batch = batch
        self.name: str | None = None
        where = hashlib.sha256(f"{self.staging} {batch} replayed".encode()).hexdigest()[:16]
        self.staging = Path(tempfile.gettempdir(), f"sit_composer-replay-{where}")

    def start(self) -> dict[str, Any]:
        """The Trainer's arguments that say what to resume from."""
        self.name = from_rank_0(self._find)
        say(f"{self.config.run_name}: replays batch {self.batch}, from {self.name or 'the start'}")
        if self.name is None:
            return {}
        return {"load_path": str(self._local(self.name)), "load_weights_only": False, "load_ignore_keys": None}

    def _find(self) -> str | None:
        if self.folder is None:
            return None
        saved, sizes = self.folder.read(CONFIG), self.folder.listing()
        if saved is not None:
            check_same_config(self.config, saved.decode(), f"{self.uri}/{CONFIG}")
        for name in reversed(checkpoints(self.folder, sizes)):
            if int(re.search(r"ba(\d+)", name)[1]) < self.batch and is_complete(self.folder, name, sizes):
                return name
        return None

    def last(self) -> str | None:
        return self.name

    def save_config(self) -> None:
        pass

    def append_metrics(self, content: bytes) -> None:
        pass

    def attach(self, trainer: Trainer) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        trainer.state.callbacks.insert(0, Replay(self.config.run_name, self.batch, self.config.on_nan == "stop"))


class Replay(Callback):
    """Shows a batch, or with ``first`` one before it that is not finite, then raises `Replayed`."""

    def __init__(self, run: str, batch: int, first: bool):
        self.run = run
        self.batch = batch
        self.first = first
        self._finite: list[tuple[str, Tensor]] = []  # of each module's output, in the order of the pass
        self._rows: list[Tensor] = []  # (4, N) of each microbatch: index, label, time and loss

    def fit_start(self, state: State, logger: Logger) -> None:
        network = unwrapped(state).network
        network.register_forward_pre_hook(lambda module, args: self._see("the noised latents", args[0]))
        for name, module in network.named_modules():
            if name:
                module.register_forward_hook(lambda module, args, out, name=name: self._see(name, out))

    def _see(self, name: str, out: Any) -> None:
        if isinstance(out, Tensor) and torch.is_grad_enabled():
            self._finite.append((name, torch.isfinite(out.detach()).all()))

    def batch_start(self, state: State, logger: Logger) -> None:
        self._finite.clear()
        self._rows.clear()

    def after_loss(self, state: State, logger: Logger) -> None:
        batch, transport = state.batch, unwrapped(state).transport
        times = transport.times(randomness.uniform(batch["key"], randomness.TIME))
        columns = batch["index"], batch["label"], times, state.outputs.detach()
        self._rows.append(torch.stack([column.double() for column in columns]))

    def after_train_batch(self, state: State, logger: Logger) -> None:
        batch = int(state.timestamp.batch) + 1
        gradients = {name: local_part(p.grad) for name, p in named_parameters(state) if p.grad is not None}
        finite = torch.stack([torch.isfinite(gradient).all() for gradient in gradients.values()]).float()
        dist.all_reduce(finite, reduce_operation="MIN")
        bad = [name for name, one in zip(gradients, finite.tolist(), strict=True) if not one]
        faulty = bad and state.precision != Precision.AMP_FP16  # whose loss scaling skips infinite gradients
        rows = torch.cat(self._rows, dim=1)
        first = next((name for name, finite in self._finite if not finite), None)  # in the order of the pass
        everything = dist.all_gather_object((rows.T.tolist(), first))
        samples = [sample for samples, _ in everything for sample in samples]
        if batch == self.batch or (self.first and (faulty or not all(math.isfinite(loss) for *_, loss in samples))):
            self._show(batch, samples, [module for _, module in everything], bad, len(gradients))
            raise Replayed

    def _show(
        self, batch: int, samples: list[list[float]], modules: list[str | None], bad: list[str], parameters: int
    ) -> None:
        samples.sort(key=lambda sample: -sample[3] if math.isfinite(sample[3]) else -math.inf)
        broken = sum(not math.isfinite(loss) for *_, loss in samples)
        lines = [f"{self.run}: batch {batch}: {len(samples)} samples, of which {broken} have a loss that is not finite"]
        lines.append(f"{'index':>10} {'label':>6} {'time':>9} {'loss':>12}")
        lines += [f"{int(i):>10} {int(label):>6} {t:>9.6f} {loss:>12.6g}" for i, label, t, loss in samples[:SHOWN]]
        lines += [f"and {len(samples) - SHOWN} with smaller losses"] if len(samples) > SHOWN else []
        ranked = [f"{module} (rank {rank})" for rank, module in enumerate(modules) if module is not None]
        lines.append(f"first output that is not finite: {', '.join(ranked) or 'none'}")
        # The backward pass comes to the last parameter first.
        which = f"{bad[-1]}; {len(bad)} of {parameters} parameters in all" if bad else "none"
        lines.append(f"first gradient that is not finite: {which}")
        say("\n".join(lines))


def unwrapped(state: State) -> Any:
    """The model, out of DDP's wrapper."""
    return getattr(state.model, "module", state.model)


def named_parameters(state: State) -> Iterator[tuple[str, nn.Parameter]]:
    """Those of the model, in the order of the forward pass."""
    return unwrapped(state).named_parameters()
