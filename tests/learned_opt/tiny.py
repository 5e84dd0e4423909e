"""Helpers of the tests of objectives."""

from __future__ import annotations

import torch
from torch import Tensor

from learned_opt.rules import UpdateRule
from learned_opt.tasks.data import ImageData
from learned_opt.tasks.mlp import MLPTask, TaskConfig

ALL = 10**6  # coordinates to learn from: more than there are


class DoubleTask(MLPTask):
    def init(self, seed: int) -> Tensor:
        return super().init(seed).double()


def tiny_task(kind: type[MLPTask] = MLPTask) -> MLPTask:
    """Two networks of 4 inputs and 3 classes, in float64."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=rng, dtype=torch.float64)
    y = torch.randint(3, (60,), generator=rng)
    data = ImageData("tiny", x[:40], y[:40], x[40:], y[40:], 3, (4,))
    return kind(TaskConfig(hidden=(5,), activation="tanh", batch_size=8), data, num_tasks=2)


def gradient(loss: Tensor, rule: UpdateRule) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(rule.parameters()))])
