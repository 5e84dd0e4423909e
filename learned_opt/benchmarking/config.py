"""The config of a benchmark: the tasks, the entrants, the seeds and the budgets.

The command line shows each description alone, so each of them is a full sentence.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from geodesic.finite import check_finite
from learned_opt.benchmarking.entrants import DEFAULTS, FIELD, Entrant, named
from learned_opt.errors import ConfigError
from learned_opt.tasks.kinds import WORKLOADS, TaskConfig, kind_class

# The first seeds if a config gives only their number, too far apart to overlap.
_FIRST_REPORTING, _FIRST_TUNING = 0, 1_000_000
LONGEST = 1e6  # seconds of a run; the timeout of poll(), which waits for it, overflows at 2.1e6


@dataclass(frozen=True)
class BenchmarkTask:
    """Describes a task of a benchmark and how long it is trained.

    Attributes:
        task: The task that is optimized.
        steps: The number of optimizer steps in a run.
        label: The name in tables; the default is the label of `task`, see TaskConfig.label.
        family: How the task relates to the training of the shipped weights. In-family: they were
            trained on its kind of network and on its data. Held-out data: on its kind of network,
            but not on its data. Held-out architecture: on its data, but not on its kind of network.
            Held-out both: on neither. Validation: choices were made on the task.
        targets: Training losses to reach, besides that of the tuned Adam.
        target: The validation loss to reach with the protocol "validation". The default is the
            loss of the tuned AdamW with warm-up and a cosine schedule, which is measured.
        best_target: A second validation loss to reach: the lowest of any optimizer that is not
            learned. By default it is measured. If you give it, give best_entrant too.
        best_entrant: The name of the optimizer that reached best_target.
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
                f"best_target={self.best_target} and best_entrant={self.best_entrant!r} go "
                "together; give both or neither"
            )
        if not self.label:
            object.__setattr__(self, "label", self.task.label)


def default_tasks() -> list[BenchmarkTask]:
    """Returns three shapes of networks on the digits that come with scikit-learn."""
    return [
        BenchmarkTask(TaskConfig(hidden=(32,), activation="relu"), family="in-family"),
        BenchmarkTask(TaskConfig(hidden=(32, 32), activation="tanh"), family="in-family"),
        BenchmarkTask(TaskConfig(hidden=(20,), activation="sigmoid"), family="in-family"),
    ]


@dataclass(frozen=True)
class BenchmarkConfig:
    """The config of `learned-opt benchmark`, which compares every entrant on every task.

    Attributes:
        name: The name of the benchmark in its report.
        protocol: What is measured. "training" measures the steps to the final training loss of the
            tuned Adam, and "validation" the steps to the validation loss of the tuned AdamW with
            warm-up and a cosine schedule. "going_on" measures how far the loss rises in runs that
            do not begin fresh, because they start from a trained network or are disturbed midway,
            and on unusual networks. The last two need tasks with a validation split.
        tasks: The tasks, and the number of steps on each.
        entrants: The optimizers. Give the settings of each, or one of these names: learned (the
            shipped weights), learned num_steps (which are told the number of steps), learned tuned
            (with a tuned factor on their steps), Adam, AdamW, SGD, SGD momentum, NAG, RMSprop, Adam
            cosine, AdamW cosine, SGD momentum cosine, AdamW warm-up cosine, NAdamW, Schedule-Free,
            Schedule-Free tuned, Muon, SOAP, SOAP tuned and Prodigy. The protocol "validation" is
            made for the last eight.
        reporting_seeds: The seeds of the runs that are reported, or the number of these seeds.
        tuning_seeds: The seeds on which hyperparameters are chosen, or the number of these seeds.
            They are never reported.
        settings: The number of hyperparameter settings that each tuned entrant tries on each task.
            They are its whole grid, or a random part of a larger grid.
        max_grid_extensions: If the best setting lies at an end of the grid, the search extends the
            grid beyond this end, by one setting at a time and by at most this many.
        done: Files `rows.jsonl` of earlier outputs. The runs in them count as finished and are not
            repeated. This is for the protocols "validation" and "going_on".
        data: Folders or files that are read in place of those that the tasks name, as in
            {cifar10: my_cifar}.
        data_root: The folder of data sets; the default is $LEARNED_OPT_DATA.
        download: Whether image sets that are missing in data_root are downloaded, through
            torchvision or OpenML.
        processes: The number of runs at the same time. Wall-clock times are most accurate with 1.
            Several machines can share the runs under torchrun; each of its processes then has this
            many runs at the same time.
        threads: The number of torch's threads in each run. Small tasks are fastest with 1.
        device: The device of the runs, cpu or cuda.
        time_limit: The number of seconds after which a run is killed and counts as failed.
        logger: The logger besides the files, "none" or "wandb".
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
                    f"data has {{{old}: {new}}}, but no task reads {old!r}, or the new name is "
                    "itself replaced; use names that the tasks have, and each only once"
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
                raise ConfigError(f"{name}={getattr(self, name)} is too small; use at least 1")
        if self.max_grid_extensions < 0 or not 0 < self.time_limit <= LONGEST:
            raise ConfigError(
                f"max_grid_extensions={self.max_grid_extensions} must be at least 0, and "
                f"time_limit={self.time_limit} above 0 and at most {LONGEST:g} seconds"
            )
        self._check_protocol()

    def _check_protocol(self) -> None:
        if self.protocol == "training":
            if self.done:
                raise ConfigError(f"done={self.done} has no use with protocol: training; drop it")
            if real := [t.label for t in self.tasks if t.task.kind in WORKLOADS]:
                raise ConfigError(f"tasks {real} need protocol: validation or going_on; set one")
            return
        if small := [t.label for t in self.tasks if t.task.kind not in WORKLOADS]:
            raise ConfigError(
                f"tasks {small} have no validation split; use the kinds {list(WORKLOADS)}, or "
                "protocol: training"
            )
        if self.protocol == "going_on":
            if tuned := [e.name for e in self.entrants if e.search]:
                raise ConfigError(
                    f"entrants {tuned} have a search, but protocol: going_on does not tune; give "
                    "their settings in kwargs instead"
                )
            return
        if self.validation_baseline not in [e.name for e in self.entrants]:
            raise ConfigError(
                f"protocol: validation compares with {self.validation_baseline!r}, which is not in "
                "entrants; add it"
            )

    def _with_data(self, entry: BenchmarkTask) -> BenchmarkTask:
        """Returns `entry` with its data replaced by `data`; a label that names the data changes."""
        data = self.data.get(entry.task.data)
        if data is None or "data" in kind_class(entry.task.kind).unused:
            return entry
        label = "" if entry.label == entry.task.label else entry.label
        return replace(entry, task=replace(entry.task, data=data), label=label)

    @property
    def reporting(self) -> list[int]:
        """The seeds of the runs that are reported."""
        return _seeds(self.reporting_seeds, _FIRST_REPORTING)

    @property
    def tuning(self) -> list[int]:
        """The seeds on which hyperparameters are chosen."""
        return _seeds(self.tuning_seeds, _FIRST_TUNING)

    @property
    def validation_baseline(self) -> str:
        """The entrant whose validation loss is the target of the protocol "validation"."""
        return FIELD[0].name

    @property
    def baseline(self) -> str | None:
        """The entrant that speed-ups are relative to, or None.

        It is Adam with a tuned, constant learning rate and no other setting.
        """
        for e in self.entrants:
            plain = e.schedule == "constant" and not e.kwargs and list(e.search) == ["lr"]
            if e.optimizer == "torch.optim.Adam" and plain:
                return e.name
        return None

    def on(self, task: TaskConfig, steps: int = 1000) -> BenchmarkConfig:
        """Returns a config with only this task, trained for `steps` steps."""
        return replace(self, tasks=[BenchmarkTask(task, steps)], data={})

    def smoke(self) -> BenchmarkConfig:
        """Returns a config of the same kind that runs in seconds; its results mean nothing.

        It has few steps and seeds, and two settings for each tuned entrant.
        """
        return replace(
            self,
            tasks=[_smoke(task) for task in self.tasks[:2]],
            data={},  # the tasks already have it
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
