"""What a benchmark is: entrants on tasks, with a protocol for tuning and one for reporting."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from geodesic.finite import check_finite
from learned_opt.benchmarking.entrants import DEFAULTS, FIELD, Entrant, named
from learned_opt.errors import ConfigError
from learned_opt.tasks.kinds import WORKLOADS, TaskConfig, kind_class

# Where the seeds start when a config says only how many: never in reach of each other.
_FIRST_REPORTING, _FIRST_TUNING = 0, 1_000_000
LONGEST = 1e6  # seconds of a run; what waits for one knows little more


@dataclass(frozen=True)
class BenchmarkTask:
    """A task and for how long it is trained.

    Attributes:
        task: what is optimised.
        steps: optimizer steps per run.
        label: what tables call it; by default the task's, see TaskConfig.label.
        family: what the shipped weights know of it. They were trained on its kind of network and
            of data (in-family), or choices were made on it (validation), or on neither of the two
            (held-out both), or on one of them alone.
        targets: training losses to reach, besides that of the tuned Adam.
        target: of the protocol "validation": the validation loss to reach, in place of that of the
            tuned AdamW with warm-up and cosine.
        best_target: that of the best entrant of the field, `best_entrant`.
        best_entrant: see best_target.
    """

    task: TaskConfig = field(default_factory=TaskConfig)
    steps: int = 1000
    label: str = ""
    family: Literal[
        "",
        "in-family",
        "validation",
        "held-out architecture",
        "held-out data",
        "held-out both",
    ] = ""
    targets: tuple[float, ...] = ()
    target: float | None = None
    best_target: float | None = None
    best_entrant: str = ""

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; use at least 1")
        if (self.best_target is None) == bool(self.best_entrant):
            raise ConfigError(
                f"best_target={self.best_target} and best_entrant={self.best_entrant!r} go together"
            )
        if not self.label:
            object.__setattr__(self, "label", self.task.label)


def default_tasks() -> list[BenchmarkTask]:
    """Three shapes of network on the digits that come with scikit-learn."""
    return [
        BenchmarkTask(TaskConfig(hidden=(32,), activation="relu"), family="in-family"),
        BenchmarkTask(TaskConfig(hidden=(32, 32), activation="tanh"), family="in-family"),
        BenchmarkTask(TaskConfig(hidden=(20,), activation="sigmoid"), family="in-family"),
    ]


@dataclass(frozen=True)
class BenchmarkConfig:
    """Every entrant on every task.

    Attributes:
        name: what the report calls it.
        protocol: what is measured: "training", steps to the training loss that the tuned Adam ends
            at; "validation", steps to the validation loss of the tuned AdamW with warm-up and
            cosine; "going_on", how far the loss rises in runs that do not begin fresh. The last two
            need tasks with a validation split.
        tasks: what is optimised, and for how many steps.
        entrants: the optimizers, each with its settings or one of those known by name: learned,
            learned tuned, Adam, AdamW, SGD, SGD momentum, NAG, RMSprop, Adam cosine, AdamW cosine,
            SGD momentum cosine; and of today's field AdamW warm-up cosine, NAdamW, Schedule-Free,
            Schedule-Free tuned, Muon, SOAP, SOAP tuned, Prodigy, learned decay.
        reporting_seeds: seeds of the runs that are reported, or how many.
        tuning_seeds: seeds on which hyperparameters are chosen, or how many; never reported.
        settings: hyperparameter settings that each tuned entrant tries on each task: its whole
            grid, or a random part of a larger one.
        max_grid_extensions: settings more, one at a time, while the best is at an end of a grid.
        done: files of rows of earlier runs, which are not run again; of the last two protocols.
        data: folders or files to read in place of those that the tasks name, as in
            {cifar10: my_cifar}.
        data_root: folder of data sets; by default $LEARNED_OPT_DATA.
        download: get image sets that are missing there, through torchvision or OpenML.
        processes: runs at the same time. Wall-clock times mean most with 1. Several machines take
            part under torchrun, with this many processes for each of its own.
        threads: of torch, per run. Small tasks are fastest with 1.
        device: where the runs are, cpu or cuda.
        time_limit: seconds after which a run has failed and is killed.
        logger: "none", or "wandb" besides the files.
    """

    name: str = ""
    protocol: Literal["training", "validation", "going_on"] = "training"
    tasks: list[BenchmarkTask] = field(default_factory=default_tasks)
    entrants: list[str | Entrant] = field(default_factory=lambda: list(DEFAULTS))
    reporting_seeds: int | list[int] = 5
    tuning_seeds: int | list[int] = 2
    settings: int = 9
    max_grid_extensions: int = 4
    done: list[str] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)
    data_root: str | None = None
    download: bool = False
    processes: int = 1
    threads: int = 1
    device: str = "cpu"
    time_limit: float = 300.0
    logger: Literal["none", "wandb"] = "none"

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        entrants = [named(e) if isinstance(e, str) else e for e in self.entrants]
        object.__setattr__(self, "entrants", entrants)
        object.__setattr__(self, "tasks", [self._with_data(task) for task in self.tasks])
        used = {task.task.data for task in self.tasks}
        for old, new in self.data.items():
            if new not in used or new in self.data:
                raise ConfigError(
                    f"data has {{{old}: {new}}}, but no task reads {old!r} alone; use the names "
                    "that the tasks have, and each only once"
                )
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
        for name in ("settings", "processes", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; use at least 1")
        if self.max_grid_extensions < 0 or not 0 < self.time_limit <= LONGEST:
            raise ConfigError(
                f"max_grid_extensions={self.max_grid_extensions} must be at least 0, "
                f"time_limit={self.time_limit} above it and at most {LONGEST:g} seconds"
            )
        self._check_protocol()

    def _check_protocol(self) -> None:
        if self.protocol == "training":
            if self.done:
                raise ConfigError(f"done={self.done} means nothing to protocol: training; drop it")
            if real := [t.label for t in self.tasks if t.task.kind in WORKLOADS]:
                raise ConfigError(f"tasks {real} need protocol: validation or going_on; add it")
            return
        if small := [t.label for t in self.tasks if t.task.kind not in WORKLOADS]:
            raise ConfigError(
                f"tasks {small} have no validation split; use kinds of {list(WORKLOADS)}, or "
                "protocol: training"
            )
        if self.protocol == "going_on":
            if tuned := [e.name for e in self.entrants if e.search]:
                raise ConfigError(
                    f"entrants {tuned} are tuned, which protocol: going_on does not do; give them "
                    "their settings in kwargs"
                )
            return
        if self.validation_baseline not in [e.name for e in self.entrants]:
            raise ConfigError(
                f"protocol: validation compares with {self.validation_baseline!r}, which entrants "
                "lacks; add it"
            )

    def _with_data(self, entry: BenchmarkTask) -> BenchmarkTask:
        """`entry` on the data that `data` has for it; a label that names the data changes too."""
        data = self.data.get(entry.task.data)
        if data is None or "data" in kind_class(entry.task.kind).unused:
            return entry
        label = "" if entry.label == entry.task.label else entry.label
        return replace(entry, task=replace(entry.task, data=data), label=label)

    @property
    def reporting(self) -> list[int]:
        return _seeds(self.reporting_seeds, _FIRST_REPORTING)

    @property
    def tuning(self) -> list[int]:
        return _seeds(self.tuning_seeds, _FIRST_TUNING)

    @property
    def validation_baseline(self) -> str:
        """Whose validation loss is the target of the protocol "validation"."""
        return FIELD[0].name

    @property
    def baseline(self) -> str | None:
        """The entrant that speed-ups are relative to: Adam with nothing but a tuned constant lr."""
        for e in self.entrants:
            plain = e.schedule == "constant" and not e.kwargs and list(e.search) == ["lr"]
            if e.optimizer == "torch.optim.Adam" and plain:
                return e.name
        return None

    def on(self, task: TaskConfig, steps: int = 1000) -> BenchmarkConfig:
        """The same on one task, trained for so many steps."""
        return replace(self, tasks=[BenchmarkTask(task, steps)], data={})

    def smoke(self) -> BenchmarkConfig:
        """The same in seconds: few steps and seeds, two settings each; tells nothing."""
        return replace(
            self,
            tasks=[_smoke(task) for task in self.tasks[:2]],
            data={},  # they have it
            done=[],
            reporting_seeds=self.reporting[: 2 if self.protocol == "training" else 1],
            tuning_seeds=self.tuning[:1],
            settings=2,
            max_grid_extensions=0,
        )


def _smoke(entry: BenchmarkTask) -> BenchmarkTask:
    sizes = {name: getattr(entry.task, name) for name in ("train_size", "test_size")}
    fewer = {name: min(size, 100) for name, size in sizes.items() if size is not None}
    return replace(
        entry,
        task=replace(entry.task, **fewer),
        steps=min(entry.steps, 3),
        target=None,
        best_target=None,
        best_entrant="",
    )


def _seeds(seeds: int | list[int], first: int) -> list[int]:
    return list(range(first, first + seeds)) if isinstance(seeds, int) else list(seeds)
