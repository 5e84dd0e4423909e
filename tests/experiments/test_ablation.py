"""ablation.py: arms on equal terms, and intervals that include training seeds."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.training import ablation
from experiments.training.generalization import largest_rise
from learned_opt.benchmarking.stats import iqm
from learned_opt.tasks.kinds import TaskConfig, make_task


def test_arms_differ_in_what_they_are_about_and_in_nothing_else():
    configs = {name: ablation.config_of(name, 0, Path("work")) for name in ablation.ARMS}
    geodesic, chord = configs["geodesic_meta"], configs["chord_meta"]
    assert geodesic.geodesics.targets.level == "sgd_profile"
    assert (
        replace(
            geodesic,
            updates=chord.updates,
            dataset=chord.dataset,
            geodesics=replace(
                geodesic.geodesics, targets=replace(geodesic.geodesics.targets, path="chord")
            ),
        )
        == chord
    )
    assert all(ablation.inner_steps(c) >= 20 * c.updates for c in configs.values())
    same = {name: c for name, c in configs.items() if c.rule == "geodesic_rnn"}
    assert len({repr(c.family) for c in same.values()}) == 1
    assert len({c.learning_rate for c in configs.values()}) == 1
    assert {c.dataset for c in configs.values() if "imitation" in c.objectives} == {
        str(Path("work") / f"paths-{path}") for path in ("chord", "geodesic", "trajectory")
    }


def test_an_interval_spans_training_seeds_that_differ():
    rng = np.random.default_rng(0)
    runs = 1 + 0.01 * rng.standard_normal((3, 4, 5))
    value, low, high = numbers(ablation.interval(iqm, runs))
    assert value == pytest.approx(float(iqm(runs.swapaxes(0, 1).reshape(4, -1))), abs=0.005)
    assert high - low < 0.03
    apart = runs + np.array([0.0, 1.0, 2.0])[:, None, None]
    value, low, high = numbers(ablation.interval(iqm, apart))
    assert value == pytest.approx(2, abs=0.02) and low < 1.4 and high > 2.6


def test_the_yardstick_is_torchs_adam():
    task = make_task(TaskConfig(kind="quadratic", options={"dim": 5}))
    theta = task.init(0)
    p = theta.clone().requires_grad_()
    adam, rule = torch.optim.Adam([p], lr=0.05), ablation.Adam(0.05)
    state = rule.init_state(theta, task.shapes)
    for step in range(5):
        _, grad = task.loss_and_grad(theta, task.batch(0, step))
        update, state = rule.update(grad, theta, state)
        theta = theta + update
        _, p.grad = task.loss_and_grad(p.detach(), task.batch(0, step))
        adam.step()
    assert torch.allclose(theta, p.detach())


def test_a_rise_is_above_the_lowest_loss_so_far():
    losses = torch.tensor([[0.999, 0.999], [0.099, 1.999], [0.199, 0.499], [0.099, 0.749]])
    rises = largest_rise(losses)
    assert rises.tolist() == pytest.approx([2.0, 2.0])  # not 0.749 above 0.499, a factor of 1.5


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"[\d.]+", text)]
