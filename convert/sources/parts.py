"""What a source is to a conversion: samples, in parts that are read each on its own. Only the standard library."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

PART = 4096  # pictures that a part has, about; at most twice as many where rows can be counted
MAX_CLASSES = 1_000_000  # more means that the labels are not classes


class InputError(Exception):
    """What is wrong with the source, where, and what to do: one line for the user."""


def no_such_file(source: str) -> InputError:
    """That there is nothing, for `raise`."""
    braces = "; braces are not expanded, but a glob is, such as 'shard-*.tar'" if "{" in source else ""
    return InputError(f"{source}: no such file or folder{braces}")


class Sample(NamedTuple):
    """One picture of a source. ``where`` names its file, and its row (counted from 0) if the file is a table."""

    where: str
    image: bytes | Path | None  # the picture file's bytes, or where they lie; None if the row has none
    label: int


@dataclass(frozen=True)
class Part:
    """A contiguous piece of a source, in its order. `dataclasses.asdict` makes JSON of it, and ``Part(**d)`` a part.

    Args:
        file: index into the plan's files of the one that it begins in.
        start: its first picture, counted in that file from 0.
        stop: past its last one, counted in the same way; None: all to the end of the file.
        rows: pictures in it; None where counting would mean reading.
    """

    file: int
    start: int
    stop: int | None
    rows: int | None


@dataclass(frozen=True)
class SourcePlan:
    """How a source is read: a function of the source alone.

    Args:
        files: of each file, in order, its ``name`` (a path or a URI), its ``bytes`` and when it was ``modified``, in
            ISO 8601; whatever else is there helps to see that it has changed, too.
        classes: the names of the classes of all rows, whatever the limit; None where labels are integers whose largest
            is known only when all are read.
        parts: together, they are all pictures that are to be read, each once, in order.
    """

    files: list[dict[str, Any]]
    classes: list[str] | None
    parts: list[Part]


def in_order(names: Iterable[str]) -> list[str]:
    """Classes of those names, sorted; by number if all are whole numbers, so that 0 to 11 stay what they are."""
    return sorted(names, key=(lambda name: (int(name), name)) if all(map(str.isdecimal, names)) else None)


def cut(file: int, lengths: Iterable[int], start: int = 0) -> list[Part]:
    """Parts of a file that consists of groups of rows of these lengths: groups are joined, and cut if they are large.

    No part has more than 2 * PART rows. ``start`` is the number of the first row.
    """
    parts: list[Part] = []
    begin = end = start

    def close() -> None:
        nonlocal begin
        if end > begin:
            parts.append(Part(file, begin, end, end - begin))
        begin = end

    for length in lengths:
        if end - begin + length > 2 * PART:
            close()
        if length > 2 * PART:
            pieces = -(-length // PART)
            bounds = [end + length * k // pieces for k in range(pieces + 1)]
            parts += [Part(file, a, b, b - a) for a, b in pairwise(bounds)]
            begin = end = end + length
            continue
        end += length
        if end - begin >= PART:
            close()
    close()
    return parts


def cut_off(parts: list[Part], limit: int | None, count: Callable[[Part, int], int] | None = None) -> list[Part]:
    """The parts of the first ``limit`` pictures; all if that is None.

    ``count(part, most)`` counts a part's pictures where they are not known, but not beyond ``most``.
    """
    if limit is None:
        return parts
    kept: list[Part] = []
    for part in parts:
        if limit == 0:
            break
        rows = count(part, limit) if part.rows is None and count else part.rows
        if rows >= limit:
            part = replace(part, stop=part.start + limit)
        kept.append(replace(part, rows=min(rows, limit)))
        limit -= kept[-1].rows
    return [part for part in kept if part.rows]
