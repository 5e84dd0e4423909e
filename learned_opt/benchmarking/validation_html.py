"""The report of the protocol "validation" as one HTML page: report.html, filled in."""

from __future__ import annotations

import html
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
import yaml

from learned_opt.benchmarking.config import BenchmarkConfig
from learned_opt.benchmarking.curves import evaluation_curves, profiles
from learned_opt.benchmarking.html import (
    details,
    download,
    emphasis,
    figure,
    heat_table,
    html_table,
    legend,
    preformatted,
)
from learned_opt.benchmarking.stats import geometric_mean
from learned_opt.benchmarking.summary import Entry, Table, runs, score_text
from learned_opt.benchmarking.validation import Outcome
from learned_opt.benchmarking.validation_report import (
    costs,
    meaning,
    names,
    overview,
    protocol,
    sentence,
    task_list,
    task_tables,
    title,
)
from learned_opt.outputs import plain


def page(
    config: BenchmarkConfig, facts: Mapping[str, Any], outcome: Outcome, raw: Mapping[str, bytes]
) -> str:
    """The whole page; `raw`: name -> content of the files to download."""
    rows, baseline = outcome.rows, config.validation_baseline
    entrants = names(rows)
    size = f"{len(entrants)} optimizers, {len(config.tasks)} tasks, {len(config.reporting)} seeds"
    curves = [
        figure(
            evaluation_curves(
                {n: outcome.curves[task.label, n] for n in entrants},
                outcome.targets[task.label][0].loss,
                f"Validation loss, {task.label}",
            ),
            html.escape(task.label),
        )
        for task in config.tasks
    ]
    tables = [
        f"<h3>{html.escape(task)}</h3>{html_table(table, sortable=True)}"
        for task, table in task_tables(rows).items()
    ]
    failed = [
        details(f"{row['task']}, {row['entrant']}, seed {row['seed']}", preformatted(row["error"]))
        for row in rows
        if row["error"]
    ]
    parts = {
        "title": html.escape(title(config)),
        "size": size,
        "verdict": html.escape(sentence(rows, baseline)),
        "overview": html_table(overview(rows, baseline), sortable=True),
        "meaning": emphasis(meaning(baseline)),
        "relation": "",
        "reference": html.escape(f"the tuned {baseline}"),
        "heat_maps": _heat_map(rows, entrants),
        "legend": legend(entrants),
        "profiles": profiles(costs(rows), "Performance profiles"),
        "curve_kind": "Validation loss",
        "mean": "Geometric mean, a miss counting half,",
        "curves": "".join(curves),
        "tables": "".join(tables),
        "protocol": html.escape(protocol(config, outcome.tuning)),
        "environment": "",
        "tasks": html_table(task_list(config, facts, outcome.targets), kind="text"),
        "entrants": "",
        "details": details(
            "configuration", preformatted(yaml.safe_dump(_plain(config), sort_keys=False))
        ),
        "failed": "".join(failed) or "<p>None.</p>",
        "downloads": "".join(f"<li>{download(name, data)}</li>" for name, data in raw.items()),
    }
    template = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    return Template(template).substitute(parts)


def _heat_map(rows: list[dict[str, Any]], entrants: list[str]) -> str:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    scores = [runs(rows, name, "speed_up") for name in entrants]
    values = np.array([np.where(s.any(1), geometric_mean(s[:, None]), 0.0) for s in scores])
    body = [
        [Entry(task, task), *(_score(v, v == line.max()) for v in line)]
        for task, line in zip(tasks, values.T, strict=True)
    ]
    return heat_table("speed-up", Table(["task", *entrants], body, range(1, len(entrants) + 1)))


def _score(value: float, best: bool) -> Entry:
    """Of one task; 0 where every run missed."""
    return Entry(score_text(value), float(value), best) if value else Entry("missed", 0.0)


def _plain(config: BenchmarkConfig) -> dict[str, Any]:
    return {k: v for k, v in plain(config).items() if k not in ("data_root", "data", "done")}
