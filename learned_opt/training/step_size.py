"""Evolution strategies on the sizes of steps: long runs, with few numbers to perturb."""

from __future__ import annotations

import torch
from torch import Tensor

from learned_opt.config import StepSizeConfig, TrainConfig
from learned_opt.errors import ConfigError
from learned_opt.rules import Observation, State, UpdateRule
from learned_opt.tasks.base import Task, generator, uniform
from learned_opt.training.pes import AntitheticRuns, differences, roll_out
from learned_opt.training.replay import start_replay
from learned_opt.training.runs import OpenRun
from learned_opt.training.start import trainable


class StepSize(AntitheticRuns):
    """How long steps are, and with `mixture` what of, by what becomes of the run.

    Each of N tasks is a pair of particles, whose updates of tensor i are e^{p ± σ ε_i} u_i, with
    ε_i = √c z + √(1 − c) z_i, z and z_i ~ N(0, 1) drawn anew in every window: one factor for the
    network and one for each tensor. p ~ U(`pace`) is one number for all of a run: with steps too
    long or too short on every task, the rule learns to notice that and to make up for it. ξ is the
    sum, over windows since the pair was last together, of

        Σ_i ε_i ∂ log ℓ_i / ∂w,    the mean over the window's steps and both particles;

        ĝ = 1 / (2 σ N) Σ_pairs ξ (L⁺ − L⁻),    L = log(mean loss of the window + loss_floor).

    ℓ_i is |c_i| for rules with gains c_i per tensor, u_i = Σ_k c_ik f_ik, else |u_i|. Both grow as
    steps do that keep their direction. Of what turns them |u_i| grows the most with the noisiest
    f_k, which is no reason to have more of it; steps along ∂ log|c_i| / ∂c_i scale c_i and no more.

    As in PES (pes.py) a window's losses count for all steps since the pair was last together, but
    what is perturbed are as many numbers as there are tensors and not the thousands of
    meta-parameters, whose noise the estimate would have; the chain rule does the rest (REINFORCE,
    Williams 1992, with antithetic pairs). To first order in σ it is the gradient, through the sizes
    of steps, of these L: exactly where ∂ log ℓ_i / ∂w is the same at all of a window's steps, and
    with what the rule observes, and what it remembers at the window's start, taken as given. What
    changes sizes within a window but not their mean it does not see. With c = `common` above 0 it
    is the gradient, through log ℓ_i, times the covariance of ε, (1 − c) I + c 1 1ᵀ: downhill all
    the same, first in what all tensors want, which is told from the noise the soonest. For rules
    without gains per tensor, of which only some coordinates are replayed, small tensors make it
    noisy.

    With `mixture` = μ above 0 the gains themselves are perturbed too, c_i ± μ |c_i| η with η ~
    N(0, I) anew in every window, the same for all tensors of a network, and ξ has besides

        σ / μ Σ_ik η_k ∂c_ik / ∂w / |c_i|:

    what steps are mixed of is then judged by runs as well, with all that later steps make of it,
    which replay takes as given.

    Every `together` windows the second particle goes on from where the first is: differences of
    runs that have long gone apart are noise.
    """

    name = "step_size"
    pairs = 1

    def __init__(self, config: TrainConfig, rule: UpdateRule) -> None:
        super().__init__(config, rule)
        if config.step_size.mixture and not rule.gains_per_tensor:
            raise ConfigError(
                f"step_size.mixture is {config.step_size.mixture}, but rule {config.rule!r} has no "
                "gains per tensor; use 0, or geodesic_rnn with per: tensor"
            )

    def estimate(
        self, rule: UpdateRule, task: Task, run: OpenRun, steps: int
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        if run.state.step // config.window % config.step_size.together == 0:
            reunite(run)
        return step_size_gradient(
            rule, task, run, steps, config.step_size, config.loss_floor, self.limit(task),
            config.coordinates,
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
) -> tuple[Tensor, Tensor]:
    """ĝ, (weights,), of the next `steps` updates, and mean losses, (tasks,); moves `run` on.

    Args:
        run: theta (2 · tasks, d), the particles of +ε first; xi (tasks, weights).
        config: its sigma, common, pace and mixture are those of StepSize.
        limit: losses count as at most this, a number or (*tasks,).
        coordinates: how many to learn from, where the rule does not allow for all.
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
        replay.see(seen)  # SampledReplay copies; what is of gains alone needs no coordinates
        if not config.mixture:
            update, state = rule.advance(seen, state)
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
    estimate = differences(losses, task, floor, limit) @ run.xi / (2 * sigma * n)
    return estimate, losses.mean(0).view(-1, *task.lead).mean(0)


def reunite(run: OpenRun) -> None:
    """The second particles go on from where the first are."""

    def twice(x: Tensor) -> Tensor:
        return x[: len(run.xi)].repeat(2, *[1] * (x.dim() - 1))

    run.theta, run.xi = twice(run.theta), torch.zeros_like(run.xi)
    run.state = run.state.map(twice)
