"""Parts of a source, one after another: pictures read, prepared ahead in other processes, made rows, and written.

What a part becomes depends on the plan alone: not on the processes, nor on which parts were finished before.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import groupby, takewhile
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from convert.engine.output import Output
from convert.engine.plan import Plan
from convert.kinds.pixels import BadPicture, Pixels
from convert.sources.registry import InputError, Sample, check_part, read_part

if TYPE_CHECKING:
    from convert.kinds.latents import Latents

UPLOADS = 4  # at once; as many finished shards again may wait for them
CHUNK = 16  # pictures that a process gets at a time
AHEAD = 3  # chunks for each process, at least, that are prepared or being so
REASONS = 100  # of skipped pictures, that a part's record keeps


class Prepared(NamedTuple):
    """A picture after the part of the work that other processes do."""

    part: int
    sample: Sample | None  # None behind a part's last
    result: Any  # what the form's `prepare` made of it, or a BadPicture


@dataclass
class Tally:
    """What was seen of the pictures of a part, or of several."""

    counts: dict[int, int] = field(default_factory=dict)  # of each label
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)
    grey: bool = False
    colour: bool = False
    sizes: list[list[int]] = field(default_factory=list)  # the first two different (width, height)

    def add(self, label: int, look: "tuple[bool, int, int]") -> None:
        """Counts a picture: its label, and whether it is grey, its width and height."""
        self.counts[label] = self.counts.get(label, 0) + 1
        self.grey |= look[0]
        self.colour |= not look[0]
        if len(self.sizes) < 2 and [*look[1:]] not in self.sizes:
            self.sizes.append([*look[1:]])

    def merge(self, record: dict[str, Any]) -> None:
        """Counts a part's pictures."""
        for label, count in record["counts"].items():
            self.counts[int(label)] = self.counts.get(int(label), 0) + count
        self.skipped += record["skipped"]
        self.reasons += record["reasons"]
        self.grey |= record["grey"]
        self.colour |= record["colour"]
        self.sizes += [size for size in record["sizes"] if size not in self.sizes]


@dataclass(frozen=True)
class Job:
    """A conversion, as whoever does a part of it needs to know it."""

    plan: Plan
    form: "Pixels | Latents"
    output: Output
    skip_bad: bool


def convert_parts(
    job: Job, todo: Iterable[int], decoders: "Decoders", on_picture: Callable[[int, str | None], None]
) -> Iterator[dict[str, Any]]:
    """Converts the parts of those numbers, and yields the record of each when its shards are there.

    Args:
        job: the conversion.
        todo: the parts' numbers.
        decoders: who decodes pictures.
        on_picture: is told of each picture its bytes, and why it was left out if it was.

    Raises:
        InputError: for a picture that can't be used, or a source that can't be read.
        StorageError, OSError: if a shard can't be written.
    """
    from convert.engine.shards import PartWriter  # streaming, which takes seconds

    samples = _samples(job.plan, todo)
    with (
        job.output.scratch() as scratch,
        Deliveries(job.output) as deliveries,
        closing(ahead(job.form.prepare, samples, decoders)) as prepared,
    ):
        try:
            for part, group in groupby(prepared, key=lambda one: one.part):
                folder = scratch / str(part)
                with PartWriter(job.form.columns, folder, part, job.output.prefix, deliveries.put) as writer:
                    tally = _write(writer, job, group, on_picture)
                    shards = writer.end()
                check_part(job.plan.source, job.plan.reading, job.plan.reading.parts[part])
                deliveries.end_part({"part": part, "shards": shards, **vars(tally)})
                yield from deliveries.finished()  # those whose shards have arrived, while the next is on its way
        except InputError:
            with suppress(Exception):  # the mistake is to be told
                yield from deliveries.finished(wait=True)  # what was done before it is kept
            raise
        yield from deliveries.finished(wait=True)


def _samples(plan: Plan, todo: Iterable[int]) -> Iterator[tuple[int, Sample | None]]:
    for part in todo:
        for sample in read_part(plan.source, plan.reading, plan.reading.parts[part]):
            yield part, sample
        yield part, None


def _write(writer: Any, job: Job, group: Iterable[Prepared], on_picture: Callable[[int, str | None], None]) -> Tally:
    """Writes a part's good pictures."""
    tally = Tally()
    # No further than the part's end: what is behind that may be the next one's mistake.
    pictures = ((one.sample, one.result) for one in takewhile(lambda one: one.sample is not None, group))
    for sample, row, look in job.form.rows(pictures):
        if isinstance(row, BadPicture):
            if not job.skip_bad:
                raise InputError(f"{sample.where}: {row}; --skip-bad leaves out such pictures")
            reason = f"{sample.where}: {row}"
            tally.skipped += 1
            tally.reasons += [reason] if tally.skipped <= REASONS else []
            on_picture(0, reason)
            continue
        size = sum(memoryview(value).nbytes for value in row.values())
        row["label"] = sample.label
        writer.write(row)
        tally.add(sample.label, look)
        on_picture(size, None)
    return tally


class Deliveries:
    """Shards on their way to the output, a few at once. With a slow store, writing waits, and the disk stays free."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.pool = ThreadPoolExecutor(UPLOADS)
        self.waiting: deque[Future[None]] = deque()
        self.sent: list[Future[None]] = []  # of the part that is being written
        self.parts: deque[tuple[list[Future[None]], dict[str, Any]]] = deque()  # written, but not yet all arrived

    def __enter__(self) -> "Deliveries":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def put(self, file: Path) -> None:
        """Sends a part's shard off, once there is room.

        Raises:
            StorageError, OSError: if an earlier one did not arrive.
        """
        while len(self.waiting) >= 2 * UPLOADS:
            self.waiting.popleft().result()
        self.sent.append(self.pool.submit(self.output.put, file))
        self.waiting.append(self.sent[-1])

    def end_part(self, record: dict[str, Any]) -> None:
        """Says that the part has no more shards."""
        self.parts.append((self.sent, record))
        self.sent = []

    def finished(self, wait: bool = False) -> Iterator[dict[str, Any]]:
        """The records, noted in the output, of ended parts whose shards have arrived; or of all, once they have."""
        while self.parts and (wait or all(future.done() for future in self.parts[0][0])):
            futures, record = self.parts.popleft()
            for future in futures:
                future.result()
            self.output.finish_part(record)
            yield record


class Decoders:
    """Processes that prepare pictures. They end with this one, also when that is killed.

    Args:
        workers: how many; 0: this one prepares pictures itself.
        preload: modules that they need.
    """

    def __init__(self, workers: int, preload: list[str]) -> None:
        self.workers = workers
        self.pool = None
        if workers:
            context = multiprocessing.get_context("forkserver")  # to fork this one, with its threads, could hang
            context.set_forkserver_preload(preload)  # loaded once, for all
            self.pool = ProcessPoolExecutor(workers, context, _begin_worker)

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)


def ahead(
    function: Callable[[Any], Any], samples: Iterable[tuple[int, Sample | None]], decoders: Decoders
) -> Iterator[Prepared]:
    """Each sample with the function of its picture, or with what is wrong with that, in order.

    The decoders work ahead of who reads.

    Raises:
        InputError: if one of them dies.
    """
    if decoders.pool is None:
        for part, sample in samples:
            yield Prepared(part, sample, None if sample is None else _attempt(function, sample.image))
        return
    waiting: deque[tuple[list[tuple[int, Sample | None]], Future[list[Any]]]] = deque()
    mistake = None
    try:
        for chunk in _chunks(samples):
            pictures = [sample.image for _, sample in chunk if sample is not None]
            waiting.append((chunk, decoders.pool.submit(_attempts, function, pictures)))
            if len(waiting) > AHEAD * decoders.workers:
                yield from _collect(*waiting.popleft())
    except InputError as error:  # those before it come first
        mistake = error
    while waiting:
        yield from _collect(*waiting.popleft())
    if mistake is not None:
        raise mistake


def _chunks(samples: Iterable[tuple[int, Sample | None]]) -> Iterator[list[tuple[int, Sample | None]]]:
    chunk = []
    try:
        for one in samples:
            chunk.append(one)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
    except InputError:
        yield chunk
        raise
    if chunk:
        yield chunk


def _collect(chunk: list[tuple[int, Sample | None]], future: "Future[list[Any]]") -> Iterator[Prepared]:
    try:
        results = iter(future.result())
    except BrokenExecutor:
        raise InputError(
            "a process that decodes pictures was killed, perhaps for memory: run it again, with fewer --workers"
        ) from None
    for part, sample in chunk:
        yield Prepared(part, sample, None if sample is None else next(results))


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; this process's end is its parent's to say
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # there are as many processes as cores
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _attempts(function: Callable[[Any], Any], images: list[Any]) -> list[Any]:
    return [_attempt(function, image) for image in images]


def _attempt(function: Callable[[Any], Any], image: Any) -> Any:
    try:
        return function(image)
    except BadPicture as error:
        return BadPicture(str(error))  # without the traceback, which holds the picture
