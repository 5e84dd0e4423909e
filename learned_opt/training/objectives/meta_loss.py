"""The loss of the rule's own runs, minimized by first-order replay or by back-propagation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learned_opt.errors import ConfigError
from learned_opt.rules import Observation, State, UpdateRule
from learned_opt.tasks.base import Batch, Task, seed_of
from learned_opt.training.objectives.replay import start_replay
from learned_opt.training.objectives.runs import OpenRun, RunObjective

if TYPE_CHECKING:
    from learned_opt.config import TrainConfig


class MetaLoss(RunObjective):
    """Minimizes the loss of the rule's own runs by first-order replay, see `meta_loss`."""

    name = "meta_loss"

    def window(
        self, rule: UpdateRule, task: Task, run: OpenRun, steps: int
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        return meta_loss(
            rule, task, run, steps, config.coordinates, config.loss_floor, self.limit(task)
        )


class Backprop(RunObjective):
    """Minimizes the loss of the rule's own runs by back-propagation, see `unrolled_loss`."""

    name = "backprop"

    def __init__(self, config: TrainConfig, rule: UpdateRule) -> None:
        super().__init__(config, rule)
        if not config.first_order and not differentiable(rule):
            raise ConfigError(
                f"first_order is False, but the statistics of rule {config.rule!r} cannot be "
                "differentiated; use rule: coordinatewise_lstm, or first_order: true"
            )

    def window(
        self, rule: UpdateRule, task: Task, run: OpenRun, steps: int
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        return unrolled_loss(
            rule, task, run, steps, config.loss_floor, self.limit(task), config.first_order
        )


def meta_loss(
    rule: UpdateRule,
    task: Task,
    run: OpenRun,
    steps: int,
    coordinates: int,
    floor: float,
    limit: float | Tensor = math.inf,
) -> tuple[Tensor, Tensor]:
    """Returns the meta-loss of the rule's next `steps` updates by replay, and advances `run`.

    The loss is Σ_t F(θ_t). If the inputs of the rule are treated as constants, as in L2L
    (Andrychowicz et al. 2016, section 2.1), its gradient in the network's weights is that of
    Σ_s ⟨u_s, Σ_{t>s} g_t⟩ with g detached, so nothing is propagated through the task. Tasks are
    weighted by 1 / (mean loss + floor), so that the relative decrease of the loss counts. A task
    whose loss or gradient is not finite has weight 0.

    Args:
        rule: the rule.
        task: the tasks of the run.
        run: the run, which is advanced.
        steps: the number of updates.
        coordinates: the number of coordinates that are replayed, for rules without gains per
            tensor.
        floor: see above.
        limit: losses are clipped at this, a number or (tasks,); above it they have no gradient.

    Returns:
        the linear form, whose gradient is the meta-gradient, and the mean losses, (tasks,).
    """
    seed = seed_of(*run.key)
    replay = start_replay(rule, run.state, coordinates, *run.key, run.state.step)
    losses, grads = [], []
    with torch.no_grad():
        for step in range(steps + 1):
            loss, grad = task.loss_and_grad(run.theta, task.batch(seed, run.state.step))
            losses.append(loss)
            grads.append(grad)
            if step == steps:
                break
            observation, run.state = rule.observe(grad, run.theta, run.state)
            replay.see(observation)
            update, run.state = rule.advance(observation, run.state)
            run.theta = rule.moved(run.theta, update, run.state.layout)
        losses, grads = torch.stack(losses[1:]), torch.stack(grads[1:])
        mean = losses.clamp(max=limit).mean(0)
        grads = torch.where((losses < limit).unsqueeze(-1), grads, 0)
        future = grads.flip(0).cumsum(0).flip(0)  # Σ_{t>s} g_t
        good = mean.isfinite() & future.isfinite().all(0).all(-1)
        future = torch.where(good[:, None], future / (mean + floor)[:, None], 0)
    return replay.inner(list(future)).sum() / (len(mean) * steps), losses.mean(0)


def unrolled_loss(
    rule: UpdateRule,
    task: Task,
    run: OpenRun,
    steps: int,
    floor: float,
    limit: float | Tensor = math.inf,
    first_order: bool = True,
) -> tuple[Tensor, Tensor]:
    """Returns the meta-loss by back-propagation through every θ_{t+1} = θ_t + u_t.

    Memory grows with `steps`. With `first_order` the inputs of the rule are detached, as in L2L,
    and the gradient is that of `meta_loss` with all coordinates. Otherwise it passes through the
    gradients as well, as second derivatives of F.

    Returns:
        the mean over tasks of mean loss / (mean loss + floor), with the denominator detached, and
        the mean losses, (tasks,).
    """
    seed, theta, state = seed_of(*run.key), run.theta.detach().requires_grad_(), run.state
    alive = torch.ones(len(theta), dtype=torch.bool, device=theta.device)
    losses = []
    for step in range(steps + 1):
        batch = task.batch(seed, state.step)
        theta, loss, observation, seen, alive = _look(
            rule, task, theta, batch, state, alive, first_order
        )
        losses.append(loss)
        if step < steps:
            update, state = rule.advance(observation, seen)
            theta = rule.moved(theta, update, state.layout)
    losses = torch.stack(losses[1:])
    mean = torch.where(alive, losses.clamp(max=limit).mean(0), 0)
    run.theta = torch.where(alive[:, None], theta.detach(), torch.nan)
    run.state = state.map(Tensor.detach)
    raw = torch.where(alive, losses.detach().mean(0), torch.nan)
    return (mean / (mean.detach() + floor)).mean(), raw


def _look(
    rule: UpdateRule,
    task: Task,
    theta: Tensor,
    batch: Batch,
    state: State,
    alive: Tensor,
    first_order: bool,
) -> tuple[Tensor, Tensor, Observation, State, Tensor]:
    """Returns θ, its losses, the observation, the next state, and which tasks are finite so far.

    The other tasks continue from θ = 0 without gradients. They have weight 0, but 0 · NaN in the
    graph would spread to the other tasks.
    """
    theta, second = torch.where(alive[:, None], theta, 0), not first_order
    loss = task.loss(theta, batch)
    (grad,) = torch.autograd.grad(loss.sum(), theta, retain_graph=True, create_graph=second)
    grad = torch.where(alive[:, None], grad, 0)
    with torch.set_grad_enabled(second):
        observation, seen = rule.observe(grad, theta, state)
    parts = (loss.unsqueeze(-1), grad, observation.coordinate, observation.tensor)
    still = alive & torch.stack([part.isfinite().flatten(1).all(-1) for part in parts]).all(0)
    if not still.equal(alive):
        return _look(rule, task, theta, batch, state, still, first_order)
    return theta, loss, observation, seen, alive


def differentiable(rule: UpdateRule) -> bool:
    """Whether `rule.observe` can be differentiated; in-place and out= operations cannot be."""
    theta = torch.ones(1, 2, requires_grad=True)
    try:
        observation, _ = rule.observe(theta**2, theta, rule.init_state(theta.detach(), ((2,),)))
    except RuntimeError:
        return False
    return observation.coordinate.requires_grad
