"""Writes the report on an output folder of the benchmark: scores.csv, report.md, report.html."""

from __future__ import annotations

import csv
import gzip
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

from geodesic.files import write_atomic
from learned_opt.benchmarking.protocol import (
    Facts,
    entrant_list,
    environment,
    protocol,
    size,
    task_list,
    title,
)
from learned_opt.benchmarking.scores import Results, Row, read_results, read_scores, score
from learned_opt.benchmarking.summary import (
    TABLES,
    Table,
    aligned,
    bullets,
    introduction,
    markdown,
    meaning,
    overview,
    overviews,
    ranked,
    sentence,
    summary_table,
    task_tables,
)
from learned_opt.benchmarking.tables import read_rows, to_csv

__all__ = ["meaning_of", "overview_of", "summary_table", "terminal_text", "write_report"]


def write_report(folder: Path) -> Path:
    """Writes scores.csv, report.md and report.html into `folder`; returns the path of the last.

    It reads only what the benchmark has left there.

    Raises:
        OutputError: the folder has no results, or those of another version.
    """
    from learned_opt.benchmarking.training_html import page  # with matplotlib, slow to load

    results = read_results(folder)
    scores = score(results)
    rows = [row | more for row, more in zip(results.rows, scores, strict=True)]
    rows = ranked(rows, overview(rows, results.facts["baseline"]))
    provenance = json.loads((folder / "provenance-benchmark.json").read_text())
    write_atomic(folder / "scores.csv", to_csv(scores))
    write_atomic(folder / "report.md", _markdown(results, rows, provenance).encode())
    raw = {
        name: (folder / name).read_bytes() for name in ("results.csv", "scores.csv", "tuning.csv")
    }
    raw["losses.csv.gz"] = gzip.compress(_losses(results), mtime=0)
    write_atomic(folder / "report.html", page(results, rows, provenance, raw).encode())
    return folder / "report.html"


# The columns that the terminal shows; the report has all of them.
TERMINAL = ("learning rate", "final train loss", "test loss", "test accuracy %", "speed-up, steps",
            "× lower final loss", "P(lower test loss)", "seconds", "diverged")  # fmt: skip


def terminal_text(folder: Path) -> str:
    """Returns what the terminal shows of a report: each task, all tasks, and who won."""
    rows, scores = read_rows(folder / "results.csv"), read_scores(folder / "scores.csv")
    facts = json.loads((folder / "benchmark.json").read_text())
    together = [more | row for more, row in zip(scores, rows, strict=True)]
    tables = task_tables(rows) | {"all tasks": overview(together, facts["baseline"])}
    parts = [f"{name}\n{aligned(table, TERMINAL)}" for name, table in tables.items()]
    parts.append("* the best of its column")
    return "\n\n".join(filter(None, [*parts, sentence(facts, together)]))


def overview_of(
    folders: Sequence[Path],
    columns: Sequence[str],
    family: str = "",
    baseline: str | None = None,
) -> str:
    """Returns the table over all tasks of benchmarks with the same entrants and seeds in Markdown.

    Args:
        folders: the output folders, of which benchmark.json, results.csv and scores.csv are read.
        columns: the headings to keep besides the optimizer's; absent ones are ignored.
        family: only tasks whose family begins with this text.
        baseline: the entrant that chances are relative to; by default that of the benchmarks.
    """
    rows: list[Row] = []
    for folder in folders:
        facts = json.loads((folder / "benchmark.json").read_text())
        wanted = {t["label"] for t in facts["tasks"] if t["family"].startswith(family)}
        files = read_scores(folder / "scores.csv"), read_rows(folder / "results.csv")
        rows += [more | row for more, row in zip(*files, strict=True) if row["task"] in wanted]
    table = overview(rows, baseline or facts["baseline"])
    kept = [0, *(table.headings.index(name) for name in columns if name in table.headings)]
    headings, *lines = ([row[i] for i in kept] for row in (table.headings, *table.rows))
    return _escape(markdown(Table(headings, lines)))


def meaning_of(folder: Path, columns: Sequence[str]) -> str:
    """Returns what the table of `overview_of` says and what its columns mean, in Markdown."""
    baseline = json.loads((folder / "benchmark.json").read_text())["baseline"]
    return _escape(f"{introduction(baseline)}\n\n{bullets(meaning(baseline, columns))}")


def _markdown(results: Results, rows: Sequence[Row], provenance: Sequence[Facts]) -> str:
    facts = results.facts
    tables, baseline = overviews(facts, rows), facts["baseline"]
    groups = (f"**{name}**\n\n{markdown(table)}" for name, table in tables.items())
    how = (environment(provenance, rows), task_list(facts), entrant_list(facts))
    failed = [f"- {f['cell']}: {f['error'].strip().splitlines()[-1]}" for f in facts["failed"]]
    parts = [
        f"# {title(facts)}",
        sentence(facts, rows),
        size(facts),
        "## Summary",
        introduction(baseline),
        *groups,
        bullets(meaning(baseline, next(iter(tables.values())).headings)),
        "## Tables",
        TABLES,
        summary_table(rows),
        "## How this was run",
        "\n".join(f"- {line}" for line in protocol(facts, results.tuning)),
        *map(markdown, how),
        "## Runs that failed",
        "\n".join(failed) or "None.",
    ]
    return _escape("\n\n".join(parts)) + "\n"


def _escape(text: str) -> str:
    """Escapes HTML, which Markdown would pass on."""
    return html.escape(text, quote=False)


def _losses(results: Results) -> bytes:
    """Returns a CSV row for each run: task, entrant, seed, and the minibatch loss of each step."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in results.rows:
        losses = (f"{loss:.6g}" for loss in results.losses[row["cell"]])
        writer.writerow([row["task"], row["entrant"], row["seed"], *losses])
    return text.getvalue().encode()
