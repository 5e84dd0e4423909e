"""A task: something to optimise, as pure functions of a flat parameter vector.

`theta` is (*tasks, d): no leading dimension for one task, one for a batch of tasks of one shape.
Everything random is keyed, so that a minibatch can be made again anywhere from (seed, step).
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
    """An independent random stream for `key`: the same key gives the same numbers everywhere."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def seed_of(*key: object) -> int:
    """A seed for `Task.init` and `Task.batch` from a key."""
    return generator(*key).initial_seed()


def uniform(rng: torch.Generator, low: float, high: float, size: tuple[int, ...] = ()) -> Tensor:
    """U(low, high), of shape `size`."""
    return low + (high - low) * torch.rand(size, generator=rng)


def log_uniform(rng: torch.Generator, low: int, high: int) -> int:
    """An integer whose logarithm is uniform between those of low and high."""
    low, high = torch.tensor((low, high)).float().log().tolist()
    return round(float(uniform(rng, low, high).exp()))


def choice(rng: torch.Generator, options: Sequence[T]) -> T:
    """One of `options`, uniformly."""
    return options[int(torch.randint(len(options), (), generator=rng))]


class Task(ABC):
    """F(theta; batch) for one task, or for `num_tasks` tasks of one shape evaluated together.

    Attributes:
        name: what tables call it.
        shapes: the tensors' shapes, in the order in which theta concatenates them.
        num_tasks: the leading dimension of theta, or None for a single task without one.
        chance: the loss of a guess that ignores the inputs, a number or (*tasks,): all classes
            equally likely, zero for standardised targets, θ = 0 of a quadratic.
    """

    name: str
    shapes: Shapes
    num_tasks: int | None
    chance: float | Tensor

    @property
    def dim(self) -> int:
        return sum(math.prod(s) for s in self.shapes)

    @property
    def lead(self) -> tuple[int, ...]:
        return () if self.num_tasks is None else (self.num_tasks,)

    def unflatten(self, theta: Tensor) -> list[Tensor]:
        """(*tasks, d) -> views of shapes (*tasks, *shape)."""
        parts = theta.split([math.prod(s) for s in self.shapes], dim=-1)
        return [p.view(*theta.shape[:-1], *s) for p, s in zip(parts, self.shapes, strict=True)]

    @abstractmethod
    def init(self, seed: int) -> Tensor:
        """Initial theta, (*tasks, d)."""

    @abstractmethod
    def batch(self, seed: int, step: int) -> Batch:
        """The training minibatch of this (seed, step)."""

    @abstractmethod
    def loss(self, theta: Tensor | Sequence[Tensor], batch: Batch) -> Tensor:
        """Mean loss over the batch, (*tasks,); theta flat or as a list of `shapes`."""

    @abstractmethod
    def fixed_batch(self, size: int | None = None) -> Batch:
        """`size` training examples (None: all), always the same: makes F deterministic."""

    @abstractmethod
    def evaluate(self, theta: Tensor) -> dict[str, Tensor]:
        """train_loss on all training data, test_loss and test_accuracy (NaN where there are no
        classes); each (*tasks,)."""

    def trainee(self, seed: int) -> Trainee:
        """A single task from its init of `seed`, ready to be trained."""
        params = [p.clone().requires_grad_() for p in self.unflatten(self.init(seed))]

        def evaluate(_: bool = False) -> dict[str, float]:
            theta = torch.cat([p.detach().flatten() for p in params])
            return {name: float(value) for name, value in self.evaluate(theta).items()}

        return Trainee(
            Parameters(params), lambda step: self.loss(params, self.batch(seed, step)), evaluate
        )

    def loss_and_grad(self, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """F, (*tasks,), and its gradient, (*tasks, d). Tasks do not mix: F_i sees theta_i only.

        With theta (particles, *tasks, d) both have that dimension too: one batch serves all.
        """
        many = theta.dim() > len(self.lead) + 1
        losses = torch.func.vmap(self.loss, in_dims=(0, None)) if many else self.loss
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            loss = losses(theta, batch)
            (grad,) = torch.autograd.grad(loss.sum(), theta)
        return loss.detach(), grad
