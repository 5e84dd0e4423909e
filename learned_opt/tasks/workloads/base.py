"""The base class of workloads: splits, training and evaluation modes, keyed randomness."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from learned_opt.errors import ConfigError
from learned_opt.tasks.base import Batch, Shapes, generator, seed_of
from learned_opt.tasks.kinds import SINGLE, Draw, NoOptions, TaskConfig
from learned_opt.tasks.trainee import Parameters, Trainee

SPLITS = ("train", "validation", "test")
CHUNK = 1024  # the number of examples that an evaluation processes at once
CALIBRATION = 10  # the number of minibatches that recompute running statistics
Device = torch.device | str


class Workload(ABC):
    """A network, its data and a loss, to be trained by an optimizer.

    A subclass defines the network and the loss, and reads the data. Everything random is keyed:
    initial weights by the seed; minibatches, augmentation and dropout by the seed and the step. All
    optimizers therefore see the same.

    Args:
        config: the name, the batch size and the sizes of the splits.
        data: the inputs and targets of each of SPLITS; integer targets are classes.
        chance: the loss of a guess that ignores the inputs.
        device: the device of parameters and data.
    """

    kind: str
    Options: type = NoOptions
    unused: tuple[str, ...] = ("init", "init_scale", "activation")

    def __init__(
        self,
        config: TaskConfig,
        data: Mapping[str, Batch],
        chance: float,
        device: Device = "cpu",
    ) -> None:
        self.config, self.name, self.chance, self.device = config, config.label, chance, device
        self.data = {split: tuple(t.to(device) for t in data[split]) for split in SPLITS}
        self.shapes: Shapes = tuple(tuple(p.shape) for p in self._fresh(0).parameters())

    @property
    def dim(self) -> int:
        """The number of parameters."""
        return sum(map(math.prod, self.shapes))

    @classmethod
    def make(
        cls, config: TaskConfig, data_root: str | Path | None = None, draw: Draw = SINGLE
    ) -> Workload:
        """Returns the workload that `config` describes.

        Raises:
            ConfigError: `draw` asks for several tasks at once.
        """
        if draw.num_tasks is not None:
            raise ConfigError(
                f"kind {config.kind!r} is for benchmarks only: its tasks cannot be batched, as "
                "those of a family must be; use another kind in the family"
            )
        return cls.read(config, data_root, draw.device)

    @classmethod
    @abstractmethod
    def read(cls, config: TaskConfig, data_root: str | Path | None, device: Device) -> Self:
        """Reads the data and returns the workload that `config` describes."""

    @abstractmethod
    def network(self) -> nn.Module:
        """Returns the module with initial weights, drawn from torch's global random numbers."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss of each element; by default the cross-entropy of logits."""
        return nn.functional.cross_entropy(
            outputs.flatten(0, -2), targets.flatten(), reduction="none"
        )

    def augment(self, inputs: Tensor, rng: torch.Generator) -> Tensor:
        """Returns randomly augmented inputs of a minibatch; by default the inputs themselves."""
        return inputs

    def batch(self, seed: int, step: int) -> Batch:
        """Returns the minibatch of (seed, step)."""
        inputs, targets = self.data["train"]
        rng = generator("batch", seed, step)
        index = torch.randint(len(inputs), (self.config.batch_size,), generator=rng)
        index = index.to(self.device)
        return self.augment(inputs[index], rng), targets[index]

    def loss(self, module: nn.Module, seed: int, step: int) -> Tensor:
        """Returns the mean loss of the minibatch; `module` is in training mode."""
        inputs, targets = self.batch(seed, step)
        return self.losses(module(inputs), targets).mean()

    def evaluate(self, module: nn.Module, split: str) -> tuple[float, float]:
        """Returns the mean loss and the accuracy on a whole split.

        The accuracy is NaN if the targets are not classes.
        """
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
        """Returns the network of this seed, ready for training."""
        return self.trainee_of(self._fresh(seed), seed)

    def trainee_of(self, module: nn.Module, seed: int) -> Trainee:
        """Returns `module`, ready for training on the minibatches of `seed`."""
        module.train()

        def loss(step: int) -> Tensor:
            with torch.random.fork_rng(self._devices()):  # the random numbers of dropout
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
        """Puts `module` into evaluation mode, without gradients.

        With a `seed`, running statistics are averages over CALIBRATION minibatches at the current
        weights. They are restored afterwards.
        """
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
