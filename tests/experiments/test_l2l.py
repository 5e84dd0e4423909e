"""l2l.py, shrunk: baselines known in closed form, rows, table and picture."""

from __future__ import annotations

import csv
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.training import l2l as study
from learned_opt.errors import ConfigError
from learned_opt.rules import make_rule
from learned_opt.tasks.families import FamilyConfig, sample_tasks
from learned_opt.tasks.kinds import TaskConfig
from learned_opt.weights import save_rule


def quadratics(key: str, count: int, runs: int):
    return study.draws(study.PROBLEMS[key].train_config("L2L"), "report", count, runs)


def test_many_tasks_together_take_the_steps_that_each_would_alone() -> None:
    """Nesterov's as torch has it: b ← μb + g, θ ← θ − lr (g + μb), with g = 2Wᵀ(Wθ − y)."""
    (task,) = quadratics("normal", 1, 3)
    make = partial(torch.optim.SGD, lr=0.003, momentum=0.9, nesterov=True)
    found = study.with_optimizer(task, make, 5, (1, 4))
    (w, y), theta = task.batch(5, 0), task.init(5)
    b, errors = torch.zeros_like(theta), []
    for _ in range(4):
        residual = (w @ theta.unsqueeze(-1)).squeeze(-1) - y
        errors.append(float(residual.square().sum(-1).mean()))
        g = 2 * (w.mT @ residual.unsqueeze(-1)).squeeze(-1)
        b = 0.9 * b + g
        theta = theta - 0.003 * (g + 0.9 * b)
    np.testing.assert_allclose(found.losses, errors, rtol=1e-5)
    last = ((w @ theta.unsqueeze(-1)).squeeze(-1) - y).square().sum(-1).mean()
    np.testing.assert_allclose(found.errors, [errors[1], last], rtol=1e-5)


def test_nets_together_keep_their_tensors_and_minibatches() -> None:
    family = FamilyConfig(num_tasks=3, task=TaskConfig(hidden=(4,), batch_size=16, init="normal"))
    task = sample_tasks(family, ("report", 0))
    together, theta, batch = study.Together(task), task.init(1), task.batch(1, 2)
    joined = together.init(1)
    assert joined.shape == (3 * task.dim,)
    torch.testing.assert_close(together.loss(joined, batch), task.loss(theta, batch).sum())
    tensors = together.unflatten(joined)
    torch.testing.assert_close(together.loss(tensors, together.batch(1, 2)),
                               task.loss(theta, batch).sum())  # fmt: skip
    expected = task.evaluate(theta)["test_loss"].mean()
    torch.testing.assert_close(together.evaluate(joined)["test_loss"], expected)


def test_adam_at_its_default_rate_gives_the_printed_error() -> None:
    """Nearly: there W and y are one draw, and Adam keeps its averages from run to run."""
    make = partial(torch.optim.Adam, lr=1e-3)
    tasks = quadratics("uniform", 3, 128)
    errors = [study.with_optimizer(task, make, i, (100,)).errors for i, task in enumerate(tasks)]
    printed = study.PROBLEMS["uniform"].printed[study.DEFAULT]
    assert np.log10(np.mean(errors)) == pytest.approx(printed, abs=0.06)


def test_learning_rates_are_tuned_within_the_grid_or_refused(monkeypatch) -> None:
    tasks = quadratics("uniform", 1, 8)
    assert study.tune(tasks, torch.optim.SGD) in (0.01, 0.03162)  # 2 / λ_max(2WᵀW) is about .04
    monkeypatch.setattr(study, "GRID", [1e-4, 1e-3])
    with pytest.raises(ConfigError, match=r"0\.001, which is at its edge"):
        study.tune(tasks, torch.optim.SGD)


def test_each_rule_is_trained_with_its_preset_on_its_task() -> None:
    configs = {rule: study.PROBLEMS[key].train_config(n) for rule, (key, n) in study.RULES.items()}
    presets = {rule: config.rule_config["preset"] for rule, config in configs.items()}
    assert presets == {
        "uniform-quadratic": "quadratic", "normal-quadratic": "quadratic",
        "mnist-deepmind-code": "deepmind-code", "mnist-paper": "paper",
    }  # fmt: skip
    assert configs["normal-quadratic"].family.task.own.entries == "normal"
    assert all(c.window == 20 and set(c.horizon) == {100} for c in configs.values())


@pytest.mark.slow
def test_rows_table_and_picture(monkeypatch, tmp_path: Path) -> None:
    problems = {"uniform": replace(study.PROBLEMS["uniform"], runs=4)}
    monkeypatch.setattr(study, "PROBLEMS", problems)
    monkeypatch.setattr(study, "RULES", {"uniform-quadratic": ("uniform", "L2L")})
    rule = make_rule("coordinatewise_lstm", preset="quadratic", output_scale=1e-3)
    save_rule(rule, tmp_path / "uniform-quadratic" / "weights.safetensors")
    study.run(tmp_path, tmp_path, count=2)
    with (tmp_path / "l2l.csv").open() as file:
        rows = list(csv.DictReader(file))
    optimizers = ["L2L", study.DEFAULT, *study.OPTIMIZERS]
    assert [row["optimizer"] for row in rows[::2]] == optimizers
    (row,) = (r for r in rows if r["optimizer"] == "L2L" and r["draw"] == "1")
    task = quadratics("uniform", 2, 4)[1]
    assert float(row["error_200"]) == study.with_rule(task, rule, 1).errors[1]
    tuned = [float(row["error_100"]) for row in rows if row["optimizer"] == "Adam"]
    assert max(tuned) < min(float(r["error_100"]) for r in rows if r["optimizer"] == study.DEFAULT)
    lines = study.table(tmp_path).splitlines()
    assert len(lines) == 2 + len(optimizers) and "| **L2L** |" in lines[2] and "-0.70" in lines[2]
    study.plot(tmp_path, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0
