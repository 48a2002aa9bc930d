"""Parquet and Arrow files as tables. At most one batch is in memory: of a Parquet file, one page per column."""

import os
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from convert.sources import hive, s3
from convert.sources.files import check_unchanged, fingerprint, list_files
from convert.sources.parts import InputError, Part, Sample, SourcePlan, cut, cut_off
from convert.sources.s3 import RemoteFile, reading
from convert.sources.tables import Labels, Rows, Table, count_rows, merge_classes, read_labels, samples
from sit_composer.cli import is_remote


def plan_source(description: dict[str, Any], limit: int | None) -> SourcePlan:
    """Reads all labels, except the integers of a remote Arrow stream: that would mean reading the images, too."""
    names = tuple(list_files(description["path"], description["format"]))

    def plan(name: str) -> tuple[dict[str, Any], Labels | None, list[int] | None]:
        file = fingerprint(name)
        table = _open(file, description, names)
        empty = table.lengths is not None and not sum(table.lengths)  # pandas gives its columns the type null
        return file, None if empty else read_labels(table, description), table.lengths

    def count(part: Part, most: int) -> int:
        return count_rows(_open(files[part.file], description, names), description, most)

    with ThreadPoolExecutor(16) as pool:
        files, labels, lengths = zip(*pool.map(plan, names), strict=True)
    cuts = ([Part(n, 0, None, None)] if groups is None else cut(n, groups) for n, groups in enumerate(lengths))
    classes = merge_classes([found for found in labels if found])
    return SourcePlan(list(files), classes, cut_off(list(chain(*cuts)), limit, count))


def read_part(description: dict[str, Any], plan: SourcePlan, part: Part) -> Iterator[Sample]:
    """The images of a part."""
    file = plan.files[part.file]
    check = partial(check_unchanged, file)
    check()
    # If a file that is mapped into memory shrinks, the process ends without an error that could be caught.
    before_rows = (lambda: None) if is_remote(file["name"]) else check
    names = tuple(file["name"] for file in plan.files)
    yield from samples(_open(file, description, names), description, plan, part, before_rows)
    check()


def _open(file: dict[str, Any], description: dict[str, Any], names: tuple[str, ...]) -> Table:
    """A file as a table. ``names`` are those of all files, whose folders may hold columns."""
    columns = tuple(filter(None, (description["label_column"], description["image_column"])))
    open_file = _parquet_file if description["format"] == "parquet" else _arrow_file
    with reading(file["name"]):
        table = open_file(file["name"], columns, file["bytes"], file["modified"])
    return hive.with_folders(table, hive.column_types(names))


def _beside(folder: str, path: str) -> Path:
    """The file that a row of a table names. A table from elsewhere must not name arbitrary files of this machine."""
    if is_remote(folder):
        raise InputError(f"{path!r}: a file instead of an image's bytes; only local tables may name files")
    file = os.path.normpath(os.path.join(folder, path))
    if not file.startswith(os.path.join(folder, "")):
        raise InputError(f"{path!r}: the image's path leads out of {folder}, the table's folder")
    return Path(file)


@lru_cache(maxsize=64)  # a file's table is kept for its next parts, unless its state changes
def _parquet_file(name: str, *state: Any) -> Table:
    # Without the first two options, pyarrow holds a whole row group, which may be the whole file.
    chunk = s3.CHUNK if is_remote(name) else 1 << 20
    options = {"pre_buffer": False, "buffer_size": chunk, "page_checksum_verification": True}

    def open_file() -> pa.NativeFile:
        return pa.PythonFile(RemoteFile(name)) if is_remote(name) else pa.OSFile(name)

    with open_file() as file, pq.ParquetFile(file, **options) as parquet:
        metadata, schema = parquet.metadata, parquet.schema_arrow
    lengths = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    ends = list(accumulate(lengths))
    resting: dict[tuple, Rows] = {}  # at most one reader that stopped inside a row group, by where it continues

    def read_groups(columns: list[str], groups: list[int], size: int) -> Iterator[pa.RecordBatch]:
        with open_file() as file, pq.ParquetFile(file, metadata=metadata, **options) as parquet:
            yield from parquet.iter_batches(size, row_groups=groups, columns=columns)

    def read(columns: list[str], start: int, stop: int, size: int) -> Iterator[pa.RecordBatch]:
        groups = [k for k, end in enumerate(ends) if end > start and end - lengths[k] < stop]
        if not groups:
            return
        # To begin inside a row group means to read all rows before. If the next part is read next, that is avoided.
        rows = resting.pop((*columns, start, size), None)
        rows = rows or Rows(read_groups(columns, groups, size), ends[groups[0]] - lengths[groups[0]])
        yield from rows.between(start, stop)
        resting.clear()
        if stop < ends[groups[-1]]:
            resting[*columns, stop, size] = rows

    return Table(name, partial(_beside, os.path.dirname(name)), schema, lengths, read)


@lru_cache(maxsize=64)
def _arrow_file(name: str, wanted: tuple[str, ...], *state: Any) -> Table:
    """An Arrow file. Its rows are counted by reading one of the wanted columns, which is likely to be needed anyway."""
    with _arrow_batches(name) as (schema, _, is_stream):
        pass
    tops = [part for column in wanted for part in (column, column.partition(".")[0]) if part in schema.names]
    lengths = None
    if not (is_stream and is_remote(name)):
        with _arrow_batches(name, [schema.names.index(top) for top in tops[:1]]) as (_, batches, _):
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
    """The schema of an Arrow file, its batches from ``first`` on with some fields, and whether it is a stream, which
    `datasets` saves: that is read from its beginning, as a batch's place is known only from the batches before it."""
    options = pa.ipc.IpcReadOptions(included_fields=fields)
    with pa.PythonFile(RemoteFile(name)) if is_remote(name) else pa.memory_map(name) as file:
        magic = file.read(6)
        file.seek(0)
        if magic.startswith(b"FEA1"):
            advice = "write it again with pyarrow.feather.write_feather(pyarrow.feather.read_table(…), …)"
            raise InputError(f"{name}: is of Feather's version 1, expected version 2; {advice}")
        if magic == b"ARROW1":
            with pa.ipc.open_file(file, options=options) as reader:
                yield reader.schema, map(reader.get_batch, range(first, reader.num_record_batches)), False
            return
        stream = pa.PythonFile(RemoteFile(name, s3.CHUNK)) if is_remote(name) else file
        with stream, pa.ipc.open_stream(stream, options=options) as reader:
            yield reader.schema, iter(reader), True
