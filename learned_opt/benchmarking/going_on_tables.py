"""The tables and texts of a report of the protocol "going_on"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from learned_opt.benchmarking.config import BenchmarkConfig
from learned_opt.benchmarking.entrants import LEARNED
from learned_opt.benchmarking.going_on import Row
from learned_opt.benchmarking.summary import Entry, Table, mean_entry
from learned_opt.benchmarking.verdict import counted

# The limits of a run: the factor by which its loss may rise over the loss before the change, the
# factor by which it may end above the best of the others, and the steps by which it may be behind
# the run without a disturbance.
WORST, END, BEHIND = 1.1, 1.05, 100
LOSS = "validation_loss"
INTRODUCTION = (
    "Each row is an optimizer on one task, the mean over seeds. The training changes in the "
    "middle of a run, or begins from a trained network; losses are on validation data, relative "
    "to the loss before the first update of the new phase. Bold marks trouble."
)
MEANING = {
    "before": "the loss before the first update of the new phase",
    "worst": f"the highest loss after it, divided by the loss before; trouble is a rise by more "
    f"than {WORST - 1:.0%}, and by more than with the best of the optimizers that are not learned",
    "end": "the last loss, divided by the loss before",
    "final": f"the last loss; trouble is more than {END - 1:.0%} above the best of the optimizers "
    "that are not learned",
    "behind": "how many steps before its end the same run without the disturbance had reached the "
    f"last loss of the disturbed run; trouble is more than {BEHIND}",
}
OVERVIEW = (
    "Each row is an optimizer. It kept its loss on a task if the loss rose by at most "
    f"{WORST - 1:.0%}, or by no more than with the best optimizer that is not learned. It "
    f"ended low if its last loss is within {END - 1:.0%} of the best of the optimizers that are "
    "not learned. The last column counts the runs that diverged."
)


def title(config: BenchmarkConfig) -> str:
    return f"Benchmark of optimizers: {config.name or 'runs that go on'}"


def fixed(config: BenchmarkConfig) -> list[str]:
    """Returns the entrants that others are compared with: those that are not learned."""
    return [e.name for e in config.entrants if e.optimizer != LEARNED]


def sentence(config: BenchmarkConfig, rows: Sequence[Row]) -> str:
    """Says how often each learned entrant kept its loss, and ended as low as the best others."""
    learned = [e.name for e in config.entrants if e.optimizer == LEARNED]
    if not learned or not fixed(config):
        return "No learned optimizer was compared with others."
    parts = []
    for name in learned:
        kept, low = (set(passed(config, rows, name, what)) for what in ("kept", "low"))
        if parts:
            parts.append(f"{name} did so on {len(kept)}, {len(low)} and {len(kept & low)} tasks")
            continue
        parts.append(
            f"{name} kept its validation loss on {len(kept)} of "
            f"{counted(len(config.tasks), 'task')} (it rose by at most {WORST - 1:.0%}, or by no "
            "more than with the best optimizer that is not learned), ended within "
            f"{END - 1:.0%} of the best optimizer that is not learned on {len(low)}, and did both "
            f"on {len(kept & low)}"
        )
    return "; ".join(parts) + "."


def passed(config: BenchmarkConfig, rows: Sequence[Row], name: str, what: str) -> list[str]:
    """Returns the tasks on which an entrant "kept" its loss or ended "low", see OVERVIEW."""
    others, tasks = fixed(config), [task.label for task in config.tasks]
    mine = {task: _runs(rows, task, name) for task in tasks}
    if what == "kept":
        return [t for t in tasks if _mean(mine[t], "worst") <= allowed(rows, t, others)]
    return [t for t in tasks if _mean(mine[t], LOSS) <= END * best(rows, t, others, LOSS)]


def overview(config: BenchmarkConfig, rows: Sequence[Row]) -> Table:
    """Returns a table of the entrants over all tasks, see OVERVIEW; the best comes first."""
    lines, tasks = [], len(config.tasks)
    for entrant in config.entrants:
        kept, low = (len(passed(config, rows, entrant.name, what)) for what in ("kept", "low"))
        group = [row for row in rows if row["entrant"] == entrant.name]
        diverged = sum(bool(row["diverged"]) for row in group)
        lines.append([
            Entry(entrant.name, entrant.name),
            Entry(f"{kept} of {tasks}", float(kept)),
            Entry(f"{low} of {tasks}", float(low)),
            Entry(f"{diverged} of {len(group)}", float(diverged)),
        ])  # fmt: skip
    lines.sort(key=lambda line: -(line[1].key + line[2].key))
    most = [max(line[i].key for line in lines) for i in (1, 2)]
    for line in lines:
        line[1:3] = [e._replace(best=e.key == m) for e, m in zip(line[1:3], most, strict=True)]
    headings = ["optimizer", "tasks on which it kept its loss", "tasks on which it ended low",
                "diverged"]  # fmt: skip
    return Table(headings, lines, {1, 2})


def table(config: BenchmarkConfig, rows: Sequence[Row]) -> Table:
    """Returns a table with a row for each task and entrant."""
    entrants, tasks = [e.name for e in config.entrants], [task.label for task in config.tasks]
    tables = [(task, task_table(config, rows, task, entrants)) for task in tasks]
    lines = [[Entry(task, task), *line] for task, table in tables for line in table.rows]
    return Table(["task", *tables[0][1].headings], lines)


def task_table(
    config: BenchmarkConfig, rows: Sequence[Row], task: str, names: Sequence[str]
) -> Table:
    """Returns a table of the entrants `names` on one task; bold is trouble."""
    others, lines = fixed(config), []
    lowest, highest = best(rows, task, others, LOSS), allowed(rows, task, others)
    for name in names:
        group = _runs(rows, task, name)
        before, worst, end, final = (_mean(group, k) for k in ("before", "worst", "end", LOSS))
        late = [r["behind"] for r in group if r["behind"] is not None]
        behind = float(np.mean(late)) if late else np.nan
        lines.append([
            Entry(name, name), _number(before), _number(worst, worst > highest), _number(end),
            _number(final, final > END * lowest),
            Entry("", np.nan) if np.isnan(behind)
            else Entry(f"{behind:.0f}".replace("inf", "∞"), behind, behind > BEHIND),
        ])  # fmt: skip
    return Table(["optimizer", *MEANING], lines)


def best(rows: Sequence[Row], task: str, others: Sequence[str], key: str) -> float:
    """Returns the lowest mean over seeds of `key` of the entrants `others`; ∞ without any."""
    return min((_mean(_runs(rows, task, name), key) for name in others), default=np.inf)


def allowed(rows: Sequence[Row], task: str, others: Sequence[str]) -> float:
    """Returns how high `worst` may be, because the loss may rise under all optimizers."""
    calmest = best(rows, task, others, "worst")
    return max(WORST, calmest) if np.isfinite(calmest) else WORST


def _runs(rows: Sequence[Row], task: str, entrant: str) -> list[Row]:
    return [row for row in rows if row["task"] == task and row["entrant"] == entrant]


def _mean(rows: Sequence[Row], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def _number(value: float, marked: Any = False) -> Entry:
    return mean_entry([value])._replace(best=bool(marked))
