"""Rescales tasks: the parameters tensor by tensor, and the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from learned_opt.tasks.base import Batch, Task, seed_of


class RescaledTask(Task):
    """F'(θ') = c · F(s · θ'), with a number s for each tensor and a number c for each task.

    The optimizer is given θ' = θ/s, which starts at θ₀/s, and the gradient c · s · ∇F(s · θ'). It
    cannot rely on the scale of weights or gradients then (Metz et al. 2022, arXiv 2211.09760).

    Args:
        task: the task F.
        scales: s, (*tasks, tensors).
        weights: c, (*tasks,); 1 by default.
    """

    def __init__(self, task: Task, scales: Tensor, weights: Tensor | None = None) -> None:
        self.task, self.config, self.name = task, task.config, task.name
        self.shapes, self.num_tasks, self.device = task.shapes, task.num_tasks, task.device
        weights = scales.new_ones(self.lead) if weights is None else weights
        self._scales, self._weights = scales.to(task.device), weights.to(task.device)
        self.chance = self._weights * task.chance

    def _stretch(self, theta: Tensor | Sequence[Tensor], scales: Tensor) -> list[Tensor]:
        tensors = self.unflatten(theta) if isinstance(theta, Tensor) else theta
        pairs = zip(tensors, scales.unbind(-1), strict=True)
        return [t * s.reshape(*s.shape, *(1,) * (t.dim() - s.dim())) for t, s in pairs]

    def _flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.flatten(len(self.lead)) for t in tensors], -1)

    def init(self, seed: int) -> Tensor:
        return self._flatten(self._stretch(self.task.init(seed), 1 / self._scales))

    def batch(self, seed: int, step: int) -> Batch:
        return self._scales, self._weights, *self.task.batch(seed, step)

    def fixed_batch(self, size: int | None = None) -> Batch:
        return self._scales, self._weights, *self.task.fixed_batch(size)

    def loss(self, theta: Tensor | Sequence[Tensor], batch: Batch) -> Tensor:
        scales, weights, *rest = batch
        return weights * self.task.loss(self._stretch(theta, scales), tuple(rest))

    def evaluate(self, theta: Tensor) -> dict[str, Tensor]:
        found = self.task.evaluate(self._flatten(self._stretch(theta, self._scales)))
        losses = {name: self._weights * found[name] for name in ("train_loss", "test_loss")}
        return found | losses


def equal_gradients(task: Task, examples: int = 256) -> Tensor:
    """Returns c (tasks,) that makes |c ∇F(θ₀)| the same for all tasks, namely their geometric mean.

    θ₀ is one fixed initial point of each task, and F the loss on `examples` fixed examples. With
    other initial points and minibatches the norms are therefore only similar.
    """
    _, grad = task.loss_and_grad(task.init(seed_of("equal")), task.fixed_batch(examples))
    log_norm = grad.norm(dim=-1).clamp(min=1e-30).log()
    return (log_norm.mean() - log_norm).exp()
