"""Runs an optimizer or a rule on a task: benchmark, validation and training share it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learned_opt.memory import peak_memory
from learned_opt.rules.base import UpdateRule
from learned_opt.tasks.base import Task

MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Run:
    """One optimizer on one task.

    Attributes:
        losses: (steps,), the minibatch loss before each step; NaN after a divergence.
        evaluation: train_loss, test_loss and test_accuracy at the end, on all data.
        seconds: wall-clock time of the steps, evaluation not included.
        peak_memory: most bytes that the steps took, parameters not included; NaN if unknown.
        diverged: whether a loss or the final parameters were not finite.
    """

    losses: np.ndarray
    evaluation: dict[str, float]
    seconds: float
    peak_memory: float
    diverged: bool


def train(
    task: Task, params: list[Tensor], optimizer: torch.optim.Optimizer, seed: int, steps: int
) -> Iterator[float]:
    """Trains `params` on minibatches of `seed`, a step each time that it is asked for a loss: that
    before the step. It ends after one that is not finite."""
    for step in range(steps):
        optimizer.zero_grad()
        loss = task.loss(params, task.batch(seed, step))
        value = loss.item()
        if np.isfinite(value):
            loss.backward()
            optimizer.step()
        yield value
        if not np.isfinite(value):
            return


def run_optimizer(task: Task, make_optimizer: MakeOptimizer, seed: int, steps: int) -> Run:
    """Trains a single task from its init of `seed` with a torch optimizer."""
    params = [p.clone().requires_grad_() for p in task.unflatten(task.init(seed))]
    optimizer = make_optimizer(params)
    losses = np.full(steps, np.nan)
    with peak_memory(params[0].device) as peak:
        start = time.perf_counter()
        for step, loss in enumerate(train(task, params, optimizer, seed, steps)):
            losses[step] = loss
        seconds, memory = time.perf_counter() - start, peak()
    theta = torch.cat([p.detach().flatten() for p in params])
    evaluation = {name: float(value) for name, value in task.evaluate(theta).items()}
    diverged = not (np.isfinite(losses).all() and np.isfinite(evaluation["train_loss"]))
    return Run(losses, evaluation, seconds, memory, diverged)


def run_rule(task: Task, rule: UpdateRule, seed: int, steps: int) -> tuple[Tensor, Tensor]:
    """Trains a batch of tasks with a rule.

    Returns:
        minibatch losses (steps, *tasks), before each step, and the final theta (*tasks, d).
    """
    theta = task.init(seed)
    state = rule.init_state(theta, task.shapes)
    losses = []
    for step in range(steps):
        loss, grad = task.loss_and_grad(theta, task.batch(seed, step))
        losses.append(loss)
        update, state = rule.update(grad, theta, state, in_place=True)
        theta = theta + update
    return torch.stack(losses), theta
