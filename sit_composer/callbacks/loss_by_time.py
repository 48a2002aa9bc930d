"""The mean loss in bins of time."""

import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from torch import Tensor

from sit_composer import randomness


class LossByTime(Callback):
    """Logs the mean loss of the samples since the last interval, by their times: ``loss/time/0.1-0.2`` and so on.

    Of all ranks together, computed on the device, which nothing waits for. NaN is logged for a bin without a sample.
    The sums aren't in checkpoints: the first values after a resumption are of the batches since.
    """

    def __init__(self, bins: int, interval: str):
        self.bins = bins
        self.due = create_interval_scheduler(interval)
        self._sums: Tensor | None = None  # float64 (2, bins): of the losses, and of the samples

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.AFTER_FORWARD:
            self._add(state)
        elif event in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT) and self.due(state, event):
            self._log(logger)

    def _add(self, state: State) -> None:
        model = getattr(state.model, "module", state.model)  # inside DDP's wrapper
        t = model.transport.times(randomness.uniform(state.batch["key"], randomness.TIME))  # (N,), as in the model
        sums = bin_sums(t, state.outputs.detach(), self.bins)
        self._sums = sums if self._sums is None else self._sums + sums

    def _log(self, logger: Logger) -> None:
        if self._sums is not None:
            dist.all_reduce(self._sums)
            losses = self._sums[0] / self._sums[1]
            edges = [f"{i / self.bins:.3g}" for i in range(self.bins + 1)]
            logger.log_metrics({f"loss/time/{edges[i]}-{edges[i + 1]}": losses[i] for i in range(self.bins)})
            self._sums = None


def bin_sums(t: Tensor, losses: Tensor, bins: int) -> Tensor:
    """float64 (2, bins): in each equal part of [0, 1], the sum of the losses (N,) at times t (N,), and their number."""
    number = (t.double() * bins).long().clamp(0, bins - 1)
    inside = number == torch.arange(bins, device=t.device)[:, None]  # (bins, N)
    return torch.stack([torch.where(inside, losses.double(), 0.0).sum(1), inside.double().sum(1)])
