"""Evolution strategies on weights and on steps: finite differences, and particle by particle."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from learned_opt.cli import parse
from learned_opt.config import PESConfig, StepSizeConfig, TrainConfig
from learned_opt.errors import ConfigError
from learned_opt.rules import Layout, Observation, State, TensorGains, UpdateRule, make_rule
from learned_opt.tasks.base import Batch, Task, generator, seed_of
from learned_opt.training.objectives.meta_loss import MetaLoss
from learned_opt.training.objectives.pes import PES, differences, perturbed, pes_gradient, roll_out
from learned_opt.training.objectives.runs import pack, unpack
from learned_opt.training.objectives.step_size import StepSize, reunite, step_size_gradient
from tests.learned_opt.tiny import ALL, DoubleTask, gradient, tiny_task

HORIZON, WINDOW, FLOOR = 12, 3, 0.1


class Quadratic(Task):
    """F(θ) = ½ Σ a θ², a = (.2, 1, 3), from (1, −1, .5)."""

    name, shapes, num_tasks, chance = "quadratic", ((3,),), 1, 10.0
    curvature = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)

    def init(self, seed: int) -> Tensor:
        return torch.tensor([[1.0, -1.0, 0.5]], dtype=torch.float64)

    def batch(self, seed: int, step: int) -> Batch:
        return ()

    def loss(self, theta: Tensor, batch: Batch) -> Tensor:
        return (self.curvature * theta.square()).sum(-1) / 2

    fixed_batch = evaluate = batch


class Momentum(UpdateRule):
    """u = −w₁ m, m ← (1 − w₂) m + g: what it does now, it does through m for long."""

    name, hidden_per = "momentum", "coordinate"
    config: ClassVar[dict] = {}

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.15, 0.4], dtype=torch.float64))

    def init_state(self, params: Tensor, shapes: tuple) -> State:
        hidden = params.new_zeros(*params.shape[:-1], 1, params.shape[-1])
        return State(Layout(tuple(shapes)), 0, {"hidden": hidden}, {})

    def observe(self, grads: Tensor, params: Tensor, state: State, in_place: bool = False):
        none = grads.new_zeros(*grads.shape[:-1], 0, len(state.layout.shapes))
        observation = Observation(grads.unsqueeze(-2), none, state.layout)
        return observation, replace(state, step=state.step + 1)

    def respond(self, observation: Observation, hidden: Tensor, in_place: bool = False):
        new = (1 - self.w[1]) * hidden + observation.coordinate
        return -self.w[0] * new.squeeze(-2), hidden.copy_(new) if in_place else new


def whole_run(rule: UpdateRule, w: Tensor) -> Tensor:
    """The losses of a run with weights w, (HORIZON,)."""
    task, state = Quadratic(), rule.init_state(Quadratic().init(0), Quadratic.shapes)
    theta, losses = task.init(0), []
    with torch.no_grad():
        rule.w.copy_(w)
        for _ in range(HORIZON):
            update, state = rule.update(task.loss_and_grad(theta, ())[1], theta, state)
            theta = theta + update
            losses.append(task.loss(theta, ()))
    return torch.cat(losses)


def windows(losses: Tensor) -> Tensor:
    """Σ over windows of log(mean loss + FLOOR)."""
    return (losses.view(-1, WINDOW).mean(-1) + FLOOR).log().sum()


def whole_gradient(
    rule: UpdateRule, objective: Callable[[Tensor], Tensor] = windows, h: float = 1e-5
) -> Tensor:
    """Of `objective` of a run's losses in the rule's w, (2,), by finite differences."""
    w, eye = rule.w.detach().clone(), torch.eye(2, dtype=torch.float64)
    found = [
        float(objective(whole_run(rule, w + h * e)) - objective(whole_run(rule, w - h * e)))
        for e in eye
    ]
    with torch.no_grad():
        rule.w.copy_(w)
    return torch.tensor(found, dtype=torch.float64) / (2 * h)


def estimates(persistent: bool, sigma: float = 0.01, runs: int = 60, pairs: int = 40) -> Tensor:
    """ĝ summed over the windows of each of many runs, (runs, 2)."""
    rule, task = Momentum(), Quadratic()
    config = TrainConfig(objectives=("pes",), pes=PESConfig(sigma, pairs))
    found = []
    for key in range(runs):
        run, total = PES(config, rule).open(("test", key), HORIZON, task, rule), 0
        while run.state.step < HORIZON:
            if not persistent:
                run.xi = torch.zeros_like(run.xi)
            total = total + pes_gradient(rule, task, run, WINDOW, sigma, FLOOR)[0]
        found.append(total)
    return torch.stack(found)


def test_the_estimate_is_the_gradient_of_the_whole_run() -> None:
    expected = whole_gradient(Momentum())
    found = estimates(persistent=True)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - expected).abs() < 4 * error).all()
    assert error.norm() < 0.1 * expected.norm()
    short = estimates(persistent=False)  # what windows alone would say
    assert (short.mean(0) - expected).norm() > 10 * short.std(0).norm() / len(short) ** 0.5


def test_whole_runs_are_judged_by_their_ends() -> None:
    """The gradient of log(mean loss of the last quarter + FLOOR), by finite differences."""
    rule, task, judged = Momentum(), Quadratic(), 0.25

    def end(losses: Tensor) -> Tensor:
        return (losses[-math.ceil(judged * HORIZON) :].mean() + FLOOR).log()

    expected = whole_gradient(rule, end)
    config = TrainConfig(objectives=("pes",), pes=PESConfig(0.01, 40), window=None)
    found = []
    for key in range(60):
        run = PES(config, rule).open(("test", key), HORIZON, task, rule)
        found.append(pes_gradient(rule, task, run, HORIZON, 0.01, FLOOR, judged=judged)[0].double())
    found = torch.stack(found)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - expected).abs() < 4 * error).all()
    assert error.norm() < 0.2 * expected.norm()


def test_a_share_of_the_runs_is_told_its_length() -> None:
    rule, task = make_rule("geodesic_rnn", hidden=3, horizon=True).double(), Quadratic()
    for share in (0.0, 0.5, 1.0):
        config = TrainConfig(objectives=("pes", "meta_loss"), window=3, known_length=share)
        for objective in (PES(config, rule), MetaLoss(config, rule)):
            runs = [objective.open(("test", key), 9, task, rule) for key in range(40)]
            told = [run.state.num_steps == 9 for run in runs]
            assert abs(sum(told) / 40 - share) < 0.3 and (0 < sum(told) < 40) == (share == 0.5)
            again = [unpack(pack(run), torch.device("cpu")) for run in runs]
            assert [run.state.num_steps for run in again] == [r.state.num_steps for r in runs]
    with pytest.raises(ConfigError, match=r"known_length is 1.0, but rule .* does not use"):
        PES(config, make_rule("rnnprop"))


def test_a_particle_is_a_run_with_its_own_weights(rule: UpdateRule) -> None:
    task = Quadratic()
    config = TrainConfig(objectives=("pes",), pes=PESConfig(pairs=2), window=3)
    run = PES(config, rule).open(("test",), 9, task, rule)
    weights = nn.utils.parameters_to_vector(rule.parameters()).detach()
    own = weights + 0.1 * torch.randn(4, len(weights), dtype=torch.float64)
    losses = roll_out(rule, perturbed(rule, own), task, run, 5)
    for particle in range(4):
        nn.utils.vector_to_parameters(own[particle], rule.parameters())
        theta, state, expected = task.init(0), rule.init_state(task.init(0), task.shapes), []
        for _ in range(5):
            update, state = rule.update(task.loss_and_grad(theta, ())[1], theta, state)
            theta = theta + update
            expected.append(task.loss(theta, ()))
        torch.testing.assert_close(losses[:, particle], torch.cat(expected))
        torch.testing.assert_close(run.theta[particle], theta[0])
        torch.testing.assert_close(rule.hidden(run.state)[particle], rule.hidden(state)[0])


def test_the_loss_has_the_estimate_as_its_gradient_and_the_mean_loss_as_its_value() -> None:
    rule, task = Momentum(), Quadratic()
    objective = PES(TrainConfig(objectives=("pes",), loss_floor=FLOOR), rule)
    runs = [objective.open(("test",), HORIZON, task, rule) for _ in range(2)]
    objective.limit = lambda task: math.inf
    loss, losses = objective.window(rule, task, runs[0], WINDOW)
    loss.backward()
    expected, _ = pes_gradient(rule, task, runs[1], WINDOW, 0.01, FLOOR)
    torch.testing.assert_close(rule.w.grad, expected)
    assert loss.item() == losses.mean().item() and expected.norm() > 0


class Quadratics(Quadratic):
    """Many at once, in two tensors."""

    num_tasks, shapes = 400, ((1,), (2,))

    def init(self, seed: int) -> Tensor:
        return super().init(seed).repeat(self.num_tasks, 1)


class PerTensor(Momentum):
    """u_i = −w_i g, a number for each tensor, (1,) and (2,)."""

    def respond(self, observation: Observation, hidden: Tensor, in_place: bool = False):
        w = self.w[[0, 1, 1]]
        if isinstance(observation.layout, Tensor):  # of coordinates that were picked
            w = self.w[observation.layout % 2]
        return -w * observation.coordinate.squeeze(-2), hidden


def open_pair(rule: UpdateRule, task: Task, key: int = 0, **step_size) -> tuple:
    config = replace(
        TrainConfig(objectives=("step_size",), window=WINDOW, horizon=(HORIZON, HORIZON)),
        step_size=StepSizeConfig(**step_size),
    )
    objective = StepSize(config, rule)
    return objective, objective.open(("test", key), HORIZON, task, rule)


def step_size_estimates(rule: UpdateRule, config: StepSizeConfig, runs: int) -> Tensor:
    """ĝ summed over the windows of each of many runs, (runs, 2)."""
    task, found = Quadratics(), []
    for key in range(runs):
        _, run = open_pair(rule, task, key)
        parts = [
            step_size_gradient(rule, task, run, WINDOW, config, FLOOR, math.inf, ALL)[0]
            for _ in range(HORIZON // WINDOW)
        ]
        found.append(torch.stack(parts).sum(0))
    return torch.stack(found)


@pytest.mark.slow
def test_the_estimate_of_step_sizes_is_their_share_of_the_gradient_of_the_whole_run() -> None:
    """All that w₁ does is to multiply steps."""
    rule = Momentum()
    expected = whole_gradient(rule)[0]
    found = step_size_estimates(rule, StepSizeConfig(0.01), 10)[:, 0]
    error = found.std() / len(found) ** 0.5
    assert (found.mean() - expected).abs() < 4 * error
    assert error < 0.05 * abs(expected)


def test_particles_take_steps_of_the_same_direction_and_opposite_log_sizes() -> None:
    rule, task, sigma, pace = Momentum(), Quadratics(), 0.3, 0.5
    _, run = open_pair(rule, task)
    start = run.theta.clone()
    step_size_gradient(
        rule, task, run, 1, StepSizeConfig(sigma, pace=(pace, pace)), FLOOR, math.inf, ALL
    )
    plus, minus = (run.theta - start).chunk(2)
    plain = -0.15 * math.exp(pace) * task.loss_and_grad(start[: len(plus)], ())[1]
    torch.testing.assert_close(plus * minus, plain.square())
    sizes = (plus / plain).log() / sigma  # ε of each tensor
    torch.testing.assert_close(sizes[:, 1], sizes[:, 2])
    own, other = sizes[:, 0], sizes[:, 1]
    moments = torch.stack([own.var(), other.var(), (own * other).mean()])
    assert ((moments - torch.tensor([1.0, 1.0, 0.0])).abs() < 0.35).all()  # 5 standard errors


@pytest.mark.slow
@pytest.mark.parametrize("common", [0.0, 0.5])
def test_tensors_have_an_estimate_each(common: float) -> None:
    """Weights that scale one tensor's steps each: against finite differences."""
    rule, w = PerTensor(), PerTensor().w.detach()
    covariance = (1 - common) * torch.eye(2, dtype=torch.float64) + common  # of ε, in log w
    expected = covariance @ (w * whole_gradient(rule)) / w
    found = step_size_estimates(rule, StepSizeConfig(0.01, common=common), 12)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - expected).abs() < 4 * error).all()
    assert (error < 0.1 * expected.abs()).all()


def test_the_old_name_of_pairs_works_with_a_warning(tmp_path: Path) -> None:
    config = tmp_path / "old.yaml"
    config.write_text("objectives: [pes]\npes: {particles: 3}\n")
    with pytest.warns(FutureWarning, match="now called pes.pairs"):
        read = parse(["train", "--config", str(config), "--output", str(tmp_path)])[1]
    assert read.pes == PESConfig(pairs=3)


class Mixed(Momentum, TensorGains):
    """u = −(w₁ + w₂ D) g, with a fixed diagonal D."""

    diagonal = torch.tensor([0.5, -0.2, 0.3], dtype=torch.float64)

    def respond(self, observation: Observation, hidden: Tensor, in_place: bool = False):
        return -(self.w[0] + self.w[1] * self.diagonal) * observation.coordinate[..., 0, :], hidden

    def gains(self, tensor: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return -self.w[:, None].expand(*tensor.shape[:-2], 2, tensor.shape[-1]), hidden

    def features(self, observation: Observation) -> Tensor:
        g = observation.coordinate
        return torch.cat([g, self.diagonal * g], -2)

    def mix(self, gains: Tensor, observation: Observation) -> Tensor:
        return (observation.layout.expand(gains) * self.features(observation)).sum(-2)


@pytest.mark.slow
def test_mixtures_have_the_gradient_of_the_whole_run() -> None:
    """G, against finite differences: once for each of two tensors by what is common to both, and
    its part along w by how long steps are."""
    rule, w = Mixed(), Mixed().w.detach()
    whole = whole_gradient(rule)
    expected = 2 * whole + (whole @ w) / w.square().sum() * w
    found = step_size_estimates(rule, StepSizeConfig(0.01, mixture=0.01), 20)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - expected).abs() < 4 * error).all()
    assert error.norm() < 0.1 * expected.norm()


def test_only_gains_per_tensor_are_mixed() -> None:
    config = TrainConfig(objectives=("step_size",), step_size=StepSizeConfig(mixture=0.2))
    with pytest.raises(ConfigError, match=r"mixture is 0\.2.*gains per tensor"):
        StepSize(config, make_rule("rnnprop"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sigma": 0.0}, r"sigma=0\.0 must be positive"),
        ({"together": 0}, r"together=0 at least 1"),
        ({"common": 1.0}, r"common is 1\.0; use 0 or more"),
        ({"pace": (0.5, 0.0)}, r"pace is \(0\.5, 0\.0\); give the lower bound first"),
        ({"mixture": -1.0}, r"mixture is -1\.0; use 0 for none"),
    ],
)
def test_step_sizes_that_mean_nothing_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StepSizeConfig(**wrong)


def test_gains_mix_to_the_update(rule: UpdateRule) -> None:
    if rule.gains_per_tensor:
        task = tiny_task(DoubleTask)
        theta = task.init(0).double()
        _, grad = task.loss_and_grad(theta, task.fixed_batch())
        seen, state = rule.observe(grad, theta, rule.init_state(theta, task.shapes))
        gains, _ = rule.gains(seen.tensor, rule.hidden(state))
        torch.testing.assert_close(rule.mix(gains, seen), rule.advance(seen, state)[0])


def test_pairs_start_from_one_point_again() -> None:
    rule, task = Momentum(), Quadratics()
    objective, run = open_pair(rule, task, together=2)
    never = deepcopy(run)
    for _ in range(2):
        objective.window(rule, task, run, WINDOW)
        step_size_gradient(rule, task, never, WINDOW, StepSizeConfig(), 0.003, math.inf, ALL)
    torch.testing.assert_close((run.theta, run.xi), (never.theta, never.xi))
    other, first = deepcopy(run), run.theta[: task.num_tasks].clone()
    reunite(other)
    assert not run.theta[task.num_tasks :].equal(first)
    assert other.theta[task.num_tasks :].equal(first) and not other.xi.any()
    objective.window(rule, task, run, WINDOW)
    step_size_gradient(rule, task, other, WINDOW, StepSizeConfig(), 0.003, math.inf, ALL)
    torch.testing.assert_close((run.theta, run.xi), (other.theta, other.xi))


def test_step_sizes_have_the_derivatives_that_autograd_gives(rule: UpdateRule) -> None:
    """ξ against autograd of the mean of Σ_i ε_i log|u_i|, ε from what the first steps are; of rules
    with gains per tensor it is that of these."""
    task, sigma, steps = tiny_task(DoubleTask), 0.2, 3
    config = TrainConfig(objectives=("step_size",), window=3)
    run = StepSize(config, rule).open(("test",), 9, task, rule)
    step_size_gradient(
        rule, task, run, 2, StepSizeConfig(sigma), 0.1, math.inf, ALL
    )  # states are carried on
    before, old = deepcopy(run), run.xi.clone()
    step_size_gradient(rule, task, run, steps, StepSizeConfig(sigma), 0.1, math.inf, ALL)
    rng = generator("step sizes", *before.key, before.state.step)
    epsilon = torch.randn(2, len(task.shapes), generator=rng).double()
    theta, state, total = before.theta, before.state, [0.0, 0.0]
    factors = state.layout.expand((sigma * torch.cat([epsilon, -epsilon])).exp())
    for _ in range(steps):
        batch = task.batch(seed_of(*before.key), state.step)
        grad = task.loss_and_grad(theta.view(2, 2, -1), batch)[1].flatten(0, -2)
        seen, state = rule.observe(grad, theta, state)
        if rule.gains_per_tensor:
            lengths = rule.gains(seen.tensor, rule.hidden(state))[0].norm(dim=-2).unbind(-1)
        update, state = rule.advance(seen, state)
        theta = theta + factors * update.detach()
        if not rule.gains_per_tensor:
            lengths = [part.norm(dim=-1) for part in update.split(state.layout.sizes, -1)]
        sizes = [length.log() for length in lengths]
        for i, value in enumerate((torch.stack(sizes, -1).view(2, 2, -1) * epsilon).sum((0, 2))):
            total[i] = total[i] + value / (2 * steps)
    torch.testing.assert_close(run.theta, theta)
    for found, expected in zip(run.xi - old, total, strict=True):
        grads = torch.autograd.grad(expected, list(rule.parameters()), retain_graph=True)
        torch.testing.assert_close(found, nn.utils.parameters_to_vector(grads))
        assert found.norm() > 0


def test_longer_steps_point_where_they_did() -> None:
    """Of a mixture that is a constant, c, what step sizes teach is a multiple of c."""
    rule, task = make_rule("geodesic_rnn", hidden=3).double(), tiny_task(DoubleTask)
    mixture = torch.tensor([0.1, -0.3, 1.0, 0.5])
    rule.head.bias.data[:-1] = mixture
    rule.head.bias.data[-1] = -4.0  # far below the bound on steps, which sees the whole mixture
    run = StepSize(TrainConfig(objectives=("step_size",)), rule).open(("test",), 9, task, rule)
    step_size_gradient(rule, task, run, 5, StepSizeConfig(), 0.1, math.inf, ALL)
    learned = run.xi[:, -5:-1].float()  # of the head's bias, the last of the weights
    cosine = torch.cosine_similarity(learned, mixture.expand_as(learned), dim=-1)
    assert (cosine.abs() > 0.999).all()


def test_a_task_that_is_lost_leaves_the_others_theirs(rule: UpdateRule) -> None:
    task = tiny_task(DoubleTask)
    for mixture in {0.0, 0.2 * rule.gains_per_tensor}:
        objective, run = open_pair(rule, task, mixture=mixture)
        run.theta[1] = torch.nan
        loss, losses = objective.window(rule, task, run, WINDOW)
        found = gradient(loss, rule)
        assert found.isfinite().all() and found.norm() > 0
        assert losses[0].isfinite() and not losses[1].isfinite()


def test_a_particle_that_diverges_counts_as_a_bad_one() -> None:
    task = Quadratics()
    task.num_tasks = 2
    losses = torch.tensor([[1.0, 2.0, math.nan, 2.0], [1.0, 2.0, math.inf, 3.0]])
    found = differences(losses, task, 0.1, math.inf)
    assert found.tolist() == pytest.approx([math.log(1.1 / 1000.1), math.log(2.1 / 2.6)])
    found = differences(losses, task, 0.1, torch.tensor([4.0, 2.0]))  # a limit for each task
    assert found.tolist() == pytest.approx([math.log(1.1 / 4.1), 0.0])
    assert differences(-losses, task, 0.1, math.inf).tolist() == [0, 0]
