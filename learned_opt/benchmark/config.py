"""What a benchmark is: entrants on tasks, with a protocol for tuning and one for reporting."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from learned_opt.errors import ConfigError
from learned_opt.tasks.kinds import TaskConfig

LEARNED = "learned"  # the `optimizer` of an entrant that is LearnedOptimizer
# Where the seeds start when a config says only how many: never in reach of each other.
_FIRST_REPORTING, _FIRST_TUNING = 0, 1_000_000


@dataclass(frozen=True)
class BenchmarkTask:
    """A task and for how long it is trained.

    Attributes:
        task: what is optimised.
        steps: optimizer steps per run.
        label: what tables call it; by default the task's, see TaskConfig.label.
    """

    task: TaskConfig = field(default_factory=TaskConfig)
    steps: int = 1000
    label: str = ""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; use at least 1")
        if not self.label:
            object.__setattr__(self, "label", self.task.label)


@dataclass(frozen=True)
class Entrant:
    """An optimizer that takes part.

    Attributes:
        name: what tables call it.
        optimizer: dotted path of a torch.optim.Optimizer class, or "learned".
        kwargs: its keyword arguments; `lr` too, unless it is tuned.
        tune: search its learning rate on the tuning seeds.
        schedule: of the learning rate over a run: constant, or cosine to zero.
        weights: a weights file of a learned optimizer; null is the shipped one.
    """

    name: str
    optimizer: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    tune: bool = False
    schedule: Literal["constant", "cosine"] = "constant"
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.tune and "lr" in self.kwargs:
            raise ConfigError(
                f"entrant {self.name!r} has kwargs.lr={self.kwargs['lr']} and tune=true; drop one"
            )
        if self.weights is not None and self.optimizer != LEARNED:
            raise ConfigError(
                f"entrant {self.name!r} has weights but optimizer={self.optimizer!r}; "
                f"only optimizer: {LEARNED} reads weights"
            )


def default_tasks() -> list[BenchmarkTask]:
    """Three shapes of network on the digits that come with scikit-learn."""
    return [
        BenchmarkTask(TaskConfig(hidden=(32,), activation="relu")),
        BenchmarkTask(TaskConfig(hidden=(32, 32), activation="tanh")),
        BenchmarkTask(TaskConfig(hidden=(20,), activation="sigmoid")),
    ]


def default_entrants() -> list[Entrant]:
    """The tuned baselines, Adam as most people run it, and the shipped learned optimizer."""
    return [
        Entrant("learned", LEARNED),
        Entrant("Adam (tuned)", "torch.optim.Adam", tune=True),
        Entrant("SGD (tuned)", "torch.optim.SGD", tune=True),
        Entrant("SGD momentum (tuned)", "torch.optim.SGD", {"momentum": 0.9}, tune=True),
        Entrant("Adam 1e-3", "torch.optim.Adam", {"lr": 1e-3}),
    ]


@dataclass(frozen=True)
class BenchmarkConfig:
    """Every entrant on every task.

    Attributes:
        tasks: what is optimised, and for how many steps.
        entrants: the optimizers.
        reporting_seeds: seeds of the runs that are reported, or how many.
        tuning_seeds: seeds on which learning rates are chosen, or how many; never reported.
        learning_rate_min: lower end of the half-decade grid 10^(k/2).
        learning_rate_max: its upper end.
        max_grid_extensions: half-decades by which the grid may grow, one at a time, while the
            best learning rate is at an end of it.
        data_root: folder of data sets; by default $LEARNED_OPT_DATA.
        processes: runs at the same time. Wall-clock times mean most with 1.
        threads: of torch, per run. Small tasks are fastest with 1.
    """

    tasks: list[BenchmarkTask] = field(default_factory=default_tasks)
    entrants: list[Entrant] = field(default_factory=default_entrants)
    reporting_seeds: int | list[int] = 5
    tuning_seeds: int | list[int] = 3
    learning_rate_min: float = 1e-4
    learning_rate_max: float = 1.0
    max_grid_extensions: int = 4
    data_root: str | None = None
    processes: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        for name, names in (
            ("tasks", [t.label for t in self.tasks]),
            ("entrants", [e.name for e in self.entrants]),
            ("reporting_seeds", self.reporting),
            ("tuning_seeds", self.tuning),
        ):
            if not names or len(set(names)) < len(names):
                raise ConfigError(f"{name} is {names}; use at least one, and each only once")
        if shared := sorted({*self.reporting} & {*self.tuning}):
            raise ConfigError(
                f"seeds {shared} are both in reporting_seeds and in tuning_seeds; a learning rate "
                "must not be chosen on the runs that are reported: use different seeds"
            )
        if not 0 < self.learning_rate_min <= self.learning_rate_max < math.inf:
            raise ConfigError(
                f"learning_rate_min={self.learning_rate_min} and "
                f"learning_rate_max={self.learning_rate_max}: use 0 < min <= max"
            )
        if self.max_grid_extensions < 0 or self.processes < 1 or self.threads < 1:
            raise ConfigError(
                f"max_grid_extensions={self.max_grid_extensions} must be at least 0, "
                f"processes={self.processes} and threads={self.threads} at least 1"
            )

    @property
    def reporting(self) -> list[int]:
        return _seeds(self.reporting_seeds, _FIRST_REPORTING)

    @property
    def tuning(self) -> list[int]:
        return _seeds(self.tuning_seeds, _FIRST_TUNING)

    def smoke(self) -> BenchmarkConfig:
        """The same in seconds: few steps and seeds, three learning rates; tells nothing."""
        return replace(
            self,
            tasks=[replace(task, steps=min(task.steps, 5)) for task in self.tasks[:2]],
            reporting_seeds=self.reporting[:2],
            tuning_seeds=self.tuning[:1],
            learning_rate_min=1e-3,
            learning_rate_max=1e-2,
            max_grid_extensions=0,
            processes=1,
        )


def _seeds(seeds: int | list[int], first: int) -> list[int]:
    return list(range(first, first + seeds)) if isinstance(seeds, int) else list(seeds)
