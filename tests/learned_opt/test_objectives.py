"""Learning from the loss of the rule's own runs: gradients against autograd."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from learned_opt.config import RUN_OBJECTIVES, TrainConfig
from learned_opt.errors import ConfigError
from learned_opt.rules import UpdateRule, make_rule
from learned_opt.tasks.mlp import MLPTask
from learned_opt.training import objectives
from learned_opt.training.objectives.meta_loss import meta_loss, unrolled_loss
from learned_opt.training.objectives.runs import OpenRun
from tests.learned_opt.tiny import ALL, DoubleTask, gradient, tiny_task


def open_run(rule: UpdateRule, task: MLPTask) -> OpenRun:
    theta = task.init(0).double()
    return OpenRun(("test", 0), 100, theta, rule.init_state(theta, task.shapes))


@pytest.mark.parametrize("limit", [math.inf, 1.1])
def test_the_replayed_form_has_the_gradient_of_the_unrolled_loss(
    rule: UpdateRule, limit: float
) -> None:
    task = tiny_task()
    run = open_run(rule, task)
    meta_loss(rule, task, run, 3, ALL, 0.01)  # states are carried into the next window
    assert run.state.step == 3
    other = deepcopy(run)
    loss, raw = unrolled_loss(rule, task, other, 6, 0.01, limit)
    expected = gradient(loss, rule)
    linear, losses = meta_loss(rule, task, run, 6, ALL, 0.01, limit)
    torch.testing.assert_close(gradient(linear, rule), expected)
    assert run.state.step == other.state.step == 9 and expected.norm() > 0
    torch.testing.assert_close(run.theta, other.theta)
    torch.testing.assert_close(raw, losses)
    for mine, its in zip(
        (run.state.coordinate, run.state.tensor, *run.state.matrix),
        (other.state.coordinate, other.state.tensor, *other.state.matrix),
        strict=True,
    ):
        torch.testing.assert_close(mine, its)
        assert not any(value.requires_grad for value in its.values())


def test_clipped_losses_have_no_gradient() -> None:
    torch.manual_seed(0)
    rule, task = make_rule("geodesic_rnn", hidden=3).double(), tiny_task()
    for loss in (
        meta_loss(rule, task, open_run(rule, task), 4, ALL, 0.01, limit=0.1)[0],
        unrolled_loss(rule, task, open_run(rule, task), 4, 0.01, limit=0.1)[0],
    ):
        assert gradient(loss, rule).norm() == 0


def test_second_derivatives_against_finite_differences() -> None:
    torch.manual_seed(0)
    rule = make_rule("coordinatewise_lstm", hidden=3, output_scale=0.3).double()
    task, h = tiny_task(), 1e-6

    def loss(first_order: bool) -> Tensor:
        return unrolled_loss(rule, task, open_run(rule, task), 5, 1.0, first_order=first_order)[0]

    def relative_losses() -> Tensor:
        return unrolled_loss(rule, task, open_run(rule, task), 5, 1.0)[1]

    found, first = gradient(loss(False), rule), gradient(loss(True), rule)
    direction = torch.randn_like(found)
    start = nn.utils.parameters_to_vector(rule.parameters()).detach()
    ends = []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(start + sign * h * direction, rule.parameters())
        ends.append(relative_losses())
    nn.utils.vector_to_parameters(start, rule.parameters())
    slope = ((ends[0] - ends[1]) / (2 * h) / (relative_losses() + 1.0)).mean()
    torch.testing.assert_close(found @ direction, slope, rtol=1e-5, atol=1e-9)
    assert (first @ direction - slope).abs() > 1e-3 * slope.abs()


def test_second_derivatives_need_a_rule_that_has_them() -> None:
    config = TrainConfig(objectives=("backprop",), first_order=False)
    with pytest.raises(ConfigError, match=r"first_order is False.*coordinatewise_lstm"):
        objectives.OBJECTIVES["backprop"](config, make_rule("geodesic_rnn"))


class FullBatch(MLPTask):
    """Without minibatches a key decides nothing but which coordinates are learned from."""

    def batch(self, seed: int, step: int) -> tuple[Tensor, ...]:
        return self.fixed_batch()


@pytest.mark.parametrize("name", sorted(RUN_OBJECTIVES))
def test_every_window_begins_with_a_look_of_the_network(name: str) -> None:
    rule = make_rule("scheduled", base_config={"every": 10})
    config = TrainConfig(objectives=(name,), window=20, horizon=(60, 600))
    objectives.OBJECTIVES[name](config, rule)
    with pytest.raises(ConfigError, match=r"window is 15.*runs every 10 steps; use a multiple"):
        objectives.OBJECTIVES[name](replace(config, window=15), rule)


@pytest.mark.slow
def test_learning_from_some_coordinates_is_unbiased() -> None:
    torch.manual_seed(0)
    rule = make_rule("coordinatewise_lstm", hidden=3, output_scale=0.3).double()
    task = tiny_task(FullBatch)

    def estimate(key: int, coordinates: int) -> Tensor:
        run = replace(open_run(rule, task), key=("test", key))
        return gradient(meta_loss(rule, task, run, 3, coordinates, 0.01)[0], rule)

    full = estimate(0, ALL)
    mean = torch.stack([estimate(key, task.dim) for key in range(800)]).mean(0)  # half of them
    torch.testing.assert_close(estimate(1, ALL), full)
    assert (mean - full).norm() < 0.1 * full.norm()


class Breaks(DoubleTask):
    """The second task has data that are no numbers, from the third step on."""

    def batch(self, seed: int, step: int) -> tuple[Tensor, ...]:
        x, y = super().batch(seed, step)
        if step >= 2:
            x[1] = math.nan
        return x, y


@pytest.mark.parametrize("lost", [True, False])
@pytest.mark.parametrize("name", RUN_OBJECTIVES)
def test_a_lost_task_weighs_nothing(name: str, lost: bool, rule: UpdateRule) -> None:
    """One that was lost before a window, or in the midst of it."""
    task = tiny_task(Breaks)
    config = TrainConfig(objectives=(name,), coordinates=ALL, window=3)
    objective = objectives.OBJECTIVES[name](config, rule)
    run = objective.open(("test", 0), 100, task, rule)
    if lost:
        run.theta[1::2] = math.nan
    loss, losses = objective.window(rule, task, run, 4)
    found = gradient(loss, rule)
    assert losses[0].isfinite() and not losses[1].isfinite()
    assert loss.isfinite() and found.isfinite().all() and found.norm() > 0
    assert run.theta[0].isfinite().all() and not run.theta[1].isfinite().all()  # the run ends
