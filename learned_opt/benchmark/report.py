"""results.csv, tuning.csv, the summary tables, and report.html that needs nothing but a browser."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from learned_opt.benchmark.config import BenchmarkConfig
from learned_opt.benchmark.curves import loss_curves
from learned_opt.benchmark.tune import Tuning
from learned_opt.outputs import write_atomic

Row = Mapping[str, Any]

# Column of results.csv, heading, factor, and +1 where less is better, -1 where more is, 0 neither.
METRICS = (
    ("final_train_loss", "final train loss", 1, 1),
    ("mean_loss", "mean loss", 1, 1),
    ("test_loss", "test loss", 1, 1),
    ("test_accuracy", "test accuracy %", 100, -1),
    ("seconds", "seconds", 1, 0),
)


def summary_table(results: Sequence[Row]) -> str:
    """Markdown: a table per task, mean ± standard deviation over seeds, the best mean in bold.

    A run that diverged or failed counts with an infinite loss: its entrant's mean is ∞, and the
    last column says how many there were.
    """
    parts = []
    for task, rows in _tables(results).items():
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|" + "---|" * len(rows[0]))
        parts.append("\n".join([f"### {task}", "", *lines]))
    return "\n\n".join(parts)


def write_report(
    folder: Path,
    config: BenchmarkConfig,
    results: Sequence[Row],
    tunings: Mapping[tuple[str, str], Tuning],
    losses: Mapping[tuple[str, str], Sequence[np.ndarray]],
    errors: Mapping[str, str],
) -> Path:
    """Writes results.csv, tuning.csv and report.html into `folder`; the path of the last.

    Args:
        folder: the claimed output folder, with its config and provenance.
        losses: minibatch losses of the reported runs by (task label, entrant name).
        errors: tracebacks of the runs that raised, by cell name.
    """
    table = _csv(results)
    write_atomic(folder / "results.csv", table)
    write_atomic(folder / "tuning.csv", _csv(_tuning_rows(tunings)))
    sections = []
    for i, (task, rows) in enumerate(_tables(results).items()):
        runs = {entrant: runs for (label, entrant), runs in losses.items() if label == task}
        figure = loss_curves(runs, key=f"figure-{i}")
        sections.append(f"<h2>{html.escape(task)}</h2>{figure}{_html_table(rows)}")
    uri = "data:text/csv;base64," + base64.b64encode(table).decode()
    page = _PAGE.format(
        style=_STYLE,
        sections="\n".join(sections),
        protocol=html.escape(_protocol(config, tunings)),
        csv=uri,
        errors="".join(_details(name, text) for name, text in errors.items()) or "<p>None.</p>",
        tuning=_html_table(_tuning_table(tunings)) if tunings else "<p>Nothing was tuned.</p>",
        details="".join(
            _details(name, (folder / name).read_text())
            for name in ("config-benchmark.yaml", "provenance-benchmark.json")
        ),
        environment=_html_table(_environment(folder / "provenance-benchmark.json")),
    )
    write_atomic(folder / "report.html", page.encode())
    return folder / "report.html"


def _tables(results: Sequence[Row]) -> dict[str, list[list[str]]]:
    """Task -> rows of text, headings first; bold as in markdown."""
    headings = ["optimizer", "learning rate", *(m[1] for m in METRICS), "diverged"]
    tables = {}
    for task in dict.fromkeys(row["task"] for row in results):
        rows = [row for row in results if row["task"] == task]
        groups = {
            entrant: [row for row in rows if row["entrant"] == entrant]
            for entrant in dict.fromkeys(row["entrant"] for row in rows)
        }
        means = {
            (entrant, metric): float(np.mean([row[metric] for row in group]))
            for entrant, group in groups.items()
            for metric, *_ in METRICS
        }
        table = [headings]
        for entrant, group in groups.items():
            cells = [entrant, _learning_rate(group[0])]
            for metric, _, factor, sign in METRICS:
                text = _mean_and_spread([factor * row[metric] for row in group])
                finite = [m for g in groups if math.isfinite(m := sign * means[g, metric])]
                is_best = sign and finite and sign * means[entrant, metric] == min(finite)
                cells.append(f"**{text}**" if is_best else text)
            diverged, failed = (sum(bool(row[k]) for row in group) for k in ("diverged", "error"))
            count = f"{diverged} of {len(group)}"
            cells.append(count + f", {failed} failed" if failed else count)
            table.append(cells)
        tables[task] = table
    return tables


def _mean_and_spread(values: Sequence[float]) -> str:
    if not np.isfinite(values).all():
        return "–" if np.isnan(values).any() else "∞"
    mean = f"{np.mean(values):.3g}"
    return f"{mean} ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else mean


def _learning_rate(row: Row) -> str:
    if row["lr"] is None:
        return "none"
    note = " (tuned, at the edge of the grid)" if row["lr_at_edge"] else " (tuned)"
    return f"{row['lr']:.3g}" + (note if row["tuned"] else "")


def _protocol(config: BenchmarkConfig, tunings: Mapping[tuple[str, str], Tuning]) -> str:
    grown = sum(tuning.extensions > 0 for tuning in tunings.values())
    edges = sum(tuning.at_edge for tuning in tunings.values())
    return (
        f"Every optimizer starts from the same weights and sees the same minibatches for a seed. "
        f"Reported are seeds {config.reporting}. Where a learning rate is tuned, it is the one of "
        f"the half-decade grid {config.learning_rate_min:g} to {config.learning_rate_max:g} with "
        f"the lowest final loss on the full training set, mean over seeds {config.tuning}, on "
        f"which nothing is reported. Where the best was at an end of the grid, the grid grew by up "
        f"to {config.max_grid_extensions} half-decades: in {grown} of {len(tunings)} searches, "
        f"{edges} of which ended at an edge all the same. A diverged or failed run counts with an "
        f"infinite loss. Seconds are of whole runs, {config.processes} at a time with "
        f"{config.threads} thread(s) each."
    )


def _tuning_rows(tunings: Mapping[tuple[str, str], Tuning]) -> list[dict[str, Any]]:
    return [
        {
            "task": task,
            "entrant": entrant,
            "lr": lr,
            "final_train_loss": score,
            "chosen": lr == tuning.lr,
            "extensions": tuning.extensions,
            "at_edge": tuning.at_edge,
        }
        for (task, entrant), tuning in tunings.items()
        for lr, score in sorted(tuning.scores.items())
    ]


def _tuning_table(tunings: Mapping[tuple[str, str], Tuning]) -> list[list[str]]:
    grid = sorted({lr for tuning in tunings.values() for lr in tuning.scores})
    table = [["task", "optimizer", *(f"{lr:.3g}" for lr in grid), "grid grew by"]]
    for (task, entrant), tuning in tunings.items():
        scores = {lr: _mean_and_spread([score]) for lr, score in tuning.scores.items()}
        scores[tuning.lr] = f"**{scores[tuning.lr]}**"
        row = [scores.get(lr, "") for lr in grid]
        table.append([task, entrant, *row, f"{tuning.extensions}"])
    return table


def _environment(provenance_file: Path) -> list[list[str]]:
    last = json.loads(provenance_file.read_text())[-1]
    facts = last.pop("versions") | last
    return [[key, str(value)] for key, value in facts.items() if value is not None]


def _csv(rows: Sequence[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{_bold(cell)}</{tag}>" for cell in row)

    head, *body = rows
    lines = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in body)
    return f'<div class="wide"><table><tr>{cells(head, "th")}</tr>{lines}</table></div>'


def _bold(text: str) -> str:
    return re.sub(r"^\*\*(.*)\*\*$", r"<strong>\1</strong>", html.escape(text))


def _details(title: str, text: str) -> str:
    title, text = html.escape(title), html.escape(text)
    return f"<details><summary>{title}</summary><pre>{text}</pre></details>"


_STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: auto; padding: 1rem; }
svg { display: block; width: 100%; max-width: 40rem; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; }
td { white-space: nowrap; }
pre { overflow-x: auto; font-size: .8rem; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Optimizer benchmark</title>
<style>{style}</style>
</head>
<body>
<h1>Optimizer benchmark</h1>
<p>Mean ± standard deviation over seeds, the best mean in bold. Curves: mean over seeds, band from
the least to the most. <a download="results.csv" href="{csv}">Raw numbers (CSV)</a></p>
{sections}
<h2>How this was run</h2>
<p>{protocol}</p>
{environment}
{details}
<h2>Tuning</h2>
<p>Final loss on the full training set, mean over the tuning seeds; the chosen one in bold.</p>
{tuning}
<h2>Runs that failed</h2>
{errors}
</body>
</html>
"""
