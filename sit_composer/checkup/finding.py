"""What a check finds, and how long it may take."""

import faulthandler
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sit_composer.errors import UserError, one_line

STOPPING = 5  # seconds after Ctrl-C for a check to remove what it made
LOCKED = 10  # seconds over a check's limit after which the whole process is ended


@dataclass(frozen=True)
class Finding:
    """A check's result: a status, what was found, and what to do."""

    status: str  # ok, warning, failed or not checked
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.text}{self.advice and '; '}{self.advice}"


ok, warning, failed, not_checked = (partial(Finding, name) for name in ("ok", "warning", "failed", "not checked"))
# Prints the result of a check with a name, a limit in seconds, and what to do if it fails without saying that.
Make = Callable[[str, float, Callable[[], Finding], str], Finding]


def bounded(check: Callable[[], Finding], seconds: float, advice: str) -> Finding:
    """What a check finds. It has failed if it raises an error, or gives no answer in time; then its thread is left.

    If a library holds Python's lock meanwhile, the process is ended (exit code 1), and shows where it was.
    """
    found: list[Finding] = []
    done = threading.Event()  # and not Thread.join, which in Python 3.11 takes a thread for ended after a Ctrl-C

    def work() -> None:
        try:
            found.append(check())
        except Exception as error:  # of any kind: the remaining checks must still be made
            prefix = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            found.append(failed(f"{prefix}{one_line(error)}", advice))
        finally:
            done.set()

    faulthandler.dump_traceback_later(seconds + LOCKED, exit=True, file=sys.__stderr__)
    threading.Thread(target=work, daemon=True).start()
    try:
        done.wait(seconds)
    except KeyboardInterrupt:
        done.wait(STOPPING)
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
    return found[0] if found else failed(f"no answer within {seconds:g} s", advice)
