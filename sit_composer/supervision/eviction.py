"""What a run does on a SIGTERM: save, then end, in time. Spot machines and schedulers send one before a kill."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from sit_composer.errors import EVICTED


class Evicted(Exception):
    """A SIGTERM came: the run has left training, and must save."""


class Eviction(Callback):
    """After a SIGTERM, leaves training on all ranks at the same point, by raising `Evicted`.

    That point is the end of a training batch, or the start of a batch of an evaluation or of generated images. An
    evaluation or images due after the last batch are skipped: the resumed run continues with the next batch.
    """

    def __init__(self, grace: float, timeout: float):
        self.grace = grace  # seconds until the process exits, saved or not
        self.timeout = timedelta(seconds=timeout)  # for a rank that waits for the others; one may wait for a store
        self.check: Callable[[], None] = lambda: None  # raises what ends the run otherwise
        self._training = False
        self._told = False
        self._left = threading.Event()
        self._before: Any = None  # the handler before; None until installed
        self._asked: tuple[Any, torch.Tensor] | None = None
        self._group: Any = None

    def install(self) -> None:
        """Handles SIGTERM from now on; until training starts, it ends the process at once."""
        self._before = signal.signal(signal.SIGTERM, self._hear)
        # Python runs signal handlers between two of its own instructions, so a rank blocked on a dead peer may run none
        # for minutes. This thread sees a signal at once.
        listening, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        threading.Thread(target=self._time, args=(listening,), name="eviction", daemon=True).start()
        if "LOCAL_RANK" in os.environ and sys.platform == "linux":
            # If a signal kills Composer's launcher, it tells its ranks nothing, and they would train on alone.
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a SIGTERM when this process's parent dies

    def _time(self, listening: int) -> None:
        while os.read(listening, 1) not in (b"", bytes([signal.SIGTERM])):
            pass
        if not self._left.wait(self.grace):
            os._exit(EVICTED)
        os.close(listening)

    def end(self) -> None:
        """Restores the handler that was there before `install`."""
        if self._before is None:
            return
        self._left.set()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, self._before)
        os.close(self._pipe)

    def _hear(self, number: int, frame: Any) -> None:
        if not self._training:
            os._exit(EVICTED)
        self._told = True

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
        """Raises Evicted on all ranks if one received a SIGTERM. All ranks must call this equally often."""
        if self._training and self._agree():
            raise Evicted

    def _agree(self) -> bool:
        # Ranks receive the signal at different moments. Their flags are summed on the CPU while the next batch is
        # computed, so no rank waits for another or for its GPU, and all of them know at the end of the same batch.
        if self._group is None:
            return self._told
        agreed = False
        if self._asked is not None:
            work, heard = self._asked
            work.wait()
            agreed = bool(heard.item())
        heard = torch.tensor([int(self._told)])
        self._asked = torch.distributed.all_reduce(heard, group=self._group, async_op=True), heard
        return agreed
