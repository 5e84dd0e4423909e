"""The tables and texts of a report of the protocol "validation"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from learned_opt.benchmarking.config import BenchmarkConfig
from learned_opt.benchmarking.protocol import seeds_text, size_text
from learned_opt.benchmarking.stats import (
    PROFILE_TASKS,
    geometric_mean,
    iqm,
    probability_of_improvement,
    profile_score,
    stratified_bootstrap,
)
from learned_opt.benchmarking.summary import (
    Entry,
    Table,
    column_meanings,
    mean_entry,
    number,
    runs,
    score_text,
)
from learned_opt.benchmarking.validation import HOPELESS, LENGTHS, SMOOTHING, Target
from learned_opt.benchmarking.verdict import counted, verdict

Row = Mapping[str, Any]
INTRODUCTION = (
    "Each row is an optimizer, over all runs of all tasks. A speed-up of 2 means that it reaches "
    "the target of a task, the validation loss of the tuned {baseline}, in half of the steps; a "
    "run that misses the target has a speed-up of 0. The best of a column is bold. Brackets hold "
    "95 % intervals, from 5,000 stratified bootstrap resamples of the seeds."
)
# Parts of headings, and what they mean.
MEANING = {
    "speed-up": "the budget divided by the steps to the target. An optimizer that knows the length "
    "of its run is also run for 1/{lengths} of the budget, and the shortest run that ends at or "
    "below the target counts. For others the first of two evaluations in a row at or below it "
    "counts",
    "geometric mean": "over all runs; a miss counts as ½",
    "IQM": "the interquartile mean: the mean of the middle half of the runs; a miss counts as 0",
    "missed": "runs that never reach the target",
    "against the best": "the same with another target: the validation loss of whichever optimizer"
    " is the best on that task",
    "P(": "the probability that the loss of a run of the full budget is below that of a run of "
    "{baseline}; a tie counts as half",
    "profile": "the share of tasks on which the optimizer takes at most τ times the steps of the "
    "fastest one, averaged over 1 ≤ τ ≤ 4: 1 means that it is the fastest on every task, 0 that it "
    "never comes within a factor of 4; steps are the median over seeds",
    "diverged": "runs of the full budget that diverged",
}
TABLES = (
    "Each row is an optimizer on one task: the speed-up of each seed, then losses at the end of "
    "the full budget, the mean over seeds ± the standard deviation; the best mean is bold."
)


def title(config: BenchmarkConfig) -> str:
    return f"Benchmark of optimizers: {config.name}" if config.name else "Optimizer benchmark"


def introduction(baseline: str) -> str:
    """Returns the sentences above the overview."""
    return INTRODUCTION.format(baseline=baseline)


def meaning(baseline: str, headings: Sequence[str]) -> dict[str, str]:
    """Returns what the columns of the overview mean, for those that it has."""
    lengths = ", 1/".join(f"{length:g}" for length in LENGTHS[1:])
    return column_meanings(MEANING, headings, baseline=baseline, lengths=lengths)


def sentence(rows: Sequence[Row], baseline: str) -> str:
    """Says who won, by how much, and what was missed."""
    speed_ups = {name: runs(rows, name, "speed_up") for name in names(rows)}
    return verdict(speed_ups, baseline, "validation loss")


def names(rows: Sequence[Row]) -> list[str]:
    """Returns the names of the entrants."""
    return list(dict.fromkeys(row["entrant"] for row in rows))


def costs(rows: Sequence[Row]) -> np.ndarray:
    """Returns the shares of the budget to the target, median over seeds: (entrants, tasks).

    A miss is ∞.
    """
    speed_ups = np.array([np.median(runs(rows, name, "speed_up"), axis=1) for name in names(rows)])
    with np.errstate(divide="ignore"):
        return 1 / speed_ups


def overview(rows: Sequence[Row], baseline: str) -> Table:
    """Returns a table of the entrants over all tasks of `rows`, see MEANING.

    The best geometric mean comes first. The profile is left out if there are too few tasks for it.
    """
    headings = ["optimizer", "speed-up, geometric mean", "speed-up, IQM", "missed",
                "against the best, geometric mean", "against the best, IQM", "missed the best",
                "P(lower validation loss)", "P(lower test loss)"]  # fmt: skip
    more, steps, lines = {1, 2, 4, 5, 7, 8}, costs(rows), []
    profiled = steps.shape[1] >= PROFILE_TASKS
    if profiled:
        more.add(len(headings))
        headings.append("profile")
    for name, share in zip(names(rows), profile_score(steps), strict=True):
        line = [Entry(name, name)]
        for column in ("speed_up", "best_speed_up"):
            scores = runs(rows, name, column)
            line += [_estimate(geometric_mean, scores), _estimate(iqm, scores)]
            missed = int((scores == 0).sum())
            line.append(Entry(f"{missed} of {scores.size}", float(missed)))
        for column in ("validation_loss", "test_loss"):
            mine, theirs = (-runs(rows, n, column) for n in (name, baseline))
            line.append(_estimate(probability_of_improvement, mine, theirs))
        line += [Entry(score_text(share), float(share))] if profiled else []
        diverged = [row for row in rows if row["entrant"] == name and row["diverged"]]
        line.append(Entry(f"{len(diverged)} of {scores.size}", float(len(diverged))))
        lines.append(line)
    lines.sort(key=lambda line: -line[1].key)
    best = {i: max(line[i].key for line in lines) for i in more}
    lines = [
        [e._replace(best=i in more and e.key == best[i]) for i, e in enumerate(line)]
        for line in lines
    ]
    return Table([*headings, "diverged"], lines, more)


def task_tables(rows: Sequence[Row]) -> dict[str, Table]:
    """Returns a table for each task, with speed-ups by seed and losses of the full run."""
    return {
        task: _task_table([row for row in rows if row["task"] == task])
        for task in dict.fromkeys(row["task"] for row in rows)
    }


def _task_table(rows: Sequence[Row]) -> Table:
    metrics = [("validation_loss", "final validation loss", 1, 1),
               ("validation_accuracy", "validation error %", -100, 1),
               ("test_loss", "test loss", 1, 1), ("test_accuracy", "test error %", -100, 1),
               ("train_loss", "train loss", 1, 0)]  # fmt: skip
    groups = [[row for row in rows if row["entrant"] == name] for name in names(rows)]
    headings = ["optimizer", "tuned"]
    columns = [[Entry(g[0]["entrant"], g[0]["entrant"]) for g in groups],
               [_setting(g[0]) for g in groups]]  # fmt: skip
    for column, heading in (("speed_up", "speed-ups"), ("best_speed_up", "against the best")):
        scores = [[float(row[column]) for row in group] for group in groups]
        columns.append([Entry(", ".join(map(score_text, v)), float(np.mean(v))) for v in scores])
        headings.append(heading)
    for metric, heading, factor, sign in metrics:
        offset = 100 if factor < 0 else 0
        values = [[offset + factor * float(row[metric]) for row in group] for group in groups]
        if np.isnan(values).all():
            continue
        entries = [mean_entry(v) for v in values]
        finite = [e.key for e in entries if np.isfinite(e.key)]
        columns.append(
            [e._replace(best=bool(sign and finite and e.key == min(finite))) for e in entries]
        )
        headings.append(heading)
    return Table(headings, [list(line) for line in zip(*columns, strict=True)], {2, 3})


def size(config: BenchmarkConfig) -> str:
    """Returns the size of the benchmark in one line."""
    return size_text(*map(len, (config.entrants, config.tasks, config.reporting)))


def task_list(
    config: BenchmarkConfig,
    facts: Mapping[str, Any],
    targets: Mapping[str, tuple[Target, Target]],
) -> Table:
    """Returns a table of the tasks and the losses to reach."""
    lines = []
    for task in config.tasks:
        fact, (base, best) = facts[task.label], targets[task.label]
        texts = [task.label, task.task.kind, str(fact["parameters"]), str(task.steps),
                 str(task.task.batch_size), number(fact["chance"]), f"{base.loss:.4g}",
                 f"{best.loss:.4g}", best.entrant]  # fmt: skip
        lines.append([Entry(text, text) for text in texts])
    headings = ["task", "kind", "parameters", "steps", "batch", "loss of a guess", "target",
                "target of the best", "the best"]  # fmt: skip
    return Table(headings, lines)


def target_rows(targets: Mapping[str, tuple[Target, Target]]) -> list[dict[str, Any]]:
    """Returns a row for each task, with the targets as in the file of a suite."""
    return [
        {
            "task": task,
            "target": base.loss,
            "best_target": best.loss,
            "best_entrant": best.entrant,
        }
        for task, (base, best) in targets.items()
    ]


def protocol(config: BenchmarkConfig, tuning: Sequence[Row]) -> list[str]:
    """Returns sentences on what is held equal, what is tuned, and on which seeds."""
    searches = len({(row["task"], row["entrant"]) for row in tuning})
    edges = sum(row["at_edge"] for row in tuning)
    return [
        "Every optimizer starts from the same weights and sees the same minibatches, augmentation "
        "and dropout for a seed.",
        f"The report is on {seeds_text(config.reporting)}.",
        f"An optimizer that is tuned tries {counted(config.settings, 'setting')}, half a decade "
        f"apart, on {seeds_text(config.tuning[:1])}, and the one with the lowest final validation "
        f"loss is reported. In {edges} of {counted(searches, 'search', 'searches')} that one is at "
        "an end of the range. A tuning run whose loss is above that of a guess after a quarter of "
        "its steps is given up.",
        f"The target of a task is the lowest validation loss of {config.validation_baseline}, "
        f"tuned, in a run of the full budget, smoothed over {SMOOTHING:.0%} of it, averaged over "
        f"{seeds_text(config.tuning)}. The best optimizer of the field has the lowest mean final "
        "validation loss there.",
        "An optimizer that knows how long a run is and was never within "
        f"{HOPELESS:.0%} of the target in its full run is not run for fewer steps.",
        "There are fifty validations in a run, outside the time that is measured.",
    ]


def _setting(row: Row) -> Entry:
    text = ", ".join(f"{k} {number(v)}" for k, v in row["hyperparameters"].items()) or "–"
    return Entry(text, text)


def _estimate(statistic: Any, *scores: np.ndarray) -> Entry:
    value = float(statistic(*scores))
    low, high = stratified_bootstrap(statistic, *scores)
    return Entry(f"{score_text(value)} [{score_text(low)}, {score_text(high)}]", value)
