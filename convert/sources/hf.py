"""Hugging Face data sets: saved to disk, or what `load_dataset` loads, from a folder or the Hub; whole or streamed."""

import logging
import os
import sys
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from convert.sources.files import fingerprint
from convert.sources.names import check_same
from convert.sources.parts import InputError, Part, Sample, SourcePlan, cut, cut_off
from convert.sources.tables import Rows, Table, batches, merge_classes, read_labels, samples


def plan_data_set(description: dict[str, Any], limit: int | None) -> SourcePlan:
    """Loads a data set and reads through its labels. Of a streamed one no label is read, and each shard is a part.

    Raises:
        InputError: if it cannot be loaded, lacks a column, or has labels that are not classes; if it is streamed and
            they are strings.
    """
    _load.cache_clear()  # it may have changed since
    data, files = _open(description)
    if "streaming" not in description:
        table = _table(description, data)
        classes = merge_classes((read_labels(table, description),))
        return SourcePlan(files, classes, cut_off(cut(0, table.lengths), limit))
    labels = read_labels(_shard(description, data, 0), description, or_strings=False)

    def count(part: Part, most: int) -> int:
        table = _shard(description, data, part.file)
        column = description["label_column"] or description["image_column"]
        return sum(len(arrays[0]) for _, arrays in batches(table, [column], 0, most))

    parts = [Part(shard, 0, None, None) for shard in range(len(files))]
    return SourcePlan(files, merge_classes((labels,)), cut_off(parts, limit, count))


def read_data_set(description: dict[str, Any], plan: SourcePlan, part: Part) -> Iterator[Sample]:
    """The pictures of a part, as stored: none is decoded.

    Raises:
        InputError: if it cannot be loaded, or has changed.
    """

    def check() -> None:
        files = _open(description)[1]
        if len(files) != len(plan.files):
            raise InputError(f"{description['path']} changed since the conversion began: it has other files")
        for planned, file in zip(plan.files, files, strict=True):
            check_same(planned, file)

    check()
    data, _ = _open(description)
    if "streaming" in description:
        yield from samples(_shard(description, data, part.file), description, plan, part, lambda: None)
    else:
        yield from samples(_table(description, data), description, plan, part, check)
    check()


def _open(description: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """The data set, and what its files are.

    Those of a saved one are its own; of others, the library's fingerprint counts, as its cache is not the source.
    """
    path = description["path"]
    data, state = _load(path, description["split"], description["config"], "streaming" in description)
    if _is_saved(Path(path)):
        return data, [fingerprint(file["filename"]) for file in data.cache_files]
    shards = range(data.num_shards) if "streaming" in description else [None]
    names = [path if shard is None else f"{path} shard {shard}" for shard in shards]
    return data, [{"name": name, "bytes": None, "modified": None, "fingerprint": state} for name in names]


def _is_saved(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _name(description: dict[str, Any]) -> str:
    path, split = description["path"], description["split"]
    return path if split is None else f"{path} ({split})"


def _table(description: dict[str, Any], data: Any) -> Table:
    def read(columns: list[str], start: int, stop: int, size: int) -> Iterator[pa.RecordBatch]:
        # The arrow format hands out the stored bytes and decodes no picture.
        rows = data.select_columns(columns).select(range(start, min(stop, len(data)))).with_format("arrow")
        for table in rows.iter(size):
            yield from table.to_batches()

    find = partial(_find, description["path"])
    return Table(_name(description), find, data.features.arrow_schema, [1] * len(data), read)


def _shard(description: dict[str, Any], data: Any, shard: int) -> Table:
    name = f"{_name(description)} shard {shard}"

    def read(columns: list[str], start: int, stop: int, size: int) -> Iterator[pa.RecordBatch]:
        rows = data.shard(data.num_shards, shard).select_columns(columns).with_format("arrow")
        try:
            yield from Rows(batch for table in rows.iter(size) for batch in table.to_batches()).between(start, stop)
        except Exception as error:  # of a dozen libraries underneath
            raise InputError(f"cannot read {name}: {' '.join(str(error).split())}") from error

    return Table(name, partial(_find, description["path"]), data.features.arrow_schema, None, read)


def _find(source: str, path: str) -> bytes | Path:
    """A picture that a data set keeps as a file of its own, here or inside an archive or on the Hub.

    Raises:
        InputError: if it cannot be read; or if it lies neither on the Hub nor in the data set's folder nor in a cache
            of theirs: a data set that came from elsewhere must name no other file of this machine or its network.
    """
    from datasets import config
    from datasets.utils.file_utils import xopen
    from huggingface_hub import constants

    place = path.rpartition("::")[2]  # of the archive, if it is in one
    if not place.startswith(("hf://", constants.ENDPOINT + "/")):
        folders = (source, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
        if "://" in place or not any(_is_below(place, str(folder)) for folder in folders):
            raise InputError(f"the picture's path {path!r} leads out of the data set {source}")
    if "://" not in path:
        return Path(path)

    try:
        with xopen(path, "rb") as file:
            return file.read()
    except Exception as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _is_below(path: str, folder: str) -> bool:
    ways = (os.path.abspath, os.path.realpath)
    return os.path.abspath(path).startswith(tuple(os.path.join(way(folder), "") for way in ways))


@lru_cache(maxsize=1)  # parts after the first need not load it again
def _load(path: str, split: str | None, config: str | None, streaming: bool) -> tuple[Any, str]:
    """A data set, and what tells whether it is still the same."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it logs each of five tries to reach the Hub
    try:
        if streaming:
            builder = datasets.load_dataset_builder(path, config)
            data = builder.as_streaming_dataset(split=split)
            # Only then are its columns known, if its files do not tell them.
            data = data if data.features is not None else data._resolve_features()
            return data, f"{builder.config_id} {builder.hash}"
        if not _is_saved(Path(path)):
            data = datasets.load_dataset(path, config, split=split)
            return data, data._fingerprint
        data = datasets.load_from_disk(path)
        if split is not None and split not in data:
            raise InputError(f"{path} has no split {split!r}; its splits are: {', '.join(data)}")
        return data if split is None else data[split], ""
    except InputError:
        raise
    except Exception as error:  # of a dozen libraries underneath
        where = path if Path(path).exists() else f"{path!r}, neither a path here nor readable as a data set on the Hub"
        raise InputError(f"cannot load {where}: {' '.join(str(error).split())}") from error
