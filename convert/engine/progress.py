"""The progress of a conversion: a bar for people, and one line of JSON per event for machines."""

import json
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from tqdm import tqdm

from convert.sources.parts import InputError


class Progress:
    """Counts the images of this run, after ``done`` of earlier runs; appends to the file ``log``, if given."""

    def __init__(self, total: int | None, done: int, log: str | None) -> None:
        try:
            self.log_file = open(log, "a", encoding="utf-8") if log else None  # noqa: SIM115 - closed in `close`
        except OSError as error:
            raise InputError(f"--log: cannot write to {log}: {error.strerror}") from error
        self.bar = tqdm(total=total, initial=done, unit=" images", disable=None)  # None: disabled without a terminal
        self.start = self.changed = time.monotonic()
        self.images = self.bytes = self.skipped = 0

    def add(self, count: int, size: int, skipped: int = 0, reasons: Iterable[str] = ()) -> None:
        """Counts images with their bytes in shards, some of which were skipped for those reasons."""
        self.images += count
        self.bytes += size
        self.skipped += skipped
        for reason in reasons:
            self.log("skipped", reason=reason)
        self.bar.update(count)
        if not self.bar.disable and time.monotonic() - self.changed > 0.5:  # seconds
            self.changed = time.monotonic()
            rate = self.bytes / (self.changed - self.start) / 1e6
            self.bar.set_postfix_str(f"{rate:.1f} MB/s" + (f", {self.skipped} skipped" if self.skipped else ""), False)

    def log(self, event: str, **details: Any) -> None:
        """Appends a line to the log."""
        if self.log_file:
            line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **details}
            print(json.dumps(line), file=self.log_file, flush=True)

    def rates(self) -> dict[str, Any]:
        """The images, bytes written and seconds of this run."""
        return {"pictures": self.images, "bytes": self.bytes, "seconds": round(time.monotonic() - self.start, 3)}

    def close(self) -> None:
        """Closes the bar and the log."""
        self.bar.close()
        if self.log_file:
            self.log_file.close()
