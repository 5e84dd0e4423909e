"""Combines optimizers of several kinds of tensors under one learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

SCHEDULES = ("constant", "cosine", "warmup_cosine")


class Together:
    """Several optimizers that act as one, with a schedule of their learning rates.

    Args:
        optimizers: optimizers of disjoint parameters.
        schedule: one of SCHEDULES.
        steps: the number of steps of the run, after which a schedule ends.
        warmup: the share of the steps in which the rate of "warmup_cosine" rises linearly.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        schedule: str = "constant",
        steps: int = 1,
        warmup: float = 0.05,
    ) -> None:
        self.optimizers = list(optimizers)
        self._schedules = []
        if schedule == "cosine":
            self._schedules = [
                torch.optim.lr_scheduler.CosineAnnealingLR(o, steps) for o in self.optimizers
            ]
        elif schedule == "warmup_cosine":
            factor = warmup_cosine(steps, warmup)
            self._schedules = [
                torch.optim.lr_scheduler.LambdaLR(o, factor) for o in self.optimizers
            ]
        self.train()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def averages(self) -> bool:
        """Whether an optimizer evaluates other weights than it trains, so that it must be told."""
        return any(hasattr(optimizer, "eval") for optimizer in self.optimizers)

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        for schedule in self._schedules:
            schedule.step()

    def train(self) -> None:
        """Is called before training, and again after an evaluation."""
        self._tell("train")

    def eval(self) -> None:
        """Is called before an evaluation."""
        self._tell("eval")

    def _tell(self, mode: str) -> None:
        for optimizer in self.optimizers:
            if hasattr(optimizer, mode):
                getattr(optimizer, mode)()


def warmup_cosine(steps: int, warmup: float) -> Callable[[int], float]:
    """Returns the factor of the learning rate as a function of the step t, from 0.

    It is (t + 1) / w in the first w = max(1, warmup · steps) steps, and then
    (1 + cos(π (t − w) / (steps − w))) / 2, which is 0 only after the last step.
    """
    rise = max(1, round(warmup * steps))

    def factor(t: int) -> float:
        if t < rise:
            return (t + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (t - rise) / max(1, steps - rise))))

    return factor
