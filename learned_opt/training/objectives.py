"""What a rule is trained on: geodesic imitation, and the loss of its own runs.

Both roll the rule out without a graph, keep what it observed at a random subset of coordinates,
and replay the network on that once. Since all coordinates share the network, the subset gives
an unbiased gradient at a fraction of the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from learned_opt.rules.base import Observation, State, UpdateRule
from learned_opt.tasks.base import Task, generator

PULL = 0.2  # share of the distance to the path that a target takes back
MAX_PULL = 2.0  # in steps of the path; an uncapped pull did worse
MAX_DRIVE = 3.0  # the student's own step while it drives, in steps of the path
MIN_PROGRESS = 0.25  # steps along the path that count even when the student stands still
AHEAD = 5  # segments ahead in which the nearest point is looked for
HUBER = 3.0  # in units of the tensor's target RMS


def sample_coordinates(total: int, count: int, *key: object) -> Tensor:
    """`count` of `total` coordinates without replacement, (count,); all if there are fewer."""
    return torch.randperm(total, generator=generator("coordinates", *key))[:count]


def replay(rule: UpdateRule, observations: Sequence[Observation], hidden: Tensor) -> Tensor:
    """The updates (steps, n) that the rule makes of these observations, with a graph.

    What is not finite is replaced: a lost task weighs nothing, but 0 · NaN would reach the others.
    """
    updates, hidden = [], _finite(hidden)
    for seen in observations:
        seen = Observation(_finite(seen.coordinate), _finite(seen.tensor), seen.layout)
        update, hidden = rule.respond(seen, hidden)
        updates.append(update)
    return torch.stack(updates)


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(1.0, 1.0, 1.0)  # not 0: rules divide by some of it


def tensor_rms(x: Tensor, layout) -> Tensor:
    """RMS over the tensor that a coordinate belongs to, (*, d) -> (*, d)."""
    parts = x.split(layout.sizes, dim=-1)
    rms = torch.stack([p.square().mean(-1).sqrt() for p in parts], dim=-1)
    return rms[..., layout.tensor_of]


def cap(x: Tensor, limit: Tensor) -> Tensor:
    """x (tasks, d), shortened to Euclidean norm `limit` (tasks, 1) where it is longer."""
    return x * (limit / x.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1)


def imitation_loss(
    rule: UpdateRule,
    task: Task,
    points: Tensor,
    lengths: Tensor,
    coordinates: int,
    student_drives: bool,
    key: tuple[object, ...],
) -> Tensor:
    """Regression of the rule's updates onto steps along a geodesic: mean Huber(u/σ, target/σ).

    Off policy θ follows the path itself and the target is the path's next step. On policy the
    rule drives; its progress τ is the nearest point of the path ahead, and the target is the
    path's step there plus PULL of the way back to it (DAgger's relabelling: Ross et al. 2011,
    arXiv 1011.0686). σ is the RMS of the path's step over the tensor.

    Args:
        points: (tasks, steps + 1, d), the path of each task.
        lengths: (tasks,), steps of it that are real; the rest is not learned from.
        coordinates: how many to learn from.
        key: of the randomness.
    """
    steps = points.shape[1] - 1
    theta, tasks = points[:, 0], torch.arange(len(points))
    state = rule.init_state(theta, task.shapes)
    index = sample_coordinates(theta.numel(), coordinates, *key)
    hidden = rule.pick_hidden(state, index)
    progress = torch.zeros(len(points))
    observations, targets, scales, masks = [], [], [], []
    with torch.no_grad():
        for step in range(steps):
            _, grad = task.loss_and_grad(theta, task.batch(hash_key(key), step))
            observation, state = rule.observe(grad, theta, state)
            observations.append(observation.pick(index))
            segment = progress.long().clamp(max=steps - 1)
            start = points[tasks, segment]
            ahead = points[tasks, segment + 1] - start
            length = ahead.norm(dim=-1, keepdim=True)
            off = start + (progress - segment)[:, None] * ahead - theta
            target = ahead + cap(PULL * off, MAX_PULL * length)
            sigma = tensor_rms(ahead, state.layout).clamp(min=1e-12)
            targets.append(target.flatten()[index])
            scales.append(sigma.flatten()[index])
            masks.append((progress < lengths).float()[index // theta.shape[-1]])
            if student_drives:
                update, state = rule.advance(observation, state)
                theta = theta + cap(update.nan_to_num(), MAX_DRIVE * length)
                progress = nearest(theta, points, progress).minimum(lengths.float())
            else:
                theta = theta + ahead
                progress = (progress + 1).minimum(lengths.float())
    updates = replay(rule, observations, hidden)
    scale, mask = torch.stack(scales), torch.stack(masks)
    error = F.smooth_l1_loss(
        updates / scale, torch.stack(targets) / scale, beta=HUBER, reduction="none"
    )
    return (mask * error).sum() / mask.sum().clamp(min=1)


def nearest(theta: Tensor, points: Tensor, progress: Tensor) -> Tensor:
    """Where along `points` (tasks, steps + 1, d) theta (tasks, d) is, in steps, (tasks,): the
    nearest point of the next AHEAD segments, at least MIN_PROGRESS further than `progress`."""
    last = points.shape[1] - 2
    segments = (progress.long()[:, None] + torch.arange(AHEAD)).clamp(max=last)
    tasks = torch.arange(len(points))[:, None]
    start, end = points[tasks, segments], points[tasks, segments + 1]
    along, to = end - start, theta[:, None] - start
    share = (to * along).sum(-1) / along.square().sum(-1).clamp(min=1e-30)
    share = share.clamp(0, 1)
    distance = (to - share.unsqueeze(-1) * along).norm(dim=-1)
    best = distance.argmin(-1, keepdim=True)
    found = (segments + share).gather(-1, best).squeeze(-1)
    return torch.maximum(found, progress + MIN_PROGRESS)


def hash_key(key: tuple[object, ...]) -> int:
    """A seed for `Task.batch` from a key."""
    return generator(*key).initial_seed()


@dataclass
class OpenRun:
    """A run that meta-training comes back to, window after window.

    Attributes:
        key: of its tasks, init and minibatches.
        horizon: steps after which it ends.
        theta: (tasks, d).
        state: the rule's.
    """

    key: tuple[object, ...]
    horizon: int
    theta: Tensor
    state: State


def meta_loss(
    rule: UpdateRule, task: Task, run: OpenRun, steps: int, coordinates: int, floor: float
) -> tuple[Tensor, Tensor]:
    """The loss Σ_t F(θ_t) of the rule's next `steps` updates; moves `run` on.

    With gradients stopped, as in L2L (Andrychowicz et al. 2016, section 2.1), its gradient in
    the network's weights is that of the linear form Σ_s ⟨u_s, Σ_{t>s} g_t⟩ with g detached, so
    nothing is propagated through the task. Tasks weigh 1 / (mean loss + floor): what counts is
    the relative fall of the loss. A task whose loss or gradient is not finite weighs nothing.

    Returns:
        the linear form, whose gradient is the meta-gradient, and mean losses, (tasks,).
    """
    seed = hash_key(run.key)
    index = sample_coordinates(run.theta.numel(), coordinates, *run.key, run.state.step)
    hidden = rule.pick_hidden(run.state, index)
    observations, losses, grads = [], [], []
    with torch.no_grad():
        for step in range(steps + 1):
            loss, grad = task.loss_and_grad(run.theta, task.batch(seed, run.state.step))
            losses.append(loss)
            grads.append(grad.flatten()[index])
            if step == steps:
                break
            observation, run.state = rule.observe(grad, run.theta, run.state)
            observations.append(observation.pick(index))
            update, run.state = rule.advance(observation, run.state)
            run.theta = run.theta + update
        mean = torch.stack(losses[1:]).mean(0)
        future = torch.stack(grads[1:]).flip(0).cumsum(0).flip(0)  # Σ_{t>s} g_t
        weight = (1 / (mean + floor))[index // run.theta.shape[-1]]
        future = torch.where(torch.isfinite(weight) & future.isfinite().all(0), future * weight, 0)
    updates = replay(rule, observations, hidden)
    linear = torch.where(future == 0, 0, updates * future).sum()
    return linear * (run.theta.numel() / len(index) / len(run.theta) / steps), mean
