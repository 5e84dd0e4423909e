"""The benchmark's protocol, on real runs of a few steps on the digits."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learned_opt import make_rule
from learned_opt.benchmarking import NAMED, BenchmarkConfig, BenchmarkTask, Entrant, benchmark
from learned_opt.benchmarking.cells import Cell, load
from learned_opt.benchmarking.entrants import FIELD, Group
from learned_opt.benchmarking.runner import Runner
from learned_opt.benchmarking.scores import read_results
from learned_opt.benchmarking.stores import Files
from learned_opt.benchmarking.tables import read_rows
from learned_opt.benchmarking.tune import half_decades, settings_of, tune
from learned_opt.errors import ConfigError, OutputError
from learned_opt.run import run_optimizer
from learned_opt.tasks.kinds import TaskConfig, make_task
from learned_opt.weights import save_rule

TASK = BenchmarkTask(TaskConfig(hidden=(8,), batch_size=32), steps=15)
ADAM = Entrant("Adam <tuned>", "torch.optim.Adam", search={"lr": [1e-3, 1e-1]})
SGD = Entrant("SGD", "torch.optim.SGD", {"lr": 0.1})
EXPLODES = Entrant("explodes", "torch.optim.SGD", {"lr": 1e30})
RAISES = Entrant("raises", "torch.optim.SparseAdam", {"lr": 0.1})  # of dense gradients
CONFIG = BenchmarkConfig(
    tasks=[TASK],
    entrants=[ADAM, SGD, EXPLODES, RAISES],
    reporting_seeds=2,
    tuning_seeds=2,
    settings=5,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """CONFIG, run once."""
    folder = tmp_path_factory.mktemp("benchmark")
    return folder, benchmark(CONFIG, folder)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory):
    with Runner(Files(tmp_path_factory.mktemp("cells"))) as runner:
        yield runner


def rows_of(results: list[dict], entrant: Entrant) -> list[dict]:
    return [row for row in results if row["entrant"] == entrant.name]


def search(config: BenchmarkConfig, runner: Runner) -> Any:
    """The tuning of `config`'s one tuned entrant on its one task."""
    (found,) = tune(config, runner.run, Cell).values()
    return found


def test_a_row_is_what_the_optimizer_did(done) -> None:
    _, results = done
    make = partial(torch.optim.SGD, lr=0.1)
    for row in rows_of(results, SGD):
        run = run_optimizer(make_task(TASK.task), make, row["seed"], TASK.steps)
        assert row["final_train_loss"] == run.evaluation["train_loss"]
        assert row["test_accuracy"] == run.evaluation["test_accuracy"]
        assert row["mean_loss"] == pytest.approx(run.losses.mean(), rel=1e-6)
        assert row["best_loss"] == pytest.approx(run.losses.min(), rel=1e-6)
        assert row["lr"] == 0.1 and not row["tuned"] and not row["diverged"]
        assert row["torch"] == torch.__version__.split()[0]


def test_the_tuned_learning_rate_is_that_of_brute_force(done) -> None:
    _, results = done

    def final_loss(lr: float) -> float:
        task, make = make_task(TASK.task), partial(torch.optim.Adam, lr=lr)
        runs = [run_optimizer(task, make, seed, TASK.steps) for seed in CONFIG.tuning]
        return float(np.mean([run.evaluation["train_loss"] for run in runs]))

    best = min(half_decades(1e-3, 1.0), key=final_loss)
    rows = rows_of(results, ADAM)
    assert {row["lr"] for row in rows} == {best}
    assert {row["hyperparameters"] for row in rows} == {json.dumps({"lr": best})}


@pytest.mark.parametrize(("condition", "steps"), [(1.0, 8), (100.0, 300)])
def test_tuned_sgd_has_the_theoretical_learning_rate(condition, steps, runner) -> None:
    """On a quadratic of curvatures from 1/κ to 1 the rate 2/(1 + 1/κ) contracts best in the end:
    the error in each direction falls by 1 − lr·λ a step, F by its square. A grid of half decades
    finds it to a factor of 10^¼ where it must not be exceeded by as much."""
    options = {"dim": 10, "condition": condition}
    task = BenchmarkTask(TaskConfig(kind="quadratic", options=options), steps)
    sgd = Entrant("SGD", "torch.optim.SGD", search={"lr": [1e-2, 1e2]})
    config = replace(CONFIG, tasks=[task], entrants=[sgd], tuning_seeds=1)
    found = search(config, runner)
    w, y = make_task(task.task).batch(0, 0)
    curvatures = torch.linalg.svdvals(w.double()).square()
    rates = torch.tensor(half_decades(1e-2, 1e2)).double()
    start = make_task(task.task).init(config.tuning[0]).double()
    optimum = torch.linalg.solve(w.double(), y.double())
    error = torch.linalg.svd(w.double()).Vh @ (start - optimum)
    factor = (1 - rates[:, None] * curvatures) ** steps
    losses = 0.5 * (curvatures * (factor * error).square()).sum(-1)
    assert dict(found.best)["lr"] == pytest.approx(float(rates[losses.argmin()]))
    best = 2 / (curvatures.max() + curvatures.min())
    assert abs(math.log10(dict(found.best)["lr"] / best)) <= 0.5 and not found.at_edge


def test_adam_under_another_name_has_the_same_curves(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "renamed.py").write_text("from torch.optim import Adam as Madam\n")
    monkeypatch.syspath_prepend(tmp_path)
    other = replace(ADAM, name="Madam", optimizer="renamed.Madam")
    cells = [Cell(TASK, e, {"lr": 0.01}, seed) for e in (ADAM, other) for seed in (0, 1)]
    with Runner(Files(tmp_path / "cells")) as runner:
        first, second, *others = (record["losses"] for record in runner.run(cells))
    assert np.array_equal([first, second], others) and not np.array_equal(first, second)


def test_a_second_run_recomputes_nothing(done) -> None:
    folder, results = done
    succeeded = [p for p in (folder / "cells").iterdir() if "_raises_" not in p.name]
    before = {path: path.stat().st_mtime_ns for path in succeeded}
    again = benchmark(CONFIG, folder)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert list(map(str, again)) == list(map(str, results))


def test_another_config_is_refused(done) -> None:
    changed = replace(CONFIG, tasks=[replace(TASK, steps=16)])
    with pytest.raises(OutputError, match=r"tasks\.0\.steps was 15, now it is 16"):
        benchmark(changed, done[0])


def test_results_of_another_version_are_kept_and_refused(tmp_path: Path) -> None:
    (tmp_path / "config-benchmark.yaml").write_text("tasks: []\nprocesses: 1\n")
    (tmp_path / "results.csv").write_text("task\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OutputError, match=r"another version .*\(format 1, this one writes 2\)"):
        benchmark(CONFIG, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_diverged_run_counts_as_infinite(done) -> None:
    rows = rows_of(done[1], EXPLODES)
    assert all(row["diverged"] and math.isinf(row["final_train_loss"]) for row in rows)
    assert all(math.isnan(row["test_accuracy"]) and not row["error"] for row in rows)


def test_a_run_that_raises_is_recorded_and_the_others_go_on(done) -> None:
    folder, results = done
    assert all("dense gradients" in row["error"] for row in rows_of(results, RAISES))
    assert not any(row["error"] for row in rows_of(results, SGD))
    facts = json.loads((folder / "benchmark.json").read_text())
    assert facts["failures"] == len(facts["failed"]) == 2
    for failure in facts["failed"]:
        assert failure["entrant"] == "raises" and failure["error"].startswith("Traceback (most")
        assert 'File "run.py"' in failure["error"] and str(Path.cwd()) not in failure["error"]


def test_the_tables_read_back_as_they_were_written(done) -> None:
    folder, results = done
    assert str(read_rows(folder / "results.csv")) == str(results)
    tried = read_rows(folder / "tuning.csv")
    assert sum(row["chosen"] for row in tried) == 1
    (chosen,) = (row for row in tried if row["chosen"])
    assert chosen["lr"] == rows_of(results, ADAM)[0]["lr"] and chosen["runs"] == 2
    with (folder / "results.csv").open(newline="") as file:
        assert {row["cell"] for row in csv.DictReader(file)} < {
            path.stem for path in (folder / "cells").iterdir()
        }


def test_what_was_done_is_said_without_folders(done, tmp_path: Path) -> None:
    facts = json.loads((done[0] / "benchmark.json").read_text())
    (task,) = facts["tasks"]
    assert (task["parameters"], task["tensors"]) == (64 * 8 + 8 + 8 * 10 + 10, 4)
    assert task["chance"] == pytest.approx(math.log(10)) and task["hidden"] == [8]
    assert facts["baseline"] == ADAM.name and facts["budget"]["settings"] == 5
    tried = len(read_rows(done[0] / "tuning.csv"))
    assert facts["tuning_runs"] == {ADAM.name: 2 * tried, "SGD": 0, "explodes": 0, "raises": 0}
    assert facts["cells"] == 2 * tried + 8
    save_rule(make_rule("geodesic_rnn", hidden=2), tmp_path / "w.safetensors")
    learned = Entrant("mine", "learned", weights=str(tmp_path / "w.safetensors"))
    config = replace(CONFIG, entrants=[learned, RAISES], data_root=str(tmp_path))
    benchmark(config, tmp_path / "out")
    text = (tmp_path / "out" / "benchmark.json").read_text()
    facts = json.loads(text)
    assert facts["failed"] and str(tmp_path) not in text
    assert facts["entrants"][0]["weights"] == "w.safetensors"


def test_the_grid_grows_while_the_best_is_at_its_edge(runner) -> None:
    low = replace(ADAM, search={"lr": [1e-5, 1e-4]})
    config = replace(CONFIG, entrants=[low], settings=3)
    capped = search(replace(config, max_grid_extensions=2), runner)
    assert capped.extensions == 2 and capped.at_edge
    assert capped.beyond("lr") and not capped.beyond("momentum")
    assert [dict(setting)["lr"] for setting in capped.tried] == half_decades(1e-5, 1e-3)
    found = search(replace(config, max_grid_extensions=12), runner)
    assert not found.at_edge
    assert found.best == search(replace(CONFIG, entrants=[ADAM]), runner).best


def test_of_several_hyperparameters_the_product_is_searched(runner) -> None:
    space = {"lr": [1e-2, 1e-1], "momentum": {"values": [0.0, 0.9]}}
    sgd = Entrant("SGD", "torch.optim.SGD", search=space)
    found = search(replace(CONFIG, entrants=[sgd], settings=6, max_grid_extensions=1), runner)
    assert len(found.scores) == 6 + found.extensions
    assert {dict(s)["momentum"] for s in found.scores} == {0.0, 0.9}
    part = settings_of(sgd, 4)
    assert (
        len(set(part)) == 4 and set(part) < set(settings_of(sgd, 6)) and part == settings_of(sgd, 4)
    )


def test_budgets_are_equal() -> None:
    assert {len(settings_of(e, 9)) for e in NAMED.values() if e.search and e not in FIELD} == {9}
    assert {len(settings_of(e, 5)) for e in FIELD if e.search} == {5}
    small = replace(ADAM, search={"lr": [1e-2, 1e-1]})
    with pytest.raises(ConfigError, match="'Adam <tuned>' has 3 settings to try, but all that"):
        benchmark(replace(CONFIG, entrants=[small, SGD]), "unused")
    assert not Path("unused").exists()


def test_the_grid_is_half_decades() -> None:
    assert half_decades(1e-2, 1.0) == [0.01, 0.03162, 0.1, 0.3162, 1.0]
    assert len(half_decades(1e-4, 1.0)) == 9


def test_cosine_ends_at_zero() -> None:
    entrant = Entrant("cosine", "torch.optim.SGD", {"lr": 0.1}, schedule="cosine")
    param = torch.ones(2, requires_grad=True)
    optimizer = entrant.make_optimizer([param], {}, TASK.steps)
    rates = []
    for _ in range(TASK.steps):
        rates.append(optimizer.param_groups[0]["lr"])
        param.grad = torch.ones(2)
        optimizer.step()
    assert rates[0] == 0.1 and rates[5] == pytest.approx(0.075)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", NAMED)
def test_entrants_known_by_name_learn(name: str) -> None:
    (entrant,) = BenchmarkConfig(entrants=[name]).entrants
    steps = 600 if name == "Prodigy" else 80  # it takes hundreds to find its rate
    task = make_task(TASK.task)
    rates = {"torch.optim.SGD": 0.1, "learned": 1.0}
    tuned = entrant.search or "lr" not in entrant.kwargs
    chosen = {"lr": rates.get(entrant.optimizer, 0.01)} if tuned else {}
    run = run_optimizer(task, lambda p: entrant.make_optimizer(p, chosen, steps), 0, steps)
    published = ("NAdamW", "Schedule-Free", "SOAP")  # one setting for runs of any length
    share = 0.95 if name in published else 0.8
    assert run.evaluation["train_loss"] < share * task.chance


def test_other_weights_are_another_cell(tmp_path: Path) -> None:
    names = set()
    for content in (b"one", b"two"):
        (tmp_path / "w.safetensors").write_bytes(content)
        entrant = Entrant("mine", "learned", weights=str(tmp_path / "w.safetensors"))
        names.add(Cell(TASK, entrant, {}, seed=0).name)
    assert len(names) == 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"reporting_seeds": [0, 1], "tuning_seeds": [1, 2]}, r"seeds \[1\] are both"),
        ({"reporting_seeds": 0}, "reporting_seeds"),
        ({"entrants": [ADAM, ADAM]}, "entrants"),
        ({"entrants": ["Adm"]}, "entrant 'Adm' is not known by name; use one of .*'AdamW'"),
        ({"tasks": []}, "tasks"),
        ({"settings": 0}, "settings=0"),
        ({"processes": 0}, "processes=0"),
        ({"time_limit": 0.0}, "time_limit=0.0"),
        ({"time_limit": 1e7}, "time_limit=10000000.0 .*at most 1e"),
        ({"data": {"digit": "mnist"}}, "no task reads 'digit'"),
        ({"data": {"digits": "mnist", "mnist": "digits"}}, "data has"),
    ],
)
def test_bad_settings_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        replace(CONFIG, **settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kwargs": {"lr": 0.1}, "search": {"lr": [0.1, 1]}}, r"\['lr'\] in kwargs and in search"),
        ({"search": {"lr": [1, 0.1]}}, r"search\.lr=\[1, 0\.1\]"),
        ({"search": {"lr": 0.1}}, r"search\.lr=0\.1"),
        ({"search": {"lr": {"values": []}}}, r"search\.lr="),
        ({"search": {"lr": [0.05, 1]}}, r"search\.lr=\[0\.05, 1\]; .*half decades"),
        ({"weights": "w.safetensors"}, "weights"),
    ],
)
def test_bad_entrants_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Entrant("a", "torch.optim.Adam", **settings)


@pytest.mark.parametrize(
    ("entrant", "says"),
    [
        (Entrant("a", "torch.optim.Adm"), r"torch\.optim\.Adm"),
        (Entrant("a", "torch.optim"), "'a' cannot be made"),
        (Entrant("a", "collections.Counter"), r"not a torch\.optim\.Optimizer"),
        (Entrant("a", "torch.optim.Adam", {"lrr": 0.1}), "'a' cannot be made: .*lrr"),
        (Entrant("a", "torch.optim.SGD", {"lr": -1.0}), "Invalid learning rate"),
        (Entrant("a", "torch.optim.Adam", search={"lrr": [0.1, 1]}), "'a' cannot be made: .*lrr"),
        (Entrant("a", "learned", weights="absent.safetensors"), "absent.safetensors"),
    ],
)
def test_a_wrong_entrant_is_refused_before_anything_is_run(
    entrant: Entrant, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        benchmark(replace(CONFIG, entrants=[SGD, entrant]), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["function", "Kind", "instance"])
@pytest.mark.parametrize("of_group", [False, True])
def test_nothing_is_called_before_it_is_known_to_be_an_optimizer(
    name: str, of_group: bool, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "effects.py").write_text(
        "from pathlib import Path\n"
        "def function(*args, **kwargs):\n"
        f"    Path({str(tmp_path / 'called')!r}).touch()\n"
        "class Kind:\n"
        "    __init__ = __call__ = function\n"
        "instance = object.__new__(Kind)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = f"effects.{name}"
    groups = (Group(("vector",), path),) if of_group else ()
    entrant = Entrant("a", "torch.optim.SGD" if of_group else path, groups=groups)
    output = tmp_path / "output"
    with pytest.raises(ConfigError, match=rf"'effects\.{name}', which is not a torch.optim"):
        benchmark(replace(CONFIG, entrants=[entrant]), output)
    assert not output.exists() and not (tmp_path / "called").exists()


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device='gpu' cannot be used"):
        benchmark(replace(CONFIG, device="gpu"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_data_is_replaced_where_there_is_some() -> None:
    quadratic = BenchmarkTask(TaskConfig(kind="quadratic"))
    tasks = replace(CONFIG, tasks=[TASK, quadratic], data={"digits": "mnist"}).tasks
    assert tasks[0].task.data == "mnist" and tasks[1] == quadratic


def test_pairs_of_numbers_are_tuned_too() -> None:
    space = {"betas": {"values": [[0.9, 0.999], [0.8, 0.99]]}}
    entrant = Entrant("a", "torch.optim.Adam", search=space)
    entrant.check()
    assert settings_of(entrant, 2) == [(("betas", (0.9, 0.999)),), (("betas", (0.8, 0.99)),)]


def test_a_damaged_cell_is_run_again(done) -> None:
    cell = Cell(TASK, SGD, {}, 0)
    path = done[0] / "cells" / f"{cell.name}.npz"
    content = path.read_bytes()
    assert load(cell, path.parent) is not None
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        load(cell, path.parent)  # whatever is left, None if nothing
    path.write_bytes(content[: len(content) // 2])
    assert load(cell, path.parent) is None
    path.write_bytes(content)


def test_results_with_a_damaged_cell_are_refused_by_its_name(done) -> None:
    path = done[0] / "cells" / f"{Cell(TASK, SGD, {}, 0).name}.npz"
    content = path.read_bytes()
    assert len(read_results(done[0]).losses) == len(done[1])
    for damaged in (b"", content[:200], content[:-200]):
        path.write_bytes(damaged)
        with pytest.raises(OutputError, match=f"{re.escape(path.name)} is damaged; delete it, and"):
            read_results(done[0])
    path.write_bytes(content)


def test_smoke_shrinks_the_default_benchmark() -> None:
    smoke = BenchmarkConfig().smoke()
    assert max(task.steps for task in smoke.tasks) <= 5
    assert not {*smoke.reporting} & {*smoke.tuning}
