"""Regression of a rule's updates onto steps along geodesics, and its loss.

The rule is rolled out without a graph and its network replayed once, see replay.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learned_opt.config import TrainConfig
from learned_opt.rules import Layout, UpdateRule
from learned_opt.tasks.base import Task, generator, seed_of
from learned_opt.training.base import Objective, between
from learned_opt.training.replay import Replay, start_replay, sum_by_tensor

if TYPE_CHECKING:
    from learned_opt.training.module import MetaTraining

PULL = 0.2  # share of the distance to the path that a target takes back
MAX_PULL = 2.0  # in steps of the path; an uncapped pull did worse
MAX_DRIVE = 3.0  # the student's own step while it drives, in steps of the path
MIN_PROGRESS = 0.25  # steps along the path that count even when the student stands still
AHEAD = 5  # segments ahead in which the nearest point is looked for
HUBER = 3.0  # error beyond which the loss is linear, in RMS of the teacher's step
VANISHED = 1e-4  # an update this small a share of its target is as wrong as one can be in size


class Imitation(Objective):
    """Imitation of geodesics, on policy in a share of the updates that grows with time."""

    name = "imitation"

    def loss(self, module: MetaTraining, item: dict) -> Tensor:
        config, geodesics = self.config, self.config.geodesics
        key = (config.seed, module.global_rank, item["number"])
        task = module.tasks(geodesics.family, "train", geodesics.seed, item["shard"])
        module.inner_steps += item["lengths"].sum()
        return imitation_loss(
            module.rule, task, item["points"], item["lengths"], config.coordinates,
            student_drives(config, *key), key, config.imitation_form,
        )  # fmt: skip


def student_drives(config: TrainConfig, *key: int) -> bool:
    """Whether the update of `key` (seed, rank, number) is on policy."""
    share = between(config.teacher_share, min(1.0, 2 * key[-1] / config.updates))
    return float(torch.rand((), generator=generator("driver", *key))) >= share


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
    form: str = "huber",
) -> Tensor:
    """`regression` of the rule's updates onto steps along a geodesic, measured by the path's step.

    Off policy θ follows the path itself and the target is the path's next step. On policy the
    rule drives; its progress τ is the nearest point of the path ahead, and the target is the
    path's step there plus PULL of the way back to it (DAgger's relabelling: Ross et al. 2011,
    arXiv 1011.0686).

    Args:
        points: (tasks, steps + 1, d), the path of each task.
        lengths: (tasks,), steps of it that are real; the rest is not learned from.
        coordinates: how many to learn from, where the rule does not allow for all.
        key: of the randomness.
        form: of the loss, "huber" or "cosine".
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
    """How far the updates u of a rollout are from their targets y: the mean over steps and
    tensors, weighed by their size, of one of

    - "huber": β²(√(1 + e²/β²) − 1), e the RMS over the tensor of u − y in units of the scale's;
    - "cosine": 1 − cos(u, y) + log²(|u| / |y|), each tensor's direction and size apart.

    Args:
        targets: y, (tasks, d) for each step.
        scales: squared norms of what an update is measured by, (steps, tasks · tensors).
        mask: 1 where there is something to learn, (steps, tasks · tensors).
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
