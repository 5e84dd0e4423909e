"""Imitation of a torch optimizer, the control for the imitation of geodesics."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learned_opt.rules import UpdateRule
from learned_opt.tasks.base import Task, seed_of
from learned_opt.training.objectives.base import Context, Objective
from learned_opt.training.objectives.imitation import MAX_DRIVE, cap, regression, student_drives
from learned_opt.training.objectives.replay import start_replay, sum_by_tensor

if TYPE_CHECKING:
    from learned_opt.config import TeacherConfig


class TorchImitation(Objective):
    """Imitates `teacher` on tasks of the geodesics' family, with a new draw in each update."""

    name = "torch_imitation"

    def loss(self, context: Context, item: dict) -> Tensor:
        config, key = self.config, (self.config.seed, context.rank, item["number"])
        task = context.draw(config.geodesics.family, "train", *key)
        context.count(config.teacher.length * config.geodesics.family.num_tasks)
        return torch_imitation_loss(
            context.rule, task, config.teacher, config.coordinates,
            student_drives(config, *key), key, config.imitation_form,
        )  # fmt: skip


class Teacher:
    """An element-wise torch optimizer on the flat parameters of many tasks."""

    def __init__(self, config: TeacherConfig, theta: Tensor) -> None:
        self.theta = theta.clone().requires_grad_()
        self.optimizer = config.make(self.theta)

    def step(self, theta: Tensor, grad: Tensor) -> Tensor:
        """Returns θ after one step of the optimizer from `theta`, and advances its state."""
        with torch.no_grad():
            self.theta.copy_(theta)
        self.theta.grad = grad
        self.optimizer.step()
        return self.theta.detach().clone()


def torch_imitation_loss(
    rule: UpdateRule,
    task: Task,
    config: TeacherConfig,
    coordinates: int,
    student_drives: bool,
    key: tuple[object, ...],
    form: str = "huber",
) -> Tensor:
    """Returns the `regression` loss of the rule's updates onto K = `config.steps` teacher steps.

    The first of the K steps uses the same minibatch as the rule. Off policy, θ follows the teacher,
    whose state is that of its own run. On policy, θ follows the rule's updates, which are clipped.
    The state of the teacher then comes from the same gradients as the rule's, and its K steps start
    from the rule's θ.

    Args:
        rule: the rule.
        task: the tasks to train on.
        config: the teacher.
        coordinates: the number of coordinates to learn from, for rules without gains per tensor.
        student_drives: whether the rollout is on policy.
        key: the key of initial parameters, minibatches and coordinates.
        form: the form of the loss, "huber" or "cosine".
    """
    seed = seed_of(*key)
    theta = task.init(seed)
    state = rule.init_state(theta, task.shapes)
    replay, teacher = start_replay(rule, state, coordinates, *key), Teacher(config, theta)
    alive = torch.ones(len(theta), dtype=torch.bool, device=theta.device)
    targets, scales, masks = [], [], []
    with torch.no_grad():
        for step in range(config.length):
            _, grad = task.loss_and_grad(theta, task.batch(seed, step))
            observation, state = rule.observe(grad, theta, state)
            replay.see(observation)
            after = teacher.step(theta, grad)
            ahead = deepcopy(teacher) if student_drives and config.steps > 1 else teacher
            for more in range(1, config.steps):
                _, grad = task.loss_and_grad(after, task.batch(seed, step + more * config.length))
                after = ahead.step(after, grad)
            alive &= (after - theta).isfinite().all(-1)
            targets.append(torch.where(alive[:, None], after - theta, 0))
            scales.append(sum_by_tensor(targets[-1].square(), state.layout))
            masks.append((scales[-1] > 0).to(theta.dtype))  # 0 for tasks that diverged
            if student_drives:
                update, state = rule.advance(observation, state)
                limit = MAX_DRIVE * targets[-1].norm(dim=-1, keepdim=True)
                theta = theta + cap(update.nan_to_num(), limit)
            else:
                theta = theta + targets[-1]
    return regression(replay, targets, torch.stack(scales), torch.stack(masks), state.layout, form)
