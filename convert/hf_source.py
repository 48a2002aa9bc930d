"""Hugging Face data sets: saved to disk, or what `load_dataset` loads, from a folder or the Hub."""

import logging
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from parts import InputError, Part, Sample, SourcePlan, cut, cut_off
from source_files import check_same, fingerprint
from tables import Labels, Table, merge_classes, read_labels, samples


def plan_data_set(description: dict[str, Any], limit: int | None) -> SourcePlan:
    """Loads a data set and reads through its labels.

    Raises:
        InputError: if it cannot be loaded, lacks a column, or has labels that are not classes.
    """
    _load.cache_clear()  # it may have changed since
    data = _open(description)
    files = _files(description, data)
    table = _table(description, data)
    labels: Labels = read_labels(table, description)
    return SourcePlan(files, merge_classes((labels,)), cut_off(cut(0, table.lengths), limit))


def read_data_set(description: dict[str, Any], plan: SourcePlan, part: Part) -> Iterator[Sample]:
    """The pictures of a part, as stored: none is decoded.

    Raises:
        InputError: if it cannot be loaded, or has changed.
    """
    data = _open(description)

    def check() -> None:
        now = _files(description, data)
        for planned, file in zip(plan.files, now, strict=True):
            check_same(planned, file)

    check()
    yield from samples(_table(description, data), description, plan, part, check)
    check()


def _open(description: dict[str, Any]) -> Any:
    return _load(description["path"], description["split"], description["config"])


def _files(description: dict[str, Any], data: Any) -> list[dict[str, Any]]:
    """What a saved data set's own files are; of others, the library's fingerprint, as its cache is not the source."""
    path = Path(description["path"])
    if _is_saved(path):
        return [fingerprint(file["filename"]) for file in data.cache_files]
    return [{"name": str(path), "bytes": data.download_size, "modified": None, "fingerprint": data._fingerprint}]


def _is_saved(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _table(description: dict[str, Any], data: Any) -> Table:
    def read(columns: list[str], start: int, stop: int, size: int) -> Iterator[pa.RecordBatch]:
        # The arrow format hands out the stored bytes and decodes no picture.
        rows = data.select_columns(columns).select(range(start, min(stop, len(data)))).with_format("arrow")
        for table in rows.iter(size):
            yield from table.to_batches()

    path, split = description["path"], description["split"]
    name = path if split is None else f"{path} ({split})"
    return Table(name, None, data.features.arrow_schema, [1] * len(data), read)


@lru_cache(maxsize=1)  # parts after the first need not load it again
def _load(path: str, split: str | None, config: str | None) -> Any:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it logs each of five tries to reach the Hub
    try:
        if not _is_saved(Path(path)):
            return datasets.load_dataset(path, config, split=split)
        data = datasets.load_from_disk(path)
        if split is not None and split not in data:
            raise InputError(f"{path} has no split {split!r}; its splits are: {', '.join(data)}")
        return data if split is None else data[split]
    except InputError:
        raise
    except Exception as error:  # of a dozen libraries underneath
        where = path if Path(path).exists() else f"{path!r}, neither a path here nor readable as a data set on the Hub"
        raise InputError(f"cannot load {where}: {' '.join(str(error).split())}") from error
