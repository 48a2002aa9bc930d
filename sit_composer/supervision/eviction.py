"""What a run does on a SIGTERM or Ctrl-C: save, then end. Spot machines and schedulers send a SIGTERM before a kill."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from sit_composer.errors import EVICTED, INTERRUPTED

AGAIN = 1.0  # seconds. A terminal's Ctrl-C comes twice at once: from the terminal, and from the launcher


class Evicted(Exception):
    """A signal came: the run has left training, and must save."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Eviction(Callback):
    """After a SIGTERM or SIGINT, leaves training on all ranks at the same point, by raising `Evicted`.

    That point is the end of a training batch, or the start of a batch of an evaluation or of generated images. An
    evaluation or images due after the last batch are skipped: the resumed run continues with the next batch.
    """

    def __init__(self, grace: float, timeout: float):
        self.grace = grace  # seconds after a SIGTERM until the process exits, saved or not
        self.timeout = timedelta(seconds=timeout)  # for a rank that waits for the others; one may wait for a store
        self.check: Callable[[], None] = lambda: None  # raises what ends the run otherwise
        self._training = False
        self._told = 0  # the signal's number
        self._left = threading.Event()
        self._before: dict[int, Any] = {}  # the handlers before
        self._asked: tuple[Any, torch.Tensor] | None = None
        self._group: Any = None

    def install(self) -> None:
        """Handles the signals from now on; until training starts, they end the process at once."""
        self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}
        # Python runs signal handlers between two of its own instructions, so a rank blocked on a dead peer may run none
        # for minutes. This thread sees a signal at once.
        listening, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        threading.Thread(target=self._time, args=(listening,), name="eviction", daemon=True).start()

    def _time(self, listening: int) -> None:
        asked: float | None = None  # when Ctrl-C was pressed
        while (number := ord(os.read(listening, 1) or b"\0")) not in (0, signal.SIGTERM):
            if number == signal.SIGINT:
                asked = asked or time.monotonic()
                if time.monotonic() - asked > AGAIN:  # a second time
                    os._exit(INTERRUPTED)
        if not self._left.wait(self.grace):
            os._exit(EVICTED)
        os.close(listening)

    def end(self) -> None:
        """Restores the handlers that were there before `install`."""
        if not self._before:
            return
        self._left.set()
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._pipe)

    def _hear(self, number: int, frame: Any) -> None:
        if not self._training and number == signal.SIGTERM:
            os._exit(EVICTED)
        if not self._training:
            raise KeyboardInterrupt
        if number == signal.SIGINT and sys.stderr.isatty():
            print("\nCtrl-C: saving, then stopping; press it again to stop at once", file=sys.stderr)
        self._told = max(self._told, number)

    def fit_start(self, state: State, logger: Logger) -> None:
        self._training = True
        if dist.get_world_size() > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=self.timeout)

    def batch_end(self, state: State, logger: Logger) -> None:
        self.check()
        self.leave_if_told()  # before an evaluation or images take the time that is left

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        self.leave_if_told()

    def leave_if_told(self) -> None:
        """Raises Evicted on all ranks if one received a signal. All ranks must call this equally often."""
        if self._training and (number := self._agree()):
            raise Evicted(number)

    def _agree(self) -> int:
        # Ranks receive the signal at different moments. They tell each other on the CPU while the next batch is
        # computed, so no rank waits for another or for its GPU, and all of them know at the end of the same batch.
        if self._group is None:
            return self._told
        agreed = 0
        if self._asked is not None:
            work, heard = self._asked
            work.wait()
            agreed = int(heard.item())
        heard = torch.tensor([self._told])
        largest = torch.distributed.ReduceOp.MAX
        self._asked = torch.distributed.all_reduce(heard, largest, group=self._group, async_op=True), heard
        return agreed
