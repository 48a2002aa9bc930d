"""Rows of measurements, of which one that fails says why and the rest goes on.

A group of rows runs in a process of its own, so that it starts with an empty GPU and no error of CUDA's outlives it. A
row has a limit in seconds; a group that doesn't obey is killed at the sum of its rows' limits.
"""

import gc
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module, util
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

Result = dict[str, Any]  # a row's numbers, or {"error": why there are none}
Rows = dict[str, tuple[float, Callable[[], Result]]]  # name -> limit in seconds, what measures it
GROUPS = "tests.benchmarks.gpu."  # modules with `rows(setting) -> Rows`
GRACE = 15.0  # seconds beyond the limits before a group is killed: its imports


@dataclass(frozen=True)
class Setting:
    """What a group is told."""

    device: str  # cuda or cpu
    tiny: bool  # sizes for a test
    done: dict[str, Result]  # the rows of earlier groups


class Missing(RuntimeError):
    """A package that a row needs isn't installed."""


def has(package: str) -> bool:
    """Whether a package is installed."""
    return util.find_spec(package) is not None


def need(package: str) -> None:
    """Raises `Missing` if it isn't."""
    if not has(package):
        raise Missing(f"{package} is not installed")


def run_groups(groups: list[str], device: str, tiny: bool, seconds: float) -> dict[str, Result]:
    """The results of all rows of these groups, by name, in at most so many seconds."""
    end, done = time.monotonic() + seconds, {}
    for group in groups:
        done |= run_group(group, Setting(device, tiny, dict(done)), end)
    return done


def run_group(group: str, setting: Setting, end: float) -> dict[str, Result]:
    """The results of a group's rows; an error for those that didn't come before ``end`` or the group's own limit."""
    if time.monotonic() >= end:
        return {group: {"group": group, "error": "no time left"}}
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(group, setting, end, sender))
    process.start()
    sender.close()
    names, results, limit = [], {}, end
    try:
        while receiver.poll(max(0.0, limit - time.monotonic())):
            name, content = receiver.recv()
            if name is None:  # the first message: all rows, and what they may take
                names, limit = content[0], min(end, time.monotonic() + content[1]) + GRACE
            else:
                results[name] = {"group": group, **content}
                print(f"{name}: {told(content)}", file=sys.stderr, flush=True)
        reason = "took too long, and was stopped"
    except EOFError:  # the process has ended
        process.join()
        reason = "no time left" if time.monotonic() > end else f"its process ended with {process.exitcode}"
    finally:
        _kill(process)
    lost = {name: {"group": group, "error": reason} for name in names or [group] if name not in results}
    for name in lost:
        print(f"{name}: {reason}", file=sys.stderr, flush=True)
    return results | lost


def _kill(process: Any) -> None:
    """Ends a process and those that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it ended by itself, or has no group yet
        process.kill()
    process.join()


def _work(group: str, setting: Setting, end: float, sender: Connection) -> None:
    """The process of a group: sends (None, (names, limit)), then (name, result) for each row."""
    os.setsid()
    try:
        rows = import_module(GROUPS + group).rows(setting)
    except Exception as error:  # a package that all of its rows need
        rows = {group: (1.0, partial(_raise, error))}
    if setting.tiny:  # a test, on a processor that is busy with others
        rows = {name: (10 * limit, measure) for name, (limit, measure) in rows.items()}
    sender.send((None, (list(rows), sum(limit for limit, _ in rows.values()))))
    for name, (limit, measure) in rows.items():
        if time.monotonic() < end:
            sender.send((name, attempt(measure, limit)))
        gc.collect()  # a failed row's tensors
        if setting.device == "cuda":
            import_module("torch").cuda.empty_cache()
    sender.close()


def _raise(error: Exception) -> Result:
    raise error


def attempt(measure: Callable[[], Result], limit: float) -> Result:
    """What a row measures, or its error in one line."""
    try:
        with at_most(limit):
            result = measure()
        bad = [key for key, value in result.items() if isinstance(value, float) and not math.isfinite(value)]
        return {"error": f"not finite: {', '.join(bad)}"} if bad else result
    except Exception as error:  # whatever it is, the other rows go on
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return {"error": f"{type(error).__name__}: {line}"[:300]}


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises a TimeoutError after that many seconds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {seconds:g} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def seconds_of(call: Callable[[], Any], device: str, repeats: int, warm_up: int = 1) -> list[float]:
    """The seconds of each of so many calls. On a GPU, by events: nothing waits between the calls."""
    import torch  # not at the head: the process that starts the groups needs none

    for _ in range(warm_up):
        call()
    if device != "cuda":
        marks = [time.perf_counter()]
        for _ in range(repeats):
            call()
            marks.append(time.perf_counter())
        return [b - a for a, b in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in pairwise(events)]


def spread(times: list[float]) -> Result:
    """Median, least and most, in ms."""
    return {"ms": 1e3 * statistics.median(times), "ms_min": 1e3 * min(times), "ms_max": 1e3 * max(times)}


def told(result: Result) -> str:
    """A result on one line."""
    return ", ".join(f"{key} {number(value)}" for key, value in result.items())


def number(value: Any) -> str:
    """Four digits of a float; anything else as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "–" if value is None else str(value)
