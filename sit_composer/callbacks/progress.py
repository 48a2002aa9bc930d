"""How a run goes: a bar on a terminal, else a line per interval; a line per evaluation; and the figures at the end."""

import math
import sys
import time
from collections import deque
from typing import Any

import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler
from torch import Tensor
from tqdm import tqdm

WINDOW = 50  # batches over which speed and waiting are averaged
SMOOTHING = 0.98  # of the loss
UNREAD = 500  # losses that may wait on the device to be read
REDRAW = 0.5  # seconds between two drawings of the bar
FORMAT = "{percentage:3.0f}% |{bar:10}| {n_fmt}/{total_fmt}{postfix}"


class Progress(Callback):
    """Shows, on rank 0, the batch, the smoothed loss, throughput, learning rate, time left, and what takes the time.

    Args:
        total: batches of the whole run; None if unknown.
        save_every: batches between two checkpoints; None if unknown.
        peak: images/s at the devices' peak FLOP/s, for the MFU; None if unknown.
        bar: whether to show a bar.
        interval: of lines, such as ``100ba``; None: no lines.
        stream: of the lines: ``stderr`` or ``stdout``.
    """

    def __init__(
        self,
        total: int | None,
        save_every: int | None,
        peak: float | None,
        bar: bool,
        interval: str | int | None,
        stream: str = "stderr",
    ):
        self.total = total
        self.save_every = save_every
        self.peak = peak
        self.stream = stream
        self.due = create_interval_scheduler(interval, checkpoint_events=False) if interval else lambda *_: False
        self.evaluation: str | None = None  # the last one's result
        self._loss = self._weight = 0.0  # smoothed, and the weight of the losses in it
        self._unread: list[Tensor] = []  # losses on the device: to read one is to wait for it
        self._drawn = 0.0
        self._steps: deque[tuple[float, float, int]] = deque(maxlen=WINDOW)  # seconds, of these waiting, samples
        self._bar = tqdm(total=total, disable=not bar, dynamic_ncols=True, bar_format=FORMAT)
        self._streams: tuple[Any, Any] | None = None  # stdout and stderr, where they are replaced
        self._started = self._asked = self._fetched = self._evaluating = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        self._started, self._first = time.monotonic(), int(state.timestamp.sample)
        if not self._bar.disable:
            self._bar.update(int(state.timestamp.batch))
            self._streams = sys.stdout, sys.stderr  # what others print must not begin behind the bar
            sys.stdout, sys.stderr = (Beside(stream, self._bar) for stream in self._streams)

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._asked = time.monotonic()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._fetched = time.monotonic()

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.BATCH_END:
            self._step(state)
            seconds, waiting, _ = self._steps[-1]
            logger.log_metrics({"throughput/waiting_for_data": waiting / seconds})  # the share of this step's time
        if event in (Event.BATCH_END, Event.EPOCH_END) and self.due(state, event):
            self._say(f"batch {int(state.timestamp.batch)}/{self.total or '?'}  {self.line(state)}")
        super().run_event(event, state, logger)

    def _step(self, state: State) -> None:
        samples = int(state.timestamp.sample - state.previous_timestamp.sample)
        self._steps.append((time.monotonic() - self._asked, self._fetched - self._asked, samples))
        self._unread.append(state.total_loss_dict["loss/train/total"])
        if len(self._unread) == UNREAD:
            self.loss()
        if not self._bar.disable and (now := time.monotonic()) - self._drawn > REDRAW:
            self._drawn = now
            self._bar.set_postfix_str(self.line(state), refresh=False)
            self._bar.update(int(state.timestamp.batch) - self._bar.n)

    def loss(self) -> float:
        """The smoothed loss, up to the last batch; those that are not finite are `Guard`'s, and left out."""
        for loss in filter(math.isfinite, torch.cat(self._unread).tolist() if self._unread else ()):
            self._weight = SMOOTHING * self._weight + 1 - SMOOTHING
            self._loss += (loss - self._loss) * (1 - SMOOTHING) / self._weight
        self._unread.clear()
        return self._loss

    def line(self, state: State) -> str:
        """What is shown beside the batch."""
        seconds, waiting, samples = map(sum, zip(*self._steps, strict=True))
        batch, each = int(state.timestamp.batch), seconds / len(self._steps)
        parts = [f"loss {self.loss():.4f}", f"{samples / seconds:,.4g} images/s"]
        parts.append(f"lr {state.schedulers[0].get_last_lr()[0]:.3g}")
        if self.peak is not None:
            parts.append(f"MFU {samples / seconds / self.peak:.0%}")
        left = self.total - batch if self.total is not None else None
        if left:
            parts.append(f"left {duration(left * each)}")
        if self.save_every is not None and left != 0:
            saved = self.save_every - batch % self.save_every
            parts.append(f"checkpoint in {duration(min(saved, left or saved) * each)}")  # the last batch is saved, too
        return "  ".join([*parts, f"data {waiting / seconds:.1%}"])

    def eval_start(self, state: State, logger: Logger) -> None:
        self._evaluating = time.monotonic()

    def eval_end(self, state: State, logger: Logger) -> None:
        values = state.eval_metric_values.items()
        self.evaluation = ", ".join(f"evaluation {name} {float(value):.4f}" for name, value in values)
        took = duration(time.monotonic() - self._evaluating)
        self._say(f"batch {int(state.timestamp.batch)}: {self.evaluation}, in {took}")

    def _say(self, text: str) -> None:
        print(text, file=getattr(sys, self.stream), flush=True)

    def summary(self, state: State) -> str:
        """The run's figures, at its end."""
        seconds, samples = time.monotonic() - self._started, int(state.timestamp.sample) - self._first
        rate, loss = f"{samples / seconds:,.4g} images/s", f"loss {self.loss():.4f}"
        figures = ", ".join(filter(None, (duration(seconds), rate, loss, self.evaluation)))
        return f"batch {int(state.timestamp.batch)}: trained in {figures}"

    def fit_end(self, state: State, logger: Logger) -> None:
        self._bar.close()
        if self._streams is not None:
            sys.stdout, sys.stderr = self._streams
            self._streams = None

    def close(self, state: State, logger: Logger) -> None:  # fit_end doesn't come after an error
        self.fit_end(state, logger)


class Beside:
    """A stream whose lines don't begin behind a bar: it is cleared before them, and drawn again after them."""

    def __init__(self, stream: Any, bar: tqdm):
        self.stream = stream
        self.bar = bar
        self.begun = ""  # the text of a line that has no end yet

    def write(self, text: str) -> int:
        lines, newline, self.begun = (self.begun + text).rpartition("\n")
        if newline:
            with tqdm.external_write_mode(file=self.bar.fp):  # tqdm.write clears no bar of another stream
                self.stream.write(lines + newline)
                self.stream.flush()
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def duration(seconds: float) -> str:
    """Seconds as 0:05, 12:34, 3:05:00 or 2 d 3:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour}:{minute:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
