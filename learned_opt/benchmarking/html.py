"""Makes the HTML of a report: its parts, and report.html, which needs nothing but a browser."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
import yaml

from learned_opt.benchmarking.config import BenchmarkConfig
from learned_opt.benchmarking.curves import profiles, style
from learned_opt.benchmarking.stats import PROFILE_TASKS
from learned_opt.benchmarking.summary import Entry, Table
from learned_opt.output_folder import plain

FULL = 8  # the factor, better or worse, at which a color is full
MIME = {".csv": "text/csv", ".gz": "application/gzip"}


class Section(NamedTuple):
    """A part of the page: its anchor, its heading, a note on how to read it, and its HTML."""

    name: str
    heading: str
    note: str
    body: str


def document(title: str, verdict: str, size: str, sections: Sequence[Section]) -> str:
    """Returns the whole page.

    Args:
        title: the title of the page.
        verdict: a sentence on who won.
        size: a line on how much was run.
        sections: the parts of the page, in order.
    """
    links = (f'<a href="#{s.name}">{escape(s.heading)}</a>' for s in sections)
    bodies = (
        f'<section id="{s.name}"><h2>{escape(s.heading)}</h2>'
        + (f'<p class="note">{escape(s.note)}</p>' if s.note else "")
        + f"{s.body}</section>"
        for s in sections
    )
    template = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=escape(title),
        verdict=escape(verdict),
        size=escape(size),
        links=" ".join(links),
        sections="\n".join(bodies),
    )


def map_section(mean: str, baseline: str, heat_maps: str) -> Section:
    """Returns the heat maps, with a note that calls the mean over the runs of a task `mean`."""
    note = (
        f"{mean}, the best of a task in bold. Violet is better than {baseline}, gray is worse; "
        f"the color is full at {FULL} times."
    )
    return Section("map", "Task by task", note, heat_maps)


def curves_section(
    what: str, names: Sequence[str], figures: Iterable[str], more: str = ""
) -> Section:
    """Returns a figure for each task; `more` is a further sentence on how to read them."""
    note = (
        f"{what} of each optimizer: the mean over seeds, in a band from the lowest to the highest. "
        f"A line ends where the first of its runs diverged. {more}"
    )
    body = f'{legend(names)}<div class="pictures">{"".join(figures)}</div>'
    return Section("curves", "Curves", note, body)


def profiles_section(costs: np.ndarray, names: Sequence[str]) -> list[Section]:
    """Returns the profiles of costs (entrants, tasks); [] if there are too few tasks."""
    if costs.shape[1] < PROFILE_TASKS:
        return []
    note = (
        "A performance profile says on what share of the tasks (upwards) an optimizer takes at "
        "most τ times the steps of the fastest one (to the right): the higher the line, the "
        "better. A task on which it never reaches the target does not count for it."
    )
    body = f"{legend(names)}<figure>{profiles(costs, 'Performance profiles')}</figure>"
    return [Section("profiles", "Performance profiles", note, body)]


def errors_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the errors in the rows of results.csv by a description of the run."""
    failed = (row for row in rows if row["error"])
    return {f"{r['task']}, {r['entrant']}, seed {r['seed']}": r["error"] for r in failed}


def failures_section(errors: Mapping[str, str]) -> Section:
    """Returns a list of tracebacks, which are given by the run that they ended."""
    failed = "".join(details(run, preformatted(error)) for run, error in errors.items())
    return Section("failed", "Runs that failed", "", failed or "<p>None.</p>")


def numbers_section(raw: Mapping[str, bytes]) -> Section:
    """Returns links to files to download, whose contents are given by name."""
    links = (
        f'<li><a download="{name}" href="data:{MIME[Path(name).suffix]};base64,'
        f'{base64.b64encode(data).decode()}">{name}</a></li>'
        for name, data in raw.items()
    )
    return Section("numbers", "Raw numbers", "", f"<ul>{''.join(links)}</ul>")


def html_table(
    table: Table,
    kind: str = "",
    sortable: bool = False,
    attributes: Callable[[Entry], str] = lambda _: "",
) -> str:
    """Returns a `<table>` of class `kind` in a box that scrolls by itself."""
    heads = []
    for i, heading in enumerate(table.headings):
        heading = escape(heading).replace("speed-up", "speed\u2011up")  # does not break
        first = "descending" if i in table.largest_first else "ascending"
        button = f'<th data-first="{first}"><button>{heading}</button></th>'
        heads.append(button if sortable else f"<th>{heading}</th>")
    lines = []
    for row in table.rows:
        cells = []
        for entry in row:
            text = escape(entry.text)
            if not isinstance(entry.key, str):  # puts an interval, spread or note on a second line
                text = re.sub(r",? ([\[(±].*|\d+ failed)$", r"<small>\1</small>", text)
            text = f"<strong>{text}</strong>" if entry.best else text
            key = f' data-key="{escape(_key(entry.key))}"' if sortable else ""
            cells.append(f"<td{key}{attributes(entry)}>{text}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _key(key: float | str) -> str:
    """Returns a key as JavaScript's Number reads it."""
    if isinstance(key, str):
        return key
    return str(float(key)).replace("inf", "Infinity").replace("nan", "NaN")


def heat_table(heading: str, table: Table) -> str:
    """Returns a table of ratios to the baseline, in colors."""
    return f"<h3>{escape(heading)}</h3>" + html_table(table, "heat", True, _shade)


def _shade(entry: Entry) -> str:
    """Returns the color of an entry, which is stronger the farther its ratio is from 1."""
    if isinstance(entry.key, str):
        return ""
    octaves = math.log2(min(max(entry.key, 1 / FULL), FULL)) / math.log2(FULL)
    kind = "better" if octaves > 0 else "worse"
    return f' class="{kind}" style="--much:{60 * abs(octaves):.0f}%"'


def legend(names: Sequence[str]) -> str:
    items = []
    for name, (colour, dashes) in ((name, style(i)) for i, name in enumerate(names)):
        line = f'stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dashes}"'
        line = f'<line x1="0" y1="5" x2="32" y2="5" {line}/>'
        items.append(f'<li><svg width="32" height="10">{line}</svg>{escape(name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def figure(svg: str, caption: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def terms(meaning: Mapping[str, str]) -> str:
    """Returns a list of terms and what they mean."""
    items = (f"<dt>{escape(term)}</dt><dd>{escape(text)}.</dd>" for term, text in meaning.items())
    return f"<dl>{''.join(items)}</dl>"


def listing(sentences: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"


def details(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def plain_config(config: BenchmarkConfig) -> dict[str, Any]:
    """Returns the config without folders, so that it can be published."""
    return {k: v for k, v in plain(config).items() if k not in ("data_root", "data", "done")}


def settings(config: Mapping[str, Any]) -> str:
    """Returns the configuration, folded."""
    return details("Configuration", preformatted(yaml.safe_dump(dict(config), sort_keys=False)))


def preformatted(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"
