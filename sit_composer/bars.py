"""Progress bars on a terminal, which are lines in a log."""

import sys
from types import SimpleNamespace
from typing import Any

from tqdm import tqdm

SECONDS = 60  # between two lines


def _line(text: str) -> None:
    if text.strip():
        print(text.strip(), file=sys.stderr, flush=True)


def progress(total: float, shown: bool = True, **options: Any) -> tqdm:
    """A bar on stderr; without a terminal, a line per minute, the first one after a minute."""
    if not sys.stderr.isatty():
        options["file"] = SimpleNamespace(write=_line, flush=sys.stderr.flush)
        options |= dict.fromkeys(("mininterval", "maxinterval", "delay"), SECONDS)
    return tqdm(total=total, disable=not shown, **options)
