"""Learning rates for the entrants that need one: as good as a half-decade grid finds them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from learned_opt.benchmark.cells import Cell, run_cells
from learned_opt.benchmark.config import BenchmarkConfig, BenchmarkTask, Entrant


@dataclass
class Tuning:
    """The search for one entrant on one task.

    Attributes:
        scores: learning rate -> final loss on the full training set, mean over the tuning seeds;
            infinite where a run diverged or failed.
        extensions: half-decades by which the grid has grown.
        errors: tracebacks of runs that raised, by cell name.
    """

    task: BenchmarkTask
    entrant: Entrant
    scores: dict[float, float]
    extensions: int = 0
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def lr(self) -> float:
        """The learning rate of the lowest score; the smaller one of equals."""
        return min(sorted(self.scores), key=self.scores.__getitem__)

    @property
    def at_edge(self) -> bool:
        """The best is at an end of the grid: a better one may lie beyond."""
        return self.lr in (min(self.scores), max(self.scores))


def learning_rate_grid(low: float, high: float) -> list[float]:
    """10^(k/2) from low to high, both rounded to the nearest half-decade."""
    return [_half_decade(k) for k in range(_index(low), _index(high) + 1)]


def tune(config: BenchmarkConfig, folder: Path) -> dict[tuple[str, str], Tuning]:
    """The search for each tuned entrant on each task, by (task label, entrant name).

    All searches advance together, a grid or an extension at a time, which keeps processes busy.
    """
    grid = learning_rate_grid(config.learning_rate_min, config.learning_rate_max)
    searches = [Tuning(t, e, {}) for t in config.tasks for e in config.entrants if e.tune]
    pending = [(search, lr) for search in searches for lr in grid]
    while pending:
        cells = [
            Cell(search.task, search.entrant, lr, seed, config.data_root, config.threads)
            for search, lr in pending
            for seed in config.tuning
        ]
        records = run_cells(cells, folder, config.processes, "tuning")
        runs = iter(zip(cells, records, strict=True))
        for search, lr in pending:
            group = [next(runs) for _ in config.tuning]
            search.scores[lr] = float(np.mean([r["final_train_loss"] for _, r in group]))
            search.errors |= {cell.name: r["error"] for cell, r in group if r["error"]}
        pending = [
            (search, _beyond(search))
            for search in searches
            if search.at_edge and search.extensions < config.max_grid_extensions
        ]
        for search, _ in pending:
            search.extensions += 1
    return {(search.task.label, search.entrant.name): search for search in searches}


def _beyond(search: Tuning) -> float:
    """The next half-decade on the side of the grid where the best is."""
    return _half_decade(_index(search.lr) + (-1 if search.lr == min(search.scores) else 1))


def _index(lr: float) -> int:
    return round(2 * math.log10(lr))


def _half_decade(k: int) -> float:
    return float(f"{10 ** (k / 2):.4g}")  # four digits: what tables and file names can show
