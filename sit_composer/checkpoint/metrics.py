"""A run's metrics.jsonl, beside its checkpoints: what was logged, one JSON object per line, appended.

* an attempt, at each start and resumption: {"start": batch, "time": seconds since 1970, what it trains, and where};
* a row of training: {"batch": the last, "batches": how many, NAME: mean over them, …};
* what was logged between two batches, such as an evaluation: {"batch": after which, NAME: value, …}.

An attempt makes the rows void that earlier ones logged after its batch. A kill can leave half a line, which is ignored.
"""

import json
from typing import Any

from sit_composer.storage import LocalFolder, RunFolder

NAME = "metrics.jsonl"
EXACT = 10_000  # batches that have a row each; from there on, ten times the batches have a row of ten times as many
Row = dict[str, Any]


def row_length(batch: int) -> int:
    """How many batches a row has around this one: so many rows for each power of ten, however long the run is."""
    return 10 ** max(0, len(str(batch)) - len(str(EXACT)) + 1)


def read(content: bytes) -> tuple[list[Row], list[Row]]:
    """The attempts in their order, and the rows that count, by their batches."""
    attempts: list[Row] = []
    rows: list[Row] = []
    for line in content.splitlines():
        try:
            row = json.loads(line, parse_constant=lambda name: None)  # NaN, which our rows and JSON have not
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(start := row.get("start"), int):
            attempts.append(row)
            while rows and rows[-1]["batch"] > start:
                rows.pop()
        elif isinstance(row, dict) and isinstance(row.get("batch"), int):
            rows.append(row)
    return attempts, rows


class MetricsFile:
    """A run's file, to which one attempt appends. In an object store, nothing can be appended: `content` is written."""

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.content = folder.read(NAME) or b""
        self.appended = 0  # bytes, by this attempt
        self._start = b"\n" if self.content else b""  # as a kill may have left half a line

    def append(self, lines: bytes) -> None:
        """Appends whole lines."""
        self.appended += len(lines)
        lines, self._start = self._start + lines, b"\n"
        if isinstance(self.folder, LocalFolder):
            self.content = b""
            self.folder.append(NAME, lines)
        else:
            self.content += lines
        self._start = b""  # unless a full disk has left half a line, too
