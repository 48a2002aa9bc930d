"""A source as a conversion sees it: samples, in parts that are read independently. Only the standard library."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from sit_composer.errors import UserError

PART = 4096  # images per part, about; at most twice as many where rows can be counted
MAX_CLASSES = 1_000_000  # more means that the labels are not classes


class InputError(UserError):
    """What is wrong with the source, where, and what to do."""


def no_such_file(source: str) -> InputError:
    """The error for a path or a glob that names nothing."""
    braces = "; braces are not expanded, but globs are, such as 'shard-*.tar'" if "{" in source else ""
    return InputError(f"{source}: no such file or folder{braces}")


class Sample(NamedTuple):
    """One image of a source. ``where`` names its file, and its row (counted from 0) if the file is a table."""

    where: str
    image: bytes | Path | None  # the image file's bytes, or its path; None if the row has none
    label: int
    left_out: tuple[str, ...] = ()  # why what lies between the sample before and this one is left out


@dataclass(frozen=True)
class Part:
    """A contiguous piece of a source, in order. `dataclasses.asdict` converts it to JSON, ``Part(**d)`` back."""

    file: int  # index into the plan's files: the file in which the part begins
    start: int  # its first image, counted in that file from 0
    stop: int | None  # past its last image, counted likewise; None: to the end of the file
    rows: int | None  # images in it; None where counting would mean reading


@dataclass(frozen=True)
class SourcePlan:
    """How a source is read. It depends on the source alone."""

    files: list[dict[str, Any]]  # ``name`` (path or URI), ``bytes``, ``modified`` (ISO 8601), others to detect changes
    classes: list[str] | None  # of all rows; None if labels are integers whose largest is known only when all are read
    parts: list[Part]  # together, all images to be read, each once, in order
    left_out: dict[str, int] = field(default_factory=dict)  # files, by reason; others are found as parts are read


def cut(file: int, lengths: Iterable[int]) -> list[Part]:
    """Parts, of at most 2 * PART rows, of a file of groups of rows with these lengths: groups are joined or cut."""
    bounds, end = [0], 0  # of the parts
    for length in lengths:
        if end - bounds[-1] + length > 2 * PART and end > bounds[-1]:
            bounds.append(end)
        if length > 2 * PART:
            pieces = -(-length // PART)
            bounds += [end + length * (k + 1) // pieces for k in range(pieces)]
        end += length
        if end - bounds[-1] >= PART:
            bounds.append(end)
    if end > bounds[-1]:
        bounds.append(end)
    return [Part(file, begin, end, end - begin) for begin, end in pairwise(bounds)]


def cut_off(parts: list[Part], limit: int | None, count: Callable[[Part, int], int] | None = None) -> list[Part]:
    """The parts of the first ``limit`` images, if any. ``count(part, most)`` counts images where ``rows`` is None."""
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
