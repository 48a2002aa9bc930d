"""Keeps a loss or gradient that is not finite away from the weights and checkpoints; clips gradients by their norm.

No step waits for the device: what is skipped is decided there, and the losses and norms are read at every 100th batch
and before each save, at the same batches on all ranks. Where an optimizer can't skip on the device, and for rollback,
the host reads one number per step.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from composer.core import Callback, Precision, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from sit_composer.algorithms.ema import EMAWeights, local_part
from sit_composer.cli import say
from sit_composer.errors import UserError

INTERVAL = 100  # batches between two readings
NORM_INTERVAL = 10  # batches between two norms, where they are only logged
EPSILON = 1e-6  # torch's, in torch.nn.utils.clip_grad_norm_


class NotFinite(UserError):
    """Training can't continue, as a loss, a gradient or the weights are not finite."""


class Guard(Callback):
    """``on_nan`` and ``on_nan_limit`` of the config: stop, skip or rollback; and ``clip_norm``.

    A batch that is skipped leaves weights, optimizer and averages as they were, on all ranks alike; time, data and
    schedule go on. The gradients of all ranks g are multiplied by min(1, clip_norm / (‖g‖ + 1e-6)), as torch does
    (Pascanu et al., arXiv 1211.5063, algorithm 1).
    """

    def __init__(self, on_nan: str, limit: int, clip_norm: float | None, weights: EMAWeights | None, run: str):
        self.on_nan = on_nan
        self.limit = limit
        self.clip_norm = clip_norm
        self.weights = weights
        self.run = run
        self.last_checkpoint: Callable[[], str | None] = lambda: None
        self.go_back: Callable[[], str | None] = lambda: None  # to the last checkpoint's weights; returns its name
        self.skipped = self.in_a_row = self.rollbacks = 0
        self._copies = 1.0  # ranks that hold the same part of the gradients
        self._on_device = False  # whether the optimizer skips there
        self._scaled = False  # float16's loss scaling skips infinite gradients by itself, which are no fault
        self._own: list[Tensor] = []  # of the batches since the last reading: this rank's losses,
        self._losses: list[Tensor] = []  # all ranks',
        self._norms: list[Tensor] = []  # and the gradients' norms, where they are needed

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "rollbacks": self.rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row, self.rollbacks = state["skipped"], state["in_a_row"], state["rollbacks"]

    def fit_start(self, state: State, logger: Logger) -> None:
        sharded = next((p for p in state.model.parameters() if isinstance(p, DTensor)), None)
        places = enumerate(sharded.placements) if sharded is not None else ()
        shards = math.prod(sharded.device_mesh.size(axis) for axis, placement in places if placement.is_shard())
        self._copies = dist.get_world_size() / shards
        groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
        self._scaled = state.precision == Precision.AMP_FP16
        fused = all(group.get("fused") for group in groups) and isinstance(state.optimizers[0], torch.optim.AdamW)
        self._on_device = self.on_nan == "skip" and fused and not self._scaled

    def before_train_batch(self, state: State, logger: Logger) -> None:
        read = len(self._losses)  # automatic microbatching repeats a batch that has run out of memory
        del self._own[read:], self._norms[read:]

    def after_train_batch(self, state: State, logger: Logger) -> None:
        loss = state.total_loss_dict["loss/train/total"]
        self._own.append(loss.clone())  # the Trainer sums over the ranks in place
        only_logged = self.on_nan == "stop" and self.clip_norm is None
        if only_logged and (self._scaled or int(state.timestamp.batch) % NORM_INTERVAL):
            return
        gradients = [local_part(p.grad) for p in state.model.parameters() if p.grad is not None]
        norm, loss = total_norm(gradients), loss.squeeze()
        if dist.get_world_size() > 1:
            both = torch.stack([norm.square() / self._copies, loss])
            dist.all_reduce(both)
            norm, loss = both[0].sqrt(), both[1]
        if only_logged:
            return logger.log_metrics({"gradient/norm": norm})
        self._norms.append(norm)
        if self.on_nan != "stop":
            self._keep(state, torch.isfinite(loss if self._scaled else loss + norm))
        if self.clip_norm is not None:
            torch._foreach_mul_(gradients, (self.clip_norm / (norm + EPSILON)).clamp(max=1.0))

    def _keep(self, state: State, finite: Tensor) -> None:
        """Lets the optimizer and the averages skip this batch unless it is finite."""
        if self.weights is not None:
            self.weights.keep = finite.float()
        for optimizer in state.optimizers:
            if self._on_device:
                optimizer.found_inf = 1 - finite.float()  # as torch's GradScaler does
            elif not finite:  # which waits for the device
                optimizer.zero_grad(set_to_none=True)

    def batch_end(self, state: State, logger: Logger) -> None:
        self._losses.append(state.total_loss_dict["loss/train/total"])
        if self.on_nan == "rollback" or int(state.timestamp.batch) % INTERVAL == 0:
            self.read(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        self.read(state, logger)

    def before_save(self, state: State, logger: Logger) -> None:
        """Raises `NotFinite`, or goes back to the last checkpoint's, if the weights or averages are not finite."""
        self.read(state, logger)
        averages = self.weights.averages.values() if self.weights is not None else ()
        tensors = [*state.model.parameters(), *(p for average in averages for p in average.values())]
        norm = total_norm([local_part(p.detach()) for p in tensors])
        dist.all_reduce(norm)
        if not math.isfinite(norm.item()):
            batch = int(state.timestamp.batch)
            if self.on_nan != "rollback":
                raise self._stop(f"the weights after batch {batch} are not finite", batch)
            self._roll_back("its weights are not finite", batch)

    def read(self, state: State, logger: Logger) -> None:
        """Reads what has gathered on the device: acts on what is not finite, and logs the rest."""
        if not self._losses:
            return
        losses, own = torch.cat(self._losses).tolist(), torch.cat(self._own).tolist()
        norms = torch.stack(self._norms).tolist() if self._norms else [0.0] * len(losses)
        logged = bool(self._norms)
        for gathered in (self._losses, self._own, self._norms):
            gathered.clear()
        if logged:
            self._log(norms, logger)
        first = int(state.timestamp.batch) - len(losses) + 1
        try:
            for batch, (loss, mine, norm) in enumerate(zip(losses, own, norms, strict=True), first):
                if math.isfinite(loss) and (math.isfinite(norm) or self._scaled):
                    self.in_a_row = 0
                else:
                    self._act(batch, None if math.isfinite(loss) else mine)
        finally:  # also where that ends the run
            if self.on_nan != "stop":
                logger.log_metrics({"nan/skipped": self.skipped, "nan/rollbacks": self.rollbacks})

    def _log(self, norms: list[float], logger: Logger) -> None:
        """Logs the mean norm of the batches since the last reading, and the share of them that was clipped."""
        finite = [norm for norm in norms if math.isfinite(norm)]
        if finite:
            logger.log_metrics({"gradient/norm": sum(finite) / len(finite)})
        if finite and self.clip_norm is not None:
            logger.log_metrics({"gradient/clipped": sum(n + EPSILON > self.clip_norm for n in finite) / len(finite)})

    def _act(self, batch: int, loss: float | None) -> None:
        """Does as ``on_nan`` says on a batch whose loss on this rank is given, or whose gradient is not finite."""
        what = "gradient"
        if loss is not None:
            ranks = [str(rank) for rank, one in enumerate(dist.all_gather_object(loss)) if not math.isfinite(one)]
            what = f"loss on rank {', '.join(ranks)}" if dist.get_world_size() > 1 else "loss"
        if self.on_nan == "stop":
            raise self._stop(f"the {what} of batch {batch} is not finite", batch)
        self.skipped += 1
        self.in_a_row += 1
        if self.on_nan == "rollback":
            return self._roll_back(f"its {what} is not finite", batch)
        done = f"its {what} is not finite ({self.skipped} in all)"
        say(f"{self.run}: batch {batch} skipped: {done}; see --replay {batch}")
        if self.in_a_row > self.limit:
            raise self._stop(f"{self.in_a_row} batches in a row are not finite (on_nan_limit={self.limit})", batch)

    def _roll_back(self, what: str, batch: int) -> None:
        self.rollbacks += 1
        if self.rollbacks > self.limit:
            raise self._stop(f"batch {batch}: {what} after {self.limit} rollbacks (on_nan_limit)", batch)
        name = self.go_back()
        if name is None:
            raise self._stop(f"batch {batch}: {what}, and there is no checkpoint to go back to", batch)
        say(f"{self.run}: batch {batch}: {what}; continues with the weights of {name}, at batch {batch + 1}")

    def _stop(self, what: str, batch: int) -> NotFinite:
        last = self.last_checkpoint()
        ways = " or ".join(f"on_nan={one}" for one in ("skip", "rollback")[: 2 if last else 1] if one != self.on_nan)
        kept = f"the last checkpoint is {last}" if last is not None else "no checkpoint is saved yet"
        way = f"resume with {ways}" if ways else "start with a lower optimizer.lr"
        return NotFinite(f"{self.run}: {what}; {kept}; add --replay {batch} to the command to find the cause, or {way}")


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The square root of the sum of all elements' squares: a number that is finite only if all of them are."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
