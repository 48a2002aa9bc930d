"""Progress bars on a terminal, which are lines in a log."""

import sys
from typing import Any

from tqdm import tqdm

SECONDS = 60  # between two lines


class Lines:
    """A file in which each state of a bar is a line."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def progress(total: float, shown: bool = True, **options: Any) -> tqdm:
    """A bar on stderr; without a terminal, a line per minute, the first one after a minute."""
    if not sys.stderr.isatty():
        options |= {"file": Lines(), "mininterval": SECONDS, "maxinterval": SECONDS, "delay": SECONDS}
    return tqdm(total=total, disable=not shown, **options)
