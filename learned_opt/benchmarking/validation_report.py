"""Writes the report of the protocol "validation": CSV files, report.md and report.html."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from geodesic.files import write_atomic
from learned_opt.benchmarking.config import BenchmarkConfig
from learned_opt.benchmarking.summary import aligned, bullets, markdown, ranked
from learned_opt.benchmarking.tables import to_csv
from learned_opt.benchmarking.validation import Outcome
from learned_opt.benchmarking.validation_tables import (
    TABLES,
    introduction,
    meaning,
    overview,
    protocol,
    sentence,
    target_rows,
    task_list,
    task_tables,
    title,
)

# The columns that the terminal shows; the report has all of them.
TERMINAL = ("speed-up, geometric mean", "speed-up, IQM", "missed", "P(lower validation loss)",
            "P(lower test loss)", "diverged")  # fmt: skip


def write_validation_report(
    config: BenchmarkConfig, facts: Mapping[str, Any], outcome: Outcome, folder: Path
) -> tuple[str, Path]:
    """Writes the report into `folder`; returns the text for the terminal and the page's path.

    The files are results.csv, tuning.csv, targets.csv, report.md and report.html.

    Args:
        config: the config of the benchmark.
        facts: the facts about each task that are known once it is made, by label.
        outcome: the results.
        folder: the output folder.
    """
    from learned_opt.benchmarking.validation_html import page  # with matplotlib, slow to load

    summary = overview(outcome.rows, config.validation_baseline)
    rows = ranked(outcome.rows, summary)
    flat = [{**row, "hyperparameters": json.dumps(row["hyperparameters"])} for row in outcome.rows]
    tuning = [{**row, "hyperparameters": json.dumps(row["hyperparameters"])}
              for row in outcome.tuning]  # fmt: skip
    write_atomic(folder / "results.csv", to_csv(flat))
    write_atomic(folder / "tuning.csv", to_csv(tuning))
    write_atomic(folder / "targets.csv", to_csv(target_rows(outcome.targets)))
    parts = [
        f"# {title(config)}",
        sentence(rows, config.validation_baseline),
        introduction(config.validation_baseline),
        markdown(summary),
        bullets(meaning(config.validation_baseline, summary.headings)),
        "## Tasks",
        markdown(task_list(config, facts, outcome.targets)),
        TABLES,
        *(f"### {t}\n\n{markdown(table)}" for t, table in task_tables(rows).items()),
        "## How this was run",
        "\n".join(f"- {line}" for line in protocol(config, outcome.tuning)),
    ]
    write_atomic(folder / "report.md", ("\n\n".join(parts) + "\n").encode())
    raw = {n: (folder / n).read_bytes() for n in ("results.csv", "tuning.csv", "targets.csv")}
    if (folder / "rows.jsonl").exists():  # absent if the rows of all runs were known
        raw["rows.jsonl.gz"] = gzip.compress((folder / "rows.jsonl").read_bytes(), mtime=0)
    html = page(config, facts, replace(outcome, rows=rows), raw)
    write_atomic(folder / "report.html", html.encode())
    return f"{aligned(summary, TERMINAL)}\n\n* the best of its column\n\n{parts[1]}", (
        folder / "report.html"
    )
