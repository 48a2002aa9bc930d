"""One live run a folder: a small file beside the checkpoints, whose holder writes it anew every few seconds.

A second run of the same name finds it beating, and is refused. After a kill it beats no more, and the next run takes it
over: at once on the same machine, where the dead process is known to be dead, and after three missed beats elsewhere.
A run that finds another's name in the file (it was cut off, and was taken for dead) stops, and writes no more.

Each writes on the condition that the file is as it was read, so that two don't take over from the same one, and a beat
doesn't undo a takeover. What remains: a process that stands still for three beats between a look at the file and the
request behind it (see `Uploads`) makes that one request when it goes on.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from sit_composer.storage import RunFolder, StorageError

NAME = "alive.json"
MISSED = 3  # beats after which a holder counts as dead


class Lease:
    """The right to write to a run's folder.

    Args:
        folder: the run's.
        beat: seconds between two beats.
        owner: of another process of the same run, that keeps it; None: this one does, once it has acquired it.
    """

    def __init__(self, folder: RunFolder, beat: float, owner: str | None = None):
        self.folder = folder
        self.beat = beat
        self.lost: str | None = None  # why it isn't held any more
        self.owner = owner or uuid.uuid4().hex
        self._me = {"owner": self.owner, "host": socket.gethostname(), **_process(os.getpid())}
        self._beats = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def acquire(self) -> None:
        """Takes the lease, waiting out one that may be a dead run's.

        Raises:
            StorageError: if a live run holds it, or the folder can't be written to.
        """
        there = self.folder.read(NAME)
        deadline = time.monotonic() + MISSED * max(self.beat, self._beat_of(there))
        while there is not None and not self._is_dead(there) and time.monotonic() < deadline:
            time.sleep(min(self.beat / 2, 1))
            now = self.folder.read(NAME)
            if now is not None and now != there:
                raise self._refusal(now)
            there = now
        taken = self._write(there)
        time.sleep(min(self.beat / 2, 1))  # of two in a store that knows no conditions, the later one has it
        now = self.folder.read(NAME)
        if not taken or self._owner(now) != self.owner:
            raise self._refusal(now)
        self._thread.start()

    def check(self) -> bytes | None:
        """Makes sure, by a look at the folder, that it is held; what the file holds.

        Raises:
            StorageError: if another run holds it.
        """
        if self.lost is None:
            now = self.folder.read(NAME)
            if self._owner(now) != self.owner:
                self.lost = (
                    f"{self.folder.uri}: another run{self._where(now)} has taken this one for dead and took over"
                )
        if self.lost is not None:
            raise StorageError(self.lost)
        return now

    def release(self) -> None:
        """Lets go of it, so that the next run need not wait."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(self.beat)
            if self._thread.is_alive():  # the store doesn't answer
                return
        with contextlib.suppress(StorageError):  # it will be taken for dead
            self.folder.replace(NAME, self.check(), None)

    def _keep(self) -> None:
        while not self._ended.wait(self.beat):
            try:
                there = self.check()
                if not self._ended.is_set():
                    self._write(there)  # if another wrote meanwhile, the next look tells who
            except StorageError:
                if self.lost is not None:
                    return
                # A store that doesn't answer doesn't let another run take over either.

    def _write(self, there: bytes | None) -> bool:
        self._beats += 1
        content = json.dumps({**self._me, "beat": self.beat, "beats": self._beats}).encode()
        return self.folder.replace(NAME, there, content)

    def _is_dead(self, content: bytes) -> bool:
        """Whether the holder is known to be dead: a process of this machine that isn't there any more."""
        try:
            holder = json.loads(content)
            if any(holder[name] != self._me[name] for name in ("host", "boot", "pids")):
                return False
            return _process(int(holder["pid"])) != {name: holder[name] for name in ("pid", "boot", "pids", "started")}
        except (ValueError, KeyError, TypeError):
            return False

    def _refusal(self, content: bytes | None) -> StorageError:
        return StorageError(
            f"{self.folder.uri}: a run of this name is alive{self._where(content)}; stop it first, or choose another "
            "run_name"
        )

    @staticmethod
    def _where(content: bytes | None) -> str:
        try:
            holder = json.loads(content or b"")
            return f" on {holder['host']}, process {int(holder['pid'])},"
        except (ValueError, KeyError, TypeError):
            return ""

    @staticmethod
    def _beat_of(content: bytes | None) -> float:
        try:
            return float(json.loads(content or b"")["beat"])
        except (ValueError, KeyError, TypeError):
            return 0.0

    @staticmethod
    def _owner(content: bytes | None) -> str | None:
        try:
            return json.loads(content or b"")["owner"]
        except (ValueError, KeyError, TypeError):
            return None


def _process(pid: int) -> dict[str, str | int]:
    """What names a process of this machine: its number is given again to others, also after a boot."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pids = os.readlink("/proc/self/ns/pid")  # containers of one host count their processes apart
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # from the third on
        started = "" if fields[0] in "ZX" else fields[19]  # ticks since boot; a zombie is dead
    except (OSError, IndexError):
        boot, pids, started = "", "", ""
    return {"pid": pid, "boot": boot, "pids": pids, "started": started}
