"""Cells in processes that are killed, die, raise or are interrupted; ranks; measurements."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from learned_opt.benchmarking import BenchmarkConfig, BenchmarkTask, Entrant, benchmark
from learned_opt.benchmarking.cells import Cell, load, without_folders
from learned_opt.benchmarking.runner import Runner
from learned_opt.benchmarking.stores import Files, Rows
from learned_opt.benchmarking.validation import ValidationCell
from learned_opt.peak_memory import peak_memory
from learned_opt.tasks.kinds import TaskConfig

ROOT = Path(__file__).parents[2]
# Milliseconds a cell, nothing to load: a time limit is met with ease on a machine that is busy.
TASK = BenchmarkTask(TaskConfig(kind="quadratic", options={"condition": 10.0}), steps=15)
REGRESSION = {"data": "breast_cancer", "hidden": (4,), "batch_size": 8}
WORKLOAD = BenchmarkTask(TaskConfig(kind="regression", **REGRESSION), steps=15)
SGD = Entrant("SGD", "torch.optim.SGD", {"lr": 0.1})
CONFIG = BenchmarkConfig(tasks=[TASK], entrants=[SGD], reporting_seeds=4)
# Optimizers that misbehave, each in its own way, at their third step.
BAD = """
import os, signal, sys, time, ctypes, torch
class Bad(torch.optim.SGD):
    def step(self, *args):
        self.count = getattr(self, "count", 0) + 1
        if self.count == 3:
            self.misbehave()
        return super().step(*args)
class Killed(Bad):
    def misbehave(self): os.kill(os.getpid(), signal.SIGKILL)
class Crashes(Bad):
    def misbehave(self): ctypes.string_at(0)
class Exits(Bad):
    def misbehave(self): sys.exit(3)
class Vanishes(Bad):
    def misbehave(self): os._exit(7)
class Hangs(Bad):
    def misbehave(self): time.sleep(1000)
class NaN(Bad):
    def misbehave(self): self.param_groups[0]["params"][0].data.fill_(float("nan"))
class Raises(Bad):
    def misbehave(self): raise RuntimeError(f"no {__file__} here")
"""


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.py").write_text(BAD)
    monkeypatch.syspath_prepend(tmp_path)


def cell(name: str, seed: int = 0) -> Cell:
    return Cell(TASK, Entrant(name, f"bad.{name}", {"lr": 0.1}), {}, seed)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_what_an_entrant_does_is_a_result_and_the_others_go_on(
    bad, tmp_path: Path, processes: int
) -> None:
    says = {
        "Killed": ["WorkerDied: killed by SIGKILL, most often because memory ran out"],
        "Crashes": ["WorkerDied: killed by SIGSEGV", 'File "bad.py", line', "in misbehave"],
        "Exits": ["SystemExit: 3", 'File "bad.py", line'],
        "Vanishes": ["WorkerDied: it ended with exit code 7"],
        "Hangs": ["TimeLimitError: no result after time_limit=5 s", 'File "bad.py"', "misbehave"],
        "Raises": ["RuntimeError: no bad.py here", 'File "bad.py", line'],
    }
    good = [Cell(TASK, SGD, {}, seed) for seed in range(len(says))]
    cells = [c for pair in zip(map(cell, says), good, strict=True) for c in pair]
    with Runner(Files(tmp_path / "cells"), processes, time_limit=5) as runner:
        records = runner.run([*cells, cell("NaN")])
    for name, record in zip(says, records[::2], strict=False):
        assert all(text in record["error"] for text in says[name]), record["error"]
        assert str(tmp_path) not in record["error"]
        assert np.isinf(record["final_train_loss"]) and not record["diverged"]
    for record in records[1::2]:
        assert record["error"] is None, record["error"]
        assert len(record["losses"]) == TASK.steps
    assert records[-1]["diverged"] and np.isnan(records[-1]["losses"][3:]).all()
    assert records[-1]["error"] is None and np.isfinite(records[-1]["losses"][:3]).all()
    assert all(path.is_file() for c in cells for path in [tmp_path / "cells" / f"{c.name}.npz"])


def test_a_cell_that_failed_is_tried_again(bad, tmp_path: Path) -> None:
    (fails,) = run_cells(tmp_path, [cell("Raises")])
    assert fails["error"]
    (tmp_path / "bad.py").write_text(BAD.replace('raise RuntimeError(f"no {__file__} here")', "0"))
    (works,) = run_cells(tmp_path, [cell("Raises")])
    assert works["error"] is None


def run_cells(folder: Path, cells: list[Cell], processes: int = 1) -> list[dict]:
    with Runner(Files(folder / "cells"), processes, time_limit=60) as runner:
        return runner.run(cells)


def test_the_same_cell_is_the_same_curve_in_any_process(tmp_path: Path) -> None:
    cells = [Cell(TASK, SGD, {}, seed) for seed in range(4)]
    alone = run_cells(tmp_path / "one", cells)
    together = run_cells(tmp_path / "two", cells, processes=2)
    for a, b in zip(alone, together, strict=True):
        assert np.array_equal(a["losses"], b["losses"]) and a["test_loss"] == b["test_loss"]
    assert len({a["test_loss"] for a in alone}) == 4


def test_a_damaged_cell_is_run_again_and_only_that(tmp_path: Path) -> None:
    cells = [Cell(TASK, SGD, {}, seed) for seed in range(2)]
    before = run_cells(tmp_path, cells)
    files = [tmp_path / "cells" / f"{c.name}.npz" for c in cells]
    files[0].write_bytes(files[0].read_bytes()[:200])
    kept = files[1].stat().st_mtime_ns
    after = run_cells(tmp_path, cells)
    assert files[1].stat().st_mtime_ns == kept and load(cells[0], tmp_path / "cells")
    assert [r["test_loss"] for r in after] == [r["test_loss"] for r in before]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("store", "kind", "task"), [(Files, Cell, TASK), (Rows, ValidationCell, WORKLOAD)]
)
def test_a_run_of_another_setting_is_never_taken_for_this_one(
    store, kind, task, tmp_path: Path
) -> None:
    """The runs have the same task, entrant and seed by name, and differ only in the rate."""

    def records(place: str, rate: float) -> list[dict]:
        folder = tmp_path / place
        cells = [kind(task, replace(SGD, kwargs={"lr": rate}), {}, seed) for seed in range(2)]
        with Runner(store(folder / "rows.jsonl" if store is Rows else folder)) as runner:
            return runner.run(cells)

    first = records("first", 0.1)
    expected = records("alone", 0.2)
    shutil.copytree(tmp_path / "first", tmp_path / "both")
    found = records("both", 0.2)
    assert [r["test_loss"] for r in found] == [r["test_loss"] for r in expected]
    again = records("both", 0.1)  # those are still there
    assert [r["test_loss"] for r in again] == [r["test_loss"] for r in first]
    assert [r["seconds"] for r in again] == [r["seconds"] for r in first]  # not run once more
    assert again[0]["test_loss"] != found[0]["test_loss"]


def command(tmp_path: Path, config: BenchmarkConfig, *launcher: str) -> subprocess.Popen:
    """The benchmark from the command line, in a process group of its own."""
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "tasks": [
                    {"steps": t.steps, "task": {"kind": t.task.kind, "options": t.task.options}}
                    for t in config.tasks
                ],
                "entrants": [
                    {"name": e.name, "optimizer": e.optimizer, "kwargs": e.kwargs}
                    for e in config.entrants
                ],
                "reporting_seeds": config.reporting_seeds,
                "processes": config.processes,
                "time_limit": config.time_limit,
            }
        )
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    paths = [str(ROOT), str(tmp_path), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    args = ["benchmark", "--config", "config.yaml", "--output", "out"]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "learned_opt.cli", *args],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell that runs the tests in the background ignores it, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
def test_killed_halfway_it_goes_on_where_it_was(bad, tmp_path: Path) -> None:
    """SIGKILL of the command while its worker hangs, which then ends by itself at its limit."""
    hangs = Entrant("Hangs", "bad.Hangs", {"lr": 0.1})
    config = replace(CONFIG, entrants=[SGD, hangs], time_limit=20.0)
    process = command(tmp_path, config)
    cells = tmp_path / "out" / "cells"
    patience = time.monotonic() + 120
    while len(list(cells.glob("*_SGD_*.npz"))) < 4 and time.monotonic() < patience:
        time.sleep(0.1)
    process.kill()
    process.communicate(timeout=60)
    before = {p: p.stat().st_mtime_ns for p in cells.glob("*_SGD_*.npz")}
    assert len(before) == 4 and not (tmp_path / "out" / "results.csv").exists()
    (tmp_path / "bad.py").write_text(BAD.replace("time.sleep(1000)", "0"))
    again = command(tmp_path, config)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert {p: p.stat().st_mtime_ns for p in before} == before
    facts = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert facts["cells"] == 8 and not facts["failures"]


@pytest.mark.slow
def test_workers_run_what_is_installed_whatever_lies_in_the_folder(tmp_path: Path) -> None:
    for module in ("learned_opt", "torch"):
        (tmp_path / module).mkdir()
        trap = "open('trapped', 'w').close()\nraise ImportError('the wrong one')\n"
        (tmp_path / module / "__init__.py").write_text(trap)
    (tmp_path / "suite.yaml").write_text(
        "tasks: [{steps: 2, task: {data: digits, hidden: [4]}}]\n"
        "entrants: [{name: SGD, optimizer: torch.optim.SGD, kwargs: {lr: 0.1}}]\n"
        "reporting_seeds: 1\ntuning_seeds: 1\n"
    )
    command = [Path(sys.executable).parent / "learned-opt", "benchmark", "--config", "suite.yaml"]
    process = subprocess.run(
        [*command, "--output", "out"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    assert not (tmp_path / "trapped").exists()
    assert not json.loads((tmp_path / "out" / "benchmark.json").read_text())["failures"]


@pytest.mark.slow
def test_a_temporary_folder_with_a_long_name_does(tmp_path: Path, monkeypatch) -> None:
    """What the workers listen on has a name of some hundred bytes at most."""
    temporary = tmp_path / ("long" * 30)
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    process = command(tmp_path, CONFIG)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert not list(temporary.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_it_with_its_workers(
    bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    # not in tmp_path: what the workers listen on must have a short name
    temporary = Path(tempfile.mkdtemp())
    monkeypatch.setenv("TMPDIR", str(temporary))
    hangs = Entrant("Hangs", "bad.Hangs", {"lr": 0.1})
    process = command(tmp_path, replace(CONFIG, entrants=[SGD, hangs], processes=2))
    patience = time.monotonic() + 120
    cells = tmp_path / "out" / "cells"
    while len(list(cells.glob("*_SGD_*.npz"))) < 4 and time.monotonic() < patience:
        time.sleep(0.1)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal's Ctrl-C
    else:
        process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    last = f"learned-opt: ended by {number.name}; the same command resumes where it stopped"
    assert errors.splitlines()[-1] == last and "Traceback" not in errors
    patience = time.monotonic() + 30
    while alive(process.pid) and time.monotonic() < patience:
        time.sleep(0.1)
    assert not alive(process.pid)
    assert not (tmp_path / "out" / ".lock-owner.json").exists()
    temporary.rmdir()  # which is empty


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_ranks_share_the_cells(tmp_path: Path) -> None:
    config = replace(CONFIG, entrants=[SGD, Entrant("bad", "torch.optim.SparseAdam", {"lr": 0.1})])
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = command(tmp_path, config, *launcher)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert out.count("report.html") == 1
    facts = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert (facts["ranks"], facts["cells"], facts["failures"]) == (2, 8, 4)
    alone = {row["seed"]: row for row in benchmark(CONFIG, tmp_path / "alone")}
    for path in (tmp_path / "out" / "cells").glob("*_SGD_*.npz"):
        with np.load(path, allow_pickle=False) as file:
            record = json.loads(str(file["record"]))
        assert record["test_loss"] == alone[record["seed"]]["test_loss"]
    started = json.loads((tmp_path / "out" / "provenance-benchmark.json").read_text())
    assert len(started) == 1


def test_wandb_has_a_point_for_each_cell(tmp_path: Path, monkeypatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    benchmark(replace(CONFIG, reporting_seeds=2, logger="wandb"), tmp_path)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    wandb.teardown()


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_peak_memory_is_what_the_work_took_and_not_what_came_before() -> None:
    size = 1 << 26
    earlier = torch.ones(4 * size // 4)
    del earlier
    with peak_memory() as peak:
        for _ in range(2):  # freed in between: the peak is of one
            block = torch.ones(size // 4)
            del block
        assert 0.9 * size < peak() < 1.2 * size  # the allocator gives some back meanwhile
    with peak_memory() as peak:
        assert peak() < size / 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('  File "/home/ann b/x/run.py", line 3, in f', '  File "run.py", line 3, in f'),
        ('  File "C:\\Users\\ann\\run.py", line 3', '  File "run.py", line 3'),
        ("missing /data/sets/train.npz; write it", "missing train.npz; write it"),
        ("'/data/sets/train.npz' is cut", "'train.npz' is cut"),
        ("lr/2 is 1/3, see https://a.org/b/c", "lr/2 is 1/3, see https://a.org/b/c"),
    ],
)
def test_tracebacks_carry_no_folders(text: str, expected: str) -> None:
    assert without_folders(text) == expected
