"""Composer's launcher, made fit for schedulers:   python sit_composer/launch.py [composer's arguments]

It passes a SIGTERM on to each rank once, and waits until they have saved. Composer's own kills a rank after 30 seconds,
and exits at a second SIGTERM, which some schedulers send. The exit code is the first failed rank's, or 128 + N if
signal N ended it. Composer's own is the lowest rank's, which the launcher may have ended itself, or 256 - N.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

# A script run by its path finds its own folder first, where config, data and others would shadow other packages.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]
import psutil


def main() -> int:
    """Runs the launcher, and returns its exit code."""
    signal.signal(signal.SIGTERM, pass_on)
    from composer.cli import launcher  # takes seconds, in which a SIGTERM may come; it sets a handler of its own

    signal.signal(signal.SIGTERM, pass_on)
    failed: list[int] = []
    monitor = launcher._monitor_processes

    def watch(processes: dict[int, subprocess.Popen]) -> None:
        monitor(processes)  # returns when all have exited, or one has failed
        failed.extend(process.returncode for process in processes.values() if process.returncode)

    launcher._monitor_processes = watch
    code = launcher.main()
    code = failed[0] if failed else code
    return 128 - code if code < 0 else code


def pass_on(number: int, frame: FrameType | None) -> None:
    """Sends SIGTERM to the ranks, and waits until they have exited; if there are none yet, exits."""
    # Not SIG_IGN, which a rank that is started later would inherit.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    ranks = psutil.Process().children()
    if not ranks:
        os._exit(128 + number)
    for rank in ranks:
        rank.send_signal(number)
    for rank in ranks:
        os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOWAIT)  # leaves its exit code to the launcher


if __name__ == "__main__":
    sys.exit(main())
