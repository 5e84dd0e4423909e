"""Plain SGD runs, between whose iterates geodesics are found.

    θ_{t+1} = θ_t − η ∇F(θ_t; batch_t)

Many runs of one shape are computed side by side, each with its own learning rate η.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GradFn = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Maps θ (runs, d) and a key to the losses (runs,) and gradients (runs, d) on that minibatch."""

RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
PROBE_STEPS = 60
STUCK_RATIO = 0.65  # 1.5 / log 10: a ten-class run that ends above loss 1.5 has learned little


@dataclass(frozen=True)
class Trajectory:
    """The recorded iterates of SGD runs.

    Attributes:
        points: (records, runs, d); every `stride`-th iterate, beginning with the start.
        losses: (records, runs); F on the fixed evaluation set.
        learning_rate: (runs,).
        stride: the number of SGD steps between two records.
    """

    points: Tensor
    losses: Tensor
    learning_rate: Tensor
    stride: int

    @property
    def diverged(self) -> Tensor:
        """(runs,) bool: a loss is not finite, or the last loss is above the first."""
        return ~self.losses.isfinite().all(0) | ~(self.losses[-1] <= self.losses[0])

    @property
    def stuck(self) -> Tensor:
        """(runs,) bool: the run did not diverge, but its last loss is above STUCK_RATIO × first."""
        return ~self.diverged & (self.losses[-1] > STUCK_RATIO * self.losses[0])


def probe_learning_rate(
    grad_fn: GradFn,
    loss_fn: Callable[[Tensor], Tensor],
    theta: Tensor,
    rates: Sequence[float] = RATES,
    steps: int = PROBE_STEPS,
) -> Tensor:
    """Returns the rate of each run that gives the lowest F after `steps` SGD steps, (runs,).

    Args:
        grad_fn: minibatch gradients, see GradFn.
        loss_fn: F on the fixed evaluation set; it maps (runs, d) to (runs,).
        theta: the starting points, (runs, d).
        rates: the candidate learning rates.
        steps: the number of SGD steps of each trial.
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
    """Runs SGD for `steps` steps and records every `stride`-th iterate.

    Args:
        grad_fn: minibatch gradients, see GradFn.
        loss_fn: F on the fixed evaluation set; it maps (runs, d) to (runs,).
        theta: the starting points, (runs, d).
        learning_rate: η of each run, (runs,).
        steps: the number of steps, a multiple of `stride`.
        stride: the number of steps between two records.

    Raises:
        ValueError: `steps` is not a multiple of `stride`.
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
