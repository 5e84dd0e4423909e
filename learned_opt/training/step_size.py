"""Evolution strategies on the sizes of steps: long runs, with few numbers to perturb."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from learned_opt.rules import Observation, State, UpdateRule
from learned_opt.tasks.base import Task, generator
from learned_opt.training.pes import AntitheticRuns, differences, roll_out
from learned_opt.training.replay import start_replay
from learned_opt.training.runs import OpenRun
from learned_opt.training.start import trainable

TINY = 1e-30  # squared norm of an update that has no size to learn


class StepSize(AntitheticRuns):
    """How long steps are, by what becomes of the run; where they point is not touched.

    Every task is a pair of particles, whose updates of tensor i are e^{±σ ε_i} u_i, with
    ε_i = (z + z_i) / √2, z and z_i ~ N(0, 1) drawn anew in every window: one factor for the network
    and one for each tensor. ξ is the sum, over windows since the pair was last together, of

        Σ_i ε_i ∂ log|u_i| / ∂w,    the mean over the window's steps and both particles;

        ĝ = 1 / (2 σ N) Σ_pairs ξ (L⁺ − L⁻),    L = log(mean loss of the window + loss_floor).

    As in PES (pes.py) a window's losses count for all earlier windows' steps, but what is perturbed
    are as many numbers as there are tensors and not the thousands of meta-parameters, whose noise
    the estimate would have; the chain rule does the rest (REINFORCE, Williams 1992, with
    antithetic pairs). It is the gradient for a single tensor; several share z, which makes it that
    gradient times the covariance of ε, still downhill. Every `together` windows the second particle
    goes on from where the first is, as differences of runs that have long gone apart are noise.
    """

    name = "step_size"
    pairs = 1

    def window(
        self, rule: UpdateRule, task: Task, run: OpenRun, steps: int
    ) -> tuple[Tensor, Tensor]:
        config, weights = self.config, trainable(rule)
        if run.state.step // config.window % config.step_size.together == 0:
            reunite(run)
        estimate, losses = step_size_gradient(
            rule, task, run, steps, config.step_size.sigma, config.loss_floor, self.limit(task),
            config.coordinates,
        )  # fmt: skip
        now = nn.utils.parameters_to_vector(weights)
        value = losses.nanmean().nan_to_num()
        return value + estimate @ (now - now.detach()), losses


def step_size_gradient(
    rule: UpdateRule,
    task: Task,
    run: OpenRun,
    steps: int,
    sigma: float,
    floor: float,
    limit: float | Tensor,
    coordinates: int,
) -> tuple[Tensor, Tensor]:
    """ĝ, (weights,), of the next `steps` updates, and mean losses, (tasks,); moves `run` on.

    Args:
        run: theta (2 · tasks, d), the particles of +ε first; xi (tasks, weights).
        limit: losses count as at most this, a number or (*tasks,).
        coordinates: how many to learn from, where the rule does not allow for all.
    """
    pairs, layout = len(run.xi), run.state.layout
    rng = generator("step sizes", *run.key, run.state.step)
    common, own = (torch.randn(pairs, n, generator=rng) for n in (1, len(layout.shapes)))
    epsilon = ((common + own) / 2**0.5).to(run.theta)
    both = torch.cat([epsilon, epsilon])
    factors = layout.expand((sigma * torch.cat([epsilon, -epsilon])).exp())
    replay = start_replay(rule, run.state, coordinates, *run.key, run.state.step)
    directions: list[Tensor] = []  # of ε_i log|u_i| in u: ⟨u, these⟩ has its gradient

    def advance(seen: Observation, state: State) -> tuple[Tensor, State]:
        replay.see(replace(seen, coordinate=seen.coordinate.clone()))
        update, state = rule.advance(seen, state)
        shares = layout.expand(both / layout.squared_norms(update).clamp(min=TINY))
        directions.append((shares * update).nan_to_num(0.0, 0.0, 0.0))
        return factors * update, state

    losses = roll_out(rule, advance, task, run, steps)
    sizes = replay.inner(directions).view(steps, 2, pairs, -1).sum(-1).mean((0, 1))
    eye = torch.eye(pairs, dtype=sizes.dtype, device=sizes.device)
    grads = torch.autograd.grad(sizes, trainable(rule), eye, is_grads_batched=True)
    run.xi = run.xi + torch.cat([g.flatten(1) for g in grads], 1)
    estimate = differences(losses, task, floor, limit) @ run.xi / (2 * sigma * pairs)
    return estimate, losses.mean(0).view(-1, *task.lead).mean(0)


def reunite(run: OpenRun) -> None:
    """The second particles go on from where the first are."""
    pairs = len(run.xi)

    def twice(x: Tensor) -> Tensor:
        return torch.cat([x[:pairs], x[:pairs]])

    kinds = {
        kind: {name: twice(x) for name, x in getattr(run.state, kind).items()}
        for kind in ("coordinate", "tensor")
    }
    run.theta, run.xi = twice(run.theta), torch.zeros_like(run.xi)
    run.state = replace(run.state, **kinds)
