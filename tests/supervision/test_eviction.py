import os
import signal
import time

import pytest

from sit_composer.errors import EVICTED, INTERRUPTED
from sit_composer.launch import LAUNCHER, follow_launcher
from sit_composer.supervision.eviction import Eviction


@pytest.mark.parametrize("training", [True, False])
def test_a_process_that_does_not_save_in_time_ends_by_itself(training):
    """In training after the grace; before training at once."""
    before, process = time.monotonic(), os.fork()
    if process == 0:
        eviction = Eviction(grace=3, timeout=60)
        eviction.install()
        eviction._training = training
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == EVICTED
    assert (time.monotonic() - before >= 3) == training


def test_a_second_ctrl_c_aborts_at_once_and_one_that_comes_twice_does_not():
    process = os.fork()
    if process == 0:
        eviction = Eviction(grace=60, timeout=60)
        eviction.install()
        eviction._training = True
        for _ in range(2):  # from the terminal, and from the launcher
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        time.sleep(1)
        assert eviction._told == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == INTERRUPTED


def test_a_rank_whose_launcher_was_killed_before_it_could_ask_ends_at_once():
    process = os.fork()
    if process == 0:
        os.environ |= {"LOCAL_RANK": "0", LAUNCHER: "4194304"}  # one more than the largest process number
        follow_launcher()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == EVICTED


def test_a_rank_ends_when_its_launcher_is_killed():
    reading, writing = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        if os.fork() == 0:
            os.environ["LOCAL_RANK"] = "0"
            follow_launcher()
            os.write(writing, b"listens")
        time.sleep(60)
        os._exit(1)
    os.close(writing)
    assert os.read(reading, 7) == b"listens"
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    before = time.monotonic()
    assert os.read(reading, 1) == b""  # all writers have ended
    assert time.monotonic() - before < 30
    os.close(reading)
