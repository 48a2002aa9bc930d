"""The doctor's command: its lines, its limits of time, its exit codes, and two ranks."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sit_composer import doctor
from sit_composer.checkup.finding import bounded, failed, ok
from tests.helpers.paths import ROOT

PYTHON = sys.executable
RUN = ["yamls/quickstart.yaml", "data.local=/tmp/x"]
WAITS = """
import sys, time
from sit_composer import doctor
from sit_composer.checkup import finding
from sit_composer.checkup.finding import ok

def probe():
    try:
        print("ready", flush=True)
        time.sleep(0.5)
        return ok("done")
    finally:
        open(sys.argv[1], "w").close()  # as a store's probe is removed

doctor.examine = lambda config: doctor.Report().make("probe", 60, probe, "") and time.sleep(60)
sys.exit(doctor.main([]))
"""
LOCKED = """
import ctypes
from sit_composer.checkup import finding

finding.LOCKED = 1
finding.bounded(lambda: ctypes.PyDLL(None).sleep(60), 1, "")  # PyDLL keeps Python's lock
"""


def test_a_check_that_fails_or_gives_no_answer_is_told_with_what_to_do():
    assert bounded(lambda: ok("fine"), 5, "nothing") == ok("fine")
    started = time.monotonic()
    assert str(bounded(lambda: time.sleep(60), 0.1, "wait")) == "failed: no answer within 0.1 s; wait"
    assert time.monotonic() - started < 5
    assert bounded(lambda: 1 / 0, 5, "count") == failed("ZeroDivisionError: division by zero", "count")


def test_a_library_that_never_returns_ends_the_process_and_shows_where():
    done = subprocess.run([PYTHON, "-c", LOCKED], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "bounded" in done.stderr


def test_ctrl_c_stops_it_once_the_check_has_cleaned_up(tmp_path):
    command = [PYTHON, "-c", WAITS, str(tmp_path / "removed")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "\nstopped\n")
    assert (tmp_path / "removed").exists()


def test_a_mistake_in_the_command_or_the_yaml_is_usage(capsys):
    assert doctor.main(["nowhere.yaml"]) == 2
    assert doctor.main(["yamls/quickstart.yaml", "precision=fp8"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "nowhere.yaml: can't be read" in err
    assert "precision: got" in err


def test_this_machine_is_examined_and_a_secret_is_not_printed(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_TOKEN", "hunter2hunter2")
    monkeypatch.setattr(doctor.machine, "WRITTEN", 2**22)
    folder = tmp_path / "hunter2hunter2"
    folder.write_text("a file in the way")
    code = doctor.main([str(ROOT / RUN[0]), f"data.local={tmp_path}", f"trainer.save_folder={folder}/runs"])
    out = capsys.readouterr().out
    lines = {line[2:26].strip(): line[27:] for line in out.splitlines() if line.startswith("  ")}
    assert code == 1, out
    assert lines["disk trainer.save_folder"].startswith("failed: ")
    assert lines["disk trainer.save_folder"].endswith(
        "is a file, expected a folder; delete it, or choose another folder"
    )
    assert "hunter2" not in out
    assert "$SOME_TOKEN" in out
    for name in (
        "Python",
        "packages",
        "launcher",
        "open files",
        "shared memory",
        "torch",
        "bfloat16",
        "memory of the run",
    ):
        assert lines[name].startswith(("ok", "warning")), out
    assert lines["ranks"].startswith("not checked: there is one rank")
    assert re.fullmatch(r"\d+ ok, .*1 failed.*", out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_two_ranks_sum_and_tell_what_failed_on_the_other(tmp_path, broken):
    """The second rank alone is given a failure: the first one, whose output is seen, tells it."""
    command = [str(Path(PYTHON).with_name("composer")), "-n", "2", "-m", "sit_composer.doctor"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    if broken:
        (tmp_path / "sitecustomize.py").write_text(
            "import os\n"
            "if os.environ.get('RANK') == '1':\n"
            "    import torch\n"
            "    torch.Tensor.__matmul__ = lambda a, b: torch.matmul(a, b).roll(int(a.dtype == torch.float32))\n"
        )
        environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert re.search(r"ranks +ok: gloo between 2 ranks on \S+: \d+ µs for a number, \S+ GB/s for 17 MB", done.stdout)
    told = re.findall(r"^  rank 1, \S+ +failed: bfloat16: (.*)$", done.stdout, re.MULTILINE)
    assert (done.returncode, len(told)) == ((1, 1) if broken else (0, 0)), done.stdout + done.stderr


@pytest.mark.slow
def test_a_rank_that_never_comes_is_waited_for_no_longer_than_the_limit(tmp_path):
    code = "from sit_composer.checkup import between; between.SECONDS = 3.0; print(between.check_ranks([], []))"
    names = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [PYTHON, "-c", code], cwd=ROOT, env={**os.environ, **names}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert "1/2 clients joined" in done.stderr
