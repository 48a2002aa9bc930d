"""What a run shows of itself, as lines and as a bar."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios

import pytest

from sit_composer.callbacks.progress import duration
from sit_composer.errors import INTERRUPTED
from tests.helpers.paths import ROOT
from tests.helpers.runs import TINY

FIGURES = r"loss \d\.\d+  [\d,.]+ images/s  lr 0\.003  left \d+:\d\d  checkpoint in \d+:\d\d  data \d+\.\d%"


def test_a_first_screen_a_line_per_interval_and_evaluation_and_the_figures_at_the_end(
    run, tmp_path, digits_shards, capsys
):
    evaluation = f"eval_data={{local: {digits_shards}, global_batch_size: 599, num_workers: 0}}"
    assert run("trainer.max_duration=12ba", "trainer.console_log_interval=5ba", evaluation) == 0
    out, err = capsys.readouterr()
    screen, end = out.splitlines()[:11], out.splitlines()[-3:]
    assert screen[0] == "run:         quickstart, which starts anew"
    names = "network objective optimizer data batch device length memory time checkpoints"
    assert " ".join(line.partition(":")[0] for line in screen[1:]) == names
    assert screen[3] == "optimizer:   AdamW; rate 0.003 (constant), weight decay 0, seed 0"
    assert "every 10ba (about 0:0" in out
    lines = [line for line in err.splitlines() if line.startswith("batch ")]
    assert re.fullmatch(rf"batch 5/12  {FIGURES}", lines[0])
    assert re.fullmatch(rf"batch 10/12  {FIGURES}", lines[1])
    assert re.fullmatch(r"batch 12: evaluation loss \d\.\d{4}, in 0:0\d", lines[2])
    assert len(lines) == 3
    figures = r"quickstart: batch 12: trained in 0:0\d, [\d,.]+ images/s, loss \d\.\d{4}, evaluation loss \d\.\d{4}"
    assert re.fullmatch(figures, end[0])
    assert end[1] == f"checkpoint: {tmp_path}/run/ep0-ba12-rank0.pt"
    assert end[2] == f"next: python -m sit_composer.sample {tmp_path}/run --out samples"
    assert "Config:" not in out + err
    assert "UserWarning" not in err


@pytest.mark.slow
def test_a_bar_on_a_terminal_tears_no_line_and_ctrl_c_saves(digits_shards, tmp_path):
    evaluation = f"eval_data={{local: {digits_shards}, global_batch_size: 599, num_workers: 0}}"
    options = [f"data.local={digits_shards}", f"trainer.save_folder={tmp_path}/run", "trainer.max_duration=2000ba"]
    command = [sys.executable, "sit_composer/train.py", "yamls/quickstart.yaml", *TINY, *options, evaluation]
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.execve(sys.executable, [*command, "trainer.eval_interval=5ba"], os.environ | {"OMP_NUM_THREADS": "1"})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    shown, pressed = b"", False
    try:
        while part := os.read(terminal, 4096):
            shown += part
            if b"batch 10: evaluation" in shown and not pressed:
                pressed = os.write(terminal, b"\x03") == 1
    except OSError:  # the end
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == INTERRUPTED
    lines = [line.split("\r")[-1] for line in shown.decode().replace("\r\n", "\n").split("\n")]  # what stays on them
    for batch in (5, 10):
        assert any(re.fullmatch(rf"batch {batch}: evaluation loss \d\.\d{{4}}, in 0:0\d", line) for line in lines)
    assert "/2000, loss" in shown.decode()
    assert "Ctrl-C: saving, then stopping; press it again to stop at once" in lines
    assert any(re.fullmatch(r"quickstart: saved at batch 1\d; the same command resumes", line) for line in lines)


def test_a_duration_is_short():
    assert [duration(s) for s in (0, 5.4, 754, 11100, 190000)] == ["0:00", "0:05", "12:34", "3:05:00", "2 d 4:46"]
