"""Images and labels from tables of columns, whatever stores them. At most one batch of rows is in memory."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from convert.sources.names import class_name, class_names, numbered_names
from convert.sources.parts import MAX_CLASSES, InputError, Part, Sample, SourcePlan
from convert.sources.s3 import reading

BATCH = 64  # rows
VIEWS = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}  # which few functions know
Check = Callable[[], None]


@dataclass(frozen=True)
class Table:
    """One file, or one data set."""

    name: str  # for errors
    find: Callable[[str], bytes | Path]  # the image at a path, for rows without bytes; or raises an InputError
    schema: pa.Schema
    lengths: list[int] | None  # of its groups of rows, where reading can begin; None: unknown, only at the first row
    # (columns, start, stop, size) to batches of top-level columns, of ``size`` rows where it can choose
    read: Callable[[list[str], int, int, int], Iterator[pa.RecordBatch]]


def samples(table: Table, description: dict[str, Any], plan: SourcePlan, part: Part, check: Check) -> Iterator[Sample]:
    """The images of a part's rows. ``check`` is called before rows are taken from a batch."""
    image, label = description["image_column"], description["label_column"]
    columns = [image] if label is None else [image, label]
    classes = MAX_CLASSES if plan.classes is None else len(plan.classes)
    numbers = {name: number for number, name in enumerate(plan.classes or ())}
    for first, (images, *labels) in batches(table, columns, part.start, part.stop, check):
        if labels:
            _check_labels(table, first, labels[0], classes)
        values = labels[0].to_pylist() if labels else [0] * len(images)
        for row, (image, value) in enumerate(zip(images.to_pylist(), values, strict=True), first):
            where = f"{table.name} row {row}"
            if isinstance(image, dict):  # the struct of `datasets`: bytes, or else a path
                path, image = image.get("path"), image["bytes"]
                if image is None and path:
                    try:
                        image = table.find(path)
                    except InputError as error:
                        raise InputError(f"{where}: {error}") from None
            yield Sample(where, image, numbers[class_name(value)] if isinstance(value, str) else value)


@dataclass(frozen=True)
class Labels:
    """The labels of a table: ``kind`` is the names of its classes, or "integers", "strings" or "none"."""

    table: str
    column: str | None
    kind: tuple[str, ...] | str
    strings: frozenset[str] = frozenset()
    largest: int | None = -1  # integer; None: unknown


def read_labels(table: Table, description: dict[str, Any], or_strings: bool = True) -> Labels:
    """Checks the columns of a table and reads all its labels, except integers where that would mean reading all. Raises
    InputError if a column is missing or of another type, or naming the first row whose label is not a class."""
    image, column = description["image_column"], description["label_column"]
    type_ = _find(table, image)[1]
    if pa.types.is_struct(type_) and type_.get_field_index("bytes") >= 0:
        type_ = _plain_type(type_.field("bytes").type)
    if not any(is_type(type_) for is_type in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_null)):
        raise InputError(f"{table.name} column {image!r}: is {type_}, expected the bytes of image files")
    if column is None:
        return Labels(table.name, None, "none")
    path, type_ = _find(table, column)
    names = _class_names(table, description, path)
    text = pa.types.is_string(type_) or pa.types.is_large_string(type_)
    if not text and not pa.types.is_integer(type_) and not pa.types.is_null(type_):
        raise InputError(f"{table.name} column {column!r}: is {type_}, expected labels that are integers or strings")
    if text and not or_strings:
        raise InputError(f"{table.name} column {column!r}: has strings, expected integers with --streaming")
    if table.lengths is None and not text:
        return Labels(table.name, column, tuple(names) if names else "integers", largest=None)
    strings: set[str] = set()
    largest = -1
    for first, (labels,) in batches(table, [column], 0, None, size=64 * BATCH):
        largest = max(largest, _check_labels(table, first, labels, len(names) if names else MAX_CLASSES))
        if text:
            strings.update(map(class_name, pc.unique(labels).to_pylist()))
    kind = tuple(names) if names and strings.issubset(names) else "strings" if text else "integers"
    return Labels(table.name, column, kind, frozenset(strings), largest)


def _check_labels(table: Table, first: int, labels: pa.Array, classes: int) -> int:
    """The largest of labels, which begin at row ``first``, or -1 if they are strings; all must be classes."""
    if labels.null_count:
        row = first + pc.index(pc.is_null(labels), True).as_py()
        raise InputError(f"{table.name} row {row}: the label is null; --label-column none converts without labels")
    if not pa.types.is_integer(labels.type):
        if blank := [text for text in pc.unique(labels).to_pylist() if not class_name(text)]:
            row = first + labels.to_pylist().index(blank[0])
            raise InputError(f"{table.name} row {row}: the label is empty; --label-column none converts without labels")
        return -1
    bounds = pc.min_max(labels)
    for value in (bounds["min"].as_py(), bounds["max"].as_py()):
        if not 0 <= value < classes:
            row = first + labels.to_pylist().index(value)
            raise InputError(f"{table.name} row {row}: label {value} is not a class, expected 0 to {classes - 1}")
    return bounds["max"].as_py()


def merge_classes(labels: Sequence[Labels]) -> list[str] | None:
    """The names of the classes of all tables; None if they are integers that were not all read."""
    if not labels:
        return []
    first = labels[0]
    for other in labels:
        if other.kind != first.kind:
            raise InputError(f"{other.table} column {first.column!r}: has other classes than {first.table}")
    if first.kind == "none":
        return ["all"]
    if first.kind == "strings":
        return class_names(frozenset().union(*(t.strings for t in labels)), f"{first.table} column {first.column!r}")
    if first.kind != "integers":
        return list(first.kind)
    largest = [table.largest for table in labels]
    return None if None in largest else list(map(str, range(max(largest) + 1)))


def batches(
    table: Table, columns: list[str], start: int, stop: int | None, check: Check = lambda: None, size: int = BATCH
) -> Iterator[tuple[int, list[pa.Array]]]:
    """The columns of rows ``start`` to before ``stop`` (None: the end), a few at a time, each after its first row."""
    stop = sys.maxsize if stop is None else stop
    paths = [_find(table, column)[0] for column in columns]
    with reading(table.name):
        for whole in table.read(list(dict.fromkeys(path[0] for path in paths)), start, stop, size):
            for begin in range(0, whole.num_rows, size):  # a batch of an Arrow file may be of any size
                check()
                batch = whole.slice(begin, size)
                arrays = [batch.column(path[0]) for path in paths]
                arrays = [pc.struct_field(a, p[1:]) if p[1:] else a for a, p in zip(arrays, paths, strict=True)]
                yield start, [_plain(array) for array in arrays]
                start += batch.num_rows


def count_rows(table: Table, description: dict[str, Any], most: int) -> int:
    """Counts the rows of a table, up to ``most``, by reading a column."""
    column = description["label_column"] or description["image_column"]
    return sum(len(arrays[0]) for _, arrays in batches(table, [column], 0, most))


class Rows:
    """Takes ranges of rows from batches, one after another. ``first`` is the number of the first row."""

    def __init__(self, batches: Iterator[pa.RecordBatch], first: int = 0) -> None:
        self.batches, self.first = batches, first
        self.rest: pa.RecordBatch | None = None  # of a batch taken in part; it begins with row ``first``

    def between(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """The rows ``start`` to before ``stop``, and no further. The range before must end before them."""
        while self.first < stop:
            batch = self.rest or next(self.batches, None)
            if batch is None:
                return
            begin, end = max(start - self.first, 0), min(stop - self.first, batch.num_rows)
            self.rest = batch.slice(end) if end < batch.num_rows else None
            self.first += end
            if begin < end:
                yield batch.slice(begin, end - begin)


def _find(table: Table, column: str) -> tuple[list[str], pa.DataType]:
    """The path of a column (dots go into structs), and its plain type."""
    path = [column] if column in table.schema.names else column.split(".")
    type_: pa.DataType = pa.struct(table.schema)
    for name in path:
        found = type_.get_all_field_indices(name) if pa.types.is_struct(type_) else []
        if len(found) > 1:
            raise InputError(f"{table.name}: has two columns {name!r}, expected one")
        if not found:
            columns = ", ".join(map(repr, _names(pa.struct(table.schema))))
            raise InputError(f"{table.name}: has no column {column!r}; its columns are: {columns}")
        type_ = type_.field(found[0]).type
    return path, _plain_type(type_)


def _class_names(table: Table, description: dict[str, Any], path: list[str]) -> list[str] | None:
    """The names of a column's classes, as `datasets` notes them in a schema; None if nothing there is such a note."""
    try:
        feature = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        for name in path:
            feature = feature[name]
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
        names = [names[str(number)] for number in range(len(names))] if isinstance(names, dict) else names
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    if not isinstance(names, list) or not names:
        return None
    wrong = [name for name in names if type(name) not in (str, int)]
    if (wrong or len(set(map(class_name, names))) < len(names)) and "class_names" in description:
        return None  # then they are given by number
    if wrong:
        what = f"has a class named {wrong[0]!r}, expected text; give the names with --class-names"
        raise InputError(f"{table.name} column {description['label_column']!r}: {what}")
    return numbered_names(names, f"{table.name} column {description['label_column']!r}")


def _plain_type(type_: pa.DataType) -> pa.DataType:
    """The type of `_plain`."""
    type_ = type_.value_type if pa.types.is_dictionary(type_) else type_
    return VIEWS.get(type_, type_)


def _plain(array: pa.Array) -> pa.Array:
    """An array without a dictionary, and not of views."""
    if pa.types.is_dictionary(array.type):
        array = pa.DictionaryArray.from_arrays(array.indices, _plain(array.dictionary)).dictionary_decode()
    return array.cast(VIEWS[array.type]) if array.type in VIEWS else array


def _names(struct: pa.StructType, prefix: str = "") -> Iterator[str]:
    for field in struct:
        yield prefix + field.name
        if pa.types.is_struct(field.type):
            yield from _names(field.type, f"{prefix}{field.name}.")
