"""Makes the report of the protocol "going_on" as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from learned_opt.benchmarking.config import BenchmarkConfig
from learned_opt.benchmarking.curves import evaluation_curves
from learned_opt.benchmarking.going_on import Curves, Row, change_of
from learned_opt.benchmarking.going_on_tables import (
    INTRODUCTION,
    MEANING,
    OVERVIEW,
    overview,
    sentence,
    task_table,
    title,
)
from learned_opt.benchmarking.html import (
    Section,
    curves_section,
    document,
    errors_of,
    escape,
    failures_section,
    figure,
    html_table,
    numbers_section,
    plain_config,
    settings,
    terms,
)
from learned_opt.benchmarking.protocol import seeds_text, size_text


def page(
    config: BenchmarkConfig, rows: Sequence[Row], curves: Curves, raw: Mapping[str, bytes]
) -> str:
    """Returns the whole page; `raw` has the contents of the files to download by name."""
    summary = overview(config, rows)
    names = [line[0].text for line in summary.rows]
    figures = [
        figure(
            evaluation_curves(
                {name: curves[task.label, name] for name in names},
                f"Validation loss, {task.label}",
                change=change_of(task.task),
            ),
            escape(task.label),
        )
        for task in config.tasks
    ]
    tables = [
        f"<h3>{escape(task.label)}</h3>"
        + html_table(task_table(config, rows, task.label, names), sortable=True)
        for task in config.tasks
    ]
    how = (
        "<p>Every optimizer starts from the same weights and sees the same minibatches for a seed. "
        f"The report is on {seeds_text(config.reporting)}. Nothing is tuned.</p>"
    )
    sections = [
        Section("summary", "Summary", OVERVIEW, html_table(summary, sortable=True)),
        curves_section(
            "Validation loss", names, figures, "A dotted line is the step of the change."
        ),
        Section("tables", "Tables", INTRODUCTION, terms(MEANING) + "".join(tables)),
        Section("how", "How this was run", "", how + settings(plain_config(config))),
        failures_section(errors_of(rows)),
        numbers_section(raw),
    ]
    size = size_text(*map(len, (config.entrants, config.tasks, config.reporting)))
    return document(title(config), sentence(config, rows), size, sections)
