"""The benchmark, on real runs of a few steps on the digits."""

from __future__ import annotations

import base64
import csv
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from learned_opt.benchmark import (
    BenchmarkConfig,
    BenchmarkTask,
    Entrant,
    run_benchmark,
    summary_table,
)
from learned_opt.benchmark.cells import Cell, run_cells
from learned_opt.benchmark.tune import learning_rate_grid, tune
from learned_opt.errors import ConfigError, LearnedOptError, OutputError
from learned_opt.run import run_optimizer
from learned_opt.tasks.kinds import TaskConfig, make_task

TASK = BenchmarkTask(TaskConfig(hidden=(8,), batch_size=32), steps=15)
ADAM = Entrant("Adam <tuned>", "torch.optim.Adam", tune=True)
SGD = Entrant("SGD", "torch.optim.SGD", {"lr": 0.1})
EXPLODES = Entrant("explodes", "torch.optim.SGD", {"lr": 1e30})
RAISES = Entrant("raises", "torch.optim.SGD", {"lr": -1.0})
CONFIG = BenchmarkConfig(
    tasks=[TASK],
    entrants=[ADAM, SGD, EXPLODES, RAISES],
    reporting_seeds=2,
    tuning_seeds=2,
    learning_rate_min=1e-3,
    learning_rate_max=1e-1,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the benchmark runs: the same sums, and no waiting for a core that others use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """CONFIG, run once."""
    folder = tmp_path_factory.mktemp("benchmark")
    return folder, run_benchmark(CONFIG, folder)


def rows_of(results: list[dict], entrant: Entrant) -> list[dict]:
    return [row for row in results if row["entrant"] == entrant.name]


def test_a_row_is_what_the_optimizer_did(done) -> None:
    _, results = done
    make = partial(torch.optim.SGD, lr=0.1)
    for row in rows_of(results, SGD):
        run = run_optimizer(make_task(TASK.task), make, row["seed"], TASK.steps)
        assert row["final_train_loss"] == run.evaluation["train_loss"]
        assert row["test_accuracy"] == run.evaluation["test_accuracy"]
        assert row["mean_loss"] == pytest.approx(run.losses.mean(), rel=1e-6)
        assert row["lr"] == 0.1 and not row["tuned"] and not row["diverged"]
        assert row["torch"] == torch.__version__.split()[0]


def test_the_tuned_learning_rate_is_that_of_brute_force(done) -> None:
    _, results = done

    def final_loss(lr: float) -> float:
        task, make = make_task(TASK.task), partial(torch.optim.Adam, lr=lr)
        runs = [run_optimizer(task, make, seed, TASK.steps) for seed in CONFIG.tuning]
        return float(np.mean([run.evaluation["train_loss"] for run in runs]))

    best = min(learning_rate_grid(1e-3, 1.0), key=final_loss)
    assert {row["lr"] for row in rows_of(results, ADAM)} == {best}


def test_a_second_run_recomputes_nothing(done) -> None:
    folder, results = done
    succeeded = [p for p in (folder / "cells").iterdir() if "_raises_" not in p.name]
    before = {path: path.stat().st_mtime_ns for path in succeeded}
    again = run_benchmark(CONFIG, folder)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert list(map(str, again)) == list(map(str, results))


def test_an_interrupted_run_does_only_what_is_missing(done) -> None:
    folder, results = done
    lost = next(p for p in (folder / "cells").iterdir() if "_SGD_" in p.name)
    kept = {p: p.stat().st_mtime_ns for p in (folder / "cells").iterdir() if "_Adam" in p.name}
    lost.unlink()
    again = run_benchmark(CONFIG, folder)
    assert lost.exists() and all(p.stat().st_mtime_ns == time for p, time in kept.items())
    losses = [row["final_train_loss"] for row in results]
    assert [row["final_train_loss"] for row in again] == losses


def test_another_config_is_refused(done) -> None:
    changed = replace(CONFIG, tasks=[replace(TASK, steps=16)])
    with pytest.raises(OutputError, match=r"tasks\.0\.steps was 15, now it is 16"):
        run_benchmark(changed, done[0])


def test_a_diverged_run_counts_as_infinite_and_is_shown(done) -> None:
    _, results = done
    rows = rows_of(results, EXPLODES)
    assert all(row["diverged"] and math.isinf(row["final_train_loss"]) for row in rows)
    line = next(ln for ln in summary_table(results).splitlines() if "explodes" in ln)
    assert "| ∞ |" in line and line.endswith("| 2 of 2 |")


def test_one_diverged_seed_makes_the_mean_infinite(done) -> None:
    _, results = done
    rows = rows_of(results, SGD)
    mixed = [rows[0], rows[1] | {"final_train_loss": math.inf, "diverged": True}]
    line = summary_table(mixed).splitlines()[-1]
    assert "| ∞ |" in line and line.endswith("| 1 of 2 |")


def test_a_run_that_raises_is_recorded_and_the_others_go_on(done) -> None:
    folder, results = done
    assert all("Invalid learning rate" in row["error"] for row in rows_of(results, RAISES))
    assert not any(row["error"] for row in rows_of(results, SGD))
    assert "0 of 2, 2 failed" in summary_table(results)
    assert "Traceback (most recent call last)" in (folder / "report.html").read_text()


def test_the_best_is_bold(done) -> None:
    _, results = done
    mean = {e.name: np.mean([r["test_loss"] for r in rows_of(results, e)]) for e in (ADAM, SGD)}
    for line in summary_table(results).splitlines()[4:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[4].startswith("**") == (cells[0] == min(mean, key=mean.get))


def test_the_report_needs_nothing_but_a_browser(done) -> None:
    folder, results = done
    page = (folder / "report.html").read_text()
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"https?://|<script|<link|@import|src=", outside)
    assert page.count("<svg") == 1 and "currentColor" in page
    for heading in ("How this was run", "Tuning", "Runs that failed", "final train loss"):
        assert heading in page
    assert "Adam &lt;tuned&gt;" in page and "Adam <tuned>" not in page
    table = base64.b64decode(re.search(r"base64,([\w+/=]+)", page)[1])
    assert table == (folder / "results.csv").read_bytes()
    rows = list(csv.DictReader(table.decode().splitlines()))
    assert len(rows) == len(results) == 8
    assert [float(r["test_loss"]) for r in rows] == [r["test_loss"] for r in results]


def test_the_grid_grows_while_the_best_is_at_its_edge(tmp_path: Path) -> None:
    config = replace(CONFIG, entrants=[ADAM], learning_rate_min=1e-5, learning_rate_max=1e-4)
    capped = tune(replace(config, max_grid_extensions=2), tmp_path)[TASK.label, ADAM.name]
    assert capped.extensions == 2 and capped.at_edge
    assert sorted(capped.scores) == learning_rate_grid(1e-5, 1e-3)
    found = tune(replace(config, max_grid_extensions=12), tmp_path)[TASK.label, ADAM.name]
    assert not found.at_edge
    assert found.lr == tune(CONFIG, tmp_path)[TASK.label, ADAM.name].lr


def test_the_grid_is_half_decades() -> None:
    assert learning_rate_grid(1e-2, 1.0) == [0.01, 0.03162, 0.1, 0.3162, 1.0]
    assert len(learning_rate_grid(1e-4, 1.0)) == 9


def test_processes_give_the_same_results(done, tmp_path: Path) -> None:
    cells = [Cell(TASK, SGD, None, seed) for seed in CONFIG.reporting]
    records = run_cells(cells, tmp_path, processes=2)
    rows = rows_of(done[1], SGD)
    assert [r["test_loss"] for r in records] == [row["test_loss"] for row in rows]


def test_a_worker_that_dies_is_explained(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "dying.py").write_text(
        "import os, signal, torch\n"
        "class Dies(torch.optim.SGD):\n"
        "    def step(self):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cells = [Cell(TASK, Entrant("dies", "dying.Dies", {"lr": 0.1}), None, s) for s in (0, 1)]
    with pytest.raises(LearnedOptError, match="0 of 2 runs are saved: use fewer processes"):
        run_cells(cells, tmp_path / "cells", processes=2)


def test_cosine_ends_at_zero() -> None:
    entrant = Entrant("cosine", "torch.optim.SGD", {"lr": 0.1}, schedule="cosine")
    param = torch.ones(2, requires_grad=True)
    optimizer = Cell(TASK, entrant, None, seed=0).make_optimizer([param])
    rates = []
    for _ in range(TASK.steps):
        rates.append(optimizer.param_groups[0]["lr"])
        param.grad = torch.ones(2)
        optimizer.step()
    assert rates[0] == 0.1 and rates[5] == pytest.approx(0.075)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_other_weights_are_another_cell(tmp_path: Path) -> None:
    names = set()
    for content in (b"one", b"two"):
        (tmp_path / "w.safetensors").write_bytes(content)
        entrant = Entrant("mine", "learned", weights=str(tmp_path / "w.safetensors"))
        names.add(Cell(TASK, entrant, None, seed=0).name)
    assert len(names) == 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"reporting_seeds": [0, 1], "tuning_seeds": [1, 2]}, r"seeds \[1\] are both"),
        ({"reporting_seeds": 0}, "reporting_seeds"),
        ({"entrants": [ADAM, ADAM]}, "entrants"),
        ({"tasks": []}, "tasks"),
        ({"learning_rate_min": 0.0}, "learning_rate_min=0.0"),
        ({"processes": 0}, "processes=0"),
    ],
)
def test_bad_settings_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        replace(CONFIG, **settings)


def test_bad_entrants_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tune=true"):
        Entrant("a", "torch.optim.Adam", {"lr": 0.1}, tune=True)
    with pytest.raises(ConfigError, match="weights"):
        Entrant("a", "torch.optim.Adam", weights="w.safetensors")
    misspelt = replace(CONFIG, entrants=[Entrant("a", "torch.optim.Adm")])
    with pytest.raises(ConfigError, match=r"torch\.optim\.Adm"):
        run_benchmark(misspelt, tmp_path)
    assert not list(tmp_path.iterdir())


def test_smoke_shrinks_the_default_benchmark() -> None:
    smoke = BenchmarkConfig().smoke()
    assert max(task.steps for task in smoke.tasks) <= 5
    assert not {*smoke.reporting} & {*smoke.tuning}
