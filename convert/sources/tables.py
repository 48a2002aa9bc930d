"""Pictures and labels out of tables of columns, whatever they are stored in.

A table is a schema and a function that reads some columns of some rows batch by batch. At no time is more in memory
than one batch.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from convert.sources.parts import MAX_CLASSES, InputError, Part, Sample, SourcePlan, in_order
from convert.sources.s3 import reading

BATCH = 64  # rows


@dataclass(frozen=True)
class Table:
    """One file, or one data set.

    Args:
        name: for errors.
        find: what a row means that has a picture's path and no bytes; or it raises an InputError.
        schema: of all columns.
        lengths: of the groups of rows that it consists of; a reader can begin at each. None: only at the first row, and
            the number of rows is not known.
        read: batches of some top-level columns, from a row on to before another, of so many rows if it has the choice.
    """

    name: str
    find: Callable[[str], bytes | Path]
    schema: pa.Schema
    lengths: list[int] | None
    read: Callable[[list[str], int, int, int], Iterator[pa.RecordBatch]]


def samples(
    table: Table, description: dict[str, Any], plan: SourcePlan, part: Part, check: Callable[[], None]
) -> Iterator[Sample]:
    """The pictures of some rows. ``check`` is called before rows are taken from what was read."""
    image, label = description["image_column"], description["label_column"]
    columns = [image] if label is None else [image, label]
    classes = MAX_CLASSES if plan.classes is None else len(plan.classes)
    numbers = {name: number for number, name in enumerate(plan.classes or ())}
    for first, (images, *labels) in batches(table, columns, part.start, part.stop, check):
        if labels:
            _check_labels(table, first, labels[0], classes)
        values = labels[0].to_pylist() if labels else [0] * len(images)
        for row, (picture, value) in enumerate(zip(images.to_pylist(), values, strict=True), first):
            where = f"{table.name} row {row}"
            if isinstance(picture, dict):  # the struct of `datasets`: bytes, or else a path
                path = picture.get("path")
                picture = (
                    picture["bytes"] if picture["bytes"] is not None or not path else _find_file(table, path, where)
                )
            yield Sample(where, picture, numbers[value] if isinstance(value, str) else value)


def _find_file(table: Table, path: str, where: str) -> bytes | Path:
    try:
        return table.find(path)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


@dataclass(frozen=True)
class Labels:
    """What the labels of a table are: ``kind`` is the names of its classes, or "integers", "strings" or "none"."""

    table: str
    column: str | None
    kind: tuple[str, ...] | str
    strings: frozenset[str] = frozenset()
    largest: int | None = -1  # integer; None: not known


def read_labels(table: Table, description: dict[str, Any], or_strings: bool = True) -> Labels:
    """Checks the columns of a table and reads all its labels, but no integers where that would mean reading all.

    ``or_strings`` is whether labels may be strings.

    Raises:
        InputError: if it lacks a column, or the pictures are no bytes; or naming the first row whose label is no class:
            null, negative, too large, not an integer or string.
    """
    _check_image_type(table, description["image_column"])
    column = description["label_column"]
    if column is None:
        return Labels(table.name, None, "none")
    type_, names = _find(table, column)[1:]
    text = pa.types.is_string(type_) or pa.types.is_large_string(type_)
    if not text and not pa.types.is_integer(type_):
        raise InputError(f"labels must be integers or strings, but column {column!r} of {table.name} is {type_}")
    if text and not or_strings:
        raise InputError(
            f"column {column!r} of {table.name} is strings, which are numbered before: not with --streaming"
        )
    kind = tuple(names) if names else "strings" if text else "integers"
    if table.lengths is None and not text:
        return Labels(table.name, column, kind, largest=None)
    strings: set[str] = set()
    largest = -1
    for first, (labels,) in batches(table, [column], 0, None, size=64 * BATCH):
        greatest = _check_labels(table, first, labels, len(names) if names else MAX_CLASSES)
        if text:
            strings.update(pc.unique(labels).to_pylist())
        else:
            largest = max(largest, greatest)
    return Labels(table.name, column, kind, frozenset(strings), largest)


def _check_labels(table: Table, first: int, labels: pa.Array, classes: int) -> int:
    """The largest of some labels, or -1 if they are strings. ``first`` is the row of the first.

    Raises:
        InputError: naming the first row whose label is null or no class.
    """
    if labels.null_count:
        row = first + pc.index(pc.is_null(labels), True).as_py()
        raise InputError(f"{table.name} row {row}: the label is null; say --label-column none to do without labels")
    if not pa.types.is_integer(labels.type):
        return -1
    bounds = pc.min_max(labels)
    for value in (bounds["min"].as_py(), bounds["max"].as_py()):
        if not 0 <= value < classes:
            row = first + labels.to_pylist().index(value)
            raise InputError(f"{table.name} row {row}: label {value} is not a class: they are 0 to {classes - 1}")
    return bounds["max"].as_py()


def merge_classes(labels: tuple[Labels, ...]) -> list[str] | None:
    """The classes' names, of all tables; None if they are integers that were not all read.

    Raises:
        InputError: if the tables differ in what their labels are.
    """
    first = labels[0]
    for other in labels:
        if other.kind != first.kind:
            raise InputError(f"column {first.column!r} has other classes in {other.table} than in {first.table}")
    if first.kind == "none":
        return ["all"]
    if first.kind == "strings":
        return in_order(frozenset().union(*(table.strings for table in labels)))
    if first.kind != "integers":
        return list(first.kind)
    largest = [table.largest for table in labels]
    return None if None in largest else list(map(str, range(max(largest) + 1)))


def batches(
    table: Table,
    columns: list[str],
    start: int,
    stop: int | None,
    check: Callable[[], None] = lambda: None,
    size: int = BATCH,
) -> Iterator[tuple[int, list[pa.Array]]]:
    """Yields the columns of rows from ``start`` to before ``stop`` (None: to the end), a few at a time, and the number
    of the first of these rows."""
    stop = sys.maxsize if stop is None else stop
    paths = [_find(table, column)[0] for column in columns]
    with reading(table.name):
        for whole in table.read(list(dict.fromkeys(path[0] for path in paths)), start, stop, size):
            for begin in range(0, whole.num_rows, size):  # a batch of an Arrow file may be of any size
                check()
                batch = whole.slice(begin, size)
                arrays = [batch.column(path[0]) for path in paths]
                arrays = [pc.struct_field(a, p[1:]) if p[1:] else a for a, p in zip(arrays, paths, strict=True)]
                yield start, [a.dictionary_decode() if pa.types.is_dictionary(a.type) else a for a in arrays]
                start += batch.num_rows


class Rows:
    """Rows of batches, taken in turns. ``first`` is the number of the first row of the first batch."""

    def __init__(self, batches: Iterator[pa.RecordBatch], first: int = 0) -> None:
        self.batches, self.first = batches, first
        self.rest: pa.RecordBatch | None = None  # of a batch that was taken in part; it begins with row ``first``

    def between(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """The rows from ``start`` to before ``stop``, and none further. The last turn must have ended before them."""
        while self.first < stop:
            batch = self.rest or next(self.batches, None)
            if batch is None:
                return
            begin, end = max(start - self.first, 0), min(stop - self.first, batch.num_rows)
            self.rest = batch.slice(end) if end < batch.num_rows else None
            self.first += end
            if begin < end:
                yield batch.slice(begin, end - begin)


def _find(table: Table, column: str) -> tuple[list[str], pa.DataType, list[str] | None]:
    """Returns the path of a column (dots go into structs), its type, and the names of its classes if it has any."""
    path = [column] if column in table.schema.names else column.split(".")
    type_: pa.DataType = pa.struct(table.schema)
    features: Any = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = features.get("info", {}).get("features", {})
    for name in path:
        if not pa.types.is_struct(type_) or type_.get_field_index(name) < 0:
            columns = ", ".join(_names(pa.struct(table.schema)))
            raise InputError(f"{table.name} has no column {column!r}; its columns are: {columns}")
        type_ = type_.field(name).type
        features = features.get(name, {}) if isinstance(features, dict) else {}
    names = features.get("names") if isinstance(features, dict) and features.get("_type") == "ClassLabel" else None
    return path, type_.value_type if pa.types.is_dictionary(type_) else type_, names


def _names(struct: pa.StructType, prefix: str = "") -> Iterator[str]:
    for field in struct:
        yield prefix + field.name
        if pa.types.is_struct(field.type):
            yield from _names(field.type, f"{prefix}{field.name}.")


def _check_image_type(table: Table, column: str) -> None:
    type_ = _find(table, column)[1]
    if pa.types.is_struct(type_) and type_.get_field_index("bytes") >= 0:
        type_ = type_.field("bytes").type
    if not pa.types.is_binary(type_) and not pa.types.is_large_binary(type_):
        raise InputError(f"column {column!r} of {table.name} is {type_}: no bytes of picture files")
