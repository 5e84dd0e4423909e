"""Vanilla SGD runs: the teacher that geodesics shorten.

θ_{t+1} = θ_t − η ∇F(θ_t; batch_t), many runs of one shape side by side, each with its own η.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GradFn = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(θ (runs, d), key) -> losses (runs,) and gradients (runs, d) on the minibatch of that key."""

RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
PROBE_STEPS = 60
STUCK_RATIO = 0.65  # 1.5 / log 10: a ten-class run that ends above loss 1.5 has learned little


@dataclass(frozen=True)
class Trajectory:
    """Recorded iterates of SGD runs.

    Attributes:
        points: (records, runs, d), one every `stride` steps, the first is the start.
        losses: (records, runs), F on the fixed evaluation set.
        learning_rate: (runs,).
        stride: SGD steps between records.
    """

    points: Tensor
    losses: Tensor
    learning_rate: Tensor
    stride: int

    @property
    def diverged(self) -> Tensor:
        """(runs,) bool: some loss is not finite, or the run ends above its start."""
        return ~self.losses.isfinite().all(0) | ~(self.losses[-1] <= self.losses[0])

    @property
    def stuck(self) -> Tensor:
        """(runs,) bool: finite, but the last loss is above STUCK_RATIO of the first."""
        return ~self.diverged & (self.losses[-1] > STUCK_RATIO * self.losses[0])


def probe_learning_rate(
    grad_fn: GradFn,
    loss_fn: Callable[[Tensor], Tensor],
    theta: Tensor,
    rates: Sequence[float] = RATES,
    steps: int = PROBE_STEPS,
) -> Tensor:
    """For each run the rate of lowest F after `steps` SGD steps, (runs,).

    Args:
        grad_fn: see GradFn.
        loss_fn: F on the fixed evaluation set, (runs, d) -> (runs,).
        theta: starts, (runs, d).
    """
    finals = []
    for rate in rates:
        x = theta
        for key in range(steps):
            x = x - rate * grad_fn(x, key)[1]
        finals.append(loss_fn(x).nan_to_num(nan=torch.inf))
    return torch.tensor(rates, dtype=theta.dtype)[torch.stack(finals).argmin(0)]


def sgd_trajectory(
    grad_fn: GradFn,
    loss_fn: Callable[[Tensor], Tensor],
    theta: Tensor,
    learning_rate: Tensor,
    steps: int,
    stride: int,
) -> Trajectory:
    """Runs SGD for `steps` steps (a multiple of `stride`) and records every `stride`-th iterate.

    Args:
        learning_rate: (runs,).
    """
    if steps % stride:
        raise ValueError(f"steps={steps} is not a multiple of stride={stride}; round one of them")
    points, losses, rate = [theta], [loss_fn(theta)], learning_rate.unsqueeze(-1)
    for key in range(steps):
        theta = theta - rate * grad_fn(theta, key)[1]
        if (key + 1) % stride == 0:
            points.append(theta)
            losses.append(loss_fn(theta))
    return Trajectory(torch.stack(points), torch.stack(losses), learning_rate, stride)
