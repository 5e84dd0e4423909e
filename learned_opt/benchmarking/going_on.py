"""The protocol "going_on": how far the loss rises in runs that change, and where it ends."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from learned_opt.benchmarking.cells import Record
from learned_opt.benchmarking.config import BenchmarkConfig
from learned_opt.benchmarking.validation import Run, ValidationCell
from learned_opt.tasks.kinds import TaskConfig

Row = dict[str, Any]
# The steps and validation losses of each run, (evaluations, 2), by (task, entrant).
Curves = dict[tuple[str, str], list[np.ndarray]]
Key = tuple[str, str, int]  # task, entrant, seed


def change_of(task: TaskConfig) -> int:
    """Returns the step before which the new phase of the task begins."""
    return getattr(task.own, "change", 0)


def undisturbed(task: TaskConfig) -> TaskConfig | None:
    """Returns the task without the factors of its loss; None if it has none."""
    options = {k: v for k, v in task.options.items() if k not in ("scale", "first_scale")}
    return replace(task, options=options) if options != task.options else None


def run_going_on(config: BenchmarkConfig, run: Run) -> tuple[list[Row], Curves]:
    """Returns a row for each (task, entrant, reporting seed), see `outcome`, and the curves.

    `run` returns the records of cells, in their order.
    """
    cells: dict[tuple[Key, bool], ValidationCell] = {}
    for task, entrant, seed in product(config.tasks, config.entrants, config.reporting):
        twin = undisturbed(task.task)
        for disturbed, of in ((True, task.task), (False, twin)):
            if of is not None:
                cells[(task.label, entrant.name, seed), disturbed] = ValidationCell(
                    replace(task, task=of), entrant, {}, seed, config.data_root, config.threads,
                    config.device,
                )  # fmt: skip
    records = dict(zip(cells, run(list(cells.values())), strict=True))
    changes = {task.label: change_of(task.task) for task in config.tasks}
    rows, curves = [], defaultdict(list)
    for (key, disturbed), record in records.items():
        if disturbed:
            rows.append(outcome(record, changes[key[0]], records.get((key, False))))
            curve = np.array(record["validation"], dtype=float).reshape(-1, 2)
            curves[key[:2]].append(curve)
    return rows, dict(curves)


def outcome(record: Record, change: int, undisturbed: Record | None) -> Row:
    """Returns the row of one run.

    before       the validation loss before the first update of the new phase
    worst, end   the highest validation loss after it, and the last one, over `before`
    behind       the steps by which the run is behind the undisturbed one at its end, see `behind`;
                 ∞ if the run failed, and None if nothing is disturbed
    """
    kept = ("task", "entrant", "seed", "steps", "validation_loss", "validation_accuracy",
            "test_loss", "test_accuracy", "diverged", "error")  # fmt: skip
    row = {key: record[key] for key in kept}
    curve = np.array(record["validation"], dtype=float).reshape(-1, 2)
    before = curve[curve[:, 0] == change, 1]
    after = curve[curve[:, 0] > change, 1]
    failed = record["diverged"] or record["error"] or not len(before)
    row |= {
        "change": change,
        "before": float(before[0]) if len(before) else math.nan,
        "worst": math.inf if failed else float(after.max() / before[0]),
        "end": math.inf if failed else float(record["validation_loss"] / before[0]),
        "behind": None,
    }
    if undisturbed is not None:
        row["behind"] = math.inf if failed else behind(record["validation_loss"], undisturbed)
    return row


def behind(loss: float, undisturbed: Record) -> float:
    """Returns how many steps of the undisturbed run were left when it first fell to `loss`.

    Its validation loss is interpolated linearly between evaluations. 0 if it never fell so low.
    """
    curve = np.array(undisturbed["validation"], dtype=float)
    steps, lowest = curve[:, 0], np.minimum.accumulate(curve[:, 1])
    if lowest[-1] > loss:
        return 0.0
    if lowest[0] <= loss:
        return float(steps[-1])
    i = int((lowest <= loss).argmax())
    share = (lowest[i - 1] - loss) / (lowest[i - 1] - lowest[i])
    return float(steps[-1] - (steps[i - 1] + share * (steps[i] - steps[i - 1])))
