"""The tables of a benchmark, over all tasks and task by task, and their texts in Markdown.

Rows are those of results.csv, and may also have the columns of scores.csv. A table leaves out the
columns that the rows lack. html.py has the tables in HTML.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from learned_opt.benchmarking.scores import Row
from learned_opt.benchmarking.stats import (
    PROFILE_TASKS,
    iqm,
    probability_of_improvement,
    profile_score,
    stratified_bootstrap,
)
from learned_opt.benchmarking.verdict import verdict

# The columns of a task's table: name, heading, factor, and sign. The sign is +1 if less is better,
# -1 if more is better, and 0 if neither is.
METRICS = (
    ("steps_speed_up", "speed-up, steps", 1, -1),
    ("seconds_speed_up", "speed-up, seconds", 1, -1),
    ("final_train_loss", "final train loss", 1, 1),
    ("mean_loss", "mean loss", 1, 1),
    ("best_smoothed_loss", "best train loss", 1, 1),
    ("test_loss", "test loss", 1, 1),
    ("test_accuracy", "test accuracy %", 100, -1),
    ("seconds", "seconds", 1, 0),
    ("peak_memory", "peak memory, MB", 1e-6, 0),
)
# The columns of scores.csv in the table over all tasks. More is better, and the first orders rows.
SCORES = {
    "steps_speed_up": "speed-up, steps",
    "seconds_speed_up": "speed-up, seconds",
    "envelope_speed_up": "speed-up, envelope",
    "final_train_loss_ratio": "× lower final loss",
    "mean_loss_ratio": "× lower mean loss",
    "test_loss_ratio": "× lower test loss",
}
CHANCES = {
    "final_train_loss": "P(lower final loss)",
    "mean_loss": "P(lower mean loss)",
    "test_loss": "P(lower test loss)",
}
NO_BASELINE = "There was no Adam with a tuned constant learning rate to compare with."
TABLES = (
    "Each row is an optimizer on one task: the mean over seeds ± the standard deviation, the best "
    "mean in bold. A run that diverged or failed has an infinite loss."
)
# Parts of headings, and what they mean.
MEANING = {
    "speed-up, steps": "the steps in which {baseline} reaches its own final training loss, "
    "divided by those in which the optimizer reaches it with the same seed; 0 for a run that never "
    "does. Losses are smoothed over a twentieth of the run",
    "speed-up, seconds": "the same in seconds of training",
    "speed-up, envelope": "the steps that Adam needs for the optimizer's final loss, with the best "
    "learning rate at each step, divided by the steps of the optimizer",
    "× lower": "the median loss of {baseline} divided by the loss of the optimizer: above 1 the "
    "optimizer is better; 0 for a run that diverged or failed",
    "P(": "the probability that the loss of a run is below that of a run of {baseline}; a tie "
    "counts as half",
    "profile": "the share of tasks on which the optimizer takes at most τ times the steps of the "
    "fastest one, averaged over 1 ≤ τ ≤ 4: 1 means that it is the fastest on every task, 0 that it "
    "never comes within a factor of 4; steps are the median over seeds",
}


class Entry(NamedTuple):
    """A cell of a table: its text, what it is sorted by, and whether it is the column's best."""

    text: str
    key: float | str
    best: bool = False


class Table(NamedTuple):
    """A table; `largest_first` has the numbers of the columns whose largest value sorts first."""

    headings: list[str]
    rows: list[list[Entry]]
    largest_first: Collection[int] = ()


def summary_table(rows: Sequence[Row]) -> str:
    """Returns a table in Markdown for each task.

    It has means ± standard deviations over seeds, with the best mean in bold. A run that diverged
    or failed has an infinite loss, so the mean of its entrant is ∞; the last column counts them.
    """
    tables = task_tables(rows).items()
    return "\n\n".join(f"### {task}\n\n{markdown(table)}" for task, table in tables)


def markdown(table: Table) -> str:
    """Returns a table in GitHub's Markdown, with the best of a column in bold."""
    rows = [[f"**{e.text}**" if e.best else e.text for e in row] for row in table.rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
             for row in (table.headings, *rows)]  # fmt: skip
    return "\n".join([lines[0], "|" + "---|" * len(table.headings), *lines[1:]])


def introduction(baseline: str | None) -> str:
    """Returns the sentences above an overview."""
    if baseline is None:
        return f"{NO_BASELINE} Each row is an optimizer, over all runs of all tasks."
    return (
        f"Each row compares an optimizer with {baseline} over all runs of all tasks. A speed-up of "
        "2 is half the steps; the best of a column is bold. Speed-ups and ratios are interquartile "
        "means (IQM): the mean of the middle half of the runs. Brackets hold 95 % intervals, from "
        "5,000 stratified bootstrap resamples of the seeds."
    )


def meaning(baseline: str | None, headings: Collection[str]) -> dict[str, str]:
    """Returns what the columns of an overview mean, for those that it has."""
    return column_meanings(MEANING, headings, baseline=baseline)


def column_meanings(
    texts: Mapping[str, str], headings: Collection[str], **values: Any
) -> dict[str, str]:
    """Returns the `texts` whose key is a part of one of `headings`, with `values` filled in."""
    return {
        part.rstrip("("): text.format(**values)
        for part, text in texts.items()
        if any(part in heading for heading in headings)
    }


def bullets(meaning: Mapping[str, str]) -> str:
    """Returns a list of terms in Markdown."""
    return "\n".join(f"- *{term}*: {text}." for term, text in meaning.items())


def aligned(table: Table, columns: Collection[str] = ()) -> str:
    """Returns a table for a terminal, with a star after the best of a column.

    Args:
        table: the table.
        columns: the headings to keep besides the first; by default all.
    """
    kept = [i for i, h in enumerate(table.headings) if not i or not columns or h in columns]
    rows = [[e.text + "*" * bool(e.best) for e in row] for row in table.rows]
    lines = [[line[i] for i in kept] for line in (table.headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def sentence(facts: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Says who won, by how much, and what was missed."""
    if facts["baseline"] is None:
        return NO_BASELINE
    speed_ups = {name: runs(rows, name, "steps_speed_up") for name in _distinct(rows, "entrant")}
    return verdict(speed_ups, facts["baseline"], "final training loss")


def ranked(rows: Sequence[Row], overview: Table) -> list[Row]:
    """Returns the rows in the order of the optimizers in `overview`, as everywhere in a report."""
    places = {entries[0].text: place for place, entries in enumerate(overview.rows)}
    return sorted(rows, key=lambda row: places[row["entrant"]])


def overviews(facts: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Table]:
    """Returns the table over all tasks, and one for each family of tasks if there are several."""
    tables = {"all tasks": overview(rows, facts["baseline"])}
    families = {task["label"]: task["family"] for task in facts["tasks"]}
    if len(set(families.values())) > 1:
        for family in dict.fromkeys(families.values()):
            mine = [row for row in rows if families[row["task"]] == family]
            tables[family or "other tasks"] = overview(mine, facts["baseline"])
    return tables


def overview(rows: Sequence[Row], baseline: str | None) -> Table:
    """Returns a table of the entrants over all tasks of `rows`, the fastest first, see `MEANING`.

    Without a baseline, it has only their costs.
    """
    entrants = _distinct(rows, "entrant")
    headings, columns = ["optimizer"], [[Entry(name, name) for name in entrants]]

    def add_score(heading: str, entries: Sequence[Entry]) -> None:
        best = max(e.key for e in entries)
        headings.append(heading)
        columns.append([e._replace(best=e.key == best) for e in entries])

    if baseline is not None:
        for column in filter(rows[0].__contains__, SCORES):
            scores = (runs(rows, name, column) for name in entrants)
            add_score(SCORES[column], [_estimate(iqm, s) for s in scores])
        for column, heading in CHANCES.items():
            base = -runs(rows, baseline, column)
            chances = ((-runs(rows, name, column), base) for name in entrants)
            add_score(heading, [_estimate(probability_of_improvement, *c) for c in chances])
        steps = median_steps(rows, entrants)
        if steps.shape[1] >= PROFILE_TASKS:
            shares = profile_score(steps)
            add_score("profile", [Entry(score_text(share), float(share)) for share in shares])
    scored = range(1, len(headings))
    groups = [[row for row in rows if row["entrant"] == name] for name in entrants]
    for column, heading, factor, _ in METRICS[-2:]:
        headings.append(heading)
        values = ([factor * _float(row.get(column)) for row in group] for group in groups)
        columns.append([mean_entry(v, spread=False) for v in values])
    headings.append("diverged")
    columns.append([_failures(group) for group in groups])
    table = [list(row) for row in zip(*columns, strict=True)]
    if baseline is not None:
        table.sort(key=lambda row: -row[1].key)
    return Table(headings, table, scored)


def task_tables(rows: Sequence[Row]) -> dict[str, Table]:
    """Returns a table of the entrants for each task."""
    return {t: _task_table([r for r in rows if r["task"] == t]) for t in _distinct(rows, "task")}


def runs(rows: Sequence[Row], entrant: str, column: str) -> np.ndarray:
    """Returns a column of an entrant's rows, (tasks, runs)."""
    mine = [row for row in rows if row["entrant"] == entrant]
    tasks = _distinct(rows, "task")
    return np.array([[float(r[column]) for r in mine if r["task"] == task] for task in tasks])


def median_steps(rows: Sequence[Row], entrants: Sequence[str]) -> np.ndarray:
    """Returns the steps to the target, median over seeds: (entrants, tasks)."""
    return np.array([np.median(runs(rows, name, "steps_to_target"), axis=1) for name in entrants])


def number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.3g}"


def score_text(score: float) -> str:
    return f"{score:.2f}" if score < 100 else number(score)


def _task_table(rows: Sequence[Row]) -> Table:
    entrants = _distinct(rows, "entrant")
    groups = [[row for row in rows if row["entrant"] == name] for name in entrants]
    columns = [[Entry(name, name) for name in entrants], [_learning_rate(g[0]) for g in groups]]
    headings, largest_first = ["optimizer", "learning rate"], []
    for metric, heading, factor, sign in METRICS:
        if all(row.get(metric) is None for row in rows):
            continue
        entries = [mean_entry([factor * _float(r.get(metric)) for r in group]) for group in groups]
        finite = [sign * e.key for e in entries if math.isfinite(e.key)]
        best = sign and finite and min(finite)
        columns.append([e._replace(best=bool(sign and sign * e.key == best)) for e in entries])
        if sign < 0:
            largest_first.append(len(headings))
        headings.append(heading)
    for target in json.loads(rows[0].get("steps_to_targets") or "{}"):
        steps = [[json.loads(r["steps_to_targets"])[target] for r in g] for g in groups]
        columns.append([Entry(number(np.median(s)), float(np.median(s))) for s in steps])
        headings.append(f"steps to {target}")
    columns.append([_failures(group) for group in groups])
    table = [list(row) for row in zip(*columns, strict=True)]
    return Table([*headings, "diverged"], table, largest_first)


def _estimate(statistic: Callable[..., np.ndarray], *scores: np.ndarray) -> Entry:
    value = float(statistic(*scores))
    low, high = stratified_bootstrap(statistic, *scores)
    return Entry(f"{score_text(value)} [{score_text(low)}, {score_text(high)}]", value)


def mean_entry(values: Sequence[float], spread: bool = True) -> Entry:
    """Returns a mean, ± the standard deviation if there are several values."""
    mean = float(np.mean(values))
    if not math.isfinite(mean):
        return Entry(number(mean), mean)
    text = f"{mean:#.3g}".rstrip(".")  # with trailing zeros, so that numbers line up
    if not spread or len(values) == 1:
        return Entry(text, mean)
    return Entry(f"{text} ± {np.std(values, ddof=1):.2g}", mean)


def _failures(rows: Sequence[Row]) -> Entry:
    diverged, failed = (sum(bool(row[key]) for row in rows) for key in ("diverged", "error"))
    text = f"{diverged} of {len(rows)}" + (f", {failed} failed" if failed else "")
    return Entry(text, (diverged + failed) / len(rows))


def _learning_rate(row: Row) -> Entry:
    if row["lr"] is None:
        return Entry("none", math.nan)
    note = " (tuned, at the edge of the grid)" if row["lr_at_edge"] else " (tuned)"
    tuned = "lr" in json.loads(row["hyperparameters"])
    return Entry(f"{row['lr']:.3g}" + (note if tuned else ""), row["lr"])


def _distinct(rows: Sequence[Row], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)
