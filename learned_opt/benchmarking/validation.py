"""The protocol "validation": steps to the validation loss that the tuned AdamW reaches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import pairwise
from typing import Any

import numpy as np

from learned_opt.benchmarking.cells import Cell, Record
from learned_opt.benchmarking.config import BenchmarkConfig, BenchmarkTask
from learned_opt.benchmarking.entrants import FIELD, LEARNED, Entrant, is_range
from learned_opt.benchmarking.tune import half_decades, settings_of
from learned_opt.output_folder import provenance
from learned_opt.run import run_optimizer
from learned_opt.tasks.kinds import Draw, make_task

BASELINE = FIELD[0]  # AdamW with warm-up and cosine
LENGTHS = (1.0, 1.25, 1.5, 2.0, 3.0)  # factors that shorten runs of entrants that know the length
SMOOTHING = 0.05  # the share of the budget over which the validation loss is averaged
EVALUATIONS = 50  # in a run, at equal distances
FEW_EVALUATIONS = 10  # in a run of which only the end counts
TRIAL = 0.25  # the share of a tuning run after which it stops if its loss is above chance
# An entrant whose full run never comes within this share of the target gets no shorter runs.
HOPELESS = 0.05

Run = Callable[[Sequence[Cell]], list[Record]]
Row = dict[str, Any]


@dataclass(frozen=True)
class ValidationCell(Cell):
    """Describes a run with evaluations of the validation loss during training.

    Attributes:
        evaluations: their number, at equal distances, without the one before the first step.
        trial: whether the run stops if its loss is above chance after TRIAL of its steps.
    """

    evaluations: int = EVALUATIONS
    trial: bool = False

    def _more_identity(self) -> dict[str, Any]:
        return {"evaluations": self.evaluations, "trial": self.trial}

    def run(self) -> Record:
        task = make_task(self.task.task, self.data_root, Draw(device=self.device))
        steps, chance = self.task.steps, float(task.chance)
        every = max(1, steps // self.evaluations)

        def hopeless(step: int, loss: float) -> bool:
            return self.trial and step >= TRIAL * steps and loss > chance

        run = run_optimizer(
            task,
            lambda params: self.entrant.make_optimizer(params, self.chosen, steps),
            self.seed,
            steps,
            [*range(0, steps, every), steps],
            hopeless,
        )
        facts = {
            "seconds": round(run.seconds, 3),
            "peak_memory": run.peak_memory,
            "validation": [[int(step), _rounded(loss)] for step, loss in run.validation],
        }
        if run.diverged:
            return self.blank(**facts, diverged=True)
        last = max(1, round(SMOOTHING * steps))
        ending = {key: _rounded(value) for key, value in run.evaluation.items()}
        return self.blank(**facts, **ending, train_loss=_rounded(run.losses[-last:].mean()))

    def blank(self, **facts: Any) -> Record:
        """Returns the record of a run without a result, with infinite losses, and with `facts`."""
        losses = ("validation_loss", "test_loss", "train_loss")
        accuracies = ("validation_accuracy", "test_accuracy")
        here = provenance()
        return {
            "task": self.task.label,
            "entrant": self.entrant.name,
            "seed": self.seed,
            "steps": self.task.steps,
            "hyperparameters": self.chosen,
            **dict.fromkeys(losses, math.inf),
            **dict.fromkeys((*accuracies, "seconds", "peak_memory"), math.nan),
            "diverged": False,
            "error": None,
            "validation": [],
            "weights": (self.entrant.weights_hash or "")[:12],
            "commit": here["commit"],
            "cpu": here["cpu"],
            "versions": here["versions"] | _package_version(self.entrant),
        } | facts


@dataclass(frozen=True)
class Target:
    """A validation loss to reach on a task.

    Attributes:
        loss: the lowest validation loss of the tuned `entrant` in a run of the full length,
            averaged over SMOOTHING of the budget and over tuning seeds.
    """

    entrant: str
    loss: float


@dataclass(frozen=True)
class Outcome:
    """The results of the protocol.

    Attributes:
        rows: a dict for each (task, entrant, reporting seed), see `outcome_row`.
        targets: the targets by task: that of the baseline and that of the best entrant of the
            field, which are the entrants that are not learned.
        tuning: a dict for each setting that was tried, with its final validation loss, whether it
            was chosen, and whether a chosen one is at an end of its range.
        curves: the steps and validation losses of each full run, (evaluations, 2), by (task,
            entrant).
    """

    rows: list[Row]
    targets: dict[str, tuple[Target, Target]]
    tuning: list[Row]
    curves: dict[tuple[str, str], list[np.ndarray]]


def run_validation(config: BenchmarkConfig, run: Run) -> Outcome:
    """Tunes the entrants, measures targets that the config does not have, and runs all lengths.

    `run` returns the records of cells, in their order.
    """
    cells = _Cells(config)
    chosen, tuning = _tune(config, cells, run)
    targets = _targets(config, cells, run, chosen)
    full = _full_runs(config, cells, run, chosen)
    shorter = _shorter_runs(config, cells, run, chosen, full, targets)
    rows = [
        outcome_row(
            entrant, record, targets[label], {f: r[key] for f, r in shorter.items() if key in r}
        )
        for key, record in full.items()
        for label, entrant in [(key[0], _entrant(config, key[1]))]
    ]
    curves: dict[tuple[str, str], list[np.ndarray]] = {}
    for (label, name, _), record in full.items():
        curve = np.array(record["validation"], dtype=float).reshape(-1, 2)
        curves.setdefault((label, name), []).append(curve)
    return Outcome(rows, targets, tuning, curves)


@dataclass(frozen=True)
class _Cells:
    config: BenchmarkConfig

    def __call__(
        self, task: BenchmarkTask, entrant: Entrant, chosen: dict[str, Any], seed: int,
        length: float = 1.0,
    ) -> ValidationCell:  # fmt: skip
        config = self.config
        shorter = replace(task, steps=max(1, round(task.steps / length)))
        return ValidationCell(
            shorter,
            entrant,
            chosen,
            seed,
            config.data_root,
            config.threads,
            config.device,
            FEW_EVALUATIONS if length > 1 else EVALUATIONS,
            seed in config.tuning,
        )


Chosen = Mapping[tuple[str, str], dict[str, Any]]


def _tune(config: BenchmarkConfig, make: _Cells, run: Run) -> tuple[Chosen, list[Row]]:
    """Returns the settings with the lowest final validation loss on the first tuning seed."""
    trials = [
        (task, entrant, dict(setting))
        for task in config.tasks
        for entrant in config.entrants
        if entrant.search
        for setting in settings_of(entrant, config.settings)
    ]
    cells = [make(task, entrant, setting, config.tuning[0]) for task, entrant, setting in trials]
    chosen: dict[tuple[str, str], dict[str, Any]] = {}
    best: dict[tuple[str, str], float] = {}
    rows = []
    for (task, entrant, setting), record in zip(trials, run(cells), strict=True):
        key, loss = (task.label, entrant.name), record["validation_loss"]
        if key not in best or loss < best[key]:
            best[key], chosen[key] = loss, setting
        rows.append({"task": task.label, "entrant": entrant.name, "hyperparameters": setting,
                     "validation_loss": loss})  # fmt: skip
    ranges = {e.name: {k: s for k, s in e.search.items() if is_range(s)} for e in config.entrants}
    for row in rows:
        setting = row["hyperparameters"]
        row["chosen"] = chosen[row["task"], row["entrant"]] == setting
        ends = {k: half_decades(*s) for k, s in ranges[row["entrant"]].items()}
        at_edge = any(setting[k] in (grid[0], grid[-1]) for k, grid in ends.items())
        row["at_edge"] = row["chosen"] and at_edge
    return chosen, rows


def _targets(
    config: BenchmarkConfig, make: _Cells, run: Run, chosen: Chosen
) -> dict[str, tuple[Target, Target]]:
    """Returns the config's targets by task; others come from the field's runs on tuning seeds."""
    open_tasks = [t for t in config.tasks if t.target is None or t.best_target is None]
    field = [entrant for entrant in config.entrants if entrant.optimizer != LEARNED]
    pairs = [(task, entrant) for task in open_tasks for entrant in field]
    cells = [
        make(task, entrant, chosen.get((task.label, entrant.name), {}), seed)
        for task, entrant in pairs
        for seed in config.tuning
    ]
    records = iter(run(cells))
    found: dict[str, dict[str, list[Record]]] = {}
    for task, entrant in pairs:
        found.setdefault(task.label, {})[entrant.name] = [next(records) for _ in config.tuning]
    targets = {}
    for task in config.tasks:
        runs = found.get(task.label, {})
        ends = {n: float(np.mean([r["validation_loss"] for r in g])) for n, g in runs.items()}
        base = task.target
        if base is None:
            base = lowest(runs[config.validation_baseline])
        best, name = task.best_target, task.best_entrant
        if best is None:
            name = min(ends, key=ends.__getitem__)
            best = lowest(runs[name])
        targets[task.label] = Target(config.validation_baseline, base), Target(name, best)
    return targets


def _full_runs(
    config: BenchmarkConfig, make: _Cells, run: Run, chosen: Chosen
) -> dict[tuple[str, str, int], Record]:
    keys = [
        (t, e, seed) for t in config.tasks for e in config.entrants for seed in config.reporting
    ]
    cells = [make(t, e, chosen.get((t.label, e.name), {}), seed) for t, e, seed in keys]
    named = [(t.label, e.name, seed) for t, e, seed in keys]
    return dict(zip(named, run(cells), strict=True))


def _shorter_runs(
    config: BenchmarkConfig,
    make: _Cells,
    run: Run,
    chosen: Chosen,
    full: Mapping[tuple[str, str, int], Record],
    targets: Mapping[str, tuple[Target, Target]],
) -> dict[float, dict[tuple[str, str, int], Record]]:
    """Returns the shorter runs by length, without those that cannot improve the result.

    The shortest run comes first.
    """
    tasks = {task.label: task for task in config.tasks}
    waiting = []
    for key, record in full.items():
        near = (1 + HOPELESS) * max(target.loss for target in targets[key[0]])
        curve = [loss for _, loss in record["validation"]]
        if _entrant(config, key[1]).knows_length and curve and min(curve) <= near:
            waiting.append(key)
    runs = {}
    for length in sorted(LENGTHS[1:], reverse=True):
        cells = [
            make(tasks[label], _entrant(config, name), chosen.get((label, name), {}), seed, length)
            for label, name, seed in waiting
        ]
        runs[length] = dict(zip(waiting, run(cells), strict=True))
        waiting = [
            key
            for key, record in runs[length].items()
            if record["validation_loss"] > min(target.loss for target in targets[key[0]])
        ]
    return runs


def outcome_row(
    entrant: Entrant,
    record: Record,
    targets: tuple[Target, Target],
    shorter: Mapping[float, Record],
) -> Row:
    """Returns the row of results.csv for one entrant on one task and seed.

    speed_up        the budget over the steps to the first of `targets`, 0 for a miss. If the
                    entrant knows the length of a run, it is the largest factor in `shorter`, or 1,
                    whose run ends at or below the target. Otherwise it is the budget over the step
                    of the first of two evaluations in a row that are at or below it
    best_speed_up   the same for the second of `targets`, that of the best entrant of the field

    The row also has the losses and accuracies at the end of the full run.
    """
    kept = ("task", "entrant", "seed", "steps", "hyperparameters", "train_loss", "validation_loss",
            "validation_accuracy", "test_loss", "test_accuracy", "seconds", "peak_memory",
            "diverged", "error")  # fmt: skip
    row = {key: record[key] for key in kept}
    lengths = {1.0: record} | dict(shorter)
    for name, target in zip(("speed_up", "best_speed_up"), targets, strict=True):
        if entrant.knows_length:
            row[name] = max(
                (f for f, r in lengths.items() if r["validation_loss"] <= target.loss), default=0.0
            )
        else:
            row[name] = anytime_speed_up(record, target.loss)
        row[name.replace("speed_up", "target")] = target.loss
    return row


def anytime_speed_up(record: Record, target: float) -> float:
    """Returns the budget over the step of the first of two evaluations in a row at the target.

    Both have to be at or below it. A miss and a run that diverged later have 0.
    """
    if record["diverged"] or record["error"]:
        return 0.0
    curve = [point for point in record["validation"] if point[0]]
    for (step, loss), (_, following) in pairwise(curve):
        if max(loss, following) <= target:
            return record["steps"] / step
    return 0.0


def lowest(records: Sequence[Record]) -> float:
    """Returns the mean over runs of the lowest validation loss; infinite if one diverged.

    Each loss is averaged over the preceding steps, as many as SMOOTHING of the budget.
    """
    lows = []
    for record in records:
        if record["diverged"] or record["error"]:
            return math.inf
        steps, losses = np.array(record["validation"]).T
        window = SMOOTHING * record["steps"]
        smoothed = [
            losses[(steps > step - window) & (steps <= step)].mean()
            for step in steps[steps >= window]
        ]
        lows.append(min(smoothed))
    return float(np.mean(lows))


def _entrant(config: BenchmarkConfig, name: str) -> Entrant:
    return next(entrant for entrant in config.entrants if entrant.name == name)


def _package_version(entrant: Entrant) -> dict[str, str]:
    package = entrant.optimizer.partition(".")[0]
    if package in ("torch", LEARNED, "learned_opt"):
        return {}
    try:
        return {package: metadata.version(package)}
    except metadata.PackageNotFoundError:
        return {}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
