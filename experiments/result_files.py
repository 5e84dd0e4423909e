"""Saves raw results as CSV with their provenance, reads them, and makes tables in Markdown."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from geodesic.files import write_atomic
from learned_opt.output_folder import provenance

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"


def save(folder: Path, name: str, rows: list[dict], **facts) -> None:
    """Writes name.csv, and name.json with the versions, hardware, commit and `facts`."""
    facts = provenance() | facts  # before writing, which makes the tree differ from the commit
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{name}.csv", text.getvalue().encode())
    write_atomic(folder / f"{name}.json", json.dumps(facts, indent=2).encode())


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(rows: list[dict]) -> str:
    """Returns a table of rows with the same columns in Markdown."""
    lines = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    return markdown_table(list(rows[0]), lines)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
