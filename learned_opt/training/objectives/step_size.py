"""Evolution strategies on step sizes, which train on long runs with few perturbed numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learned_opt.errors import ConfigError
from learned_opt.rules import Observation, State, UpdateRule
from learned_opt.rules.base import trainable
from learned_opt.tasks.base import Task, generator, uniform
from learned_opt.training.objectives.pes import AntitheticRuns, differences, roll_out
from learned_opt.training.objectives.replay import start_replay
from learned_opt.training.objectives.runs import OpenRun

if TYPE_CHECKING:
    from learned_opt.config import StepSizeConfig, TrainConfig


class StepSize(AntitheticRuns):
    """Trains per-tensor step sizes (with `mixture`, also the gains) on the outcome of the run.

    *Perturbations.* Each of N tasks is a pair of particles, whose updates of tensor i are
    e^{p ± σ ε_i} u_i. In every window, ε_i = √c z + √(1 − c) z_i is drawn anew, with z (one for the
    network) and z_i (one for each tensor) from N(0, 1). p ~ U(`pace`) is drawn once for a run: when
    all its steps are too long or too short, the rule learns to notice and to correct it.

    *Estimate.* Let ξ be the sum, over the windows since the particles of the pair were last at the
    same point, of

        Σ_i ε_i ∂ log ℓ_i / ∂w,    averaged over the window's steps and both particles. Then

        ĝ = 1 / (2 σ N) Σ_pairs ξ (L⁺ − L⁻),    L = log(mean loss of the window + loss_floor).

    ℓ_i is |c_i| for rules with gains c_i per tensor, u_i = Σ_k c_ik f_ik, and |u_i| for others.
    Both measure the length of steps of a fixed direction. Of changes of direction, |u_i| would
    favour the noisiest f_k, because it grows most with that; ∂ log|c_i| / ∂c_i only scales c_i.

    *Properties.* As in PES (pes.py), the losses of a window count for all steps since the particles
    were last at the same point. But only one number for each tensor is perturbed, instead of
    thousands of meta-parameters, so the estimate is less noisy, and the chain rule does the rest
    (REINFORCE, Williams 1992, with antithetic pairs). To first order in σ, ĝ is the gradient of L
    through the step sizes, with the observations and the state at the start of the window taken as
    constants. This is exact if ∂ log ℓ_i / ∂w is the same at all steps of a window; changes of step
    sizes within a window that keep their mean have no effect on ĝ. With c = `common` above 0, the
    gradient through log ℓ_i is multiplied by the covariance of ε, (1 − c) I + c 1 1ᵀ. That is still
    a descent direction, and it favours changes that all tensors have in common, which emerge from
    the noise first. For rules without gains per tensor only some coordinates are replayed, so small
    tensors make the estimate noisy.

    *Gains.* With `mixture` = μ above 0 the gains are perturbed as well, by ± μ |c_i| η, with η ~
    N(0, I) drawn anew in every window and the same for all tensors of a network. ξ then has the
    further term

        σ / μ Σ_ik η_k ∂c_ik / ∂w / |c_i|.

    So the gains, too, are trained on the outcome of runs, including the effects on later steps
    that replay treats as constant.

    *Restarts.* Every `together` windows the second particle is set to the point and the state of
    the first, because differences of runs that separated long ago are mostly noise.
    """

    name = "step_size"
    pairs = 1

    def __init__(self, config: TrainConfig, rule: UpdateRule) -> None:
        super().__init__(config, rule)
        if config.step_size.mixture and not rule.gains_per_tensor:
            raise ConfigError(
                f"step_size.mixture is {config.step_size.mixture}, but rule {config.rule!r} has no "
                "gains per tensor; use 0, or geodesic_rnn"
            )

    def estimate(
        self, rule: UpdateRule, task: Task, run: OpenRun, steps: int
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        if run.state.step // config.unroll % config.step_size.together == 0:
            reunite(run)
        return step_size_gradient(
            rule, task, run, steps, config.step_size, config.loss_floor, self.limit(task),
            config.coordinates, config.judged,
        )  # fmt: skip


def step_size_gradient(
    rule: UpdateRule,
    task: Task,
    run: OpenRun,
    steps: int,
    config: StepSizeConfig,
    floor: float,
    limit: float | Tensor,
    coordinates: int,
    judged: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Returns ĝ, (weights,), of the next `steps` updates, and the mean losses, (tasks,).

    Args:
        rule: the rule.
        task: the tasks of the run.
        run: the run, which is advanced; theta is (2 · tasks, d) with the particles of +ε first, and
            xi is (tasks, weights).
        steps: the number of updates.
        config: sigma, common, pace and mixture, see StepSize.
        floor: the loss_floor.
        limit: losses are clipped at this, a number or (*tasks,).
        coordinates: the number of coordinates to learn from, for rules without gains per tensor.
        judged: the share of these updates, at the end, whose losses count.
    """
    n, layout = len(run.xi), run.state.layout
    sigma, common = config.sigma, config.common
    rng = generator("step sizes", *run.key, run.state.step)
    own, whole = (torch.randn(n, k, generator=rng) for k in (len(layout.shapes), 1))
    epsilon = (common**0.5 * whole + (1 - common) ** 0.5 * own).to(run.theta)
    both = torch.cat([epsilon, epsilon])
    pace = uniform(generator("pace", *run.key), *config.pace, (n, 1)).to(run.theta).repeat(2, 1)
    factors = layout.expand((pace + sigma * torch.cat([epsilon, -epsilon])).exp())
    replay = start_replay(rule, run.state, coordinates, *run.key, run.state.step)
    updates: list[Tensor] = []
    eta = torch.empty(0)

    def advance(seen: Observation, state: State) -> tuple[Tensor, State]:
        nonlocal eta
        replay.see(
            seen
        )  # coordinates are overwritten later: SampledReplay copies them, gains need none
        if not config.mixture:
            update, state = rule.advance(seen, state)
            if not rule.gains_per_tensor:  # else their lengths are known without them
                updates.append(update)
            return factors * update, state
        gains, hidden = rule.gains(seen.tensor, rule.hidden(state))
        if not len(eta):
            eta = torch.randn(n, gains.shape[-2], 1, generator=rng).to(gains)
        size = gains.norm(dim=-2, keepdim=True)
        gains = gains + config.mixture * size * torch.cat([eta, -eta])
        return factors * rule.mix(gains, seen), rule.with_hidden(state, hidden)

    losses = roll_out(rule, advance, task, run, steps)
    sizes = (replay.lengths(updates).view(steps, 2 * n, -1) * both).sum(-1)
    if config.mixture:
        shares = replay.shares.view(steps, -1, 2 * n, len(layout.shapes)).transpose(1, 2)
        sizes = sizes + sigma / config.mixture * (shares * torch.cat([eta, eta])).sum((-2, -1))
    sizes = sizes.view(steps, 2, n).mean((0, 1))
    weights, eye = trainable(rule), torch.eye(n, dtype=sizes.dtype, device=sizes.device)
    grads = torch.autograd.grad(sizes, weights, eye, is_grads_batched=True, allow_unused=True)
    rows = [
        torch.zeros(n, p.numel()).to(p) if g is None else g.flatten(1)
        for g, p in zip(grads, weights, strict=True)
    ]
    run.xi = run.xi + torch.cat(rows, 1)
    estimate = differences(losses, task, floor, limit, judged) @ run.xi / (2 * sigma * n)
    return estimate, losses.mean(0).view(-1, *task.lead).mean(0)


def reunite(run: OpenRun) -> None:
    """Sets the second particles to the points and states of the first."""

    def twice(x: Tensor) -> Tensor:
        return x[: len(run.xi)].repeat(2, *[1] * (x.dim() - 1))

    run.theta, run.xi = twice(run.theta), torch.zeros_like(run.xi)
    run.state = run.state.map(twice)
