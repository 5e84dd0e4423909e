"""Writes and reads the files of results: results.csv, tuning.csv and benchmark.json."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from geodesic.files import write_atomic
from learned_opt.benchmarking.cells import FORMAT, Cell, Record
from learned_opt.benchmarking.config import BenchmarkConfig
from learned_opt.benchmarking.entrants import Entrant
from learned_opt.benchmarking.tune import Tuning

Row = dict[str, Any]
Tunings = Mapping[tuple[str, str], Tuning]

_METRICS = ("final_train_loss", "mean_loss", "best_loss", "test_loss", "test_accuracy")
_INTEGERS = ("seed", "steps", "runs", "failures", "extensions")
_FLOATS = (*_METRICS, "lr", "seconds", "peak_memory")
_FLAGS = ("tuned", "lr_at_edge", "diverged", "chosen", "at_edge")


def result_rows(cells: Sequence[Cell], records: Sequence[Record], tunings: Tunings) -> list[Row]:
    """Returns a row of results.csv for each cell.

    It has the last line of an error; the file of the cell has the rest.
    """
    return [
        _result_row(cell, record, tunings.get((cell.task.label, cell.entrant.name)))
        for cell, record in zip(cells, records, strict=True)
    ]


def _result_row(cell: Cell, record: Record, tuning: Tuning | None) -> Row:
    entrant, environment = cell.entrant, record["environment"]
    return {
        "task": cell.task.label,
        "entrant": entrant.name,
        "seed": cell.seed,
        "lr": (entrant.kwargs | cell.chosen).get("lr"),
        "hyperparameters": json.dumps(cell.chosen),
        "tuned": tuning is not None,
        "lr_at_edge": tuning is not None and bool(tuning.beyond("lr")),
        "steps": cell.task.steps,
        **{key: record[key] for key in (*_METRICS, "seconds", "peak_memory", "diverged")},
        "error": record["error"] and record["error"].strip().splitlines()[-1],
        "cell": cell.name,
        "commit": environment["commit"],
        **environment["versions"],
    }


def tuning_rows(tunings: Tunings, seeds: int) -> list[Row]:
    """Returns a row of tuning.csv for each setting that was tried, on `seeds` seeds."""
    return [
        {
            "task": task,
            "entrant": entrant,
            "hyperparameters": json.dumps(dict(setting)),
            "lr": dict(setting).get("lr"),
            "final_train_loss": tuning.scores[setting],
            "runs": seeds,
            "failures": tuning.failures[setting],
            "chosen": setting == tuning.best,
            "extensions": tuning.extensions,
            "at_edge": tuning.at_edge,
        }
        for (task, entrant), tuning in tunings.items()
        for setting in tuning.tried
    ]


def describe(
    config: BenchmarkConfig,
    facts: Mapping[str, Mapping[str, Any]],
    tunings: Tunings,
    records: Mapping[str, Record],
    ranks: int,
) -> dict[str, Any]:
    """Returns the content of benchmark.json: what a report needs besides the numbers.

    It has no folders, so that it can be published.

    Args:
        config: the config of the benchmark.
        facts: the facts about each task that are known once it is made, by label.
        tunings: the searches by (task label, entrant name).
        records: the records of all cells by name, including those of the tuning.
        ranks: the number of processes of the torchrun job.
    """
    plain = json.loads(json.dumps(asdict(config)))
    del plain["data_root"], plain["data"]
    for task, entry in zip(config.tasks, plain["tasks"], strict=True):
        entry["task"]["data"] = Path(task.task.data).name
    for entrant, entry in zip(config.entrants, plain["entrants"], strict=True):
        entry["weights"] = entrant.weights and Path(entrant.weights).name
        entry["weights_digest"] = entrant.weights_hash
    tasks = [
        entry.pop("task") | entry | facts[entry["label"]] for entry in map(dict, plain["tasks"])
    ]
    failed = {name: record for name, record in records.items() if record["error"]}
    return {
        "format": FORMAT,
        "suite": config.name,
        "tasks": tasks,
        "entrants": plain["entrants"],
        "baseline": config.baseline,
        "reporting_seeds": config.reporting,
        "tuning_seeds": config.tuning,
        "budget": {
            "settings": config.settings,
            "max_extensions": config.max_grid_extensions,
            "seeds": len(config.tuning),
        },
        "tuning_runs": {e.name: _tuning_runs(e, tunings, config) for e in config.entrants},
        "processes": config.processes,
        "ranks": ranks,
        "threads": config.threads,
        "device": config.device,
        "time_limit": config.time_limit,
        "training_seconds": sum(r["seconds"] for r in records.values() if not r["error"]),
        "cells": len(records),
        "failures": len(failed),
        "failed": [
            {"cell": name} | {key: record[key] for key in ("task", "entrant", "seed", "error")}
            for name, record in failed.items()
        ],
        "config": plain,
    }


def write(folder: Path, results: Sequence[Row], tuning: Sequence[Row], facts: Row) -> None:
    write_atomic(folder / "results.csv", to_csv(results))
    write_atomic(folder / "tuning.csv", to_csv(tuning))
    write_atomic(folder / "benchmark.json", json.dumps(facts, indent=1).encode())


def to_csv(rows: Sequence[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def read_rows(path: str | Path) -> list[Row]:
    """Returns the rows of results.csv or tuning.csv, with the types that were written."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: _typed(key, text) for key, text in row.items()} for row in rows]


def _typed(key: str, text: str) -> Any:
    if key in _FLAGS:
        return text == "True"
    if key in _INTEGERS:
        return int(text)
    if key in _FLOATS:
        return float(text) if text else None
    return text or (None if key in ("error", "commit") else "")


def _tuning_runs(entrant: Entrant, tunings: Tunings, config: BenchmarkConfig) -> int:
    searches = [tuning for (_, name), tuning in tunings.items() if name == entrant.name]
    return len(config.tuning) * sum(len(search.scores) for search in searches)
