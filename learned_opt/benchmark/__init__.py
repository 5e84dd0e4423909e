"""The benchmark: optimizers on tasks, tuned on some seeds and reported on others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from learned_opt.benchmark.cells import Cell, optimizer_class, run_cells
from learned_opt.benchmark.config import LEARNED, BenchmarkConfig, BenchmarkTask, Entrant
from learned_opt.benchmark.report import summary_table, write_report
from learned_opt.benchmark.tune import tune
from learned_opt.outputs import claim_output

__all__ = ["BenchmarkConfig", "BenchmarkTask", "Entrant", "run_benchmark", "summary_table"]


def run_benchmark(config: BenchmarkConfig, output: str | Path) -> list[dict[str, Any]]:
    """Tunes, runs and reports; the rows of results.csv, one per (task, entrant, seed).

    Leaves in `output`: results.csv, tuning.csv, report.html, and cells/, a file per run with its
    whole loss curve. Claims `output` itself; called again, it runs only what is missing.
    """
    for entrant in config.entrants:
        if entrant.optimizer != LEARNED:
            optimizer_class(entrant.optimizer)  # a misspelt name is said now, not after the tuning
    settings = dataclasses.asdict(config)
    with claim_output(output, settings, "benchmark", free=["processes"]) as folder:
        tunings = tune(config, folder / "cells")
        cells = []
        for task in config.tasks:
            for entrant in config.entrants:
                lr = tunings[task.label, entrant.name].lr if entrant.tune else None
                cells += [
                    Cell(task, entrant, lr, seed, config.data_root, config.threads)
                    for seed in config.reporting
                ]
        records = run_cells(cells, folder / "cells", config.processes, "benchmark")
        results, losses = [], {}
        errors = {name: text for t in tunings.values() for name, text in t.errors.items()}
        for cell, record in zip(cells, records, strict=True):
            key = cell.task.label, cell.entrant.name
            at_edge = cell.entrant.tune and tunings[key].at_edge
            results.append(_row(cell, record, at_edge))
            losses.setdefault(key, []).append(record["losses"])
            if record["error"]:
                errors[cell.name] = record["error"]
        report = write_report(folder, config, results, tunings, losses, errors)
    print(f"{summary_table(results)}\n\n{report}")
    return results


def _row(cell: Cell, record: dict[str, Any], at_edge: bool) -> dict[str, Any]:
    """A row of results.csv; an error by its last line, the cell's file has the traceback."""
    environment = record["environment"]
    return {
        "task": cell.task.label,
        "entrant": cell.entrant.name,
        "seed": cell.seed,
        "lr": cell.entrant.kwargs.get("lr") if cell.lr is None else cell.lr,
        "tuned": cell.entrant.tune,
        "lr_at_edge": at_edge,
        "steps": cell.task.steps,
        **{
            key: record[key]
            for key in ("final_train_loss", "mean_loss", "best_loss", "test_loss", "test_accuracy")
        },
        "seconds": record["seconds"],
        "diverged": record["diverged"],
        "error": record["error"] and record["error"].strip().splitlines()[-1],
        "commit": environment["commit"],
        **environment["versions"],
    }
