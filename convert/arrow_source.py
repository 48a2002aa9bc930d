"""Pictures and labels out of Arrow tables: Parquet files, Arrow files, and (see `hf_source.py`) Hugging Face data sets.

Each kind of table is a schema and a function that reads some columns of some rows batch by batch; the rest is the same
for all. At no time is more in memory than one batch (of a Parquet file: one page of each column).
"""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from parts import MAX_CLASSES, InputError, Part, Sample, SourcePlan, cut, cut_off
from source_files import check_same, fingerprint, list_files

BATCH = 64  # rows
OPENED_AT_ONCE = 16  # files whose footers and labels are read


@dataclass(frozen=True)
class Table:
    """One file, or one data set.

    Args:
        name: for errors.
        folder: that relative paths of pictures start from; None: they may be anywhere.
        schema: of all columns.
        lengths: of the groups of rows that it consists of; a reader can begin at each.
        read: batches of some top-level columns, from a row on to before another, of so many rows if it has the choice.
    """

    name: str
    folder: str | None
    schema: pa.Schema
    lengths: list[int]
    read: Callable[[list[str], int, int, int], Iterator[pa.RecordBatch]]


def plan_tables(description: dict[str, Any], limit: int | None) -> SourcePlan:
    """Opens every file and reads through the labels.

    Raises:
        InputError: if one cannot be read, lacks a column, or has labels that are not classes.
    """
    names = list_files(description["path"], description["format"])

    def plan(name: str) -> tuple[Table, Labels, dict[str, Any]]:
        file = fingerprint(name)
        table = _open(name, description)
        return table, read_labels(table, description), file

    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        tables, labels, files = zip(*pool.map(plan, names), strict=True)
    parts = [part for number, table in enumerate(tables) for part in cut(number, table.lengths)]
    return SourcePlan(list(files), merge_classes(labels), cut_off(parts, limit))


def read_tables(description: dict[str, Any], plan: SourcePlan, part: Part) -> Iterator[Sample]:
    """The pictures of a part.

    Raises:
        InputError: if the file cannot be read, or has changed.
    """
    file = plan.files[part.file]
    check_same(file, fingerprint(file["name"]))
    table = _open(file["name"], description)
    yield from samples(table, description, plan, part, lambda: check_same(file, fingerprint(file["name"])))


def samples(
    table: Table, description: dict[str, Any], plan: SourcePlan, part: Part, check: Callable[[], None]
) -> Iterator[Sample]:
    """The pictures of some rows. ``check`` is called before rows are taken from what was read, and at the end."""
    image, label = description["image_column"], description["label_column"]
    columns = [image] if label is None else [image, label]
    numbers = {name: number for number, name in enumerate(plan.classes)}
    for first, (images, *labels) in _batches(table, columns, part.start, part.stop, check):
        values = labels[0].to_pylist() if labels else [0] * len(images)
        for row, (picture, value) in enumerate(zip(images.to_pylist(), values, strict=True), first):
            where = f"{table.name} row {row}"
            if isinstance(picture, dict):  # the struct of `datasets`: bytes, or else a path
                path = picture.get("path")
                picture = picture["bytes"] if picture["bytes"] is not None or not path else _beside(table, path, where)
            yield Sample(where, picture, numbers[value] if isinstance(value, str) else value)
    check()


def _beside(table: Table, path: str, where: str) -> Path:
    """The file that a row of a table names. A table that came from elsewhere must not name any file of this machine."""
    if table.folder is None:
        return Path(path)
    file = os.path.normpath(os.path.join(table.folder, path))
    if not file.startswith(os.path.join(table.folder, "")):
        raise InputError(f"{where}: the picture's path {path!r} leads out of {table.folder}, the table's folder")
    return Path(file)


@dataclass(frozen=True)
class Labels:
    """What the labels of a table are: ``kind`` is the names of its classes, or "integers", "strings" or "none"."""

    table: str
    column: str | None
    kind: tuple[str, ...] | str
    strings: frozenset[str] = frozenset()
    largest: int = -1


def read_labels(table: Table, description: dict[str, Any]) -> Labels:
    """Checks the columns of a table and reads all its labels.

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
    kind = tuple(names) if names else "strings" if text else "integers"
    limit = len(names) if names else MAX_CLASSES
    strings: set[str] = set()
    largest = -1
    for first, (labels,) in _batches(table, [column], 0, sum(table.lengths), size=64 * BATCH):
        if labels.null_count:
            row = first + pc.index(pc.is_null(labels), True).as_py()
            raise InputError(f"{table.name} row {row}: the label is null; say --label-column none to do without labels")
        if text:
            strings.update(pc.unique(labels).to_pylist())
            continue
        bounds = pc.min_max(labels)
        for value in (bounds["min"].as_py(), bounds["max"].as_py()):
            if not 0 <= value < limit:
                row = first + labels.to_pylist().index(value)
                raise InputError(f"{table.name} row {row}: label {value} is not a class: they are 0 to {limit - 1}")
        largest = max(largest, bounds["max"].as_py())
    return Labels(table.name, column, kind, frozenset(strings), largest)


def merge_classes(labels: tuple[Labels, ...]) -> list[str]:
    """The classes' names, of all tables.

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
        return sorted(frozenset().union(*(table.strings for table in labels)))
    return list(map(str, range(max(t.largest for t in labels) + 1))) if first.kind == "integers" else list(first.kind)


def _batches(
    table: Table,
    columns: list[str],
    start: int,
    stop: int,
    check: Callable[[], None] = lambda: None,
    size: int = BATCH,
) -> Iterator[tuple[int, list[pa.Array]]]:
    """Yields the columns of rows from ``start`` to before ``stop``, a few at a time, and the number of the first."""
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
    if start != stop:
        raise InputError(f"{table.name} ends at row {start}, before row {stop}")


def between(batches: Iterator[pa.RecordBatch], start: int, stop: int) -> Iterator[pa.RecordBatch]:
    """The rows from ``start`` to before ``stop`` of batches. None that follows is asked for."""
    first = 0
    for batch in batches:
        last = first + batch.num_rows
        if last > start and first < stop:
            yield batch.slice(max(start - first, 0), min(stop, last) - max(start, first))
        first = last
        if first >= stop:
            return


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


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Errors of pyarrow become an InputError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"cannot read {name}: {str(error).splitlines()[0]}") from error


def _open(name: str, description: dict[str, Any]) -> Table:
    with reading(name):
        return {"parquet": _parquet_file, "arrow": _arrow_file}[description["format"]](name)


def _parquet_file(name: str) -> Table:
    # Without the first two, pyarrow holds a whole row group, which some writers make of a whole file.
    options = {"pre_buffer": False, "buffer_size": 1 << 20, "page_checksum_verification": True}
    with pq.ParquetFile(name, **options) as file:
        lengths = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        schema = file.schema_arrow

    def read(columns: list[str], start: int, stop: int, size: int) -> Iterator[pa.RecordBatch]:
        ends = list(accumulate(lengths))
        groups = [k for k, end in enumerate(ends) if end > start and end - lengths[k] < stop]
        if groups:
            before = ends[groups[0]] - lengths[groups[0]]
            with pq.ParquetFile(name, **options) as file:
                batches = file.iter_batches(size, row_groups=groups, columns=columns)
                yield from between(batches, start - before, stop - before)

    return Table(name, os.path.dirname(name), schema, lengths, read)


def _arrow_file(name: str) -> Table:
    with _arrow_batches(name) as (schema, batches):
        lengths = [batch.num_rows for batch in batches]

    def read(columns: list[str], start: int, stop: int, size: int) -> Iterator[pa.RecordBatch]:
        with _arrow_batches(name) as (_, batches):
            for batch in between(batches, start, stop):
                yield batch.select(columns)

    return Table(name, os.path.dirname(name), schema, lengths, read)


@contextmanager
def _arrow_batches(name: str) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Arrow has two layouts: the file, which starts with a magic word, and the stream, which `datasets` saves."""
    with pa.memory_map(name) as file:
        magic = file.read(6)
        file.seek(0)
        if magic == b"ARROW1":
            with pa.ipc.open_file(file) as reader:
                yield reader.schema, map(reader.get_batch, range(reader.num_record_batches))
        else:
            with pa.ipc.open_stream(file) as reader:
                yield reader.schema, iter(reader)
