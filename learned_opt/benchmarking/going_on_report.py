"""The report of the protocol "going_on": results.csv and report.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geodesic.files import write_atomic
from learned_opt.benchmarking.config import BenchmarkConfig
from learned_opt.benchmarking.entrants import LEARNED
from learned_opt.benchmarking.going_on import Row
from learned_opt.benchmarking.summary import Entry, Table, markdown, number
from learned_opt.benchmarking.tables import to_csv

# What a run may do: rise by so much over the loss before the change, end so far above the best of
# the others, and be so many steps behind the run without a disturbance.
WORST, END, BEHIND = 1.1, 1.05, 100
LOSS = "validation_loss"
MEANING = f"""\
Mean over seeds. *Before*: validation loss before the first update of the new phase. *Worst* and \
*end*: the highest and the last validation loss after it, over that before; in bold where it rose \
by more than {WORST - 1:.0%}, and by more than under the calmest of the optimizers that are not \
learned. *Final*: the last validation loss; in bold where it is more than {END - 1:.0%} above the \
best of these. *Behind*: steps by which a disturbed run is behind the same run without the \
disturbance; in bold where they are more than {BEHIND}."""


def write_going_on_report(
    config: BenchmarkConfig, rows: Sequence[Row], folder: Path
) -> tuple[str, Path]:
    """Writes the report into `folder`; returns what the terminal shows, and the report's path."""
    write_atomic(folder / "results.csv", to_csv(rows))
    text = f"{sentence(config, rows)}\n\n{markdown(table(config, rows))}\n\n{MEANING}\n"
    title = f"# Benchmark of optimizers: {config.name or 'runs that go on'}"
    write_atomic(folder / "report.md", f"{title}\n\n{text}".encode())
    return text, folder / "report.md"


def fixed(config: BenchmarkConfig) -> list[str]:
    """The entrants that others are compared with: those that are not learned."""
    return [e.name for e in config.entrants if e.optimizer != LEARNED]


def sentence(config: BenchmarkConfig, rows: Sequence[Row]) -> str:
    """How often each learned entrant kept what it had, and ended as low as the best of others."""
    others, tasks = fixed(config), [task.label for task in config.tasks]
    parts = []
    for entrant in config.entrants:
        if entrant.optimizer != LEARNED or not others:
            continue
        mine = {t: _runs(rows, t, entrant.name) for t in tasks}
        kept = [t for t in tasks if _mean(mine[t], "worst") <= allowed(rows, t, others)]
        low = [t for t in tasks if _mean(mine[t], LOSS) <= END * best(rows, t, others, LOSS)]
        lost = [t for t in tasks if t not in kept or t not in low]
        parts.append(
            f"{entrant.name} kept its validation loss on {len(kept)} of {len(tasks)} tasks and "
            f"ended within {END - 1:.0%} of the best of {', '.join(others)} on {len(low)}"
            + (f"; it failed one of the two on: {', '.join(lost)}" if lost else "")
        )
    return ". ".join(parts) + "." if parts else "Nobody was compared."


def table(config: BenchmarkConfig, rows: Sequence[Row]) -> Table:
    """A line for each task and entrant."""
    others, lines = fixed(config), []
    for task in config.tasks:
        lowest = best(rows, task.label, others, LOSS)
        highest = allowed(rows, task.label, others)
        for entrant in config.entrants:
            group = _runs(rows, task.label, entrant.name)
            keys = ("before", "worst", "end", LOSS)
            before, worst, end, final = (_mean(group, key) for key in keys)
            late = [r["behind"] for r in group if r["behind"] is not None]
            behind = float(np.mean(late)) if late else np.nan
            lines.append([
                Entry(task.label, task.label), Entry(entrant.name, entrant.name),
                _number(before), _number(worst, worst > highest), _number(end),
                _number(final, final > END * lowest),
                Entry("", np.nan) if np.isnan(behind) else _number(round(behind), behind > BEHIND),
            ])  # fmt: skip
    return Table(["task", "optimizer", "before", "worst", "end", "final", "behind"], lines)


def best(rows: Sequence[Row], task: str, others: Sequence[str], key: str) -> float:
    """The lowest mean over seeds of `key` among the entrants `others` of a task; ∞ without any."""
    return min((_mean(_runs(rows, task, name), key) for name in others), default=np.inf)


def allowed(rows: Sequence[Row], task: str, others: Sequence[str]) -> float:
    """How high `worst` may be: a moving target may rise under all optimizers."""
    calmest = best(rows, task, others, "worst")
    return max(WORST, calmest) if np.isfinite(calmest) else WORST


def _runs(rows: Sequence[Row], task: str, entrant: str) -> list[Row]:
    return [row for row in rows if row["task"] == task and row["entrant"] == entrant]


def _mean(rows: Sequence[Row], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def _number(value: float, marked: Any = False) -> Entry:
    return Entry(number(value), float(value), bool(marked))
