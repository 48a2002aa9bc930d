"""Parquet and Arrow files as tables, here or in an object store.

At no time is more in memory than one batch: of a Parquet file, a page of each column.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from convert.sources import s3 as remote
from convert.sources.files import fingerprint, list_files
from convert.sources.names import SCHEME, check_same
from convert.sources.parts import InputError, Part, Sample, SourcePlan, cut, cut_off
from convert.sources.s3 import reading
from convert.sources.tables import Labels, Rows, Table, batches, merge_classes, read_labels, samples

OPENED_AT_ONCE = 16  # files whose footers and labels are read


def plan_tables(description: dict[str, Any], limit: int | None) -> SourcePlan:
    """Opens every file and reads through the labels (but for the integers of an Arrow stream that is not here: to find
    them, the pictures would have to be read, too).

    Raises:
        InputError: if one cannot be read, lacks a column, or has labels that are not classes.
    """
    names = list_files(description["path"], description["format"])

    def plan(name: str) -> tuple[dict[str, Any], Labels, list[int] | None]:
        file = fingerprint(name)
        table = _open(file, description)
        return file, read_labels(table, description), table.lengths

    def count(part: Part, most: int) -> int:
        table = _open(files[part.file], description)
        return sum(len(arrays[0]) for _, arrays in batches(table, [description["image_column"]], 0, most))

    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        files, labels, lengths = zip(*pool.map(plan, names), strict=True)
    parts = [
        part
        for number, groups in enumerate(lengths)
        for part in ([Part(number, 0, None, None)] if groups is None else cut(number, groups))
    ]
    return SourcePlan(list(files), merge_classes(labels), cut_off(parts, limit, count))


def read_tables(description: dict[str, Any], plan: SourcePlan, part: Part) -> Iterator[Sample]:
    """The pictures of a part.

    Raises:
        InputError: if the file cannot be read, or has changed.
    """
    file = plan.files[part.file]

    def check() -> None:
        check_same(file, fingerprint(file["name"]))

    check()
    table = _open(file, description)
    # Where a file that is mapped into memory shrinks, there is no error that could be caught: the process ends.
    yield from samples(table, description, plan, part, (lambda: None) if _is_remote(table.name) else check)
    check()


def _open(file: dict[str, Any], description: dict[str, Any]) -> Table:
    column = description["label_column"] or description["image_column"]
    with reading(file["name"]):
        return _open_once(description["format"], file["name"], column, file["bytes"], file["modified"])


@lru_cache(maxsize=64)
def _open_once(format: str, name: str, column: str, *state: Any) -> Table:
    """A file's table. What was read of a file serves for its next parts, too, unless its state is another."""
    return _parquet_file(name) if format == "parquet" else _arrow_file(name, column)


def _is_remote(name: str) -> bool:
    return name.startswith(SCHEME)


def _beside(folder: str, path: str) -> Path:
    """The file that a row of a table names. A table that came from elsewhere must not name any file of this machine."""
    if _is_remote(folder):
        raise InputError(f"it names a file, {path!r}, in place of a picture's bytes: that is followed only here")
    file = os.path.normpath(os.path.join(folder, path))
    if not file.startswith(os.path.join(folder, "")):
        raise InputError(f"the picture's path {path!r} leads out of {folder}, the table's folder")
    return Path(file)


def _parquet_file(name: str) -> Table:
    # Without the first two, pyarrow holds a whole row group, which some writers make of a whole file.
    chunk = remote.CHUNK if _is_remote(name) else 1 << 20
    options = {"pre_buffer": False, "buffer_size": chunk, "page_checksum_verification": True}

    def open_file() -> pa.NativeFile:
        return pa.PythonFile(remote.RemoteFile(name)) if _is_remote(name) else pa.OSFile(name)

    with open_file() as file, pq.ParquetFile(file, **options) as parquet:
        metadata, schema = parquet.metadata, parquet.schema_arrow
    lengths = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    ends = list(accumulate(lengths))

    resting: dict[tuple, Rows] = {}  # at most one: who stopped inside a row group, by where it goes on

    def read_groups(columns: list[str], groups: list[int], size: int) -> Iterator[pa.RecordBatch]:
        with open_file() as file, pq.ParquetFile(file, metadata=metadata, **options) as parquet:
            yield from parquet.iter_batches(size, row_groups=groups, columns=columns)

    def read(columns: list[str], start: int, stop: int, size: int) -> Iterator[pa.RecordBatch]:
        groups = [k for k, end in enumerate(ends) if end > start and end - lengths[k] < stop]
        if not groups:
            return
        # To begin inside a row group is to read all of it that is before. The next part need not, if it is read next.
        rows = resting.pop((*columns, start, size), None)
        rows = rows or Rows(read_groups(columns, groups, size), ends[groups[0]] - lengths[groups[0]])
        yield from rows.between(start, stop)
        resting.clear()
        if stop < ends[groups[-1]]:
            resting[*columns, stop, size] = rows

    return Table(name, partial(_beside, os.path.dirname(name)), schema, lengths, read)


def _arrow_file(name: str, column: str) -> Table:
    """An Arrow file. To count its rows, the given column is read, as that is likely to be needed anyway."""
    with _arrow_batches(name) as (schema, _, is_stream):
        pass
    top = column if column in schema.names else column.partition(".")[0]
    lengths = None
    if not (is_stream and _is_remote(name)) and top in schema.names:
        with _arrow_batches(name, [schema.get_field_index(top)]) as (_, batches, _):
            lengths = [batch.num_rows for batch in batches]
    ends = list(accumulate(lengths or []))

    def read(columns: list[str], start: int, stop: int, size: int) -> Iterator[pa.RecordBatch]:
        first = 0 if is_stream else bisect_right(ends, start)
        before = 0 if first == 0 else ends[first - 1]
        fields = [schema.get_field_index(column) for column in columns]
        with _arrow_batches(name, fields, first) as (_, batches, _):
            for batch in Rows(batches, before).between(start, stop):
                yield batch.select(columns)

    return Table(name, partial(_beside, os.path.dirname(name)), schema, lengths, read)


@contextmanager
def _arrow_batches(
    name: str, fields: list[int] | None = None, first: int = 0
) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch], bool]]:
    """The schema of an Arrow file, its batches with some fields from one on, and whether it is a stream.

    Arrow has two layouts: the file, which starts with a magic word, and the stream, which `datasets` saves, and whose
    batches are all read, as only those before it tell where one begins.
    """
    options = pa.ipc.IpcReadOptions(included_fields=fields)
    with pa.PythonFile(remote.RemoteFile(name)) if _is_remote(name) else pa.memory_map(name) as file:
        magic = file.read(6)
        file.seek(0)
        if magic == b"ARROW1":
            with pa.ipc.open_file(file, options=options) as reader:
                yield reader.schema, map(reader.get_batch, range(first, reader.num_record_batches)), False
        elif _is_remote(name):
            with (
                pa.PythonFile(remote.RemoteFile(name, remote.CHUNK)) as stream,
                pa.ipc.open_stream(stream, options=options) as reader,
            ):
                yield reader.schema, iter(reader), True
        else:
            with pa.ipc.open_stream(file, options=options) as reader:
                yield reader.schema, iter(reader), True
