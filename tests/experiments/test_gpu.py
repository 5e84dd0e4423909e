"""gpu.py, shrunk and on the CPU: its rows, and that a part that fails does not stop the others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from experiments.result_files import read
from experiments.speed import gpu


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str | int | None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--smoke", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    return ended.value.code


def test_parts_write_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ("--parts", "steps", "meta_training")
    assert run(monkeypatch, "--device", "cpu", "--output", tmp_path, *parts) == 0
    adamw, learned = read(tmp_path / "steps.csv")
    assert (adamw["optimizer"], learned["optimizer"]) == ("AdamW fused", "learned")
    assert all(0 < float(r["optimizer_ms"]) < float(r["ms"]) for r in (adamw, learned))
    (trained,) = read(tmp_path / "meta_training.csv")
    assert float(trained["last_loss"]) < float(trained["first_loss"])


def test_parts_that_fail_do_not_stop_others(tmp_path: Path, monkeypatch) -> None:
    parts = ("--parts", "steps", "meta_training")
    code = run(monkeypatch, "--device", "nowhere", "--output", tmp_path, *parts)
    assert code == "failed: steps, meta_training"
