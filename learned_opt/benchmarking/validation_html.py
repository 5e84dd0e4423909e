"""Makes the report of the protocol "validation" as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from learned_opt.benchmarking.config import BenchmarkConfig
from learned_opt.benchmarking.curves import evaluation_curves
from learned_opt.benchmarking.html import (
    Section,
    curves_section,
    document,
    errors_of,
    escape,
    failures_section,
    figure,
    heat_table,
    html_table,
    listing,
    map_section,
    numbers_section,
    plain_config,
    profiles_section,
    settings,
    terms,
)
from learned_opt.benchmarking.stats import geometric_mean
from learned_opt.benchmarking.summary import Entry, Table, runs, score_text
from learned_opt.benchmarking.validation import Outcome
from learned_opt.benchmarking.validation_tables import (
    TABLES,
    costs,
    introduction,
    meaning,
    names,
    overview,
    protocol,
    sentence,
    size,
    task_list,
    task_tables,
    title,
)


def page(
    config: BenchmarkConfig, facts: Mapping[str, Any], outcome: Outcome, raw: Mapping[str, bytes]
) -> str:
    """Returns the whole page.

    Args:
        config: the config of the benchmark.
        facts: the facts about each task that are known once it is made, by label.
        outcome: the results, with the best optimizer's rows first.
        raw: the contents of the files to download by name.
    """
    rows, baseline = outcome.rows, config.validation_baseline
    entrants, summary = names(rows), overview(rows, baseline)
    curves = [
        figure(
            evaluation_curves(
                {n: outcome.curves[task.label, n] for n in entrants},
                f"Validation loss, {task.label}",
                target=outcome.targets[task.label][0].loss,
            ),
            escape(task.label),
        )
        for task in config.tasks
    ]
    tables = [
        f"<h3>{escape(task)}</h3>{html_table(table, sortable=True)}"
        for task, table in task_tables(rows).items()
    ]
    how = [
        listing(protocol(config, outcome.tuning)),
        "<h3>Tasks</h3>",
        html_table(task_list(config, facts, outcome.targets)),
        settings(plain_config(config)),
    ]
    sections = [
        Section(
            "summary",
            "Summary",
            introduction(baseline),
            html_table(summary, sortable=True) + terms(meaning(baseline, summary.headings)),
        ),
        map_section(
            "The geometric mean over seeds, in which a miss counts as half",
            f"the target, the loss of the tuned {baseline}",
            _heat_map(rows, entrants),
        ),
        curves_section("Validation loss", entrants, curves, "The dotted line is the target."),
        *profiles_section(costs(rows), entrants),
        Section("tables", "Tables", TABLES, "".join(tables)),
        Section("how", "How this was run", "", "".join(how)),
        failures_section(errors_of(rows)),
        numbers_section(raw),
    ]
    return document(title(config), sentence(rows, baseline), size(config), sections)


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
    """Returns the entry of a task; a value of 0 says that every run missed."""
    return Entry(score_text(value), float(value), best) if value else Entry("missed", 0.0)
