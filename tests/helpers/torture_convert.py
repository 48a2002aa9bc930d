"""Kills a conversion again and again, and reruns it:

    python -m tests.helpers.torture_convert KILLS PART SHARD ARGUMENTS …

PART is the images per part, SHARD the bytes per shard, and ARGUMENTS are those of `to_mds.py`. Each run is killed with
`kill -9` at a random time of its start, or after one of its first parts; the last run finishes. Each run prints how
many parts it found finished.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from convert import to_mds
from convert.engine import conversion, shards  # noqa: F401 - imported once, not by each child
from convert.sources import parts


def start(arguments: list[str]) -> int:
    """Starts the command in a process group of its own."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.nice(19)  # on a busy machine, the killer must come in time
        code = 1
        try:
            code = to_mds.main(arguments)
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.setpgid(child, child)
    return child


def parts_done(log: Path) -> int:
    """The number of finished parts in a log."""
    return log.read_text().count('"event": "part"') if log.exists() else 0


def torture(arguments: list[str], kills: int, seed: int = 0) -> int:
    """Kills the command that many times, or half of them if it has finished by then; returns its last exit code."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        for kill in range(kills):
            child = start([*arguments, "--log", str(log)])
            soon = time.monotonic() + (rng.uniform(0, 0.1) if rng.random() < 0.2 else 60)
            target = parts_done(log) + rng.randint(1, 2)
            while parts_done(log) < target and time.monotonic() < soon:
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.02))
            os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status):
                if kill < kills / 2:
                    raise SystemExit("it finished before it was killed: more parts are needed")
                return os.waitstatus_to_exitcode(status)
        return os.waitstatus_to_exitcode(os.waitpid(start(arguments), 0)[1])


if __name__ == "__main__":
    parts.PART, shards.SHARD_BYTES = int(sys.argv[2]), int(sys.argv[3])
    sys.exit(torture(sys.argv[4:], int(sys.argv[1])))
