"""The interface of tasks: a loss and its data as pure functions of a flat parameter vector.

`theta` is (d,) for a single task, and (tasks, d) for a batch of tasks of one shape; both are
written (*tasks, d). Everything random is keyed, so a minibatch is determined by (seed, step).
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from learned_opt.tasks.trainee import Parameters, Trainee

Batch = tuple[Tensor, ...]
Shapes = tuple[tuple[int, ...], ...]
T = TypeVar("T")


def generator(*key: object) -> torch.Generator:
    """Returns an independent random stream for `key`, which gives the same numbers everywhere."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def seed_of(*key: object) -> int:
    """Returns a seed for `Task.init` and `Task.batch` from a key."""
    return generator(*key).initial_seed()


def uniform(rng: torch.Generator, low: float, high: float, size: tuple[int, ...] = ()) -> Tensor:
    """Returns samples of U(low, high), of shape `size`."""
    return low + (high - low) * torch.rand(size, generator=rng)


def log_uniform(rng: torch.Generator, low: int, high: int) -> int:
    """Returns a random integer whose logarithm is uniform between those of low and high."""
    low, high = torch.tensor((low, high)).float().log().tolist()
    return round(float(uniform(rng, low, high).exp()))


def choice(rng: torch.Generator, options: Sequence[T]) -> T:
    """Returns one of `options`, chosen uniformly."""
    return options[int(torch.randint(len(options), (), generator=rng))]


class Task(ABC):
    """A loss F(theta; batch) of one task, or of `num_tasks` tasks of one shape together.

    Attributes:
        name: the name in tables.
        shapes: the shapes of the tensors, in the order in which theta concatenates them.
        num_tasks: the leading dimension of theta, or None for a single task without one.
        chance: the loss of a guess that ignores the inputs, a number or (*tasks,). The guess gives
            all classes equal probability, predicts zero for standardized targets, or is θ = 0 for a
            quadratic.
    """

    name: str
    shapes: Shapes
    num_tasks: int | None
    chance: float | Tensor

    @property
    def dim(self) -> int:
        """The number d of coordinates of theta."""
        return sum(math.prod(s) for s in self.shapes)

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading dimensions of theta: (num_tasks,), or () for a single task."""
        return () if self.num_tasks is None else (self.num_tasks,)

    def unflatten(self, theta: Tensor) -> list[Tensor]:
        """Returns views of theta (*tasks, d) as tensors of shapes (*tasks, *shape)."""
        parts = theta.split([math.prod(s) for s in self.shapes], dim=-1)
        return [p.view(*theta.shape[:-1], *s) for p, s in zip(parts, self.shapes, strict=True)]

    @abstractmethod
    def init(self, seed: int) -> Tensor:
        """Returns the initial theta of a seed, (*tasks, d)."""

    @abstractmethod
    def batch(self, seed: int, step: int) -> Batch:
        """Returns the training minibatch of this (seed, step)."""

    @abstractmethod
    def loss(self, theta: Tensor | Sequence[Tensor], batch: Batch) -> Tensor:
        """Returns the mean loss over the batch, (*tasks,); theta is flat or a list of tensors."""

    @abstractmethod
    def fixed_batch(self, size: int | None = None) -> Batch:
        """Returns `size` training examples (None for all), always the same ones."""

    @abstractmethod
    def evaluate(self, theta: Tensor) -> dict[str, Tensor]:
        """Returns train_loss, test_loss and test_accuracy on all data, as a tensor (*tasks,) each.

        The accuracy is NaN if there are no classes.
        """

    def trainee(self, seed: int) -> Trainee:
        """Returns a single task with the initial parameters of `seed`, ready to be trained."""
        params = [p.clone().requires_grad_() for p in self.unflatten(self.init(seed))]

        def evaluate(_: bool = False) -> dict[str, float]:
            theta = torch.cat([p.detach().flatten() for p in params])
            return {name: float(value) for name, value in self.evaluate(theta).items()}

        return Trainee(
            Parameters(params), lambda step: self.loss(params, self.batch(seed, step)), evaluate
        )

    def loss_and_grad(self, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns F, (*tasks,), and its gradient, (*tasks, d).

        The F of each task depends only on the theta of that task.

        If theta is (particles, *tasks, d), both results have the dimension of particles too, and
        all particles use the same batch.
        """
        many = theta.dim() > len(self.lead) + 1
        losses = torch.func.vmap(self.loss, in_dims=(0, None)) if many else self.loss
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            loss = losses(theta, batch)
            (grad,) = torch.autograd.grad(loss.sum(), theta)
        return loss.detach(), grad
