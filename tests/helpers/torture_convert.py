"""Kills a conversion again and again, and has it go on:   python -m tests.helpers.torture_convert KILLS PART SHARD ARGUMENTS …

PART is the pictures of a part, SHARD the bytes of a shard, and ARGUMENTS are `to_mds.py`'s. Each start is killed with
`kill -9` at some moment of its start, or behind the end of one of its first parts; the last comes to its end. What a
start found finished it says itself.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from convert import to_mds
from convert.engine import shards
from convert.sources import parts


def start(arguments: list[str]) -> int:
    """Starts the command in a process group of its own."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        code = 1
        try:
            code = to_mds.main(arguments)
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.setpgid(child, child)
    return child


def parts_done(log: Path) -> int:
    """The parts that a log tells of."""
    return log.read_text().count('"event": "part"') if log.exists() else 0


def torture(arguments: list[str], kills: int, seed: int = 0) -> int:
    """Kills the command so often; returns its last exit code."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        for _ in range(kills):
            child = start([*arguments, "--log", str(log)])
            soon = time.monotonic() + (rng.uniform(0, 0.1) if rng.random() < 0.2 else 60)
            target = parts_done(log) + rng.randint(1, 2)
            while parts_done(log) < target and time.monotonic() < soon:
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.02))
            os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status):
                raise SystemExit("it came to its end before it was killed: more parts are needed")
        return os.waitstatus_to_exitcode(os.waitpid(start(arguments), 0)[1])


if __name__ == "__main__":
    parts.PART, shards.SHARD_BYTES = int(sys.argv[2]), int(sys.argv[3])
    sys.exit(torture(sys.argv[4:], int(sys.argv[1])))
