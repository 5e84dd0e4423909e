"""Tasks made of any `nn.Module`, batched over tasks by `torch.func`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from learned_opt.tasks.base import Batch, Task, choice, generator, uniform
from learned_opt.tasks.kinds import SINGLE, Draw, NoOptions, TaskConfig
from learned_opt.tasks.trainee import Parameters, Trainee

if TYPE_CHECKING:
    from learned_opt.tasks.families import FamilyConfig

ACTIVATION_MODULES = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns −log softmax(logits)[label] of each label, for logits (…, classes), labels (…,)."""
    return -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns (output − target)² of each element."""
    return (outputs - targets).square()


class ModuleTask(Task):
    """A task whose loss is the mean of `losses(module_θ(inputs), targets)` over all elements.

    A subclass defines its data and its module in `make`, and a random architecture for families in
    `architecture`.

    The module must have no state but its parameters, because each call is a pure function of θ.
    Normalization layers therefore use the statistics of their batch, in evaluations too. vmap must
    support the module, so dropout, nn.GRU and nn.LSTM are excluded (see sequence.py for the last
    two).

    Args:
        config: batch_size, init_scale, train_size and test_size are used here.
        make_module: returns the module with fresh initial weights from torch's global generator.
        train: the training inputs and targets, (*tasks, n, …) each; integer targets are classes.
        test: the test inputs and targets, of the same form.
        chance: the loss of a guess that ignores the inputs, see Task.
        draw: the number of tasks that are evaluated together, and their differences.
        losses: maps outputs and targets to the loss of each element.
    """

    Options: type = NoOptions
    unused: tuple[str, ...] = ("init",)

    def __init__(
        self,
        config: TaskConfig,
        make_module: Callable[[], nn.Module],
        train: Batch,
        test: Batch,
        chance: float | Tensor,
        draw: Draw = SINGLE,
        losses: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    ) -> None:
        self.config, self.num_tasks, self.device = config, draw.num_tasks, draw.device
        self.name, self.losses = config.label, losses
        self.chance = chance if isinstance(chance, float) else chance.to(self.device)
        self._make_module = make_module
        with torch.random.fork_rng(devices=[]):
            self.module = make_module().to(self.device)
        self._names = [name for name, _ in self.module.named_parameters()]
        self.shapes = tuple(tuple(p.shape) for p in self.module.parameters())
        scales = torch.ones(self.lead) if draw.init_scales is None else draw.init_scales
        self._init_scales = config.init_scale * scales
        self._axis = len(self.lead)  # the dimension of examples
        self._train, self._test = (
            tuple(
                t.narrow(self._axis, 0, min(size or math.inf, t.shape[self._axis])).to(self.device)
                for t in part
            )
            for part, size in ((train, config.train_size), (test, config.test_size))
        )

    @classmethod
    @abstractmethod
    def make(
        cls, config: TaskConfig, data_root: str | Path | None = None, draw: Draw = SINGLE
    ) -> Task:
        """Returns the tasks that `config` describes."""

    @classmethod
    @abstractmethod
    def architecture(cls, family: FamilyConfig, rng: torch.Generator) -> TaskConfig:
        """Returns a random config of this kind within `family`."""

    @classmethod
    def sample(
        cls,
        family: FamilyConfig,
        rng: torch.Generator,
        data_root: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> Task:
        """Returns `family.num_tasks` tasks of one random architecture."""
        config = cls.architecture(family, rng)
        if family.train_sizes:
            config = replace(config, train_size=choice(rng, family.train_sizes))
        scales = 10 ** uniform(rng, *family.log10_init_scale, (family.num_tasks,))
        return cls.make(config, data_root, Draw(family.num_tasks, rng, scales, device))

    def trainee(self, seed: int) -> Trainee:
        trainee = super().trainee(seed)
        known = Parameters.of(self.module)
        return replace(trainee, params=Parameters(trainee.params, known.names, known.kinds))

    def init(self, seed: int) -> Tensor:
        thetas = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator("init", seed).initial_seed())
            for scale in self._init_scales.reshape(-1):
                parts = [p.detach() for p in self._make_module().parameters()]
                parts = [p * scale if p.dim() > 1 else p for p in parts]
                thetas.append(torch.cat([p.flatten() for p in parts]))
        return torch.stack(thetas).reshape(*self.lead, -1).to(self.device)

    def _take(self, index: Tensor) -> Batch:
        """Returns the training examples at `index` (*tasks, n)."""
        if self.num_tasks is None:
            return tuple(t[index] for t in self._train)
        rows = torch.arange(self.num_tasks, device=index.device)[:, None]
        return tuple(t[rows, index] for t in self._train)

    def batch(self, seed: int, step: int) -> Batch:
        size = (*self.lead, self.config.batch_size)
        count, rng = self._train[0].shape[self._axis], generator("batch", seed, step)
        return self._take(torch.randint(count, size, generator=rng).to(self.device))

    def fixed_batch(self, size: int | None = None) -> Batch:
        count = self._train[0].shape[self._axis]
        index = torch.randperm(count, generator=generator("fixed"))[:size]
        return self._take(index.to(self.device).expand(*self.lead, -1))

    def outputs(self, theta: Tensor | Sequence[Tensor], inputs: Tensor) -> Tensor:
        """Returns the module's outputs, (*tasks, n, …), with the leading dimensions of theta."""
        tensors = tuple(self.unflatten(theta) if isinstance(theta, Tensor) else theta)

        def call(tensors: Sequence[Tensor], inputs: Tensor) -> Tensor:
            parameters = dict(zip(self._names, tensors, strict=True))
            return functional_call(self.module, parameters, (inputs,))

        return (vmap(call) if self._batched(theta) else call)(tensors, inputs)

    def _batched(self, theta: Tensor | Sequence[Tensor]) -> bool:
        own = 1 if isinstance(theta, Tensor) else len(self.shapes[0])
        return (theta if isinstance(theta, Tensor) else theta[0]).dim() > own

    def loss(self, theta: Tensor | Sequence[Tensor], batch: Batch) -> Tensor:
        losses = self.losses(self.outputs(theta, batch[0]), batch[1])
        return losses.flatten(int(self._batched(theta))).mean(-1)

    def evaluate(self, theta: Tensor, chunk: int = 2048) -> dict[str, Tensor]:
        """Returns losses and accuracy on all data, in chunks of at most `chunk` examples."""
        with torch.no_grad():
            train, _ = self._score(theta, self._train, chunk)
            test, hits = self._score(theta, self._test, chunk)
        return {"train_loss": train, "test_loss": test, "test_accuracy": hits}

    def _score(self, theta: Tensor, data: Batch, chunk: int) -> tuple[Tensor, Tensor]:
        n, loss, hits = data[0].shape[self._axis], 0.0, 0.0
        pieces = math.ceil(n / chunk)
        for x, y in zip(*(t.tensor_split(pieces, self._axis) for t in data), strict=True):
            outputs, share = self.outputs(theta, x), x.shape[self._axis] / n
            loss = loss + share * self.losses(outputs, y).flatten(self._axis).mean(-1)
            hits = hits + share * self._hits(outputs, y).flatten(self._axis).mean(-1)
        return loss, hits

    @staticmethod
    def _hits(outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            return torch.full_like(targets, torch.nan)
        return (outputs.argmax(-1) == targets).to(outputs.dtype)
