"""One live run per folder: its holder rewrites a small file beside the checkpoints every few seconds, a beat each.

A second run of the same name sees the beats and is refused. A killed run's lease is taken over: at once on the same
machine, elsewhere after three missed beats. A run that finds another owner in the file stops. Each write has the
condition that the file is as it was read, so two runs can't both take over. One case remains: a process suspended for
three beats between a look at the file and the request after it (see `Uploads`) makes that one request afterwards.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from sit_composer.storage import RunFolder, StorageError

NAME = "alive.json"
MISSED = 3  # beats after which a holder counts as dead


class Lease:
    """The right to write to a run's folder."""

    def __init__(self, folder: RunFolder, beat: float, owner: str | None = None):
        self.folder = folder
        self.beat = beat  # seconds between two beats
        self.lost: str | None = None  # why it isn't held any more
        self.owner = owner or uuid.uuid4().hex  # the process of the same run that holds it, or this one's own id
        self._me = {"owner": self.owner, "host": socket.gethostname(), **_process(os.getpid())}
        self._beats = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def acquire(self) -> None:
        """Acquires the lease, after waiting for the beats of a run that may be dead; StorageError if one is alive."""
        there = self.folder.read(NAME)
        beat = _holder(there).get("beat")
        deadline = time.monotonic() + MISSED * max(self.beat, beat if isinstance(beat, float | int) else 0)
        while there is not None and not self._is_dead(there) and time.monotonic() < deadline:
            time.sleep(min(self.beat / 2, 1))
            now = self.folder.read(NAME)
            if now and now != there:  # an emptied one is being released
                raise self._refusal(now)
            there = now
        taken = self._write(there)
        time.sleep(min(self.beat / 2, 1))  # in a store without conditions, the later of two writers has it
        now = self.folder.read(NAME)
        if not taken or _holder(now).get("owner") != self.owner:
            raise self._refusal(now)
        self._thread.start()

    def check(self) -> bytes | None:
        """Reads the file, and returns its content; raises StorageError if another run holds the lease."""
        if self.lost is None:
            now = self.folder.read(NAME)
            if _holder(now).get("owner") == self.owner:
                return now
            self.lost = f"{self.folder.uri}: another run{_where(now)} has taken this one for dead and took over"
        raise StorageError(self.lost)

    def raise_if_lost(self) -> None:
        """Raises StorageError if the last beat or check found that another run holds the lease."""
        if self.lost is not None:
            raise StorageError(self.lost)

    def release(self) -> None:
        """Gives the lease up, so that the next run need not wait."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(self.beat)
            if self._thread.is_alive():  # the store doesn't answer
                return
        with contextlib.suppress(StorageError):  # the next run will take this one for dead
            self.folder.replace(NAME, self.check(), None)

    def _keep(self) -> None:
        while not self._ended.wait(self.beat):
            try:
                there = self.check()
                if not self._ended.is_set():
                    self._write(there)  # if another run wrote meanwhile, the next check finds it
            except StorageError:
                if self.lost is not None:
                    return
                # A store that doesn't answer doesn't let another run take over either.

    def _write(self, there: bytes | None) -> bool:
        self._beats += 1
        content = json.dumps({**self._me, "beat": self.beat, "beats": self._beats}).encode()
        return self.folder.replace(NAME, there, content)

    def _is_dead(self, content: bytes) -> bool:
        """Whether the holder is known to be dead: a process of this machine that has ended."""
        holder = _holder(content)
        pid, started = holder.get("pid"), holder.get("started")
        if not isinstance(pid, int) or any(holder.get(name) != self._me[name] for name in ("host", "boot", "pids")):
            return False
        return started is not None and _process(pid)["started"] != started

    def _refusal(self, content: bytes | None) -> StorageError:
        alive = f"a run of this name is alive{_where(content)}".rstrip(",")
        return StorageError(f"{self.folder.uri}: {alive}; stop it first, or choose another run_name")


def _holder(content: bytes | None) -> dict[str, Any]:
    """What the file says of its holder; empty if it isn't there or malformed."""
    try:
        holder = json.loads(content or b"{}")
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _where(content: bytes | None) -> str:
    holder = _holder(content)
    return f" on {holder['host']}, process {holder['pid']}," if {"host", "pid"} <= holder.keys() else ""


def _process(pid: int) -> dict[str, str | int]:
    """Identifies a process of this machine, where numbers are reused, after a boot too."""
    # psutil's create_time() is no identity: it counts from the clock's boot time, which moves when the clock is set.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pids = os.readlink("/proc/self/ns/pid")  # each container numbers its own processes
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # from the third on
        started = "" if fields[0] in "ZX" else fields[19]  # ticks since boot; a zombie is dead
    except (OSError, IndexError):
        boot, pids, started = "", "", ""
    return {"pid": pid, "boot": boot, "pids": pids, "started": started}
