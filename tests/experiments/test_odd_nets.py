"""odd_nets.py, shrunk: its draws, its rows and the counts of its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.optimizer import odd_nets as study
from learned_opt import LearnedOptimizer


def test_a_seed_draws_one_problem_and_seeds_draw_them_all() -> None:
    first, again = study.make_problem(3), study.make_problem(3)
    assert first.facts == again.facts and torch.equal(first.value(), again.value())
    assert all(torch.equal(a, b) for a, b in zip(first.batches, again.batches, strict=True))
    drawn = [study.make_problem(seed, steps=1) for seed in range(study.SEEDS)]
    assert {problem.loss for problem in drawn} == set(study.LOSSES)
    assert all(0 < problem.value().item() < float("inf") for problem in drawn)


def test_rows_are_what_the_optimizer_did(tmp_path: Path) -> None:
    row, problem = study.run(5, "learned", steps=3), study.make_problem(5, steps=3)
    optimizer, losses = LearnedOptimizer(problem.model.parameters()), [problem.value().item()]
    for batch in problem.batches:
        optimizer.zero_grad()
        problem.value(batch).backward()
        optimizer.step()
        losses.append(problem.value().item())
    ends = losses[0], max(losses), losses[-1]
    assert (row["start"], row["largest"], row["final"]) == pytest.approx(ends, rel=1e-6)

    ends = [("learned", 11.0, 0.5), ("learned", float("inf"), 12.0)]
    ends += [("Adam 1e-3", 10.0, 1.0), ("Adam 1e-3", 1.0, 0.1)]
    rows = [row | {"optimizer": o, "start": 1.0, "largest": m, "final": f} for o, m, f in ends]
    study.save(tmp_path, "runs", rows, seeds=[5])
    learned, adam = study.table(tmp_path).splitlines()[2:]
    assert learned.startswith("| learned | 2 | 1 | 2 | 1 | inf |") and learned.endswith("| 1 |")
    assert adam.startswith("| Adam 1e-3 | 2 | 0 | 0 | 0 | 10 |") and adam.endswith("| 1 |")
    assert {"versions", "cpu", "commit", "seeds"} <= json.loads(
        (tmp_path / "runs.json").read_text()
    ).keys()
