"""The launcher, in front of ranks that are still importing."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from sit_composer.errors import EVICTED, INTERRUPTED, USAGE
from sit_composer.launch import MALLOC
from tests.helpers.paths import ROOT


@pytest.fixture
def launch(digits_shards, tmp_path):
    """Starts the launcher with two ranks of a training run; returns it, once the first rank says that it loads."""
    started = []

    def launch(*overrides: str) -> subprocess.Popen:
        places = [f"data.local={digits_shards}", f"trainer.save_folder={tmp_path}/run"]
        command = ["sit_composer/launch.py", "-n", "2", "sit_composer/train.py", "yamls/quickstart.yaml"]
        options = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, *command, *places, *overrides], **options))
        return started[-1]

    yield launch
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, EVICTED), (signal.SIGINT, INTERRUPTED)])
def test_a_signal_while_the_ranks_load_ends_them_with_its_code(launch, number, code):
    process = launch()
    assert process.stderr.readline() == "loading torch, composer, streaming …\n"
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait(30) == code
    assert "Traceback" not in rest
    assert "Rank" not in rest


def test_no_rank_outlives_a_launcher_that_is_killed_while_they_load(launch):
    process = launch()
    process.stderr.readline()
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    process.kill()
    assert psutil.wait_procs(ranks, timeout=10)[1] == []


def test_a_mistake_is_one_line_and_code_2(launch):
    process = launch("optimizer.lr=-1")
    assert process.stderr.read() == "error: optimizer.lr: got -1.0, expected a number above 0\n"
    assert process.wait() == USAGE


@pytest.mark.parametrize("chosen", [None, "glibc.malloc.check=0"])
def test_the_ranks_keep_freed_memory_unless_the_user_chose_otherwise(tmp_path, chosen):
    (tmp_path / "script.py").write_text("import os; print(os.environ['GLIBC_TUNABLES'])")
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {"GLIBC_TUNABLES": chosen} if chosen else {}
    command = [sys.executable, "sit_composer/launch.py", "-n", "1", str(tmp_path / "script.py")]
    assert subprocess.check_output(command, cwd=ROOT, env=environment, text=True).strip() == (chosen or MALLOC)
