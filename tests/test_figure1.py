"""experiments/figure1.py, shrunk: what it writes, that it resumes, and its picture."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_rows_resume_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    figure1 = importlib.import_module("figure1")
    paths = [
        "--results",
        tmp_path,
        "--cache",
        tmp_path / "nets",
        "--picture",
        tmp_path / "figure.png",
    ]

    def run(command: str, *levels: str, pairs: int = 2) -> list[dict[str, str]]:
        shrunk = ["--levels", *levels, "--pairs", pairs, "--steps", 350]
        words = [command, "--setting", "cubic", *(shrunk if levels else ()), *paths]
        figure1.main([str(word) for word in words])
        return list(csv.DictReader((tmp_path / "cubic.csv").open()))

    rows = run("run", "0.2")
    assert [(r["pair"], r["method"]) for r in rows] == [
        (pair, method) for pair in "01" for method in ("DSS", "shortened")
    ]
    for string, shortened in zip(rows[::2], rows[1::2], strict=True):
        assert string["found"] == shortened["found"] == "1"
        assert 1 < float(string["normalized_length_weights"])
        assert 1 < float(string["normalized_length"]) < 1.1  # published: 1.004 in the mean
        assert 1 <= float(shortened["normalized_length"]) <= float(string["normalized_length"])
        if shortened["chord_feasible"] == "1":
            assert float(shortened["normalized_length"]) == 1
        assert int(string["beads"]) >= 3  # a midpoint, whatever the chord
        assert float(string["max_loss"]) <= 0.22 and float(shortened["max_loss"]) <= 0.22

    more = run("run", "0.2", "0.32")
    assert more[:4] == rows and {row["level"] for row in more[4:]} == {"0.32"}
    with pytest.raises(SystemExit, match="other settings"):
        run("run", "0.2", pairs=3)

    run("plot")
    assert (tmp_path / "figure.png").stat().st_size > 0
