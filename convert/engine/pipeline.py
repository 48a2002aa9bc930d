"""Parts of a source, one after another: images are read, prepared ahead in other processes, made rows, and written.

The result for a part depends on the plan alone: not on the processes, nor on the parts that were finished before.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass, field
from itertools import groupby, takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any

from convert.engine.decoders import Decoders, Prepared, ahead
from convert.engine.output import Output
from convert.engine.plan import Plan
from convert.kinds import BadPicture, Kind, Look
from convert.sources.registry import InputError, Sample, check_part, read_part

UPLOADS = 4  # at a time; as many finished shards again may wait
REASONS = 100  # of skipped images, that a part's record keeps


@dataclass
class Tally:
    """Counts of the images of a part, or of several parts."""

    counts: Counter[int] = field(default_factory=Counter)  # per label
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)
    colour: bool = False
    sizes: list[list[int]] = field(default_factory=list)  # the first two different (width, height)
    left_out: Counter[str] = field(default_factory=Counter)  # by reason, with skipped images
    small: Counter[str] = field(default_factory=Counter)  # images, by reason
    sums: list[list[float]] = field(default_factory=list)  # of the images' `statistics`, if those are measured

    @classmethod
    def of(cls, records: Iterable[dict[str, Any]]) -> "Tally":
        """The counts of several parts together."""
        tally = cls()
        for record in records:
            tally.counts.update({int(label): count for label, count in record["counts"].items()})
            tally.skipped += record["skipped"]
            tally.reasons += record["reasons"]
            tally.colour |= record["colour"]
            tally.sizes += [size for size in record["sizes"] if size not in tally.sizes]
            tally.left_out.update(record.get("left_out", {}))  # which records of earlier versions lack
            tally.small.update(record.get("small", {}))
            tally.add_sums(record.get("sums"))
        return tally

    @property
    def images(self) -> int:
        """The number of images, with skipped ones."""
        return self.counts.total() + self.skipped

    def add(self, label: int, look: Look) -> None:
        """Counts an image."""
        grey, *size, small = look
        self.counts[label] += 1
        self.colour |= not grey
        if len(self.sizes) < 2 and size not in self.sizes:
            self.sizes.append(size)
        self.small.update([small] if small else [])

    def add_sums(self, sums: Any) -> None:
        """Adds an image's or a part's sums, if there are any."""
        if sums:
            rows = zip(self.sums, sums, strict=True)
            self.sums = [[a + b for a, b in zip(*row, strict=True)] for row in rows] if self.sums else sums


@dataclass(frozen=True)
class Job:
    """A conversion, as needed by a process that converts a part of it."""

    plan: Plan
    kind: Kind
    output: Output
    skip_bad: bool
    writer: Callable[..., Any]  # `PartWriter`, whose import takes seconds


def convert_parts(
    job: Job, todo: Iterable[int], decoders: Decoders, on_image: Callable[..., None]
) -> Iterator[dict[str, Any]]:
    """Converts parts by number, and yields their records, once shards are stored. ``on_image``: `Progress.add`."""
    samples = _samples(job.plan, todo)
    with (
        job.output.scratch() as scratch,
        Deliveries(job.output) as deliveries,
        closing(ahead(job.kind.prepare, samples, decoders)) as prepared,
    ):
        try:
            for part, group in groupby(prepared, key=itemgetter(0)):
                folder = Path(scratch, str(part))
                with job.writer(job.kind.columns, folder, part, job.output.prefix, deliveries.put) as writer:
                    tally = _write(writer, job, group, on_image)
                    shards = writer.end()
                check_part(job.plan.source, job.plan.reading, job.plan.reading.parts[part])
                deliveries.end_part({"part": part, "shards": shards, **vars(tally)})
                yield from deliveries.finished()  # the next part is written while others are uploaded
        except InputError:
            with suppress(Exception):  # the InputError is the one to report
                yield from deliveries.finished(wait=True)  # keeps the parts that were finished before
            raise
        yield from deliveries.finished(wait=True)


def _samples(plan: Plan, todo: Iterable[int]) -> Iterator[tuple[int, Sample | None]]:
    for part in todo:
        for sample in read_part(plan.source, plan.reading, plan.reading.parts[part]):
            yield part, sample
        yield part, None


def _write(writer: Any, job: Job, group: Iterable[Prepared], on_image: Callable[..., None]) -> Tally:
    """Writes a part's good images."""
    tally = Tally()
    # Only to the part's end: reading on could raise an error that belongs to the next part.
    images = ((sample, result) for _, sample, result in takewhile(itemgetter(1), group))
    for sample, row, look in job.kind.rows(images):
        tally.left_out.update(sample.left_out)
        if isinstance(row, BadPicture):
            if not job.skip_bad:
                raise InputError(f"{sample.where}: {row}; --skip-bad leaves out such images")
            tally.skipped += 1
            tally.left_out[str(row).partition(": ")[0]] += 1
            reason = f"{sample.where}: {row}"
            tally.reasons += [reason] if tally.skipped <= REASONS else []
            on_image(1, 0, 1, [reason])
            continue
        tally.add_sums(row.pop("sums", None))
        size = sum(memoryview(value).nbytes for value in row.values())
        row["label"] = sample.label
        writer.write(row)
        tally.add(sample.label, look)
        on_image(1, size)
    return tally


class Deliveries(AbstractContextManager["Deliveries"]):
    """Delivers shards to the output, a few at a time. If the store is slow, writing waits, so the disk doesn't fill."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.pool = ThreadPoolExecutor(UPLOADS)
        self.waiting: deque[Future[None]] = deque()
        self.sent: list[Future[None]] = []  # of the part that is being written
        self.parts: deque[tuple[list[Future[None]], dict[str, Any]]] = deque()  # written, but not all delivered

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def put(self, file: Path) -> None:
        """Sends a part's shard, once there is room. Raises the error of an earlier one that could not be stored."""
        while len(self.waiting) >= 2 * UPLOADS:
            self.waiting.popleft().result()
        self.sent.append(self.pool.submit(self.output.put, file))
        self.waiting.append(self.sent[-1])

    def end_part(self, record: dict[str, Any]) -> None:
        self.parts.append((self.sent, record))
        self.sent = []

    def finished(self, wait: bool = False) -> Iterator[dict[str, Any]]:
        """The records, noted in the output, of ended parts whose shards are stored; or of all, if it shall wait."""
        while self.parts and (wait or all(future.done() for future in self.parts[0][0])):
            futures, record = self.parts.popleft()
            for future in futures:
                future.result()
            self.output.finish_part(record)
            yield record
