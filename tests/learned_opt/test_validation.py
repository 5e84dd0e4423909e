"""The protocols of real training: known answers, and small benchmarks in real processes."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from learned_opt.benchmarking import BenchmarkConfig, BenchmarkTask, Entrant, benchmark
from learned_opt.benchmarking.entrants import NAMED
from learned_opt.benchmarking.going_on import behind, outcome
from learned_opt.benchmarking.stats import geometric_mean
from learned_opt.benchmarking.stores import Rows
from learned_opt.benchmarking.tables import to_csv
from learned_opt.benchmarking.validation import (
    Target,
    ValidationCell,
    anytime_speed_up,
    lowest,
    outcome_row,
)
from learned_opt.benchmarking.verdict import verdict
from learned_opt.errors import ConfigError
from learned_opt.tasks.kinds import TaskConfig

TASK = TaskConfig(kind="regression", data="breast_cancer", hidden=(8,), batch_size=16)
ADAMW = NAMED["AdamW warm-up cosine"]
TARGETS = (Target("AdamW warm-up cosine", 1.0), Target("SOAP", 0.5))


def record(curve: list[float], steps: int = 100, **facts: object) -> dict:
    """Of a run that was evaluated at equal distances, the last time at its end."""
    points = np.linspace(0, steps, len(curve)).round().astype(int).tolist()
    names = ("task", "entrant", "seed", "hyperparameters", "train_loss", "validation_accuracy",
             "test_loss", "test_accuracy", "seconds", "peak_memory")  # fmt: skip
    return dict.fromkeys(names) | {
        "steps": steps,
        "validation": [list(point) for point in zip(points, curve, strict=True)],
        "validation_loss": curve[-1],
        "diverged": False,
        "error": None,
    } | facts  # fmt: skip


def test_an_anytime_run_reaches_the_target_at_the_first_of_two_evaluations() -> None:
    curve = [3.0, 2.0, 0.9, 1.1, 1.0, 0.8, 1.2]  # steps 0, 17, 33, 50, 67, 83, 100
    assert anytime_speed_up(record(curve), 1.0) == 100 / 67
    assert anytime_speed_up(record(curve), 2.0) == 100 / 17
    assert anytime_speed_up(record(curve), 0.8) == 0.0  # a single dip
    assert anytime_speed_up(record([0.5, 2.0, 2.0]), 1.0) == 0.0  # the init does not count
    assert anytime_speed_up(record(curve, diverged=True), 1.0) == 0.0


def test_the_speed_up_of_a_schedule_is_the_shortest_run_that_ends_there() -> None:
    shorter = {1.25: record([1.1], 80), 1.5: record([0.9], 67), 3.0: record([2.0], 33)}
    row = outcome_row(ADAMW, record([2.0, 0.4, 0.7]), TARGETS, shorter)
    assert (row["speed_up"], row["best_speed_up"]) == (1.5, 0.0)  # 1.25 is skipped over
    assert row["validation_loss"] == 0.7 and row["best_target"] == 0.5
    late = outcome_row(ADAMW, record([2.0, 0.4, 1.3]), TARGETS, {})
    assert late["speed_up"] == 0.0  # its end counts, not its middle


def test_the_target_is_the_lowest_smoothed_loss() -> None:
    """Smoothed over 5 % of 100 steps: over evaluations 2 steps apart the mean of three, or two."""
    curve = [5.0, *([4.0] * 24), 1.0, *([4.0] * 25)]
    assert len(curve) == 51 and lowest([record(curve)]) == pytest.approx((1 + 4 + 4) / 3, abs=0.51)
    assert lowest([record([3.0] * 51), record([1.0] * 51)]) == 2.0
    assert lowest([record([3.0] * 51), record([1.0] * 51, diverged=True)]) == math.inf


def test_geometric_mean_counts_a_miss_as_a_half() -> None:
    assert geometric_mean([[2.0, 2.0], [2.0, 2.0]]) == pytest.approx(2.0)
    assert geometric_mean([[2.0, 0.0]]) == pytest.approx(1.0)
    assert geometric_mean([[[4.0, 1.0]], [[0.0, 0.0]]]).tolist() == pytest.approx([2.0, 0.5])


def test_the_sentence_says_who_won_by_how_much_and_what_was_missed() -> None:
    speed_ups = {"A": np.ones((2, 2)), "B": np.array([[2.0, 2.0], [2.0, 0.0]]),
                 "C": np.array([[0.0, 0.0], [3.0, 3.0]])}  # fmt: skip
    assert verdict(speed_ups, "A", "loss") == (
        "B won: it reached the loss of A in 1.41 times fewer steps and missed it in 1 of 4 runs "
        "(geometric mean over 2 tasks and 2 seeds; a miss counts as half)."
    )
    del speed_ups["B"]
    lost = verdict({"A": np.ones((2, 2)), "C": np.array([[0.0, 0.0], [1.0, 1.0]])}, "A", "loss")
    assert lost.startswith("A won: no other optimizer reached its loss in fewer steps")
    assert "and missed it in 2 of 4 runs, on 1 of 2 tasks every time (" in lost
    once = verdict({"A": np.ones((1, 1)), "C": np.full((1, 1), 3.0)}, "A", "loss")
    assert "never missed it (geometric mean over 1 task and 1 seed;" in once
    never = verdict({"A": np.ones((1, 1)), "C": np.zeros((1, 1))}, "A", "loss")
    assert never == "A won: C never reached its loss, and no other came closer."


def test_behind_is_what_the_undisturbed_run_still_had_to_go() -> None:
    undisturbed = record([4.0, 2.0, 3.0, 1.0, 0.5])  # steps 0, 25, 50, 75, 100
    assert behind(0.4, undisturbed) == 0.0 and behind(0.5, undisturbed) == 0.0
    assert behind(1.0, undisturbed) == 25.0
    assert behind(1.5, undisturbed) == pytest.approx(37.5)
    assert behind(3.0, undisturbed) == pytest.approx(87.5)
    assert behind(9.0, undisturbed) == 100.0


def test_rises_are_relative_to_the_loss_before_the_change() -> None:
    row = outcome(record([9.0, 2.0, 5.0, 1.0]), 33, None)
    assert (row["before"], row["worst"], row["end"], row["behind"]) == (2.0, 2.5, 0.5, None)
    assert outcome(record([2.0, math.nan], diverged=True), 0, None)["worst"] == math.inf


CONFIG = BenchmarkConfig(
    name="small",
    protocol="validation",
    tasks=[BenchmarkTask(TASK, 40, "one"), BenchmarkTask(replace(TASK, hidden=(4, 4)), 30, "two")],
    entrants=[
        "AdamW warm-up cosine",
        Entrant("Adam", "torch.optim.Adam", {"lr": 0.01}),
        Entrant("explodes", "torch.optim.SGD", {"lr": 1e30}),
        "learned",
    ],
    reporting_seeds=2,
    tuning_seeds=2,
    settings=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CONFIG, run once."""
    folder = tmp_path_factory.mktemp("validation")
    benchmark(CONFIG, folder)
    return folder


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_targets_come_from_tuning_seeds_and_rows_from_reporting_seeds(folder: Path) -> None:
    rows = rows_of(folder)
    tuned = [r for r in rows if r["entrant"] == ADAMW.name and r["task"] == "one"]
    trials = [r for r in tuned if r["seed"] == CONFIG.tuning[0]]
    best = min(trials, key=lambda r: r["validation_loss"])
    chosen = [r for r in tuned if r["hyperparameters"] == best["hyperparameters"]]
    on_tuning = [r for r in chosen if r["seed"] in CONFIG.tuning and r["steps"] == 40]
    assert len(trials) == 5 and len(on_tuning) == 2
    targets = (folder / "targets.csv").read_text().splitlines()
    assert targets[1].startswith(f"one,{lowest(on_tuning)}")
    assert not [r for r in rows if r["entrant"] == "learned" and r["seed"] in CONFIG.tuning]
    reported = [r for r in chosen if r["seed"] in CONFIG.reporting]
    assert {r["steps"] for r in reported} <= {40, 32, 27, 20, 13}
    assert {r["steps"] for r in rows if r["entrant"] in ("learned", "Adam") and r["task"] == "one"
            } == {40}  # fmt: skip


def test_every_run_is_in_the_report_and_a_divergence_is_a_miss(folder: Path) -> None:
    report = (folder / "report.md").read_text()
    assert re.search(r"# Benchmark of optimizers: small\n\n.* won: ", report)
    assert "profile" not in report  # of two tasks
    with open(folder / "tuning.csv", newline="") as file:
        chosen = [row for row in csv.DictReader(file) if row["chosen"] == "True"]
    ends = [json.loads(row["hyperparameters"])["lr"] in (0.0003162, 0.03162) for row in chosen]
    assert [row["at_edge"] == "True" for row in chosen] == ends
    assert f"In {sum(ends)} of 2 searches that one is at an end of the range" in report
    assert "| explodes | 0.50 [0.50, 0.50] | 0.00 [0.00, 0.00] | 4 of 4 |" in report
    page = (folder / "report.html").read_text()
    assert not re.search(r"\$[a-z_]+\b(?!\{)", re.sub(r"<svg.*?</svg>", "", page, flags=re.S))
    assert page.index(" won: ") < page.index("<table")
    assert all(name in page for name in ("AdamW warm-up cosine", "explodes", "learned"))


@pytest.mark.slow
def test_nothing_is_run_twice_and_what_was_cut_off_is_run_again(folder: Path, tmp_path) -> None:
    lines = (folder / "rows.jsonl").read_bytes()
    results = (folder / "results.csv").read_bytes()
    benchmark(CONFIG, folder)
    assert (folder / "rows.jsonl").read_bytes() == lines
    whole, last = lines.rstrip(b"\n").rsplit(b"\n", 1)
    (folder / "rows.jsonl").write_bytes(whole + b"\n" + last[: len(last) // 2])
    benchmark(CONFIG, folder)
    again = rows_of_damaged(folder)
    assert json.loads(last)["cell"] == again[-1]["cell"]
    assert again[-1]["validation_loss"] == json.loads(last)["validation_loss"]
    known = replace(CONFIG, done=[str(folder / "rows.jsonl")], entrants=CONFIG.entrants[:2])
    assert benchmark(known, tmp_path / "more")
    assert not (tmp_path / "more" / "rows.jsonl").exists()
    same = (tmp_path / "more" / "results.csv").read_text().splitlines()
    assert set(same) < set(results.decode().splitlines())
    with pytest.raises(ConfigError, match=r"done names 'nowhere\.jsonl'"):
        benchmark(replace(CONFIG, done=["nowhere.jsonl"]), tmp_path / "other")


def rows_of_damaged(folder: Path) -> list[dict]:
    rows = []
    for line in (folder / "rows.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def test_a_target_of_the_suite_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    fixed = replace(CONFIG.tasks[0], target=1e9, best_target=0.0, best_entrant="Adam")
    config = replace(CONFIG, tasks=[fixed], done=[str(folder / "rows.jsonl")])
    rows = benchmark(config, tmp_path)
    found = {row["entrant"]: row["speed_up"] for row in rows}
    assert (
        found["Adam"] == 40.0 and found["explodes"] == 0.0
    )  # the first evaluation is after 1 step
    assert found[ADAMW.name] == 3.0 and {row["best_speed_up"] for row in rows} == {0.0}


@pytest.mark.slow
def test_a_disturbed_run_beside_the_undisturbed_one(tmp_path: Path) -> None:
    base = {"kind": "regression", "data": "breast_cancer", "hidden": [8], "batch_size": 16}
    spoilt = TaskConfig(kind="continued", options={"base": base, "first_scale": 1e6})
    adam = Entrant("AdamW 1e-2", "torch.optim.AdamW", {"lr": 0.01})
    config = BenchmarkConfig(
        name="spoilt",
        protocol="going_on",
        tasks=[BenchmarkTask(spoilt, 60, "spoilt")],
        entrants=["learned", adam],
        reporting_seeds=2,
    )
    rows = benchmark(config, tmp_path)
    assert len(rows_of(tmp_path)) == 8  # each run with the disturbance and without
    for row in rows:
        assert row["end"] == pytest.approx(row["validation_loss"] / row["before"])
        assert row["worst"] >= row["end"] and 0 <= row["behind"] <= 60
    assert "<svg" in (tmp_path / "report.html").read_text()
    report = (tmp_path / "report.md").read_text()
    assert "learned kept its validation loss on " in report and "| spoilt | AdamW 1e-2 |" in report


@pytest.mark.parametrize("wrong, message", [
    ({"entrants": ["learned"]}, "compares with 'AdamW warm-up cosine', which is not in entrants"),
    ({"tasks": [BenchmarkTask(TaskConfig())]}, "have no validation split"),
    ({"protocol": "training"}, "need protocol: validation or going_on"),
    ({"protocol": "going_on"}, r"entrants \['AdamW warm-up cosine'\] have a search"),
])  # fmt: skip
def test_a_protocol_has_its_own_tasks_and_entrants(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **wrong)
    with pytest.raises(ConfigError, match="go together"):
        BenchmarkTask(TASK, best_target=1.0)


def test_rows_of_several_ranks_are_read_together(tmp_path: Path) -> None:
    cells = [ValidationCell(BenchmarkTask(TASK, 5, str(i)), ADAMW, {}, i) for i in range(2)]
    stores = [Rows(tmp_path / "rows.jsonl", rank) for rank in range(2)]
    for cell, store in zip(cells, stores, strict=True):
        store.keep(cell, cell.blank(validation_loss=cell.seed), True)
        store.keep(replace(cell, seed=9), cell.blank(error="it failed"), False)
    both = Rows(tmp_path / "rows.jsonl")
    for cell in cells:
        assert repr(both.load(cell)) == repr(cell.blank(validation_loss=cell.seed))  # NaN is NaN
    assert both.load(replace(cells[0], seed=9)) is None  # failed: it is run again
    assert to_csv([both.load(cells[0])]).startswith(b"task,entrant,seed,steps")
