"""Logs a benchmark to Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from learned_opt.benchmarking.cells import Cell, Record
from learned_opt.benchmarking.config import BenchmarkConfig
from learned_opt.errors import ConfigError


def make_tracker(config: BenchmarkConfig, folder: Path) -> Tracker | None:
    """Returns a tracker, or None if `logger` is "none"."""
    return Tracker(config, folder) if config.logger == "wandb" else None


class Tracker:
    """A run of wandb, with a point for each cell when it ends, then the results and the report."""

    def __init__(self, config: BenchmarkConfig, folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "logger is 'wandb', which is not installed; run pip install 'learned-opt[wandb]', "
                "or use logger: none"
            ) from error
        self._wandb = wandb
        self._run = wandb.init(
            project="learned-opt", job_type="benchmark", dir=str(folder), config=asdict(config)
        )

    def log(self, cell: Cell, record: Record) -> None:
        where = f"{cell.task.label}/{cell.entrant.name}"
        metrics = ("final_train_loss", "mean_loss", "validation_loss", "test_loss", "seconds")
        self._run.log({f"{where}/{m}": record[m] for m in metrics if m in record})

    def finish(self, results: Sequence[dict[str, Any]], report: Path) -> None:
        columns = list(results[0])
        table = self._wandb.Table(columns, [[row[key] for key in columns] for row in results])
        self._run.log({"results": table, "report": self._wandb.Html(report.read_text())})
        self._run.finish()
