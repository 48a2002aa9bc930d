"""Processes that prepare images ahead of the one that writes. They import this module: it must import nothing heavy."""

import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

from convert.kinds import BadPicture
from convert.sources.parts import InputError, Sample
from sit_composer.launch import follow_parent

CHUNK = 16  # images that a process gets at a time
AHEAD = 3  # chunks per process, at least, that are prepared or being prepared
Numbered = tuple[int, Sample | None]  # a part's number and a sample of it; None after its last
Prepared = tuple[int, Sample | None, Any]  # likewise, with the result of the kind's `prepare`, or a BadPicture


class Decoders(AbstractContextManager["Decoders"]):
    """So many processes, or none, that prepare images with these modules. They end with this one, also on a kill."""

    def __init__(self, workers: int, preload: list[str]) -> None:
        self.workers, self.pool = workers, None
        if workers:
            context = multiprocessing.get_context("forkserver")  # forking a process with threads could hang
            context.set_forkserver_preload(preload)  # imported once, for all
            self.pool = ProcessPoolExecutor(workers, context, _begin_worker)

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)


def ahead(
    prepare: Callable[[Any], Any], samples: Iterable[Numbered], decoders: Decoders
) -> Generator[Prepared, None, None]:
    """Each sample with its prepared image, or the BadPicture, in order. Decoders work ahead."""
    if decoders.pool is None:
        for part, sample in samples:
            yield part, sample, None if sample is None else _attempts(prepare, [sample.image])[0]
        return
    waiting: deque[tuple[list[Numbered], Future[list[Any]]]] = deque()
    chunk: list[Numbered] = []
    mistake = None

    def submit() -> None:
        images = [sample.image for _, sample in chunk if sample is not None]
        waiting.append((chunk, decoders.pool.submit(_attempts, prepare, images)))

    try:
        try:
            for one in samples:
                chunk.append(one)
                if len(chunk) == CHUNK:
                    submit()
                    chunk = []
                    if len(waiting) > AHEAD * decoders.workers:
                        yield from _collect(*waiting.popleft())
        except InputError as error:  # raised after the samples before it
            mistake = error
        submit()
        while waiting:
            yield from _collect(*waiting.popleft())
    except BrokenExecutor:
        killed = "a process that decodes images was killed, perhaps for memory"
        raise InputError(f"--workers: {killed}; rerun with fewer") from None
    if mistake is not None:
        raise mistake


def _collect(chunk: list[Numbered], future: Future[list[Any]]) -> Iterator[Prepared]:
    results = iter(future.result())
    for part, sample in chunk:
        yield part, sample, None if sample is None else next(results)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent process ends this one
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # there are as many processes as cores
    follow_parent()


def _attempts(prepare: Callable[[Any], Any], images: list[Any]) -> list[Any]:
    results = []
    for image in images:
        try:
            results.append(prepare(image))
        except BadPicture as error:
            results.append(BadPicture(str(error)))  # without the traceback, which holds the image
    return results
