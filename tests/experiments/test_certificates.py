"""certificates.py, shrunk: its problems, its rows, and the detection of a violation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.geodesics import certificates as study


@pytest.mark.slow
def test_every_kind_has_rows_and_no_disconnected_pair_is_certified(tmp_path: Path) -> None:
    rows = study.run(per_kind=3)
    assert len(rows) == 3 * len(study.KINDS) * len(study.DTYPES)
    assert {row["level"] for row in rows} == {"constant", "falling"}
    for row in rows:
        assert row["samples"] == 32 * 160 + 1
        if row["kind"] == "disconnected":
            assert not row["certified"] and row["largest_excess"] > 3
        if row["certified"] and row["kind"] != "jumps":
            assert not row["violated"] and row["largest_excess"] <= row["tolerance"]
    study.save(tmp_path, "rows", rows)
    assert study.table(tmp_path).splitlines()[-1].startswith(f"| all |  | {len(rows)} |")


def test_a_path_that_leaves_its_set_is_a_violation(monkeypatch) -> None:
    search = study.find_geodesics

    def trusting(*args, **settings):
        found = search(*args, **settings)
        return replace(found, certified=torch.ones_like(found.certified))

    monkeypatch.setattr(study, "find_geodesics", trusting)
    rows = study.solve("disconnected", "float64", 2, seed=0, count=2, falls=False)
    assert [row["violated"] for row in rows] == [1, 1]
