"""The report of the protocol "validation": results.csv, tuning.csv, report.md and report.html."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geodesic.files import write_atomic
from learned_opt.benchmarking.config import BenchmarkConfig
from learned_opt.benchmarking.stats import (
    geometric_mean,
    iqm,
    probability_of_improvement,
    profile_score,
    stratified_bootstrap,
)
from learned_opt.benchmarking.summary import (
    Entry,
    Table,
    markdown,
    mean_entry,
    number,
    runs,
    score_text,
)
from learned_opt.benchmarking.tables import to_csv
from learned_opt.benchmarking.validation import HOPELESS, LENGTHS, SMOOTHING, Outcome, Target
from learned_opt.benchmarking.verdict import verdict

Row = Mapping[str, Any]
MEANING = """\
*Speed-up*: by how many times fewer steps than the budget an optimizer reaches the target of a \
task, the validation loss of the tuned {baseline}; 0 for a miss. An optimizer that knows the \
length of a run is run for 1/{lengths} of the budget, and its speed-up is the largest of these \
whose run ends at or below the target. One that is not told is run once, and its speed-up is the \
budget over the first of two evaluations in a row that are at or below the target. *Geometric \
mean* and *IQM*, the interquartile mean, are over all runs of all tasks; a miss counts ½ in the \
first and 0 in the second. *Profile*: on what share of the tasks the median steps are within τ \
times the fastest, mean over 1 ≤ τ ≤ 4. *Against the best*: the target is the validation loss of \
the best entrant of the field on that task. *P*: probability that the final loss of a run of the \
full budget is below that of one of {baseline}. In brackets are 95 % intervals from 5000 \
stratified bootstrap resamples of the seeds."""


def write_validation_report(
    config: BenchmarkConfig, facts: Mapping[str, Any], outcome: Outcome, folder: Path
) -> tuple[str, Path]:
    """Writes the report into `folder`; returns what the terminal shows, and the page's path.

    Args:
        facts: what is known of each task once it is made, by its label.
    """
    from learned_opt.benchmarking.validation_html import page  # with matplotlib, slow to load

    rows = outcome.rows
    flat = [{**row, "hyperparameters": json.dumps(row["hyperparameters"])} for row in rows]
    tuning = [{**row, "hyperparameters": json.dumps(row["hyperparameters"])}
              for row in outcome.tuning]  # fmt: skip
    write_atomic(folder / "results.csv", to_csv(flat))
    write_atomic(folder / "tuning.csv", to_csv(tuning))
    write_atomic(folder / "targets.csv", to_csv(target_rows(outcome.targets)))
    parts = [
        f"# {title(config)}",
        sentence(rows, config.validation_baseline),
        markdown(overview(rows, config.validation_baseline)),
        meaning(config.validation_baseline),
        "## Tasks",
        markdown(task_list(config, facts, outcome.targets)),
        *(f"### {t}\n\n{markdown(table)}" for t, table in task_tables(rows).items()),
        "## How this was run",
        protocol(config, outcome.tuning),
    ]
    write_atomic(folder / "report.md", ("\n\n".join(parts) + "\n").encode())
    raw = {n: (folder / n).read_bytes() for n in ("results.csv", "tuning.csv", "targets.csv")}
    if (folder / "rows.jsonl").exists():  # not where all were known
        raw["rows.jsonl.gz"] = gzip.compress((folder / "rows.jsonl").read_bytes(), mtime=0)
    html = page(config, facts, outcome, raw)
    write_atomic(folder / "report.html", html.encode())
    return "\n\n".join(parts[1:3]), folder / "report.html"


def title(config: BenchmarkConfig) -> str:
    return f"Benchmark of optimizers: {config.name}" if config.name else "Optimizer benchmark"


def meaning(baseline: str) -> str:
    lengths = ", ".join(f"{length:g}" for length in LENGTHS)
    return MEANING.format(baseline=baseline, lengths=f"{{{lengths}}}")


def sentence(rows: Sequence[Row], baseline: str) -> str:
    """Who won, by how much, and what was missed."""
    speed_ups = {name: runs(rows, name, "speed_up") for name in names(rows)}
    return verdict(speed_ups, baseline, "validation loss")


def names(rows: Sequence[Row]) -> list[str]:
    """The entrants."""
    return list(dict.fromkeys(row["entrant"] for row in rows))


def costs(rows: Sequence[Row]) -> np.ndarray:
    """Share of the budget to the target, median over seeds, ∞ for a miss: (entrants, tasks)."""
    speed_ups = np.array([np.median(runs(rows, name, "speed_up"), axis=1) for name in names(rows)])
    with np.errstate(divide="ignore"):
        return 1 / speed_ups


def overview(rows: Sequence[Row], baseline: str) -> Table:
    """Each entrant over all tasks of `rows`, see MEANING; the best geometric mean comes first."""
    profiles = profile_score(costs(rows))
    lines = []
    for name, profile in zip(names(rows), profiles, strict=True):
        line = [Entry(name, name)]
        for column in ("speed_up", "best_speed_up"):
            scores = runs(rows, name, column)
            line += [_estimate(geometric_mean, scores), _estimate(iqm, scores)]
            missed = int((scores == 0).sum())
            line.append(Entry(f"{missed} of {scores.size}", float(missed)))
        for column in ("validation_loss", "test_loss"):
            mine, theirs = (-runs(rows, n, column) for n in (name, baseline))
            line.append(_estimate(probability_of_improvement, mine, theirs))
        line.append(Entry(score_text(profile), float(profile)))
        diverged = [row for row in rows if row["entrant"] == name and row["diverged"]]
        line.append(Entry(str(len(diverged)), float(len(diverged))))
        lines.append(line)
    lines.sort(key=lambda line: -line[1].key)
    headings = ["optimizer", "speed-up, geometric mean", "speed-up, IQM", "missed",
                "against the best, geometric mean", "against the best, IQM", "missed the best",
                "P(lower validation loss)", "P(lower test loss)", "profile",
                "diverged"]  # fmt: skip
    more = {1, 2, 4, 5, 7, 8, 9}
    best = {i: max(line[i].key for line in lines) for i in more}
    lines = [
        [e._replace(best=i in more and e.key == best[i]) for i, e in enumerate(line)]
        for line in lines
    ]
    return Table(headings, lines, more)


def task_tables(rows: Sequence[Row]) -> dict[str, Table]:
    """Task -> a table of its entrants: losses of the full run, and speed-ups by seed."""
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
    for column, heading in (("speed_up", "speed-ups"), ("best_speed_up", "against the best")):
        scores = [[float(row[column]) for row in group] for group in groups]
        columns.append([Entry(" ".join(f"{s:.3g}" for s in v), float(np.mean(v))) for v in scores])
        headings.append(heading)
    last = len(headings)
    return Table(
        headings, [list(line) for line in zip(*columns, strict=True)], {last - 2, last - 1}
    )


def task_list(
    config: BenchmarkConfig,
    facts: Mapping[str, Any],
    targets: Mapping[str, tuple[Target, Target]],
) -> Table:
    """What the tasks are, and the losses to reach."""
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
    """A row for each task, as a suite's file has them."""
    return [
        {
            "task": task,
            "target": base.loss,
            "best_target": best.loss,
            "best_entrant": best.entrant,
        }
        for task, (base, best) in targets.items()
    ]


def protocol(config: BenchmarkConfig, tuning: Sequence[Row]) -> str:
    """One paragraph: what is held equal, what is tuned, and on which seeds."""
    searches = {(row["task"], row["entrant"]) for row in tuning}
    edges = sum(row["at_edge"] for row in tuning)
    return (
        "Every optimizer starts from the same weights and sees the same minibatches, "
        f"augmentation and dropout for a seed. Reported are seeds {config.reporting}. "
        f"Optimizers that are tuned try {config.settings} half decades on seed "
        f"{config.tuning[0]}, and the one with the lowest final validation loss is reported: "
        f"in {edges} of {len(searches)} searches one at an end of the range. A run that is "
        "above the loss of a guess after a quarter of its steps is given up in tuning. The "
        "target of a task is the lowest validation loss of the tuned "
        f"{config.validation_baseline} in a run of the full budget, smoothed over "
        f"{SMOOTHING:.0%} of it, mean over seeds {config.tuning}; the best entrant of the "
        "field has the lowest mean final validation loss there. Who knows its length and was "
        f"never within {HOPELESS:.0%} of the target in its full run is not run for fewer "
        "steps. Validation losses are taken fifty times a run, outside the time that is "
        "measured."
    )


def _setting(row: Row) -> Entry:
    text = ", ".join(f"{k} {number(v)}" for k, v in row["hyperparameters"].items()) or "–"
    return Entry(text, text)


def _estimate(statistic: Any, *scores: np.ndarray) -> Entry:
    value = float(statistic(*scores))
    low, high = stratified_bootstrap(statistic, *scores)
    return Entry(f"{score_text(value)} [{score_text(low)}, {score_text(high)}]", value)
