"""Damaged or foreign files of cells and rows, whose cells the benchmark runs again."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from learned_opt.benchmarking import BenchmarkTask, Entrant
from learned_opt.benchmarking.cells import Cell, load, save
from learned_opt.benchmarking.stores import Rows
from learned_opt.benchmarking.validation import ValidationCell
from learned_opt.tasks.kinds import TaskConfig

TASK = BenchmarkTask(TaskConfig(hidden=(8,), batch_size=32), steps=3)
SGD = Entrant("SGD", "torch.optim.SGD", {"lr": 0.1})


def npz(**arrays) -> bytes:
    np.savez(buffer := io.BytesIO(), **arrays)
    return buffer.getvalue()


def npy(array) -> bytes:
    np.save(buffer := io.BytesIO(), array)
    return buffer.getvalue()


def huge() -> bytes:
    """An archive whose array says in its header that it has 10¹⁵ numbers."""
    np.lib.format.write_array_header_1_0(
        header := io.BytesIO(), {"descr": "<f8", "fortran_order": False, "shape": (10**15,)}
    )
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("losses.npy", header.getvalue())
        archive.writestr("record.npy", npy(np.array("{}")))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an archive",
        npy(np.zeros(3)),
        npz(losses=np.zeros(3)),
        npz(losses=np.zeros(3), record=np.zeros(2)),
        *(npz(losses=np.zeros(3), record=np.array(r)) for r in ("[]", "5", "{}", "null", "[[")),
        npz(losses=np.zeros(3), record=np.array('{"error": null}')),
        npz(losses=np.zeros(3), record=np.array("[" * 100_000)),
        huge(),
    ],
)
def test_a_file_that_is_no_cell_is_run_again(content: bytes, tmp_path: Path) -> None:
    cell = Cell(TASK, SGD, {}, 0)
    (tmp_path / f"{cell.name}.npz").write_bytes(content)
    assert load(cell, tmp_path) is None


@pytest.mark.parametrize(
    "wrong", [{"losses": np.float64(1)}, {"seconds": "3"}, {"diverged": 0}, {"environment": None}]
)
def test_a_record_of_other_types_is_run_again(wrong: dict, tmp_path: Path) -> None:
    cell = Cell(TASK, SGD, {}, 0)
    save(cell, cell.blank(), tmp_path)
    assert load(cell, tmp_path) is not None
    save(cell, cell.blank() | wrong, tmp_path)
    assert load(cell, tmp_path) is None


def test_a_row_that_is_no_record_is_run_again(tmp_path: Path) -> None:
    cell = ValidationCell(BenchmarkTask(TaskConfig(kind="image_mlp")), SGD, {}, 0)
    path = tmp_path / "rows.jsonl"
    Rows(path).keep(cell, cell.blank(), saved=False)
    whole, key = path.read_text(), json.dumps(cell.name)
    assert Rows(path).load(cell) is not None
    for line in ("[]", "5", "null", '{"cell": [], "error": null}', f'{{"cell": {key}}}',
                 f'{{"cell": {key}, "error": null}}', whole.replace(" []", " 7")):  # fmt: skip
        path.write_text(line + "\n")
        assert Rows(path).load(cell) is None, line
