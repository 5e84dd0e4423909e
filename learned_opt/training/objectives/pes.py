"""Persistent evolution strategies, which train on long runs without the bias of short windows."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from learned_opt.rules import Observation, State, UpdateRule
from learned_opt.rules.base import trainable
from learned_opt.tasks.base import Task, generator, seed_of
from learned_opt.training.objectives.runs import OpenRun, RunObjective

DIVERGED = 100.0  # losses that are larger or not finite count as so many times that of chance

Advance = Callable[[Observation, State], tuple[Tensor, State]]


class AntitheticRuns(RunObjective):
    """Runs in antithetic pairs of particles; all first particles come before all second ones."""

    pairs: int  # the number of pairs for each task

    def open(self, key: tuple[object, ...], horizon: int, task: Task, rule: UpdateRule) -> OpenRun:
        run = super().open(key, horizon, task, rule)
        run.theta = run.theta.repeat(2 * self.pairs, 1)
        run.state = self.state(run.theta, key, horizon, task, rule)
        weights = sum(p.numel() for p in trainable(rule))
        run.xi = run.theta.new_zeros(len(run.theta) // 2, weights)
        return run

    @abstractmethod
    def estimate(
        self, rule: UpdateRule, task: Task, run: OpenRun, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Returns ĝ, (weights,), of the next `steps` updates, and the mean losses of the tasks."""

    def window(
        self, rule: UpdateRule, task: Task, run: OpenRun, steps: int
    ) -> tuple[Tensor, Tensor]:
        estimate, losses = self.estimate(rule, task, run, steps)
        weights = nn.utils.parameters_to_vector(trainable(rule))
        value = losses.nanmean().nan_to_num()
        return value + estimate @ (weights - weights.detach()), losses  # its gradient is ĝ


class PES(AntitheticRuns):
    """Antithetic PES (Vicol, Metz & Sohl-Dickstein 2021, arXiv 2112.13835, algorithm 2).

    Every task has N pairs of particles, which run with weights w ± ε. In every window a new
    ε ~ N(0, σ² I) is drawn for each pair. With ξ the sum of a pair's ε since the run began,

        ĝ = 1 / (2 σ² N) Σ_pairs ξ (L⁺ − L⁻),   L = log(mean loss of the window + loss_floor).

    This estimates the gradient of the σ-smoothed sum of L over the run with respect to all earlier
    perturbations, not only those of the window. It is averaged over tasks. This L is our
    choice: its gradient weights tasks by 1 / (mean loss + loss_floor), as `meta_loss` does. The
    loss of a particle that diverges counts as 100 times that of chance, so the other particle of
    its pair wins clearly.
    """

    name = "pes"

    @property
    def pairs(self) -> int:
        return self.config.pes.pairs

    def estimate(
        self, rule: UpdateRule, task: Task, run: OpenRun, steps: int
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        return pes_gradient(
            rule, task, run, steps, config.pes.sigma, config.loss_floor, self.limit(task),
            config.judged,
        )  # fmt: skip


def pes_gradient(
    rule: UpdateRule,
    task: Task,
    run: OpenRun,
    steps: int,
    sigma: float,
    floor: float,
    limit: float | Tensor = math.inf,
    judged: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Returns ĝ, (weights,), of the next `steps` updates, and the mean losses, (tasks,).

    Args:
        rule: the rule.
        task: the tasks of the run.
        run: the run, which is advanced; theta is (2 · pairs · tasks, d) with the particles of +ε
            first, and xi is (pairs · tasks, weights).
        steps: the number of updates.
        sigma: σ.
        floor: the loss_floor.
        limit: losses are clipped at this, a number or (*tasks,).
        judged: the share of these updates, at the end, whose losses count.
    """
    rng = generator("perturbation", *run.key, run.state.step)
    epsilon = sigma * torch.randn(run.xi.shape, generator=rng, dtype=run.xi.dtype)
    epsilon = epsilon.to(run.xi.device)
    run.xi = run.xi + epsilon
    weights = nn.utils.parameters_to_vector(trainable(rule)).detach()
    advance = perturbed(rule, weights + torch.cat([epsilon, -epsilon]))
    losses = roll_out(rule, advance, task, run, steps)
    found = differences(losses, task, floor, limit, judged)
    estimate = found @ run.xi / (2 * sigma**2 * len(run.xi))
    return estimate, losses.mean(0).view(-1, *task.lead).mean(0)


def differences(
    losses: Tensor, task: Task, floor: float, limit: float | Tensor, judged: float = 1.0
) -> Tensor:
    """Returns L⁺ − L⁻ of each pair, (pairs · tasks,), from losses (steps, particles).

    Only the share `judged` of the steps counts, at the end.
    """
    losses = losses[-math.ceil(judged * len(losses)) :]
    losses = losses.view(len(losses), -1, *task.lead)
    losses = torch.where(losses.isfinite(), losses, torch.inf)
    clipped = losses.clamp(max=DIVERGED * task.chance).clamp(max=limit)
    plus, minus = (clipped.mean(0).flatten() + floor).log().chunk(2)
    found = plus - minus
    return torch.where(found.isfinite(), found, 0)  # negative losses have no logarithm


@torch.no_grad()
def roll_out(rule: UpdateRule, advance: Advance, task: Task, run: OpenRun, steps: int) -> Tensor:
    """Returns the loss after each of the next `steps` updates, (steps, particles).

    It advances `run`.
    """
    seed, losses = seed_of(*run.key), []
    for step in range(steps + 1):
        particles = run.theta.view(-1, *task.lead, run.theta.shape[-1])
        loss, grad = task.loss_and_grad(particles, task.batch(seed, run.state.step))
        losses.append(loss.flatten())
        if step == steps:
            break
        grad = grad.flatten(0, -2)
        observation, state = rule.observe(grad, run.theta, run.state, in_place=True)
        update, run.state = advance(observation, state)
        run.theta = rule.moved(run.theta, update, run.state.layout)
    return torch.stack(losses[1:])


class _Call(nn.Module):
    """Makes a method of `rule` a forward pass, because functional_call calls forward."""

    def __init__(self, rule: UpdateRule, method: str) -> None:
        super().__init__()
        self.rule, self.method = rule, method

    def forward(self, *args: object) -> tuple:
        return getattr(self.rule, self.method)(*args)


def perturbed(rule: UpdateRule, weights: Tensor) -> Advance:
    """Returns `rule.advance`, in place, with a row of `weights` (particles, weights) for each."""
    module = _Call(rule, "advance" if rule.weights_per_task else "respond")
    moving = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    names, parameters = zip(*moving, strict=True)
    parts = weights.split([p.numel() for p in parameters], dim=-1)
    own = {
        name: part.unflatten(-1, p.shape)
        for name, part, p in zip(names, parts, parameters, strict=True)
    }
    if rule.weights_per_task:
        return lambda *seen: torch.func.functional_call(module, own, (*seen, True))

    def advance(observation: Observation, state: State) -> tuple[Tensor, State]:
        def one(own: dict[str, Tensor], coordinate: Tensor, tensor: Tensor, hidden: Tensor):
            seen = Observation(coordinate, tensor, observation.layout)
            return torch.func.functional_call(module, own, (seen, hidden))

        seen = (observation.coordinate, observation.tensor, rule.hidden(state))
        update, hidden = torch.func.vmap(one)(own, *seen)
        return update, rule.with_hidden(state, hidden)

    return advance
