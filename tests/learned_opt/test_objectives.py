"""What a rule is trained on: gradients against autograd, distances and paths in closed form."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from geodesic.targets import target_paths
from learned_opt.rules import Layout, Observation, State, UpdateRule, make_rule
from learned_opt.tasks.base import seed_of
from learned_opt.tasks.data import ImageData
from learned_opt.tasks.mlp import MLPTask, TaskConfig
from learned_opt.training.imitation import (
    AHEAD,
    HUBER,
    MIN_PROGRESS,
    PULL,
    imitation_loss,
    nearest,
)
from learned_opt.training.meta_loss import meta_loss
from learned_opt.training.runs import OpenRun

ALL = 10**6  # coordinates to learn from: more than there are


def tiny_task(kind: type[MLPTask] = MLPTask) -> MLPTask:
    """Two networks of 4 inputs and 3 classes, in float64."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=rng, dtype=torch.float64)
    y = torch.randint(3, (60,), generator=rng)
    data = ImageData("tiny", x[:40], y[:40], x[40:], y[40:], 3, (4,))
    return kind(TaskConfig(hidden=(5,), activation="tanh", batch_size=8), data, num_tasks=2)


def open_run(rule: UpdateRule, task: MLPTask) -> OpenRun:
    theta = task.init(0).double()
    return OpenRun(("test", 0), 100, theta, rule.init_state(theta, task.shapes))


def unrolled_loss(
    rule: UpdateRule, task: MLPTask, run: OpenRun, steps: int, floor: float
) -> Tensor:
    """Σ_t F(θ_t) with a graph through θ_{t+1} = θ_t + u_t; what the rule sees is detached."""
    every = torch.arange(run.theta.numel())
    theta, state, hidden = run.theta, run.state, rule.pick_hidden(run.state, every)
    losses = []
    for step in range(steps + 1):
        batch = task.batch(seed_of(*run.key), state.step)
        losses.append(task.loss(theta, batch))
        if step < steps:
            _, grad = task.loss_and_grad(theta, batch)
            with torch.no_grad():
                observation, state = rule.observe(grad, theta, state)
            update, hidden = rule.respond(observation.pick(every), hidden)
            theta = theta + update.view_as(theta)
    mean = torch.stack(losses[1:]).mean(0)
    return (mean / (mean.detach() + floor)).mean()


def gradient(loss: Tensor, rule: UpdateRule) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(rule.parameters()))])


def test_the_linear_form_has_the_gradient_of_the_unrolled_loss(rule: UpdateRule) -> None:
    task = tiny_task()
    run = open_run(rule, task)
    meta_loss(rule, task, run, 3, ALL, 0.01)  # states are carried into the next window
    assert run.state.step == 3
    expected = gradient(unrolled_loss(rule, task, deepcopy(run), 6, 0.01), rule)
    linear, losses = meta_loss(rule, task, run, 6, ALL, 0.01)
    torch.testing.assert_close(gradient(linear, rule), expected)
    assert run.state.step == 9 and losses.shape == (2,) and expected.norm() > 0


class FullBatch(MLPTask):
    """Without minibatches a key decides nothing but which coordinates are learned from."""

    def batch(self, seed: int, step: int) -> tuple[Tensor, ...]:
        return self.fixed_batch()


def test_learning_from_some_coordinates_is_unbiased() -> None:
    torch.manual_seed(0)
    rule = make_rule("geodesic_rnn", hidden=3, per="coordinate").double()
    task = tiny_task(FullBatch)

    def estimate(key: int, coordinates: int) -> Tensor:
        run = replace(open_run(rule, task), key=("test", key))
        return gradient(meta_loss(rule, task, run, 3, coordinates, 0.01)[0], rule)

    full = estimate(0, ALL)
    mean = torch.stack([estimate(key, task.dim) for key in range(200)]).mean(0)  # half of them
    torch.testing.assert_close(estimate(1, ALL), full)
    assert (mean - full).norm() < 0.1 * full.norm()


def test_a_lost_task_does_not_spoil_the_gradient(rule: UpdateRule) -> None:
    task = tiny_task()
    run = open_run(rule, task)
    run.theta[1] = float("nan")
    linear, losses = meta_loss(rule, task, run, 3, ALL, 0.01)
    found = gradient(linear, rule)
    assert losses[0].isfinite() and not losses[1].isfinite()
    assert found.isfinite().all() and found.norm() > 0


def paths(task: MLPTask, steps: int) -> Tensor:
    """Random walks from the inits, (2, steps + 1, d)."""
    rng = torch.Generator().manual_seed(1)
    walk = torch.randn(2, steps, task.dim, generator=rng, dtype=torch.float64).cumsum(1)
    theta = task.init(0).double()[:, None]
    return torch.cat([theta, theta + 0.02 * walk], dim=1)


def pseudo_huber(error: Tensor) -> Tensor:
    return HUBER**2 * ((1 + error.square() / HUBER**2).sqrt() - 1)


def test_imitation_off_policy_is_regression_onto_the_path_s_steps(rule: UpdateRule) -> None:
    task, key, lengths = tiny_task(), ("test", 1), torch.tensor([5, 3])
    points = paths(task, 5)
    every, state = torch.arange(points[:, 0].numel()), rule.init_state(points[:, 0], task.shapes)
    hidden, losses, sizes = rule.pick_hidden(state, every), [], []
    for t in range(5):
        _, grad = task.loss_and_grad(points[:, t], task.batch(seed_of(*key), t))
        with torch.no_grad():
            observation, state = rule.observe(grad, points[:, t], state)
        update, hidden = rule.respond(observation.pick(every), hidden)
        step = points[:, t + 1] - points[:, t]
        for i in (lengths > t).nonzero().flatten():
            made, wanted = task.unflatten(update.view_as(step)[i]), task.unflatten(step[i])
            for u, target in zip(made, wanted, strict=True):
                losses.append(pseudo_huber((u - target).norm() / target.norm()))
                sizes.append(u.numel())
    found = imitation_loss(rule, task, points, lengths, ALL, False, key)
    expected = sum(n * loss for n, loss in zip(sizes, losses, strict=True)) / sum(sizes)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, rule), gradient(expected, rule))


class Constant(UpdateRule):
    """Always makes the same update, and learns how much of it."""

    name, hidden_per = "constant", "tensor"
    config: ClassVar[dict] = {}

    def __init__(self, updates: Tensor) -> None:
        super().__init__()
        self.updates, self.scale = updates, nn.Parameter(torch.ones((), dtype=updates.dtype))

    def init_state(self, params: Tensor, shapes: tuple) -> State:
        hidden = params.new_zeros(len(params), 0, len(shapes))
        return State(Layout(tuple(shapes)), 0, {}, {"hidden": hidden})

    def observe(self, grads: Tensor, params: Tensor, state: State, in_place: bool = False):
        none = grads.new_zeros(len(grads), 0, len(state.layout.shapes))
        observation = Observation(self.updates[:, None], none, state.layout)
        return observation, replace(state, step=state.step + 1)

    def respond(self, observation: Observation, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale * observation.coordinate[..., 0, :], hidden


def test_imitation_on_policy_has_its_closed_form_on_a_straight_path() -> None:
    """A student that is s times as fast as the path is wrong by s − 1; one that drifts off by w a
    step is told to take back PULL of the way as well: at step t it is wrong by w (1 + PULL t)."""
    task, steps = tiny_task(), 6
    sizes = (0.1, 0.2, 0.3, 0.4)  # of the path's step in each tensor
    step = torch.cat(
        [torch.full(s, v).double().flatten() for s, v in zip(task.shapes, sizes, strict=True)]
    )
    step = step.expand(2, -1)
    start = task.init(0).double()
    points = start[:, None] + torch.arange(steps + 1.0)[:, None] * step[:, None]
    lengths = torch.tensor([steps, steps])

    def loss(updates: Tensor) -> float:
        return imitation_loss(Constant(updates), task, points, lengths, ALL, True, ("test",)).item()

    assert loss(step) == pytest.approx(0, abs=1e-12)
    for speed in (1.5, 2.0):
        expected = pseudo_huber(torch.tensor(speed - 1, dtype=torch.float64)).item()
        assert loss(speed * step) == pytest.approx(expected)
    aside = step * torch.where(torch.arange(task.dim) % 2 == 0, 0.5, -0.5)
    aside -= step * (aside * step).sum(-1, keepdim=True) / step.square().sum(-1, keepdim=True)
    drifts = [
        w.norm() / v.norm()
        for w, v in zip(task.unflatten(aside[0]), task.unflatten(step[0]), strict=True)
    ]
    wrong = torch.stack(drifts) * (1 + PULL * torch.arange(steps))[:, None]
    weights = torch.tensor([math.prod(s) for s in task.shapes]) / task.dim
    expected = (pseudo_huber(wrong) * weights).sum(-1).mean()
    assert loss(step + aside) == pytest.approx(expected.item())


def test_nearest_on_a_straight_path() -> None:
    direction, aside = torch.tensor([3.0, 4.0]), torch.tensor([-0.8, 0.6])
    points = (torch.arange(11.0)[:, None] * direction)[None]

    def found(along: float, progress: float) -> float:
        theta = along * direction + 0.3 * aside
        return nearest(theta[None], points, torch.tensor([progress])).item()

    assert found(2.3, 1.0) == pytest.approx(2.3)
    assert found(1.5, 3.0) == pytest.approx(3.0 + MIN_PROGRESS)  # never back
    assert found(9.0, 1.0) == pytest.approx(1.0 + AHEAD)  # no further than it looks
    assert found(12.0, 8.0) == pytest.approx(10.0)  # the end of the path


def test_target_paths_join_up_in_equal_steps_until_one_is_not_certified() -> None:
    straight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [4.0, 0.0]])  # uneven beads
    corner = torch.tensor([[4.0, 0.0], [4.0, 2.0], [5.0, 2.0]])
    beads = [straight, corner, straight, corner, straight]
    sizes = torch.tensor([0] + [len(b) for b in beads])
    shard = {
        "beads": torch.cat(beads),
        "bead_offsets": sizes.cumsum(0),
        "run": torch.tensor([0, 0, 1, 1, 1]),
        "certified": torch.tensor([True, True, True, False, True]),
    }
    points, lengths = target_paths(shard, updates=3, runs=3)
    assert lengths.tolist() == [6, 3, 0]
    first = [[0, 0], [4 / 3, 0], [8 / 3, 0], [4, 0]]
    second = [[4, 1], [4, 2], [5, 2]]
    torch.testing.assert_close(points[0], torch.tensor(first + second))
    torch.testing.assert_close(points[1], torch.tensor(first + [[4, 0]] * 3))
    assert points.shape == (3, 7, 2) and (points[2] == 0).all()
