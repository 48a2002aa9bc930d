"""Progress bars on a terminal and in a log."""

import io
import sys

import pytest

from sit_composer import bars


@pytest.mark.parametrize("seconds", [0, 60])
def test_in_a_log_a_bar_is_lines_after_its_time(monkeypatch, capsys, seconds):
    monkeypatch.setattr(bars, "SECONDS", seconds)
    with bars.progress(3, desc="sampling") as bar:
        for _ in range(3):
            bar.update()
    parts = dict.fromkeys(line.split("|")[0] for line in capsys.readouterr().err.splitlines())
    expected = [] if seconds else ["sampling:   0%", "sampling:  33%", "sampling:  67%", "sampling: 100%"]
    assert list(parts) == expected


def test_on_a_terminal_it_stays_in_one_line_and_other_ranks_have_none(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with bars.progress(1, shown=False) as bar:
        bar.update()
    assert terminal.getvalue() == ""
    with bars.progress(1) as bar:
        bar.update()
    assert "\r" in terminal.getvalue()
    assert terminal.getvalue().count("\n") == 1
