"""Names of shared memory that no other job on the machine takes.

In streaming 0.13, each rank looks for the first free name, and then the first rank of the node makes it. Two jobs that
start together may find the same name; and the ranks of a job may find different names if another job starts or ends
meanwhile. Here one job at a time looks and makes, and the ranks take what their node's first one found.
"""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from filelock import FileLock, Timeout
from streaming.base.shared import prefix
from torch import distributed

SECONDS = 60  # after which a job goes on beside one that is stuck
_find: Callable[..., int] = prefix._check_and_find_retrying


@contextmanager
def one_job_at_a_time() -> Iterator[None]:
    """Within it, no other job of this user on this node is within it. The node's first rank sees to that."""
    lock = FileLock(os.path.join(tempfile.gettempdir(), f"sit_composer-{os.getuid()}.lock"), timeout=SECONDS)
    prefix._check_and_find_retrying = _agree
    with suppress(Timeout, OSError):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            lock.acquire()
    # Every job leaves lock files. streaming looks for each of their numbers nine times, which takes 50 µs.
    taken = {name[:6] for name in os.listdir(tempfile.gettempdir()) if name.endswith("_filelock")}
    prefix._each_prefix_int = lambda: (number for number in itertools.count() if f"{number:06}" not in taken)
    try:
        yield
    finally:
        lock.release()


def _agree(*args: Any, **kwargs: Any) -> int:
    """The number that the node's first rank finds, or the error that it meets."""
    try:
        found: int | ValueError = _find(*args, **kwargs)
    except ValueError as error:
        found = error
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        of_all: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(of_all, found)
        found = of_all[distributed.get_rank() - int(os.environ.get("LOCAL_RANK", 0))]
    if isinstance(found, ValueError):
        raise found
    return found
