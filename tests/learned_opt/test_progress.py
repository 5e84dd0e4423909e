"""What is shown while one waits: lines in a log, a bar on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
import time

import pytest

from learned_opt import progress
from learned_opt.progress import Progress, tracked


def test_a_log_gets_lines_of_what_is_done_and_left(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PERIOD", 0.01)
    seen, patience = "", time.monotonic() + 60
    with Progress("train", "updates", total=10, done=4) as counted:
        counted.add()
        while "left" not in seen and time.monotonic() < patience:
            time.sleep(0.01)
            seen += capsys.readouterr().err
    assert "train: 5 of 10 updates done in 00:00, about 00:0" in seen


def test_what_an_earlier_run_has_done_does_not_speed_up_the_estimate():
    counted = Progress("benchmark", "runs", total=10, shown=False)
    counted.skip(8)
    assert str(counted) == "benchmark: 8 of 10 runs done in 00:00"


@pytest.mark.parametrize("shown", [True, False])
def test_short_work_says_nothing(shown, capsys):
    assert list(tracked([1, 2], "geodesics", "shards", shown=shown)) == [1, 2]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar():
    code = "from learned_opt.progress import tracked; list(tracked([1, 2], 'geodesics', 'shards'))"
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, timeout=300)
    assert b"geodesics: 100%" in os.read(ours, 10_000)
