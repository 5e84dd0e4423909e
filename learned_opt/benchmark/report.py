"""results.csv, tuning.csv, the summary tables, and report.html that needs nothing but a browser."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from learned_opt.benchmark.curves import loss_curves
from learned_opt.benchmark.tables import read_rows
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


def write_report(folder: Path) -> Path:
    """Writes report.html from what a benchmark has left in `folder`; its path."""
    facts = json.loads((folder / "benchmark.json").read_text())
    results, tuning = read_rows(folder / "results.csv"), read_rows(folder / "tuning.csv")
    sections = []
    for i, (task, rows) in enumerate(_tables(results).items()):
        figure = loss_curves(_curves(folder, results, task), key=f"figure-{i}")
        sections.append(f"<h2>{html.escape(task)}</h2>{figure}{_html_table(rows)}")
    uri = "data:text/csv;base64," + base64.b64encode((folder / "results.csv").read_bytes()).decode()
    failed = [_details(f["cell"], f["error"]) for f in facts["failed"]]
    page = _PAGE.format(
        style=_STYLE,
        sections="\n".join(sections),
        protocol=html.escape(_protocol(facts)),
        csv=uri,
        errors="".join(failed) or "<p>None.</p>",
        tuning=_html_table(_tuning_table(tuning)) if tuning else "<p>Nothing was tuned.</p>",
        details=_details("config", json.dumps(facts["config"], indent=1)),
        environment=_html_table(_environment(folder / "provenance-benchmark.json")),
    )
    write_atomic(folder / "report.html", page.encode())
    return folder / "report.html"


def _curves(folder: Path, results: Sequence[Row], task: str) -> dict[str, list[np.ndarray]]:
    runs: dict[str, list[np.ndarray]] = {}
    for row in results:
        if row["task"] == task:
            with np.load(folder / "cells" / f"{row['cell']}.npz", allow_pickle=False) as file:
                runs.setdefault(row["entrant"], []).append(file["losses"])
    return runs


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


def _protocol(facts: Mapping[str, Any]) -> str:
    budget = facts["budget"]
    return (
        f"Every optimizer starts from the same weights and sees the same minibatches for a seed. "
        f"Reported are seeds {facts['reporting_seeds']}. Where hyperparameters are tuned, they are "
        f"those of {budget['settings']} settings, and up to {budget['max_extensions']} more where "
        f"the best is at an end of the grid, with the lowest final loss on the full training set, "
        f"mean over seeds {facts['tuning_seeds']}, on which nothing is reported. A diverged or "
        f"failed run counts with an infinite loss. Seconds are of whole runs, "
        f"{facts['processes']} at a time with {facts['threads']} thread(s) each."
    )


def _tuning_table(tuning: Sequence[Row]) -> list[list[str]]:
    table = [["task", "optimizer", "hyperparameters", "final loss"]]
    for row in tuning:
        text = _mean_and_spread([row["final_train_loss"]])
        text = f"**{text}**" if row["chosen"] else text
        table.append([row["task"], row["entrant"], row["hyperparameters"], text])
    return table


def _environment(provenance_file: Path) -> list[list[str]]:
    last = json.loads(provenance_file.read_text())[-1]
    facts = last.pop("versions") | last
    return [[key, str(value)] for key, value in facts.items() if value is not None]


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
