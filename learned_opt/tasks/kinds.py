"""Kinds of tasks by name, and the config that describes one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from geodesic.finite import check_finite
from learned_opt.errors import ConfigError, did_you_mean
from learned_opt.tasks.base import Task

if TYPE_CHECKING:
    from learned_opt.tasks.workloads.base import Workload

K = TypeVar("K", bound=type[Task])
W = TypeVar("W", bound="type[Workload]")
KINDS: dict[str, type[Task]] = {}
WORKLOADS: dict[str, type[Workload]] = {}  # to be benchmarked on only

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": torch.nn.functional.gelu,
}


def register(name: str) -> Callable[[K], K]:
    """Class decorator: configs find the kind of task under `name`.

    The class is a `Task` with

        Options                                   a dataclass of the kind's own settings
        unused                                    fields of TaskConfig that mean nothing to it
        make(config, data_root, draw) -> Task     class method: the tasks that `config` describes
        sample(family, rng, data_root, device)    class method: tasks of a random draw
    """

    def add(kind: K) -> K:
        KINDS[name], kind.kind = kind, name
        return kind

    return add


def register_workload(name: str) -> Callable[[W], W]:
    """Class decorator, of a `Workload` (workloads/base.py): benchmarks find the kind under `name`.

    Its class has `Options`, `unused` and `make` as those of `register`.
    """

    def add(kind: W) -> W:
        WORKLOADS[name], kind.kind = kind, name
        return kind

    return add


def kind_class(name: str) -> type[Task] | type[Workload]:
    """The class that configs call `name`; ConfigError where there is none."""
    if name in WORKLOADS:
        return WORKLOADS[name]
    if name not in KINDS:
        known = [*KINDS, *WORKLOADS]
        raise ConfigError(
            f"kind has {name!r}, which is no kind of task; use one of {known}"
            f"{did_you_mean(name, known)}"
        )
    return KINDS[name]


def check_kind(name: str, argument: str) -> None:
    """That a family can draw tasks of this kind."""
    if name in WORKLOADS:
        raise ConfigError(
            f"{argument} has {name!r}, which is made one at a time, to be benchmarked on; "
            f"use {list(KINDS)}"
        )
    if name not in KINDS:
        raise ConfigError(
            f"{argument} has {name!r}, which is no kind of task; use {list(KINDS)}"
            f"{did_you_mean(name, KINDS)}"
        )


@dataclass(frozen=True)
class NoOptions:
    """Of kinds that have no settings of their own."""


@dataclass(frozen=True)
class TaskConfig:
    """A task: an MLP on an image set, or any other kind.

    Attributes:
        name: what tables call it; by default the data, the widths and the activation.
        data: images: "digits", "mnist", or a folder of train.npz and test.npz under data_root.
            Text: "markov", or a text file under data_root such as ptb/ptb.valid.txt.
        hidden: widths of the hidden layers, channels of a conv net; () is logistic regression.
        activation: relu, tanh, sigmoid or gelu.
        batch_size: examples per minibatch.
        init: "torch" (nn.Linear's U(±1/sqrt(fan_in)), biases too) or "normal" (N(0, .01²),
            as in Andrychowicz et al. 2016; MLPs only).
        init_scale: multiplies the initial weights, though not biases and other vectors.
        train_size: train on the first so many examples only; None is all.
        test_size: test on the first so many only; None is all.
        kind: mlp, conv, resnet, autoencoder, logistic, gru, lstm, transformer, diabetes, quadratic
            or matrix_factorization.
        options: what only this kind has, see `Options` of its class.
    """

    name: str = ""
    data: str = "digits"
    hidden: tuple[int, ...] = (32,)
    activation: str = "relu"
    batch_size: int = 128
    init: str = "torch"
    init_scale: float = 1.0
    train_size: int | None = None
    test_size: int | None = None
    kind: str = "mlp"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ConfigError(f"activation is {self.activation!r}; use one of {known}")
        if self.init not in ("torch", "normal"):
            raise ConfigError(f"init is {self.init!r}; use 'torch' or 'normal'")
        if self.batch_size < 1 or self.init_scale <= 0 or any(w < 1 for w in self.hidden):
            raise ConfigError(
                f"batch_size={self.batch_size}, init_scale={self.init_scale} and "
                f"hidden={self.hidden} must all be positive"
            )
        for name in ("train_size", "test_size"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise ConfigError(f"{name} is {size}; use at least 1, or null for all")
        kind = kind_class(self.kind)
        known = [f.name for f in fields(kind.Options)]
        if unknown := set(self.options) - set(known):
            raise ConfigError(
                f"options={sorted(unknown)} mean nothing to kind {self.kind!r}; it has {known}"
                f"{did_you_mean(min(unknown), known)}"
            )
        try:
            own = kind.Options(**self.options)
            if any(f.type == "int" and type(getattr(own, f.name)) is not int for f in fields(own)):
                raise TypeError("some must be whole numbers")
        except TypeError as error:  # a comparison, of text with numbers say
            raise ConfigError(
                f"options={self.options} of kind {self.kind!r} are not of the right types ({error})"
            ) from error
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name in kind.unused and value != setting.default:
                raise ConfigError(
                    f"{setting.name}={value!r} means nothing to kind {self.kind!r}; drop it"
                )

    @property
    def own(self) -> Any:
        """`options` as the kind's dataclass."""
        return kind_class(self.kind).Options(**self.options)

    @property
    def label(self) -> str:
        """`name`, or what tells the task from others."""
        if self.name:
            return self.name
        unused = kind_class(self.kind).unused
        place = Path(self.data)  # reports are published, folders need not be
        data = place.name if place.is_absolute() or self.data.startswith("~") else self.data
        parts = [] if "data" in unused else [data]
        parts += [] if self.kind == "mlp" else [self.kind]
        if "hidden" not in unused:
            parts.append("-".join(map(str, self.hidden)) or "linear")
        parts += [] if "activation" in unused else [self.activation]
        return " ".join(parts + [f"{key}={value}" for key, value in self.options.items()])


@dataclass(frozen=True)
class Draw:
    """Tasks of one shape that are evaluated together, and what tells them apart.

    Attributes:
        num_tasks: how many, or None for a single task.
        rng: of what differs between them: names of classes, targets; None: nothing does.
        init_scales: (tasks,), multiplies the initial weights of each.
        device: of theta and of the data. Random numbers are drawn on the CPU, so that a key means
            the same everywhere.
    """

    num_tasks: int | None = None
    rng: torch.Generator | None = None
    init_scales: Tensor | None = None
    device: torch.device | str = "cpu"

    @property
    def lead(self) -> tuple[int, ...]:
        return () if self.num_tasks is None else (self.num_tasks,)

    def share(self, x: Tensor) -> Tensor:
        """(n, …) -> (*tasks, n, …), the same for each task and without a copy."""
        return x.expand(*self.lead, *x.shape)

    def rename(self, *labels: Tensor, classes: int) -> list[Tensor]:
        """(n, …) -> (*tasks, n, …): each task has its own numbers for the classes."""
        if self.rng is None or self.num_tasks is None:
            return [self.share(y) for y in labels]
        names = [torch.randperm(classes, generator=self.rng) for _ in range(self.num_tasks)]
        return [torch.stack(names)[:, y] for y in labels]


SINGLE = Draw()


def make_task(
    config: TaskConfig, data_root: str | Path | None = None, draw: Draw = SINGLE
) -> Task | Workload:
    """The task that `config` describes, or several of them at once."""
    return kind_class(config.kind).make(config, data_root, draw)
