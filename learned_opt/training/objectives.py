"""What a rule is trained on: geodesic imitation, and the loss of its own runs.

Both roll the rule out without a graph and replay its network once, see replay.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learned_opt.rules.base import State, UpdateRule
from learned_opt.tasks.base import Task, seed_of
from learned_opt.training.replay import start_replay, sum_by_tensor

PULL = 0.2  # share of the distance to the path that a target takes back
MAX_PULL = 2.0  # in steps of the path; an uncapped pull did worse
MAX_DRIVE = 3.0  # the student's own step while it drives, in steps of the path
MIN_PROGRESS = 0.25  # steps along the path that count even when the student stands still
AHEAD = 5  # segments ahead in which the nearest point is looked for
HUBER = 3.0  # error beyond which the loss is linear, in RMS of the path's step


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
    """Regression of the rule's updates onto steps along a geodesic.

    The mean over steps and tensors, weighed by their size, of the pseudo-Huber loss
    β²(√(1 + e²/β²) − 1), where e is the RMS over the tensor of u − target, in units of that of
    the path's step.

    Off policy θ follows the path itself and the target is the path's next step. On policy the
    rule drives; its progress τ is the nearest point of the path ahead, and the target is the
    path's step there plus PULL of the way back to it (DAgger's relabelling: Ross et al. 2011,
    arXiv 1011.0686).

    Args:
        points: (tasks, steps + 1, d), the path of each task.
        lengths: (tasks,), steps of it that are real; the rest is not learned from.
        coordinates: how many to learn from, where the rule does not allow for all.
        key: of the randomness.
    """
    steps = points.shape[1] - 1
    theta, tasks = points[:, 0], torch.arange(len(points), device=points.device)
    state = rule.init_state(theta, task.shapes)
    replay = start_replay(rule, state, coordinates, *key)
    progress = points.new_zeros(len(points))
    targets, scales, masks = [], [], []
    with torch.no_grad():
        for step in range(steps):
            _, grad = task.loss_and_grad(theta, task.batch(seed_of(*key), step))
            observation, state = rule.observe(grad, theta, state)
            replay.see(observation)
            segment = progress.long().clamp(max=steps - 1)
            start = points[tasks, segment]
            ahead = points[tasks, segment + 1] - start
            length = ahead.norm(dim=-1, keepdim=True)
            off = start + (progress - segment)[:, None] * ahead - theta
            targets.append(ahead + cap(PULL * off, MAX_PULL * length))
            scales.append(sum_by_tensor(ahead.square(), state.layout))
            masks.append((progress < lengths).float().repeat_interleave(len(task.shapes)))
            if student_drives:
                update, state = rule.advance(observation, state)
                theta = theta + cap(update.nan_to_num(), MAX_DRIVE * length)
                progress = nearest(theta, points, progress).minimum(lengths.float())
            else:
                theta = theta + ahead
                progress = (progress + 1).minimum(lengths.float())
    error = replay.squared_error(targets) / torch.stack(scales).clamp(min=1e-20)
    sizes = points.new_tensor(state.layout.sizes)
    mask = torch.stack(masks) * sizes.repeat(len(points))
    loss = HUBER**2 * ((1 + torch.where(mask > 0, error, 0) / HUBER**2).sqrt() - 1)
    return (mask * loss).sum() / mask.sum().clamp(min=1)


def nearest(theta: Tensor, points: Tensor, progress: Tensor) -> Tensor:
    """Where along `points` (tasks, steps + 1, d) theta (tasks, d) is, in steps, (tasks,): the
    nearest point of the next AHEAD segments, at least MIN_PROGRESS further than `progress`."""
    last = points.shape[1] - 2
    segments = (progress.long()[:, None] + torch.arange(AHEAD, device=points.device)).clamp(
        max=last
    )
    tasks = torch.arange(len(points), device=points.device)[:, None]
    start, end = points[tasks, segments], points[tasks, segments + 1]
    along, to = end - start, theta[:, None] - start
    share = (to * along).sum(-1) / along.square().sum(-1).clamp(min=1e-30)
    share = share.clamp(0, 1)
    distance = (to - share.unsqueeze(-1) * along).norm(dim=-1)
    best = distance.argmin(-1, keepdim=True)
    found = (segments + share).gather(-1, best).squeeze(-1)
    return torch.maximum(found, progress + MIN_PROGRESS)


@dataclass
class OpenRun:
    """A run that meta-training comes back to, window after window.

    Attributes:
        key: of its tasks and minibatches.
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
            run.theta = run.theta + update
        mean = torch.stack(losses[1:]).mean(0)
        future = torch.stack(grads[1:]).flip(0).cumsum(0).flip(0)  # Σ_{t>s} g_t
        good = mean.isfinite() & future.isfinite().all(0).all(-1)
        future = torch.where(good[:, None], future / (mean + floor)[:, None], 0)
    return replay.inner(list(future)).sum() / (len(mean) * steps), mean
