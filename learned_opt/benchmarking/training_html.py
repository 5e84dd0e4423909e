"""Makes the report of the protocol "training" as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from learned_opt.benchmarking.curves import loss_curves
from learned_opt.benchmarking.html import (
    Section,
    curves_section,
    details,
    document,
    escape,
    failures_section,
    figure,
    heat_table,
    html_table,
    listing,
    map_section,
    numbers_section,
    profiles_section,
    settings,
    terms,
)
from learned_opt.benchmarking.protocol import (
    Facts,
    entrant_list,
    environment,
    protocol,
    size,
    task_list,
    title,
    tuning_table,
)
from learned_opt.benchmarking.scores import Results, Row
from learned_opt.benchmarking.stats import iqm
from learned_opt.benchmarking.summary import (
    SCORES,
    TABLES,
    Entry,
    Table,
    introduction,
    meaning,
    median_steps,
    overviews,
    runs,
    score_text,
    sentence,
    task_tables,
)

HEAT = ("steps_speed_up", "final_train_loss_ratio")  # of summary.SCORES


def page(
    results: Results, rows: Sequence[Row], provenance: Sequence[Facts], raw: Mapping[str, bytes]
) -> str:
    """Returns the whole page.

    Args:
        results: the results of the benchmark.
        rows: the rows of `results` with the columns of scores.csv, the best optimizer's first.
        provenance: the versions and hardware of each start of the benchmark.
        raw: the contents of the files to download by name.
    """
    facts, baseline = results.facts, results.facts["baseline"]
    names = list(dict.fromkeys(row["entrant"] for row in rows))
    families = {task["label"]: task["family"] for task in facts["tasks"]}
    first, *others = overviews(facts, rows).items()
    sections = [
        Section(
            "summary",
            "Summary",
            introduction(baseline),
            html_table(first[1], sortable=True)
            + terms(meaning(baseline, first[1].headings))
            + "".join(details(name, html_table(table, sortable=True)) for name, table in others),
        )
    ]
    if baseline:
        heat_maps = "".join(_heat_map(rows, names, column) for column in HEAT)
        sections.append(map_section("The interquartile mean over seeds", baseline, heat_maps))
    curves = [
        figure(_curves(results, task, names), _with_family(task, family))
        for task, family in families.items()
    ]
    sections.append(curves_section("Training loss", names, curves))
    if baseline:
        sections += profiles_section(median_steps(rows, names), names)
    tables = [
        f"<h3>{_with_family(task, families[task])}</h3>{html_table(table, sortable=True)}"
        for task, table in task_tables(rows).items()
    ]
    tried = html_table(tuning_table(results.tuning))
    how = [
        listing(protocol(facts, results.tuning)),
        html_table(environment(provenance, rows), kind="text"),
        "<h3>Tasks</h3>",
        html_table(task_list(facts), kind="text"),
        "<h3>Optimizers</h3>",
        html_table(entrant_list(facts), kind="text"),
        "<h3>Tuning and configuration</h3>",
        details("Every setting that was tried, the chosen one of each search in bold", tried),
        settings(facts["config"]),
    ]
    sections += [
        Section("tables", "Tables", TABLES, "".join(tables)),
        Section("how", "How this was run", "", "".join(how)),
        failures_section({f["cell"]: f["error"] for f in facts["failed"]}),
        numbers_section(raw),
    ]
    return document(title(facts), sentence(facts, rows), size(facts), sections)


def _heat_map(rows: Sequence[Row], names: Sequence[str], column: str) -> str:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    values = np.array([iqm(runs(rows, name, column)[:, None]) for name in names])
    body = [
        [Entry(task, task), *(Entry(score_text(v), float(v), v == line.max()) for v in line)]
        for task, line in zip(tasks, values.T, strict=True)
    ]
    return heat_table(SCORES[column], Table(["task", *names], body, range(1, len(names) + 1)))


def _curves(results: Results, task: str, names: Sequence[str]) -> str:
    losses = {name: [] for name in names}
    for row in results.rows:
        if row["task"] == task:
            losses[row["entrant"]].append(results.losses[row["cell"]])
    return loss_curves(losses, f"Loss curves, {task}")


def _with_family(task: str, family: str) -> str:
    return escape(task) + (f" <small>{escape(family)}</small>" if family else "")
