"""Hugging Face data sets: saved to disk, or loaded by `load_dataset` from a folder or the Hub; whole or streamed."""

import logging
import os
import sys
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.utils.file_utils import xopen
from huggingface_hub import constants

from convert.sources.files import fingerprint, is_saved
from convert.sources.names import check_same
from convert.sources.parts import InputError, Part, Sample, SourcePlan, cut, cut_off
from convert.sources.tables import Rows, Table, count_rows, merge_classes, read_labels, samples
from sit_composer.errors import one_line

_read_metadata = FolderBasedBuilder._read_metadata


def _read_plain_metadata(*arguments: Any, **options: Any) -> Iterator[pa.Table]:
    """metadata.csv and the like, with the type that the library expects of file names; pandas 3 gives another one."""
    for table in _read_metadata(*arguments, **options):
        texts = [pa.types.is_large_string(type_) or pa.types.is_string_view(type_) for type_ in table.schema.types]
        fields = (f.with_type(pa.string()) if text else f for f, text in zip(table.schema, texts, strict=True))
        yield table.cast(pa.schema(fields, table.schema.metadata))


FolderBasedBuilder._read_metadata = _read_plain_metadata


def plan_source(description: dict[str, Any], limit: int | None) -> SourcePlan:
    """Loads a data set and reads all its labels. If it is streamed, no label is read, and each shard is a part."""
    _load.cache_clear()  # it may have changed since
    data, files = _open(description)
    if "streaming" not in description:
        table = _table(description, data)
        classes = merge_classes((read_labels(table, description),))
        return SourcePlan(files, classes, cut_off(cut(0, table.lengths), limit))
    labels = read_labels(_table(description, data, 0), description, or_strings=False)

    def count(part: Part, most: int) -> int:
        return count_rows(_table(description, data, part.file), description, most)

    parts = [Part(shard, 0, None, None) for shard in range(len(files))]
    return SourcePlan(files, merge_classes((labels,)), cut_off(parts, limit, count))


def read_part(description: dict[str, Any], plan: SourcePlan, part: Part) -> Iterator[Sample]:
    """The images of a part, as stored, not decoded."""

    def check() -> Any:
        data, files = _open(description)
        if len(files) != len(plan.files):
            raise InputError(f"{description['path']}: changed since the conversion began, it has other files")
        for planned, file in zip(plan.files, files, strict=True):
            check_same(planned, file)
        return data

    streaming = "streaming" in description
    table = _table(description, check(), part.file if streaming else None)
    yield from samples(table, description, plan, part, (lambda: None) if streaming else check)
    check()


def _open(description: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """The data set, and the state of its files: the library's fingerprint, unless the data set was saved to disk."""
    path = description["path"]
    data, state = _load(path, description["split"], description["config"], "streaming" in description)
    if is_saved(path):
        return data, [fingerprint(file["filename"]) for file in data.cache_files]
    names = [f"{path} shard {shard}" for shard in range(data.num_shards)] if "streaming" in description else [path]
    return data, [{"name": name, "bytes": None, "modified": None, "fingerprint": state} for name in names]


def _table(description: dict[str, Any], data: Any, shard: int | None = None) -> Table:
    """The whole data set, or a shard of a streamed one."""
    path, split = description["path"], description["split"]
    name = (path if split is None else f"{path} ({split})") + ("" if shard is None else f" shard {shard}")

    def read(columns: list[str], start: int, stop: int, size: int) -> Iterator[pa.RecordBatch]:
        first = start if shard is None else 0
        rows = data if shard is None else data.shard(data.num_shards, shard)
        rows = rows.select_columns(columns).with_format("arrow")  # which returns the stored bytes and decodes no image
        rows = rows.select(range(start, min(stop, len(data)))) if shard is None else rows
        try:
            yield from Rows((batch for t in rows.iter(size) for batch in t.to_batches()), first).between(start, stop)
        except Exception as error:  # of a dozen libraries underneath
            raise InputError(f"{name}: cannot be read: {one_line(error)}") from error

    lengths = [1] * len(data) if shard is None else None
    return Table(name, partial(_find, path), data.features.arrow_schema, lengths, read)


def _find(source: str, path: str) -> bytes | Path:
    """An image that a data set keeps as a file, local, in an archive or on the Hub; no other file of this machine."""
    config = datasets.config
    place = path.rpartition("::")[2]  # of the archive, if the image is inside one
    if not place.startswith(("hf://", constants.ENDPOINT + "/")):
        folders = (source, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
        roots = (os.path.join(way(folder), "") for folder in folders for way in (os.path.abspath, os.path.realpath))
        if "://" in place or not os.path.abspath(place).startswith(tuple(roots)):
            raise InputError(f"{path!r}: the image's path leads out of the data set {source}")
    if "://" not in path:
        return Path(path)
    try:
        with xopen(path, "rb") as file:
            return file.read()
    except Exception as error:
        raise InputError(f"{path}: cannot be read: {one_line(error)}") from error


@lru_cache(maxsize=1)  # loaded once for all parts
def _load(path: str, split: str | None, config: str | None, streaming: bool) -> tuple[Any, str]:
    """A data set, and its fingerprint; "" if it was saved to disk."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it logs each of five attempts to reach the Hub
    try:
        if streaming:
            builder = datasets.load_dataset_builder(path, config)
            data = builder.as_streaming_dataset(split=split)
            if data.features is None:  # the columns are known only after reading a row
                data = data._resolve_features()
            return data, f"{builder.config_id} {builder.hash}"
        if not is_saved(path):
            data = datasets.load_dataset(path, config, split=split)
            return data, data._fingerprint
        data = datasets.load_from_disk(path)
        if split is not None and split not in data:
            raise InputError(f"{path}: has no split {split!r}; its splits are: {', '.join(data)}")
        return data if split is None else data[split], ""
    except InputError:
        raise
    except Exception as error:  # of a dozen libraries underneath
        here = "" if Path(path).exists() else ", it is neither a path here nor readable as a data set on the Hub"
        raise InputError(f"{path}: cannot be loaded{here}: {one_line(error)}") from error
