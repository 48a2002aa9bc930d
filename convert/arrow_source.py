"""Pictures and labels out of Arrow tables: Parquet files, Arrow files, Hugging Face data sets.

Each kind of table is a schema and a function that reads some columns of it batch by batch; the rest is the same for
all. At no time is more in memory than one batch (of a Parquet file: one page of each column).
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from sources import InputError, Sample, Source, list_files

BATCH = 64  # rows
MAX_CLASSES = 1_000_000  # more means that the column is not one of classes


@dataclass(frozen=True)
class Table:
    """One file, or one data set."""

    name: str  # for errors
    folder: Path  # that relative paths of pictures start from
    schema: pa.Schema
    rows: int | None
    read: Callable[[list[str]], Iterator[pa.RecordBatch]]  # of top-level columns


def open_tables(description: dict[str, Any]) -> Source:
    """Opens every table and reads through the labels.

    Raises:
        InputError: if one cannot be read, lacks a column, or has labels that are not classes.
    """
    if description["format"] == "hf":
        tables = [_data_set(**{key: description[key] for key in ("path", "split", "config")})]
    else:
        open_file = {"parquet": _parquet_file, "arrow": _arrow_file}[description["format"]]
        tables = [open_file(path) for path in list_files(description["path"], description["format"])]
    image, label = description["image_column"], description["label_column"]
    for table in tables:
        _check_image_type(table, image)
    classes, numbers = (["all"], None) if label is None else _read_classes(tables, label)
    rows = None if any(table.rows is None for table in tables) else sum(table.rows for table in tables)
    return Source(classes, rows, _samples(tables, image, label, numbers))


def _samples(tables: list[Table], image: str, label: str | None, numbers: dict[str, int] | None) -> Iterator[Sample]:
    for table in tables:
        for first, (images, *labels) in _batches(table, [image] if label is None else [image, label]):
            values = labels[0].to_pylist() if labels else [0] * len(images)
            for row, (picture, value) in enumerate(zip(images.to_pylist(), values, strict=True), first):
                if isinstance(picture, dict):  # the struct of `datasets`: bytes, or else a path
                    path = picture.get("path")
                    picture = picture["bytes"] if picture["bytes"] is not None or not path else table.folder / path
                yield Sample(f"{table.name} row {row}", picture, numbers[value] if numbers else value)


def _read_classes(tables: list[Table], column: str) -> tuple[list[str], dict[str, int] | None]:
    """Reads all labels. Returns the classes' names and, if labels are strings, the number of each.

    Raises:
        InputError: naming the first row whose label is no class: null, negative, too large, not an integer or string.
    """
    kinds = {}  # what each table's labels are -> the first table with such
    strings: set[str] = set()
    largest = -1
    for table in tables:
        type_, names = _find(table, column)[1:]
        text = pa.types.is_string(type_) or pa.types.is_large_string(type_)
        if not text and not pa.types.is_integer(type_):
            raise InputError(f"labels must be integers or strings, but column {column!r} of {table.name} is {type_}")
        kinds.setdefault(tuple(names) if names else "strings" if text else "integers", table.name)
        limit = len(names) if names else MAX_CLASSES
        for first, (labels,) in _batches(table, [column]):
            if labels.null_count:
                row = first + pc.index(pc.is_null(labels), True).as_py()
                raise InputError(
                    f"{table.name} row {row}: the label is null; say --label-column none to do without labels"
                )
            if text:
                strings.update(pc.unique(labels).to_pylist())
                continue
            bounds = pc.min_max(labels)
            for value in (bounds["min"].as_py(), bounds["max"].as_py()):
                if not 0 <= value < limit:
                    row = first + labels.to_pylist().index(value)
                    raise InputError(f"{table.name} row {row}: label {value} is not a class: they are 0 to {limit - 1}")
            largest = max(largest, bounds["max"].as_py())
    if len(kinds) > 1:
        raise InputError(f"column {column!r} has other classes in {list(kinds.values())[1]} than in {tables[0].name}")
    kind = next(iter(kinds))
    if kind == "strings":
        classes = sorted(strings)
        return classes, {name: number for number, name in enumerate(classes)}
    return list(map(str, range(largest + 1))) if kind == "integers" else list(kind), None


def _batches(table: Table, columns: list[str]) -> Iterator[tuple[int, list[pa.Array]]]:
    """Yields the columns a few rows at a time, with the number of the first of these rows."""
    paths = [_find(table, column)[0] for column in columns]
    first = 0
    with _reading(table.name):
        for whole in table.read(list(dict.fromkeys(path[0] for path in paths))):
            for start in range(0, whole.num_rows, BATCH):  # a batch of an Arrow file may be of any size
                batch = whole.slice(start, BATCH)
                arrays = [batch.column(path[0]) for path in paths]
                arrays = [pc.struct_field(a, p[1:]) if p[1:] else a for a, p in zip(arrays, paths, strict=True)]
                yield first, [a.dictionary_decode() if pa.types.is_dictionary(a.type) else a for a in arrays]
                first += batch.num_rows


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
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"cannot read {name}: {str(error).splitlines()[0]}") from error


def _parquet_file(path: Path) -> Table:
    # Without the first two, pyarrow holds a whole row group, which some writers make of a whole file.
    options = {"pre_buffer": False, "buffer_size": 1 << 20, "page_checksum_verification": True}

    def read(columns: list[str]) -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path, **options) as file:
            yield from file.iter_batches(BATCH, columns=columns)

    with _reading(str(path)), pq.ParquetFile(path, **options) as file:
        return Table(str(path), path.parent, file.schema_arrow, file.metadata.num_rows, read)


def _arrow_file(path: Path) -> Table:
    def read(columns: list[str]) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(path)) as file, _arrow_reader(file) as reader:
            stream = isinstance(reader, pa.RecordBatchStreamReader)
            for batch in reader if stream else map(reader.get_batch, range(reader.num_record_batches)):
                yield batch.select(columns)

    with _reading(str(path)), pa.memory_map(str(path)) as file, _arrow_reader(file) as reader:
        return Table(str(path), path.parent, reader.schema, None, read)


def _arrow_reader(file: pa.MemoryMappedFile) -> pa.RecordBatchStreamReader | pa.RecordBatchFileReader:
    """Arrow has two layouts: the file, which starts with a magic word, and the stream, which `datasets` saves."""
    magic = file.read(6)
    file.seek(0)
    return pa.ipc.open_file(file) if magic == b"ARROW1" else pa.ipc.open_stream(file)


def _data_set(path: str, split: str | None, config: str | None) -> Table:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it logs each of five tries to reach the Hub
    try:
        if (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(path)
            if split is not None and split not in data:
                raise InputError(f"{path} has no split {split!r}; its splits are: {', '.join(data)}")
            data = data if split is None else data[split]
        else:
            data = datasets.load_dataset(path, config, split=split)
    except InputError:
        raise
    except Exception as error:  # of a dozen libraries underneath
        where = path if Path(path).exists() else f"{path!r}, neither a path here nor readable as a data set on the Hub"
        raise InputError(f"cannot load {where}: {' '.join(str(error).split())}") from error

    def read(columns: list[str]) -> Iterator[pa.RecordBatch]:
        # The arrow format hands out the stored bytes and decodes no picture.
        for table in data.select_columns(columns).with_format("arrow").iter(BATCH):
            yield from table.to_batches()

    name = path if split is None else f"{path} ({split})"
    return Table(name, Path(), data.features.arrow_schema, len(data), read)
