"""Tunes the hyperparameters of entrants, on grids of half decades."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch

from learned_opt.benchmarking.cells import Cell, Record
from learned_opt.benchmarking.config import BenchmarkConfig, BenchmarkTask
from learned_opt.benchmarking.entrants import Entrant, choices, is_range
from learned_opt.errors import ConfigError
from learned_opt.tasks.base import generator

Setting = tuple[tuple[str, Any], ...]  # (argument, value) pairs


@dataclass
class Tuning:
    """The search for one entrant on one task.

    Attributes:
        scores: the final loss on the full training set by setting, averaged over the tuning seeds;
            infinite if a run diverged or failed.
        extensions: the number of settings by which the grid has grown.
        failures: the number of runs that diverged or failed, by setting.
        errors: the tracebacks of runs that failed, by cell name.
    """

    task: BenchmarkTask
    entrant: Entrant
    scores: dict[Setting, float] = field(default_factory=dict)
    extensions: int = 0
    failures: dict[Setting, int] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> Setting:
        """The setting with the lowest score; of equal ones the first, with the smaller values."""
        return min(self.tried, key=self.scores.__getitem__)

    @property
    def tried(self) -> list[Setting]:
        """The settings that were tried, in order; numbers are ordered by size."""
        return sorted(self.scores, key=_order)

    @property
    def at_edge(self) -> bool:
        """Whether the best setting is at an end of a grid, so that a better one may lie beyond."""
        return bool(self.beyond())

    def beyond(self, only: str | None = None) -> list[Setting]:
        """Returns the neighbors of the best setting that lie outside of the grids so far.

        `only` restricts them to the grid of one hyperparameter.
        """
        found = []
        for name, value in self.best:
            if is_range(self.entrant.search[name]) and only in (None, name):
                tried = {dict(setting)[name] for setting in self.scores}
                steps = {min(tried): -1, max(tried): 1}
                if value in steps:
                    grown = half_decade(_index(value) + steps[value])
                    found.append(tuple((k, grown if k == name else v) for k, v in self.best))
        return found


def half_decades(low: float, high: float) -> list[float]:
    """Returns all 10^(k/2) from low to high, which are rounded to the nearest half decades."""
    return [half_decade(k) for k in range(_index(low), _index(high) + 1)]


def grid_of(entrant: Entrant) -> list[Setting]:
    """Returns all settings of the search of `entrant`; numbers are ordered by size."""
    grids = [half_decades(*s) if is_range(s) else choices(s) for s in entrant.search.values()]
    return [tuple(zip(entrant.search, values, strict=True)) for values in product(*grids)]


def settings_of(entrant: Entrant, count: int) -> list[Setting]:
    """Returns the `count` settings that `entrant` tries first.

    They are its grid, or a random part of a larger grid.

    Raises:
        ConfigError: the grid has fewer, so its budget would be below that of the others.
    """
    grid = grid_of(entrant)
    if len(grid) < count:
        raise ConfigError(
            f"entrant {entrant.name!r} has {len(grid)} settings to try, but all that are tuned "
            f"try settings={count}; widen its search, or lower settings"
        )
    order = torch.randperm(len(grid), generator=generator("settings", entrant.name))
    return [grid[i] for i in sorted(order[:count].tolist())]


def tune(
    config: BenchmarkConfig,
    run: Callable[[Sequence[Cell]], list[Record]],
    make_cell: Callable[[BenchmarkTask, Entrant, dict[str, Any], int], Cell],
) -> dict[tuple[str, str], Tuning]:
    """Returns the search for each tuned entrant on each task, by (task label, entrant name).

    All searches advance together, by a grid or an extension at a time, to keep processes busy.

    Args:
        config: the config of the benchmark.
        run: returns the records of cells.
        make_cell: returns the cell of a task, an entrant, a setting and a seed.
    """
    searches = [Tuning(t, e) for t in config.tasks for e in config.entrants if e.search]
    pending = [(s, x) for s in searches for x in settings_of(s.entrant, config.settings)]
    while pending:
        cells = [
            make_cell(search.task, search.entrant, dict(setting), seed)
            for search, setting in pending
            for seed in config.tuning
        ]
        runs = iter(zip(cells, run(cells), strict=True))
        for search, setting in pending:
            group = [next(runs) for _ in config.tuning]
            losses = [record["final_train_loss"] for _, record in group]
            search.scores[setting] = float(np.mean(losses))
            search.failures[setting] = sum(not math.isfinite(loss) for loss in losses)
            search.errors |= {c.name: r["error"] for c, r in group if r["error"]}
        pending = []
        for search in searches:
            left = config.max_grid_extensions - search.extensions
            new = search.beyond()[:left]
            search.extensions += len(new)
            pending += [(search, setting) for setting in new]
    return {(search.task.label, search.entrant.name): search for search in searches}


def _order(setting: Setting) -> tuple:
    return tuple((0, v, "") if isinstance(v, (int, float)) else (1, 0, repr(v)) for _, v in setting)


def _index(value: float) -> int:
    return round(2 * math.log10(value))


def half_decade(k: int) -> float:
    return float(f"{10 ** (k / 2):.4g}")  # four digits, as many as tables and file names can show
