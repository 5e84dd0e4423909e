"""Runs an optimizer or a rule on a task, for the benchmark, validation and training."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from learned_opt.peak_memory import peak_memory
from learned_opt.rules.base import UpdateRule
from learned_opt.tasks.base import Task
from learned_opt.tasks.trainee import Parameters, Trainee

MakeOptimizer = Callable[[Parameters], Any]  # makes an optimizer, or a `Together` of several


@contextmanager
def one_thread() -> Iterator[None]:
    """torch with one thread, unless $OMP_NUM_THREADS says otherwise: the tensors of small tasks
    are small, and a second thread costs more than it brings."""
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Run:
    """The result of one optimizer on one task.

    Attributes:
        losses: the minibatch loss before each step, (steps,); NaN after a divergence.
        evaluation: the result of the task's `evaluate` at the end, on all data.
        validation: the number of steps and the validation loss of each evaluation,
            (evaluations, 2); empty if none was asked for.
        seconds: the wall-clock time of the steps, without evaluations.
        peak_memory: the most bytes that the steps took, without parameters; NaN if unknown.
        diverged: whether a training loss or the final loss was not finite.
    """

    losses: np.ndarray
    evaluation: dict[str, float]
    validation: np.ndarray
    seconds: float
    peak_memory: float
    diverged: bool


def train(trainee: Trainee, optimizer: Any, steps: int) -> Iterator[float]:
    """Trains step by step, and yields the loss before each step.

    It ends after a loss that is not finite.
    """
    for step in range(steps):
        optimizer.zero_grad()
        loss = trainee.loss(step)
        value = loss.item()
        if np.isfinite(value):
            loss.backward()
            optimizer.step()
        yield value
        if not np.isfinite(value):
            return


class Trainable(Protocol):
    """A task, as far as a run needs it."""

    def trainee(self, seed: int) -> Trainee: ...


def run_optimizer(
    task: Trainable,
    make_optimizer: MakeOptimizer,
    seed: int,
    steps: int,
    evaluate_at: Collection[int] = (),
    stop: Callable[[int, float], bool] = lambda step, loss: False,
) -> Run:
    """Trains a single task with a torch optimizer and returns the result.

    Args:
        task: the task.
        make_optimizer: makes the optimizer from the parameters.
        seed: the seed of the initial parameters and of the minibatches.
        steps: the number of steps.
        evaluate_at: the numbers of steps after which to compute the validation loss.
        stop: decides from one of these and the loss whether to stop the run, which then counts as
            diverged.
    """
    trainee = task.trainee(seed)
    optimizer = make_optimizer(trainee.params)
    losses = np.full(steps, np.nan)
    validation: list[tuple[int, float]] = []
    evaluate_at = {*evaluate_at}

    def validate(step: int) -> bool:
        """Validates if `step` is in `evaluate_at`, and returns whether to continue."""
        if step not in evaluate_at:
            return True
        with _evaluating(optimizer) as averages:
            validation.append((step, trainee.validate(averages)))
        return np.isfinite(validation[-1][1]) and not stop(*validation[-1])

    with peak_memory(trainee.params[0].device) as peak:
        seconds, going = 0.0, validate(0)
        run = train(trainee, optimizer, steps)
        for step in range(1, steps + 1):
            start = time.perf_counter()
            losses[step - 1] = next(run)
            seconds += time.perf_counter() - start
            going = np.isfinite(losses[step - 1]) and validate(step)
            if not going:
                break
        memory = peak()
    with _evaluating(optimizer) as averages:
        evaluation = trainee.evaluate(averages)
    finite = np.isfinite(losses).all() and np.isfinite(next(iter(evaluation.values())))
    curve = np.array(validation).reshape(-1, 2)
    return Run(losses, evaluation, curve, seconds, memory, not (going and finite))


@contextmanager
def _evaluating(optimizer: Any) -> Iterator[bool]:
    """Switches an optimizer that evaluates at other weights; yields whether it is one."""
    averages = getattr(optimizer, "averages", hasattr(optimizer, "eval"))
    if averages:
        optimizer.eval()
    try:
        yield averages
    finally:
        if averages:
            optimizer.train()


def run_rule(task: Task, rule: UpdateRule, seed: int, steps: int) -> tuple[Tensor, Tensor]:
    """Trains a batch of tasks with a rule.

    Returns:
        the minibatch loss before each step, (steps, *tasks), and the final theta, (*tasks, d).
    """
    theta = task.init(seed)
    state = rule.init_state(theta, task.shapes)
    losses = []
    for step in range(steps):
        loss, grad = task.loss_and_grad(theta, task.batch(seed, step))
        losses.append(loss)
        update, state = rule.update(grad, theta, state, in_place=True)
        theta = rule.moved(theta, update, state.layout)
    return torch.stack(losses), theta
