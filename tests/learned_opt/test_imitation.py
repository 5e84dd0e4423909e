"""Imitation: distances and paths in closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from geodesic.targets import target_paths
from learned_opt.config import TeacherConfig
from learned_opt.rules import Layout, Observation, State, UpdateRule
from learned_opt.tasks.base import seed_of
from learned_opt.tasks.mlp import MLPTask
from learned_opt.training.objectives.imitation import (
    AHEAD,
    HUBER,
    MIN_PROGRESS,
    PULL,
    imitation_loss,
    nearest,
    regression,
)
from learned_opt.training.objectives.replay import SampledReplay
from learned_opt.training.objectives.torch_imitation import torch_imitation_loss
from tests.learned_opt.tiny import ALL, DoubleTask, gradient, tiny_task


def paths(task: MLPTask, steps: int) -> Tensor:
    """Random walks from the inits, (2, steps + 1, d)."""
    rng = torch.Generator().manual_seed(1)
    walk = torch.randn(2, steps, task.dim, generator=rng, dtype=torch.float64).cumsum(1)
    theta = task.init(0).double()[:, None]
    return torch.cat([theta, theta + 0.02 * walk], dim=1)


def pseudo_huber(error: Tensor) -> Tensor:
    return HUBER**2 * ((1 + error.square() / HUBER**2).sqrt() - 1)


def cosine_form(u: Tensor, y: Tensor) -> Tensor:
    return 1 - u @ y / (u.norm() * y.norm()) + (u.norm() / y.norm()).log() ** 2


def test_forms_of_the_imitation_loss_by_hand() -> None:
    """Two tensors of 3 and 1 coordinates: |u − y|² = 16 and 0 in units of the scale; or a right
    angle and a size of e to 1, beside the same update twice as long."""
    layout, ones = Layout(((3,), (1,))), torch.ones(1, 2)

    class Known(SampledReplay):
        def __init__(self, squared_error: Tensor, moments: tuple[Tensor, ...]) -> None:
            self.squared_error, self.moments = lambda y: squared_error, lambda y: moments

    replay = Known(torch.tensor([[32.0, 0.0]]), ())
    found = regression(replay, [], 2 * ones, ones, layout, "huber")
    assert found.item() == pytest.approx((3 * 6 + 1 * 0) / 4)  # 9 (√(1 + 16/9) − 1) = 6
    u, product, y = [[math.e**2, 4.0]], [[0.0, 2.0]], [[1.0, 1.0]]
    replay = Known(ones, tuple(map(torch.tensor, (u, product, y))))
    found = regression(replay, [], ones, ones, layout, "cosine")
    assert found.item() == pytest.approx((3 * (1 + 1) + 1 * math.log(2) ** 2) / 4)


@pytest.mark.parametrize("form", ["huber", "cosine"])
def test_imitation_off_policy_is_regression_onto_the_path_s_steps(
    rule: UpdateRule, form: str
) -> None:
    task, key, lengths = tiny_task(), ("test", 1), torch.tensor([5, 3])
    points = paths(task, 5)
    state = rule.init_state(points[:, 0], task.shapes)
    hidden, losses, sizes = rule.hidden(state), [], []
    for t in range(5):
        _, grad = task.loss_and_grad(points[:, t], task.batch(seed_of(*key), t))
        with torch.no_grad():
            observation, state = rule.observe(grad, points[:, t], state)
        update, hidden = rule.respond(observation, hidden)
        step = points[:, t + 1] - points[:, t]
        for i in (lengths > t).nonzero().flatten():
            made, wanted = task.unflatten(update.view_as(step)[i]), task.unflatten(step[i])
            for u, target in zip(made, wanted, strict=True):
                u, target = u.flatten(), target.flatten()
                error = (u - target).norm() / target.norm()
                losses.append(pseudo_huber(error) if form == "huber" else cosine_form(u, target))
                sizes.append(u.numel())
    found = imitation_loss(rule, task, points, lengths, ALL, False, key, form)
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

    def respond(self, observation: Observation, hidden: Tensor, in_place: bool = False):
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


class Moments(UpdateRule):
    """Adam (β = .9, .999, ε = 1e-8), its learning rate the one meta-parameter."""

    name, hidden_per = "moments", "coordinate"
    config: ClassVar[dict] = {}

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = nn.Parameter(torch.tensor(lr, dtype=torch.float64))

    def init_state(self, params: Tensor, shapes: tuple) -> State:
        lead, d = params.shape[:-1], params.shape[-1]
        rows = {"moments": params.new_zeros(*lead, 2, d), "hidden": params.new_zeros(*lead, 0, d)}
        return State(Layout(tuple(shapes)), 0, rows, {})

    def observe(self, grads: Tensor, params: Tensor, state: State, in_place: bool = False):
        step, (m, v) = state.step + 1, state.coordinate["moments"].unbind(-2)
        m, v = 0.9 * m + 0.1 * grads, 0.999 * v + 0.001 * grads**2
        direction = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        rows = state.coordinate | {"moments": torch.stack([m, v], -2)}
        none = grads.new_zeros(*grads.shape[:-1], 0, len(state.layout.shapes))
        observation = Observation(direction.unsqueeze(-2), none, state.layout)
        return observation, replace(state, step=step, coordinate=rows)

    def respond(self, observation: Observation, hidden: Tensor, in_place: bool = False):
        return -self.lr * observation.coordinate[..., 0, :], hidden


@pytest.mark.parametrize("form", ["huber", "cosine"])
@pytest.mark.parametrize("student_drives", [False, True])
def test_imitating_adam_costs_nothing_if_the_rule_is_adam(form: str, student_drives: bool) -> None:
    task, teacher = tiny_task(DoubleTask), TeacherConfig("Adam", lr=0.01, length=8)

    def loss(rule: UpdateRule) -> Tensor:
        return torch_imitation_loss(rule, task, teacher, ALL, student_drives, ("test",), form)

    assert loss(Moments(0.01)).item() == pytest.approx(0, abs=1e-9)
    if not student_drives:  # twice its steps: e = 1 everywhere
        expected = pseudo_huber(torch.tensor(1.0)) if form == "huber" else math.log(2) ** 2
        assert loss(Moments(0.02)).item() == pytest.approx(float(expected), rel=1e-5)
    rule = Moments(0.03)
    optimizer = torch.optim.Adam(rule.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss(rule).backward()
        optimizer.step()
    assert rule.lr.item() == pytest.approx(0.01, rel=0.2)


class Slope(DoubleTask):
    """F = Σ θ: k steps of SGD are one with k times the learning rate."""

    def loss(self, theta: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        return theta.sum(-1)


@pytest.mark.parametrize("student_drives", [False, True])
def test_a_teacher_makes_k_steps_for_one_of_the_rule(student_drives: bool) -> None:
    task = tiny_task(Slope)
    teacher = TeacherConfig("SGD", lr=0.1, steps=3, length=4)
    for speed, expected in ((1.0, 0.0), (1.5, pseudo_huber(torch.tensor(0.5).double()).item())):
        rule = Constant(torch.full((2, task.dim), -0.3 * speed, dtype=torch.float64))
        loss = torch_imitation_loss(rule, task, teacher, ALL, student_drives, ("test",))
        assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_a_task_on_which_the_teacher_diverges_weighs_nothing(rule: UpdateRule) -> None:
    class Lost(DoubleTask):
        def init(self, seed: int) -> Tensor:
            theta = super().init(seed)
            theta[1] = math.nan
            return theta

    for student_drives in (False, True):
        args = (TeacherConfig(length=3), ALL, student_drives, ("test",))
        found = torch_imitation_loss(rule, tiny_task(Lost), *args)
        assert gradient(found, rule).isfinite().all() and found.isfinite() and found > 0
