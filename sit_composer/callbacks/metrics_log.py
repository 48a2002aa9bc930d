"""Writes what is logged to the run's metrics.jsonl, without a logger and without waiting for the device in a step."""

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist
from torch import Tensor

from sit_composer.checkpoint.metrics import row_length
from sit_composer.cli import say
from sit_composer.errors import StorageError

UNREAD = 500  # numbers that may wait on the device to be read
EVERY = 60.0  # seconds between two writes, besides those at checkpoints
REDUNDANT = ("time/", "trainer/")  # what Composer logs of a batch's number and microbatch
Values = dict[str, list[float | Tensor]]


class MetricsLog(LoggerDestination):
    """Rows of what is logged, with the learning rate and the throughput; see `checkpoint.metrics` for their form.

    What is logged in a step is averaged over the row's batches, and what is logged between two, as evaluations are, has
    a row of its own. Numbers that aren't finite are counted as NAME/nonfinite, and left out of the mean.

    Args:
        append: writes the bytes of whole lines behind those of before; None on the ranks that write nothing.
        attempt: what the first row says of this attempt.
    """

    def __init__(self, append: Callable[[bytes], None] | None, attempt: dict[str, Any]):
        self.append = append
        self.attempt = attempt
        self._rows: list[tuple[dict[str, Any], Values]] = []  # not written yet
        self._open: Values = {}  # of the row that isn't complete
        self._unread = 0
        self._state: State | None = None
        self._last = -1  # the last batch of the last row, and so the one before the open row
        self._in_step = False
        self._written = self._asked = time.monotonic()
        self._seconds, self._samples = 0.0, 0

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self.append is None or self._state is None:
            return
        values = {name: value for name, value in metrics.items() if not name.startswith(REDUNDANT) and is_number(value)}
        self._unread += sum(isinstance(value, Tensor) for value in values.values())
        if self._in_step:
            for name, value in values.items():
                self._open.setdefault(name, []).append(value)
        elif values:
            head = {"batch": int(self._state.timestamp.batch)}
            self._rows.append((head, {name: [value] for name, value in values.items()}))

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._asked = time.monotonic()

    def batch_start(self, state: State, logger: Logger) -> None:
        batch = int(state.timestamp.batch)
        if self._state is None or batch < self._last:  # the start, or training was set back
            self._rows.append(({"start": batch, "time": round(time.time(), 1), **self.attempt}, {}))
            self._last, self._open = batch, {}
            self._seconds, self._samples = 0.0, 0
        self._state, self._in_step = state, True
        self.log_metrics({"lr": state.schedulers[0].get_last_lr()[0]})

    def batch_end(self, state: State, logger: Logger) -> None:
        now, batch = time.monotonic(), int(state.timestamp.batch)
        self._in_step = False
        self._seconds += now - self._asked
        self._samples += int(state.timestamp.sample - state.previous_timestamp.sample)
        if batch % row_length(batch) == 0:
            self._close_row()
        if now - self._written > EVERY:
            try:
                self.flush(close_row=False)  # else rows would be short, and many
            except StorageError as error:  # a lost lease is raised elsewhere
                say(f"warning: {error}; the metrics will be written later")
        elif self._unread >= UNREAD:
            self._read()

    def close(self, state: State, logger: Logger) -> None:
        if dist.get_world_size() == 1:  # a loss may still wait for a rank that has failed
            # After an error, of the device or the disk too, what is known is kept if it can be.
            with suppress(Exception):
                self.flush()

    def flush(self, close_row: bool = True) -> None:
        """Writes all rows, that of the batches since the last one too; called before each checkpoint is saved."""
        if self.append is None or self._state is None:
            return
        if close_row:
            self._close_row()
        self._read()
        self._written = time.monotonic()
        if self._rows:
            self.append("".join(json.dumps({**head, **means(values)}) + "\n" for head, values in self._rows).encode())
            self._rows = []

    def _close_row(self) -> None:
        now = self._state.timestamp
        if int(now.batch) <= self._last:  # no batch since
            return
        head = {"batch": int(now.batch), "batches": int(now.batch) - self._last, "samples": int(now.sample)}
        if self._seconds:
            self._open["throughput/images_per_sec"] = [self._samples / self._seconds]
        self._rows.append(({**head, "epoch": int(now.epoch), "time": round(time.time(), 1)}, self._open))
        self._last, self._open = int(now.batch), {}
        self._seconds, self._samples = 0.0, 0

    def _read(self) -> None:
        """Puts numbers in the place of tensors, which are read from the device at once."""
        lists = [values for row in (*(row for _, row in self._rows), self._open) for values in row.values()]
        found = [(row, i, v) for row in lists for i, v in enumerate(row) if isinstance(v, Tensor)]
        if found:
            tensors = [value.detach().reshape(()).to(found[0][2].device, torch.float64) for _, _, value in found]
            for (row, i, _), number in zip(found, torch.stack(tensors).tolist(), strict=True):
                row[i] = number
        self._unread = 0


def is_number(value: Any) -> bool:
    """Whether it is a number, or a tensor of one."""
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, int | float)


def means(values: Values) -> dict[str, float | int | None]:
    """The means of the finite numbers, with nine digits, which hold a float32; null where there is none."""
    found: dict[str, float | int | None] = {}
    for name, numbers in values.items():
        finite = [number for number in numbers if math.isfinite(number)]
        mean = finite[-1] if name.startswith("nan/") else math.fsum(finite) / max(len(finite), 1)  # those are counts
        found[name] = float(f"{mean:.9g}") if finite else None
        if len(finite) < len(numbers):
            found[f"{name}/nonfinite"] = len(numbers) - len(finite)
    return found
