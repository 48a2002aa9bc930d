"""What a conversion says while it works: one bar for people, and a line of JSON an event for machines."""

import json
import time
from datetime import UTC, datetime
from typing import Any

from tqdm import tqdm

from convert.sources.registry import InputError

POSTFIX = 0.5  # seconds between two changes of the bar's end


class Progress:
    """Pictures done, by the picture; ``skipped`` counts those that were left out.

    Args:
        total: pictures in the source, if known; ``done`` of them by earlier runs.
        log: a file that gets a line of JSON for each event, behind what it has; None: no log.
    """

    def __init__(self, total: int | None, done: int, log: str | None) -> None:
        try:
            self.log_file = open(log, "a", encoding="utf-8") if log else None  # noqa: SIM115 - closed in `close`
        except OSError as error:
            raise InputError(f"--log: cannot write to {log}: {error.strerror}") from error
        self.bar = tqdm(total=total, initial=done, unit=" pictures", disable=None)  # None: unless stderr is no terminal
        self.start = self.changed = time.monotonic()
        self.pictures = self.bytes = self.skipped = 0

    def picture(self, size: int, skipped: str | None) -> None:
        """Counts a picture, by the bytes that it takes in a shard, or by why it was skipped."""
        self.pictures += 1
        self.bytes += size
        if skipped:
            self.skipped += 1
            self.log("skipped", reason=skipped)
        self.bar.update()
        if not self.bar.disable and time.monotonic() - self.changed > POSTFIX:
            self.show()

    def part(self, record: dict[str, Any]) -> None:
        """Counts the pictures of a part that was done elsewhere."""
        count = sum(record["counts"].values()) + record["skipped"]
        self.pictures += count
        self.bytes += sum(shard["raw_data"]["bytes"] for shard in record["shards"])
        self.skipped += record["skipped"]
        for reason in record["reasons"]:
            self.log("skipped", reason=reason)
        self.bar.update(count)
        self.show()

    def show(self) -> None:
        """Brings the end of the bar up to date."""
        self.changed = time.monotonic()
        rate = self.bytes / max(self.changed - self.start, 1e-9) / 1e6
        self.bar.set_postfix_str(f"{rate:.1f} MB/s" + (f", {self.skipped} skipped" if self.skipped else ""), False)

    def log(self, event: str, **details: Any) -> None:
        """Adds a line to the log."""
        if self.log_file:
            line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **details}
            print(json.dumps(line), file=self.log_file, flush=True)

    def rates(self) -> dict[str, Any]:
        """Pictures, bytes written and seconds of this run."""
        return {"pictures": self.pictures, "bytes": self.bytes, "seconds": round(time.monotonic() - self.start, 3)}

    def close(self) -> None:
        """Ends the bar and the log."""
        self.bar.close()
        if self.log_file:
            self.log_file.close()
