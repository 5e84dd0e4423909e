"""The registry of kinds of tasks, and the config that describes a task."""

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
UNDRAWN: dict[str, type[Task]] = {}  # kinds that a family has only as its `task`
WORKLOADS: dict[str, type[Workload]] = {}  # kinds for benchmarks only

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": torch.nn.functional.gelu,
}


def register(name: str, drawn: bool = True) -> Callable[[K], K]:
    """Class decorator that lets configs refer to a kind of task by `name`.

    If `drawn`, families draw random tasks of the kind. Otherwise a family can only have a task of
    this kind as its fixed `task`.

    The class is a `Task` with these attributes:

        Options                                   a dataclass of the kind's own settings
        unused                                    the fields of TaskConfig that it does not use
        make(config, data_root, draw) -> Task     class method: returns the tasks of `config`
        sample(family, rng, data_root, device)    class method: returns random tasks of a family
    """

    def add(kind: K) -> K:
        (KINDS if drawn else UNDRAWN)[name] = kind
        kind.kind = name
        return kind

    return add


def register_workload(name: str) -> Callable[[W], W]:
    """Class decorator that lets benchmarks refer to a kind of `Workload` by `name`.

    The class has `Options`, `unused` and `make`, as for `register`.
    """

    def add(kind: W) -> W:
        WORKLOADS[name], kind.kind = kind, name
        return kind

    return add


def kind_class(name: str) -> type[Task] | type[Workload]:
    """Returns the class of the kind `name`.

    Raises:
        ConfigError: there is no such kind.
    """
    known = KINDS | UNDRAWN | WORKLOADS
    if name not in known:
        raise ConfigError(
            f"kind is {name!r}, which is not a kind of task; use one of {[*known]}"
            f"{did_you_mean(name, known)}"
        )
    return known[name]


def check_kind(name: str, argument: str) -> None:
    """Raises ConfigError, naming `argument`, if a family cannot draw tasks of the kind `name`."""
    if name in WORKLOADS:
        raise ConfigError(
            f"{argument} has {name!r}, which is a kind for benchmarks only; use some of "
            f"{list(KINDS)}"
        )
    if name in UNDRAWN:
        raise ConfigError(
            f"{argument} has {name!r}, which families cannot draw; use --task my_module:make_task, "
            "or the family's task: {kind: own, options: {function: my_module:make_task}}"
        )
    if name not in KINDS:
        raise ConfigError(
            f"{argument} has {name!r}, which is not a kind of task; use some of {list(KINDS)}"
            f"{did_you_mean(name, KINDS)}"
        )


@dataclass(frozen=True)
class NoOptions:
    """The options of kinds that have no settings of their own."""


@dataclass(frozen=True)
class TaskConfig:
    """Describes a task: an MLP on an image set, or another kind.

    Attributes:
        name: The name in tables. The default consists of the data, the widths and the activation.
        data: An image set: "digits", "mnist", or a folder with train.npz and test.npz under
            data_root. Or a text: "markov", or a text file under data_root such as
            ptb/ptb.valid.txt.
        hidden: The widths of the hidden layers, or the channels of a convolutional network. () is
            logistic regression.
        activation: One of relu, tanh, sigmoid and gelu.
        batch_size: The number of examples in a minibatch.
        init: The distribution of the initial weights: "torch" is nn.Linear's U(±1/sqrt(fan_in)),
            also for biases; "normal" is N(0, .01²) as in Andrychowicz et al. 2016, for MLPs only.
        init_scale: A factor of the initial weights, but not of biases and other vectors.
        train_size: The number of training examples, counted from the first; null for all.
        test_size: The number of test examples, counted from the first; null for all.
        kind: One of mlp, conv, resnet, autoencoder, logistic, gru, lstm, transformer, diabetes,
            quadratic, matrix_factorization, and own for a task in a file of your own.
        options: The settings that only this kind has, see `Options` of its class.
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
                f"options={sorted(unknown)} are not options of kind {self.kind!r}; use some of "
                f"{known}{did_you_mean(min(unknown), known)}"
            )
        try:
            own = kind.Options(**self.options)
            if any(f.type == "int" and type(getattr(own, f.name)) is not int for f in fields(own)):
                raise TypeError("some must be whole numbers")
        except TypeError as error:  # for example from comparing text with numbers
            raise ConfigError(
                f"options={self.options} of kind {self.kind!r} have wrong types ({error}); see its "
                "Options"
            ) from error
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name in kind.unused and value != setting.default:
                raise ConfigError(
                    f"{setting.name}={value!r} has no effect on kind {self.kind!r}; leave it out"
                )

    @property
    def own(self) -> Any:
        """The `options` as the dataclass of the kind."""
        return kind_class(self.kind).Options(**self.options)

    @property
    def label(self) -> str:
        """The `name`, or a description by data, kind, widths, activation and options."""
        if self.name:
            return self.name
        unused = kind_class(self.kind).unused
        place = Path(self.data)  # private folders should not be in published reports
        data = place.name if place.is_absolute() or self.data.startswith("~") else self.data
        parts = [] if "data" in unused else [data]
        parts += [] if self.kind == "mlp" else [self.kind]
        if "hidden" not in unused:
            parts.append("-".join(map(str, self.hidden)) or "linear")
        parts += [] if "activation" in unused else [self.activation]
        return " ".join(parts + [f"{key}={value}" for key, value in self.options.items()])


@dataclass(frozen=True)
class Draw:
    """Describes tasks of one shape that are evaluated together, and how they differ.

    Attributes:
        num_tasks: the number of tasks, or None for a single task.
        rng: the generator of everything that is random in the draw except initial weights and
            minibatches, such as the permutation of each task's class labels. It differs from draw
            to draw; None if nothing is random.
        init_scales: factors of the initial weights of each task, (tasks,).
        device: the device of theta and of the data. Random numbers are drawn on the CPU, so that a
            key gives the same numbers on every device.
    """

    num_tasks: int | None = None
    rng: torch.Generator | None = None
    init_scales: Tensor | None = None
    device: torch.device | str = "cpu"

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading dimensions: (num_tasks,), or () for a single task."""
        return () if self.num_tasks is None else (self.num_tasks,)

    def share(self, x: Tensor) -> Tensor:
        """Expands x (n, …) to (*tasks, n, …), the same for each task, without a copy."""
        return x.expand(*self.lead, *x.shape)

    def rename(self, *labels: Tensor, classes: int) -> list[Tensor]:
        """Maps labels (n, …) to (*tasks, n, …), with a random permutation of classes per task."""
        if self.rng is None or self.num_tasks is None:
            return [self.share(y) for y in labels]
        names = [torch.randperm(classes, generator=self.rng) for _ in range(self.num_tasks)]
        return [torch.stack(names)[:, y] for y in labels]


SINGLE = Draw()


def make_task(
    config: TaskConfig, data_root: str | Path | None = None, draw: Draw = SINGLE
) -> Task | Workload:
    """Returns the task that `config` describes, or the several tasks of `draw`."""
    return kind_class(config.kind).make(config, data_root, draw)
