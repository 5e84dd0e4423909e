"""Compares each run with the baseline, tuned Adam: the rows of scores.csv."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from learned_opt.benchmarking.cells import FORMAT, read
from learned_opt.benchmarking.stats import (
    envelope,
    envelope_speed_up,
    smooth,
    steps_to_target,
    times_less,
)
from learned_opt.benchmarking.tables import read_rows
from learned_opt.errors import OutputError

LOSSES = ("final_train_loss", "mean_loss", "test_loss")
Row = Mapping[str, Any]
Array = np.ndarray


@dataclass(frozen=True)
class Results:
    """The contents of an output folder of the benchmark.

    Attributes:
        facts: benchmark.json: the tasks, entrants, seeds, budget and failures.
        rows: results.csv, with a row for each reported run.
        tuning: tuning.csv.
        losses: the minibatch losses of the reported runs, (steps,), by cell; NaN from the step at
            which a run diverged.
        searched: the same for the baseline's tuning runs, (settings, runs, steps), by task.
    """

    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    tuning: list[dict[str, Any]]
    losses: dict[str, Array]
    searched: dict[str, Array]


def read_results(folder: Path) -> Results:
    """Returns the results of the benchmark in `folder`.

    Raises:
        OutputError: there are none, or they are damaged or from another version.
    """
    try:
        facts = json.loads((folder / "benchmark.json").read_text())
    except OSError as error:
        raise OutputError(
            f"folder={str(folder)!r} has no results of a benchmark ({error}); give the --output of "
            "learned-opt benchmark; if version 0.1 made it, run it again with another --output"
        ) from error
    if facts.get("format") != FORMAT:
        raise OutputError(
            f"folder={str(folder)!r} has results in format {facts.get('format')}, but this "
            f"version reads {FORMAT}; use the version that wrote them, or another --output"
        )
    rows, tuning = (read_rows(folder / f"{name}.csv") for name in ("results", "tuning"))
    steps = {row["task"]: row["steps"] for row in rows}
    reported = {row["cell"]: row["steps"] for row in rows}
    losses, groups = {}, defaultdict(lambda: defaultdict(list))
    for path in sorted((folder / "cells").glob("*.npz")):
        record = read(path)
        if record is None or not record.keys() >= {"entrant", "seed", "task", "hyperparameters"}:
            raise OutputError(f"{path} is damaged; delete it, and run the same command again")
        if path.stem in reported:
            losses[path.stem] = _whole(record["losses"], reported[path.stem])
        elif (
            record["entrant"] == facts["baseline"]
            and record["seed"] in facts["tuning_seeds"]
            and record["task"] in steps
        ):
            setting = json.dumps(record["hyperparameters"], sort_keys=True)
            task = record["task"]
            groups[task][setting].append(_whole(record["losses"], steps[task]))
    if lost := sorted(reported.keys() - losses):
        raise OutputError(
            f"folder={str(folder)!r} lacks cells/{lost[0]}.npz and {len(lost) - 1} more runs that "
            "results.csv has; run the same command again, which repeats them"
        )
    searched = {task: np.array(list(g.values())) for task, g in groups.items()}
    return Results(facts, rows, tuning, losses, searched)


def score(results: Results) -> list[dict[str, Any]]:
    """Returns a row for each reported run, in the order of results.csv.

    best_smoothed_loss     the lowest smoothed minibatch loss (stats.smooth)
    target_loss            the baseline's smoothed loss at the end of its run with the same seed
    steps_to_target        the first step at which the smoothed loss is at most the target; ∞ for a
                           miss. If the baseline diverged, there is no target: all steps of the run,
                           or ∞ if it diverged too
    seconds_to_target      the same in seconds, as if all steps took equally long
    steps_speed_up         the baseline's steps over the run's, 0 for a miss (stats.times_less); 1
                           if the baseline diverged and the run did not
    seconds_speed_up       the same for seconds
    envelope_speed_up      the speed-up over Adam with the best learning rate at each step
    final_train_loss_ratio, mean_loss_ratio, test_loss_ratio
                           the baseline's median loss over seeds, over the loss of this run
    steps_to_targets       JSON: {"loss": steps} for the targets in the config of the task

    All entrants have the same seeds. Without a baseline, there are only best_smoothed_loss and
    steps_to_targets.
    """
    baseline = results.facts["baseline"]
    base = {(row["task"], row["seed"]): row for row in results.rows if row["entrant"] == baseline}
    medians = {
        (task, loss): np.median([row[loss] for row in base.values() if row["task"] == task])
        for task, _ in base
        for loss in LOSSES
    }
    best = {task: envelope(losses) for task, losses in results.searched.items()}
    targets = {task["label"]: task["targets"] for task in results.facts["tasks"]}
    rows = []
    for row in results.rows:
        task, losses = row["task"], results.losses[row["cell"]]
        scores = {key: row[key] for key in ("task", "entrant", "seed")}
        scores["best_smoothed_loss"] = float(smooth(losses).min())
        if base:
            reference = base[task, row["seed"]]
            scores |= _against(row, losses, reference, results.losses[reference["cell"]])
            scores |= {f"{k}_ratio": float(times_less(medians[task, k], row[k])) for k in LOSSES}
        if task in best:
            scores["envelope_speed_up"] = float(envelope_speed_up(losses, best[task]))
        steps = {f"{target:g}": float(steps_to_target(losses, target)) for target in targets[task]}
        rows.append(scores | {"steps_to_targets": json.dumps(steps)})
    return rows


def read_scores(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of scores.csv, with the types that were written."""
    text = ("task", "entrant", "steps_to_targets")
    with path.open(newline="") as file:
        return [
            {k: v if k in text else float(v) for k, v in r.items()} for r in csv.DictReader(file)
        ]


def _against(row: Row, losses: Array, reference: Row, reference_losses: Array) -> dict[str, float]:
    target = smooth(reference_losses)[-1]
    steps, reference_steps = (float(steps_to_target(x, target)) for x in (losses, reference_losses))
    if not np.isfinite(target):
        steps = float(len(losses)) if np.isfinite(smooth(losses)[-1]) else np.inf
        reference_steps, reference = steps, row
    seconds, reference_seconds = (
        s * r["seconds"] / r["steps"] if s < np.inf else np.inf
        for s, r in ((steps, row), (reference_steps, reference))
    )
    return {
        "target_loss": float(target),
        "steps_to_target": steps,
        "seconds_to_target": seconds,
        "steps_speed_up": float(times_less(reference_steps, steps)),
        "seconds_speed_up": float(times_less(reference_seconds, seconds)),
    }


def _whole(losses: Array, steps: int) -> Array:
    """Pads losses with NaN; a run that failed may lack its end."""
    return np.concatenate([losses, np.full(steps - len(losses), np.nan)])
