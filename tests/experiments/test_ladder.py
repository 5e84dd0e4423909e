"""ladder.py, shrunk: its tasks, resuming, and the measurement of seconds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from experiments.optimizer import ladder


def test_rungs_double_in_width_and_quadruple_in_length() -> None:
    tasks = ladder.rungs()
    assert len({task.label for task in tasks}) == len(tasks) == 16
    for name in ladder.NETS:
        widths = [t.task.hidden[-1] for t in tasks if t.label.startswith(f"{name}, ")]
        assert [w / widths[0] for w in widths] == [1, 2, 4, 8]
    assert [t.steps for t in tasks if t.task == ladder.SMALL] == [500, 2000, 8000, 32000]


@pytest.mark.slow
def test_losses_go_on_where_they_were_and_seconds_are_taken_in_turns(tmp_path) -> None:
    task = replace(ladder.rungs()[-1], steps=3)
    ladder.losses(tmp_path, [task], (0,), 1)
    lines = (tmp_path / "rows.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [row["error"] for row in rows] == [None] * 4
    assert {row["entrant"] for row in rows} == {entrant.name for entrant in ladder.ENTRANTS}
    ladder.losses(tmp_path, [task], (0,), 1)
    assert (tmp_path / "rows.jsonl").read_text() == lines
    timed = list(ladder.in_turn(task, ladder.ENTRANTS, turns=1))
    assert timed[-1]["times_last"] == timed[-1]["optimizer_times_last"] == 1.0
    assert all(0 < row["optimizer_ms"] < row["ms"] for row in timed)
