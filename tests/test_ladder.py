"""The ladder of sizes and lengths: a smoke run of its command, and what it promises."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

STUDY = Path(__file__).parents[1] / "experiments" / "ladder.py"


def study(what: str, output: Path) -> None:
    command = [sys.executable, str(STUDY), what, "--output", str(output), "--smoke"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr


def test_losses_go_on_where_they_were_and_seconds_are_taken_in_turns(tmp_path: Path) -> None:
    study("losses", tmp_path)
    lines = (tmp_path / "rows.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    assert len(rows) == 8 and not [row["error"] for row in rows if row["error"]]
    assert {row["entrant"] for row in rows} == {
        "learned", "learned decay", "AdamW 0.001", "AdamW 0.003",
    }  # fmt: skip
    study("losses", tmp_path)
    assert (tmp_path / "rows.jsonl").read_text() == lines
    study("seconds", tmp_path)
    with open(tmp_path / "ladder_seconds.csv", newline="") as file:
        timed = list(csv.DictReader(file))
    assert [float(row["times_adamw"]) for row in timed[3::4]] == [1.0, 1.0]
    assert all(float(row["ms"]) > 0 for row in timed)
