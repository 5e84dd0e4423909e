"""What all workloads share: splits, modes of the module, keyed randomness, evaluation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from learned_opt.errors import ConfigError
from learned_opt.tasks.base import Batch, Shapes, generator, seed_of
from learned_opt.tasks.kinds import SINGLE, Draw, NoOptions, TaskConfig
from learned_opt.tasks.trainee import Parameters, Trainee

SPLITS = ("train", "validation", "test")
CHUNK = 1024  # examples that an evaluation takes at once
CALIBRATION = 10  # minibatches that renew running statistics


class Workload(ABC):
    """A network, its data and a loss, to be trained by an optimizer.

    A subclass says what the network is, what a loss is and how to read the data. Everything random
    is keyed, initial weights by the seed, minibatches, augmentation and dropout by seed and step:
    all optimizers see the same.

    Args:
        config: name, batch size, sizes of the splits.
        data: inputs and targets of each of SPLITS; integer targets are classes.
        chance: loss of a guess that ignores the inputs.
        device: of parameters and data.
    """

    kind: str
    Options: type = NoOptions
    unused: tuple[str, ...] = ("init", "init_scale", "activation")

    def __init__(
        self,
        config: TaskConfig,
        data: Mapping[str, Batch],
        chance: float,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.name, self.chance, self.device = config, config.label, chance, device
        self.data = {split: tuple(t.to(device) for t in data[split]) for split in SPLITS}
        self.shapes: Shapes = tuple(tuple(p.shape) for p in self._fresh(0).parameters())

    @property
    def dim(self) -> int:
        return sum(map(math.prod, self.shapes))

    @classmethod
    @abstractmethod
    def make(
        cls, config: TaskConfig, data_root: str | Path | None = None, draw: Draw = SINGLE
    ) -> Workload:
        """The workload that `config` describes."""

    @abstractmethod
    def network(self) -> nn.Module:
        """The module with fresh weights, from torch's global random numbers."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Of each element; by default the cross-entropy of logits (..., classes)."""
        return nn.functional.cross_entropy(
            outputs.flatten(0, -2), targets.flatten(), reduction="none"
        )

    def augment(self, inputs: Tensor, rng: torch.Generator) -> Tensor:
        """A minibatch's inputs, changed at random."""
        return inputs

    def batch(self, seed: int, step: int) -> Batch:
        """The minibatch of this (seed, step)."""
        inputs, targets = self.data["train"]
        rng = generator("batch", seed, step)
        index = torch.randint(len(inputs), (self.config.batch_size,), generator=rng)
        index = index.to(self.device)
        return self.augment(inputs[index], rng), targets[index]

    def loss(self, module: nn.Module, seed: int, step: int) -> Tensor:
        """Mean loss of the minibatch; `module` is in training mode."""
        inputs, targets = self.batch(seed, step)
        return self.losses(module(inputs), targets).mean()

    def evaluate(self, module: nn.Module, split: str) -> tuple[float, float]:
        """Mean loss and accuracy (NaN where targets are no classes) on a whole split."""
        inputs, targets = self.data[split]
        loss, hits, count = 0.0, 0.0, 0
        for x, y in zip(inputs.split(CHUNK), targets.split(CHUNK), strict=True):
            outputs = module(x)
            losses = self.losses(outputs, y)
            loss, count = loss + float(losses.double().sum()), count + losses.numel()
            hits += (
                float((outputs.argmax(-1) == y).sum()) if not y.is_floating_point() else math.nan
            )
        return loss / count, hits / count

    def trainee(self, seed: int) -> Trainee:
        """The network of this seed, ready to be trained."""
        return self.trainee_of(self._fresh(seed), seed)

    def trainee_of(self, module: nn.Module, seed: int) -> Trainee:
        """`module`, ready to be trained on minibatches of `seed`."""
        module.train()

        def loss(step: int) -> Tensor:
            with torch.random.fork_rng(self._devices()):  # of dropout
                torch.manual_seed(seed_of("noise", seed, step))
                return self.loss(module, seed, step)

        def validate(recalibrate: bool = False) -> float:
            with self._evaluation(module, seed if recalibrate else None):
                return self.evaluate(module, "validation")[0]

        def evaluate(recalibrate: bool = False) -> dict[str, float]:
            result = {}
            with self._evaluation(module, seed if recalibrate else None):
                for split in SPLITS[1:]:
                    loss, accuracy = self.evaluate(module, split)
                    result |= {f"{split}_loss": loss, f"{split}_accuracy": accuracy}
            return result

        return Trainee(Parameters.of(module), loss, evaluate, validate)

    def _fresh(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("init", seed))
            return self.network().to(self.device)

    def _devices(self) -> list[torch.device]:
        device = torch.device(self.device)
        return [device] if device.type == "cuda" else []

    @contextmanager
    def _evaluation(self, module: nn.Module, seed: int | None) -> Iterator[None]:
        """Evaluation mode without gradients; with a `seed` running statistics are averages over
        CALIBRATION minibatches at the present weights, and back to what they were afterwards."""
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        buffers = {}
        with torch.no_grad():
            if seed is not None and norms:
                buffers = {name: b.clone() for name, b in module.named_buffers()}
                momenta = [norm.momentum for norm in norms]
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # a plain average
                with torch.random.fork_rng(self._devices()):
                    for step in range(CALIBRATION):
                        self.loss(module, seed_of("calibration", seed), step)
                for norm, momentum in zip(norms, momenta, strict=True):
                    norm.momentum = momentum
            module.eval()
            try:
                yield
            finally:
                module.train()
                for name, buffer in module.named_buffers():
                    if name in buffers:
                        buffer.copy_(buffers[name])


def no_draw(kind: str, draw: Draw) -> None:
    """Refuses to make several at once."""
    if draw.num_tasks is not None:
        raise ConfigError(f"kind {kind!r} is made one at a time; it cannot be in a family's kinds")
