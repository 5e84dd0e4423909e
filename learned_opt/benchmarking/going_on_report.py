"""Writes the report of the protocol "going_on": results.csv, report.md and report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from geodesic.files import write_atomic
from learned_opt.benchmarking.config import BenchmarkConfig
from learned_opt.benchmarking.going_on import Curves, Row
from learned_opt.benchmarking.going_on_tables import INTRODUCTION, MEANING, sentence, table, title
from learned_opt.benchmarking.summary import aligned, bullets, markdown
from learned_opt.benchmarking.tables import to_csv


def write_going_on_report(
    config: BenchmarkConfig, rows: Sequence[Row], curves: Curves, folder: Path
) -> tuple[str, Path]:
    """Writes the report into `folder`; returns the text for the terminal and the page's path."""
    from learned_opt.benchmarking.going_on_html import page  # with matplotlib, slow to load

    write_atomic(folder / "results.csv", to_csv(rows))
    found, who = table(config, rows), sentence(config, rows)
    parts = [f"# {title(config)}", who, markdown(found), INTRODUCTION, bullets(MEANING)]
    write_atomic(folder / "report.md", ("\n\n".join(parts) + "\n").encode())
    html = page(config, rows, curves, {"results.csv": (folder / "results.csv").read_bytes()})
    write_atomic(folder / "report.html", html.encode())
    return f"{aligned(found)}\n\n* too much, see the report\n\n{who}", folder / "report.html"
