"""Imitation of target paths: regression of a rule's updates onto steps along the paths.

The rule is rolled out without a graph, and its network is replayed once, see replay.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learned_opt.rules import Layout, UpdateRule
from learned_opt.tasks.base import Task, generator, seed_of
from learned_opt.tasks.families import shard_key
from learned_opt.training.objectives.base import Context, Objective, between
from learned_opt.training.objectives.replay import Replay, start_replay, sum_by_tensor

if TYPE_CHECKING:
    from learned_opt.config import TrainConfig

PULL = 0.2  # the share of the distance to the path by which a target returns to it
MAX_PULL = 2.0  # the largest return, in steps of the path; without a limit results were worse
MAX_DRIVE = 3.0  # the largest update of the student on policy, in steps of the path
MIN_PROGRESS = 0.25  # the least progress in an update, in steps of the path
AHEAD = 5  # the number of segments ahead in which the nearest point is searched
HUBER = 3.0  # the error beyond which the loss is linear, in RMS of the teacher's step
VANISHED = 1e-4  # updates below this share of their target have the largest error of size


class Imitation(Objective):
    """Imitates geodesics, on policy in a share of the updates that grows during training."""

    name = "imitation"

    def loss(self, context: Context, item: dict) -> Tensor:
        config, geodesics = self.config, self.config.geodesics
        key = (config.seed, context.rank, item["number"])
        task = context.draw(geodesics.family, *shard_key(geodesics.seed, item["shard"]))
        context.count(item["lengths"].sum())
        return imitation_loss(
            context.rule, task, item["points"], item["lengths"], config.coordinates,
            student_drives(config, *key), key, config.imitation_form,
        )  # fmt: skip


def student_drives(config: TrainConfig, *key: int) -> bool:
    """Whether the update of `key` (seed, rank, number) is on policy."""
    share = between(config.teacher_share, min(1.0, 2 * key[-1] / config.updates))
    return float(torch.rand((), generator=generator("driver", *key))) >= share


def cap(x: Tensor, limit: Tensor) -> Tensor:
    """Returns x (tasks, d) with Euclidean norms clipped to `limit` (tasks, 1)."""
    return x * (limit / x.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1)


def imitation_loss(
    rule: UpdateRule,
    task: Task,
    points: Tensor,
    lengths: Tensor,
    coordinates: int,
    student_drives: bool,
    key: tuple[object, ...],
    form: str = "huber",
) -> Tensor:
    """Returns the `regression` loss of the rule's updates onto steps along target paths.

    Off policy, θ follows the path and the target is the path's next step. On policy, θ follows the
    rule's updates. Its progress is then the nearest point of the path ahead, and the target is the
    path's step at that point plus PULL times the displacement back to the path (the relabelling of
    DAgger, Ross et al. 2011, arXiv 1011.0686). Errors are measured in units of the path's step.

    Args:
        rule: the rule.
        task: the tasks of the paths.
        points: the path of each task, (tasks, steps + 1, d).
        lengths: the number of steps of each path, (tasks,); the rest of `points` is padding.
        coordinates: the number of coordinates to learn from, for rules without gains per tensor.
        student_drives: whether the rollout is on policy.
        key: the key of minibatches and coordinates.
        form: the form of the loss, "huber" or "cosine".
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
    return regression(replay, targets, torch.stack(scales), torch.stack(masks), state.layout, form)


def regression(
    replay: Replay,
    targets: list[Tensor],
    scales: Tensor,
    mask: Tensor,
    layout: Layout,
    form: str = "huber",
) -> Tensor:
    """Returns the mean error of the updates u of a rollout with respect to their targets y.

    The mean is over steps and tensors, weighted by the size of the tensor. The error is

    - "huber": β²(√(1 + e²/β²) − 1), where e is the RMS of u − y over the tensor divided by that of
      the scale;
    - "cosine": 1 − cos(u, y) + log²(|u| / |y|), which compares direction and size separately.

    Args:
        replay: the replay of the rollout.
        targets: y of each step, (tasks, d).
        scales: the squared norms by which errors are measured, (steps, tasks · tensors).
        mask: 1 for tensors to learn from and 0 for others, (steps, tasks · tensors).
        layout: the layout of the tensors.
        form: "huber" or "cosine".
    """
    if form == "huber":
        error = replay.squared_error(targets) / scales.clamp(min=1e-20)
        loss = HUBER**2 * ((1 + torch.where(mask > 0, error, 0) / HUBER**2).sqrt() - 1)
    else:
        u, product, y = replay.moments(targets)
        mask = mask * (y > 0)
        y = torch.where(mask > 0, y, 1)
        u = torch.maximum(torch.where(mask > 0, u, 1), VANISHED**2 * y)
        cosine = torch.where(mask > 0, product, 0) * (u * y).rsqrt()
        loss = 1 - cosine + (u / y).log().square() / 4
    weights = mask * scales.new_tensor(layout.sizes).repeat(mask.shape[1] // len(layout.sizes))
    return (weights * loss).sum() / weights.sum().clamp(min=1)


def nearest(theta: Tensor, points: Tensor, progress: Tensor) -> Tensor:
    """Returns the progress of theta (tasks, d) along `points` (tasks, steps + 1, d), in steps.

    It is the place of the nearest point in the next AHEAD segments, and at least MIN_PROGRESS more
    than the last `progress`; both are (tasks,).
    """
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
