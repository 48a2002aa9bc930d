"""Composer's launcher, with what a scheduler needs of it:   python sit_composer/launch.py [composer's arguments]

A SIGTERM goes to the ranks, each of which gets it once, and the launcher waits for them as long as they take to save.
Composer's own kills a rank 30 seconds later, and at a second SIGTERM, which some schedulers send, ends without them.

The exit code is that of the first rank to fail, or 128 + N if signal N ended it. Composer's own is the lowest rank's,
which may be that of one that the launcher ended because another had failed; and 256 - N for signal N.
"""

import os
import signal
import subprocess
import sys
from types import FrameType

import psutil


def main() -> int:
    """Runs the launcher, and returns its exit code."""
    signal.signal(signal.SIGTERM, pass_on)
    from composer.cli import launcher  # takes seconds, in which a SIGTERM may come; and sets a handler of its own

    signal.signal(signal.SIGTERM, pass_on)
    failed: list[int] = []
    monitor = launcher._monitor_processes

    def watch(processes: dict[int, subprocess.Popen]) -> None:
        monitor(processes)  # returns when all have ended, or one has failed
        failed.extend(process.returncode for process in processes.values() if process.returncode)

    launcher._monitor_processes = watch
    code = launcher.main()
    code = failed[0] if failed else code
    return 128 - code if code < 0 else code


def pass_on(number: int, frame: FrameType | None) -> None:
    """Sends SIGTERM to the ranks, and waits until they have ended; without ranks, ends this process."""
    # Not SIG_IGN, which a rank that is yet to be started would inherit.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    ranks = psutil.Process().children()
    if not ranks:
        os._exit(128 + number)
    for rank in ranks:
        rank.send_signal(number)
    for rank in ranks:
        os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOWAIT)  # the launcher is the one to take its exit code


if __name__ == "__main__":
    sys.exit(main())
