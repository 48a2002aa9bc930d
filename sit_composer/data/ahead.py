"""What a thread makes before it is asked for."""

import threading
from collections.abc import Iterator
from queue import Empty, Queue
from typing import TypeVar

T = TypeVar("T")
SECONDS = 5  # that closing waits for the thread, which may wait for a store


def ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The items, which a thread makes, up to ``count`` and one more before they are asked for.

    An error in the thread is raised after the items before it. Closing this generator, or the error, ends the thread.
    """
    made: Queue[tuple[T | None, BaseException | None]] = Queue(count)
    closed = threading.Event()

    def make() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                made.put((item, None))
                if closed.is_set():
                    return
        except BaseException as raised:
            error = raised
        made.put((None, error or StopIteration()))

    thread = threading.Thread(target=make, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        try:
            while True:
                made.get_nowait()  # the thread may wait for room
        except Empty:
            thread.join(SECONDS)
