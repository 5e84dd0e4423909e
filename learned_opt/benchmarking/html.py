"""The report as one HTML page that needs nothing but a browser: report.html, filled in."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np
import yaml

from learned_opt.benchmarking.curves import loss_curves, profiles, style
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
    Entry,
    Table,
    meaning,
    median_steps,
    overviews,
    runs,
    score_text,
    sentence,
    task_tables,
)

HEAT = ("final_train_loss_ratio", "steps_speed_up")  # of summary.SCORES
FULL = 8  # times better or worse at which a colour is full
MIME = {".csv": "text/csv", ".gz": "application/gzip"}


def page(
    results: Results, rows: Sequence[Row], provenance: Sequence[Facts], raw: Mapping[str, bytes]
) -> str:
    """The whole page.

    Args:
        rows: those of `results`, with the columns of scores.csv.
        provenance: versions and hardware of each start of the benchmark.
        raw: name -> content of the files to download.
    """
    facts, baseline = results.facts, results.facts["baseline"]
    names = [entrant["name"] for entrant in facts["entrants"]]
    families = {task["label"]: task["family"] for task in facts["tasks"]}
    first, *others = (
        (name, html_table(table, sortable=True)) for name, table in overviews(facts, rows).items()
    )
    curves = [
        figure(_curves(results, task, names), _with_family(task, family))
        for task, family in families.items()
    ]
    tables = [
        f"<h3>{_with_family(task, families[task])}</h3>{html_table(table, sortable=True)}"
        for task, table in task_tables(rows).items()
    ]
    parts = {
        "title": html.escape(title(facts)),
        "size": html.escape(size(facts)),
        "verdict": html.escape(sentence(facts, rows)),
        "reference": html.escape(f"{baseline}, tuned"),
        "curve_kind": "Loss",
        "mean": "Interquartile mean",
        "overview": first[1] + "".join(details(name, table) for name, table in others),
        "meaning": emphasis(meaning(facts)),
        "relation": "alone" if baseline is None else "",
        "heat_maps": "".join(_heat_map(rows, names, column) for column in HEAT if baseline),
        "legend": legend(names),
        "profiles": profiles(median_steps(rows, names), "Performance profiles") if baseline else "",
        "curves": "".join(curves),
        "tables": "".join(tables),
        "protocol": html.escape(protocol(facts, results.tuning)),
        "environment": html_table(environment(provenance, rows), kind="text"),
        "tasks": html_table(task_list(facts), kind="text"),
        "entrants": html_table(entrant_list(facts), kind="text"),
        "details": details("every setting that was tried", html_table(tuning_table(results.tuning)))
        + details("configuration", preformatted(yaml.safe_dump(facts["config"], sort_keys=False))),
        "failed": "".join(details(f["cell"], preformatted(f["error"])) for f in facts["failed"])
        or "<p>None.</p>",
        "downloads": "".join(f"<li>{download(name, data)}</li>" for name, data in raw.items()),
    }
    template = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    return Template(template).substitute(parts)


def html_table(
    table: Table,
    kind: str = "",
    sortable: bool = False,
    attributes: Callable[[Entry], str] = lambda _: "",
) -> str:
    """A `<table>` of class `kind` in a box that scrolls by itself."""
    heads = []
    for i, heading in enumerate(map(html.escape, table.headings)):
        first = "descending" if i in table.largest_first else "ascending"
        button = f'<th data-first="{first}"><button>{heading}</button></th>'
        heads.append(button if sortable else f"<th>{heading}</th>")
    lines = []
    for row in table.rows:
        cells = []
        for entry in row:
            text = html.escape(entry.text)
            if not isinstance(entry.key, str):  # its interval, spread or note on a second line
                text = re.sub(r",? ([\[(±].*|\d+ failed)$", r"<small>\1</small>", text)
            text = f"<strong>{text}</strong>" if entry.best else text
            key = f' data-key="{html.escape(_key(entry.key))}"' if sortable else ""
            cells.append(f"<td{key}{attributes(entry)}>{text}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _key(key: float | str) -> str:
    """As JavaScript's Number reads it."""
    if isinstance(key, str):
        return key
    return str(float(key)).replace("inf", "Infinity").replace("nan", "NaN")


def _heat_map(rows: Sequence[Row], names: Sequence[str], column: str) -> str:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    values = np.array([iqm(runs(rows, name, column)[:, None]) for name in names])
    body = [
        [Entry(task, task), *(Entry(score_text(v), float(v), v == line.max()) for v in line)]
        for task, line in zip(tasks, values.T, strict=True)
    ]
    return heat_table(SCORES[column], Table(["task", *names], body, range(1, len(names) + 1)))


def heat_table(heading: str, table: Table) -> str:
    """A table of ratios to the baseline, in colours."""
    return f"<h3>{html.escape(heading)}</h3>" + html_table(table, "heat", True, _shade)


def _shade(entry: Entry) -> str:
    """Blue for better than the baseline, orange for worse, the more the farther from 1."""
    if isinstance(entry.key, str):
        return ""
    octaves = math.log2(min(max(entry.key, 1 / FULL), FULL)) / math.log2(FULL)
    kind = "better" if octaves > 0 else "worse"
    return f' class="{kind}" style="--much:{60 * abs(octaves):.0f}%"'


def _curves(results: Results, task: str, names: Sequence[str]) -> str:
    losses = {name: [] for name in names}
    for row in results.rows:
        if row["task"] == task:
            losses[row["entrant"]].append(results.losses[row["cell"]])
    return loss_curves(losses, f"Loss curves, {task}")


def legend(names: Sequence[str]) -> str:
    items = []
    for name, (colour, dashes) in ((name, style(i)) for i, name in enumerate(names)):
        line = f'stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dashes}"'
        line = f'<line x1="0" y1="5" x2="32" y2="5" {line}/>'
        items.append(f'<li><svg width="32" height="10">{line}</svg>{html.escape(name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def figure(svg: str, caption: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def _with_family(task: str, family: str) -> str:
    return html.escape(task) + (f" <small>{html.escape(family)}</small>" if family else "")


def emphasis(text: str) -> str:
    """HTML of Markdown that has no markup but *this*."""
    return re.sub(r"\*(.+?)\*", r"<em>\1</em>", html.escape(text))


def details(title: str, body: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def download(name: str, data: bytes) -> str:
    uri = f"data:{MIME[Path(name).suffix]};base64,{base64.b64encode(data).decode()}"
    return f'<a download="{name}" href="{uri}">{name}</a>'
