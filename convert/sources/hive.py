"""Columns that folders' names hold, as in `label=0/part-0.parquet`. Hive, Spark, pyarrow and Polars write them."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from urllib.parse import unquote

import pyarrow as pa

from convert.sources.tables import Table

NULL = "__HIVE_DEFAULT_PARTITION__"
WHOLE = re.compile(r"-?\d{1,18}", re.ASCII)


def _columns(name: str) -> dict[str, str | None]:
    """The columns that a file's folders hold, each with its value; None for a null."""
    pairs = (folder.split("=", 1) for folder in name.split("/")[:-1] if "=" in folder)
    return {unquote(key): None if value == NULL else unquote(value) for key, value in pairs}


@lru_cache(maxsize=1)
def column_types(names: tuple[str, ...]) -> dict[str, pa.DataType]:
    """The types of all columns that the folders of these files hold: integers if all values are, else strings."""
    values: dict[str, set[str | None]] = defaultdict(set)
    for name in names:
        for key, value in _columns(name).items():
            values[key].add(value)
    whole = {key: all(value is None or WHOLE.fullmatch(value) for value in found) for key, found in values.items()}
    return {key: pa.int64() if whole[key] else pa.string() for key in values}


def with_folders(table: Table, types: dict[str, pa.DataType]) -> Table:
    """A table with the columns that its folders hold, and that it has not itself."""
    held = {key: value for key, value in _columns(table.name).items() if key not in table.schema.names}
    if not held:
        return table
    scalars = {key: pa.scalar(value, pa.string()).cast(types[key]) for key, value in held.items()}
    schema = table.schema
    for key, scalar in scalars.items():
        schema = schema.append(pa.field(key, scalar.type))

    def read(columns: list[str], start: int, stop: int, size: int) -> Iterator[pa.RecordBatch]:
        own = [column for column in columns if column not in scalars]
        for batch in table.read(own, start, stop, size):
            rows = batch.num_rows
            arrays = [pa.repeat(scalars[name], rows) if name in scalars else batch.column(name) for name in columns]
            yield pa.RecordBatch.from_arrays(arrays, columns)

    return replace(table, schema=schema, read=read)
