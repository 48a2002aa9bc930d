"""Composer's launcher, made light, and fit for schedulers and for Ctrl-C. The command `composer` runs it, too.

    composer [-n RANKS] SCRIPT …        python sit_composer/launch.py [-n RANKS] SCRIPT …

Composer's own imports all of Composer before it starts the ranks. It kills a rank 30 seconds after a SIGTERM or Ctrl-C,
and exits at a second SIGTERM, which some schedulers send; this one passes the signal on, and waits until the ranks have
saved. The exit code is the first failed rank's, or 128 + N if signal N ended it. Composer's own is the lowest rank's,
which the launcher may have ended itself, or 256 - N.
"""

import ctypes
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

# A script run by its path finds its own folder first, where config, data and others would shadow other packages.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]
import psutil

from sit_composer.errors import EVICTED, INTERRUPTED, USAGE

LAUNCHER = "SIT_COMPOSER_LAUNCHER"  # in the ranks' environment: the launcher's process number
# How glibc allocates the ranks' memory: what a step frees stays for the next one, in pages of 2 MiB if Linux has them.
# Otherwise each large tensor is given back, and the next one costs a page fault per 4 KiB. And no small piece is kept
# for its size alone, or they would cut the free memory into pieces too small for the next step's tensors.
MALLOC = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=4294967296"
    ":glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
)
SAID = {USAGE, INTERRUPTED, EVICTED}  # exit codes of ranks that have said why they end


def main() -> int:
    """Runs the launcher, and returns its exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault("GLIBC_TUNABLES", MALLOC)
    launcher = composer_launcher()
    failed: list[int] = []

    def watch(processes: dict[int, subprocess.Popen]) -> None:
        codes: list[int | None] = [None]
        patience = 20  # tenths of a second, for the first rank, whose output is shown, to end like another one
        while None in codes and patience > 0:
            time.sleep(0.1)
            codes = [process.poll() for process in processes.values()]
            failed.extend(code for code in codes if code and not failed)
            if failed:
                patience = patience - 1 if codes[0] is None and failed[0] in SAID else 0
        if not failed or codes[0] in SAID:  # Composer would print that it waits for them, and their codes and output
            launcher.print = launcher._print_process_exit_status = lambda *_: None
            launcher.log.disabled = True

    launcher._monitor_processes = watch
    code = launcher.main()
    code = failed[0] if failed else code
    return 128 - code if code < 0 else code


def composer_launcher() -> Any:
    """The module `composer.cli.launcher`, imported with stand-ins for the modules from which it needs a few names."""
    torch = ModuleType("torch")  # used if -n isn't given
    torch.__getattr__ = lambda name: getattr(import_module("torch"), name)  # type: ignore[method-assign]
    names = ("MOSAICML_GPU_LOG_FILE_PREFIX", "MOSAICML_LOG_DIR", "MOSAICML_PLATFORM")
    contents: dict[str, dict[str, Any]] = {
        "composer": {"__path__": find_spec("composer").submodule_search_locations, "__version__": version("mosaicml")},
        "composer.loggers.mosaicml_logger": {f"{name}_ENV_VAR": name for name in names},
        "composer.utils": {"get_free_tcp_port": free_port},
    }
    modules = {"torch": torch, **{name: ModuleType(name) for name in ("composer.loggers", *contents)}}
    for name, content in contents.items():
        vars(modules[name]).update(content)
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        return import_module("composer.cli.launcher")
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


def pass_on(number: int, frame: FrameType | None) -> None:
    """Sends the signal to the ranks, and waits until they have exited; if there are none yet, exits."""
    if number == signal.SIGTERM:  # once. Not SIG_IGN, which a rank that is started later would inherit.
        signal.signal(signal.SIGTERM, lambda number, frame: None)
    ranks = psutil.Process().children()
    if not ranks:
        os._exit(128 + number)
    for rank in ranks:
        rank.send_signal(number)
    for rank in ranks:
        os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOWAIT)  # leaves its exit code to the launcher


def follow_launcher() -> None:
    """In a rank: from now on, a SIGTERM ends it at once, and so does its launcher's death."""
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(EVICTED))
    if "GROUP_RANK" in os.environ:  # torchrun's name for what Composer asks for
        os.environ.setdefault("NODE_RANK", os.environ["GROUP_RANK"])
    if "LOCAL_RANK" in os.environ and sys.platform == "linux":
        # A launcher killed by a signal tells its ranks nothing, and they would train on alone.
        launcher = int(os.environ.get(LAUNCHER, os.getppid()))
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a SIGTERM when this process's parent dies
        if os.getppid() != launcher and not is_alive(launcher):  # it died before that
            os._exit(EVICTED)


def follow_parent() -> None:
    """In a process that multiprocessing started: from now on it ends when its parent dies, whatever it waits for."""
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: wait([sentinel]) and os._exit(1), daemon=True).start()


def is_alive(pid: int) -> bool:
    """Whether there is such a process, not a zombie."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


if __name__ == "__main__":
    sys.exit(main())
