"""Makes tables of docs/results.md, of the suites of real training and of continued runs.

The tables are made of committed rows, which `learned-opt benchmark` appends to rows.jsonl. This
command copies new rows into results/<suite>/rows.jsonl:

    python -m experiments.pages.field keep runs/real_dev/rows.jsonl real_dev

It leaves out failed runs, and runs of tasks or optimizers that have changed since.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from experiments.result_files import RESULTS, ROOT, markdown_table
from learned_opt.benchmarking import BenchmarkConfig
from learned_opt.benchmarking.going_on import run_going_on, undisturbed
from learned_opt.benchmarking.going_on_tables import sentence as going_on_sentence
from learned_opt.benchmarking.going_on_tables import table as going_on_table
from learned_opt.benchmarking.stats import probability_of_improvement
from learned_opt.benchmarking.stores import Rows
from learned_opt.benchmarking.summary import markdown
from learned_opt.benchmarking.validation import (
    EVALUATIONS,
    FEW_EVALUATIONS,
    ValidationCell,
    run_validation,
)
from learned_opt.benchmarking.validation_tables import overview, sentence
from learned_opt.cli import parse


class Lacking(Exception):
    """Raised if some runs of a suite are missing."""


def suite(name: str) -> BenchmarkConfig:
    path = ROOT / "configs" / "benchmark" / f"{name}.yaml"
    return parse(["benchmark", "--config", str(path), "--output", "unused"])[1]


def known(name: str):
    """Returns a function that gives records of finished cells, and raises Lacking for others."""
    store = Rows(RESULTS / name / "rows.jsonl")

    def run(cells: Iterable) -> list[dict[str, Any]]:
        records = [store.load(cell) for cell in cells]
        if missing := records.count(None):
            raise Lacking(f"{name}: {missing} of {len(records)} runs are missing")
        return records

    return run


def real(name: str) -> str:
    """Returns the sentence about the winner and the table of all tasks of a suite."""
    config = suite(name)
    rows = run_validation(config, known(name)).rows
    baseline = config.validation_baseline
    return f"{sentence(rows, baseline)}\n\n{markdown(overview(rows, baseline))}"


def going_on(name: str) -> str:
    """Returns the sentence and the table about continued runs of a suite."""
    config = suite(name)
    rows, _ = run_going_on(config, known(name))
    return f"{going_on_sentence(config, rows)}\n\n{markdown(going_on_table(config, rows))}"


def finals(name: str, metric: str) -> dict[str, np.ndarray]:
    """Returns the losses at the end of the full budget, (tasks, seeds), of each entrant.

    Of learned entrants they are those of the weights that are shipped. Entrants whose runs are not
    complete are left out.
    """
    config, found = suite(name), {}
    for line in (RESULTS / name / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        loss = math.inf if row["diverged"] else row[metric]
        found[row["entrant"], row["task"], row["seed"], row["steps"], row["weights"]] = loss
    losses = {}
    for entrant in config.entrants:
        weights = (entrant.weights_hash or "")[:12]
        keys = [[(entrant.name, task.label, seed, task.steps, weights)
                 for seed in config.reporting] for task in config.tasks]  # fmt: skip
        if all(key in found for row in keys for key in row):
            losses[entrant.name] = np.array([[found[key] for key in row] for row in keys])
    return losses


def ends(name: str) -> str:
    """Returns a sentence and a table about the ends of runs of the full budget."""
    config, baseline = suite(name), suite(name).validation_baseline
    losses, tests = (finals(name, f"{split}_loss") for split in ("validation", "test"))
    lines = {}
    for entrant, mine in losses.items():
        ratios = mine.mean(1) / losses[baseline].mean(1)
        chances = [
            float(probability_of_improvement(-x[entrant], -x[baseline])) for x in (losses, tests)
        ]
        lines[entrant] = [*ratios, float(np.exp(np.log(ratios).mean())), *chances]
    ranked = sorted(lines, key=lambda entrant: lines[entrant][-3])
    own, best = "learned num_steps", next(e for e in ranked if not e.startswith("learned"))
    sentence = (
        f"Told the number of steps, the learned optimizer ends at {lines[own][-3]:.3f} times the "
        f"validation loss of {baseline} with a tuned rate (geometric mean), and below it with "
        f"probability {lines[own][-2]:.2f}. The best of the others is {best}, at "
        f"{lines[best][-3]:.3f} times."
    )
    if "learned" in lines:
        sentence += (
            f" Told nothing, the learned optimizer ends at {lines['learned'][-3]:.3f} times."
        )
    headings = ["optimizer", *(task.label for task in config.tasks), "geometric mean",
                "P(lower validation loss)", "P(lower test loss)"]  # fmt: skip
    table = [
        [e, *(f"{x:.3f}" for x in lines[e][:-2]), *(f"{p:.2f}" for p in lines[e][-2:])]
        for e in ranked
    ]
    return f"{sentence}\n\n{markdown_table(headings, table)}"


def keep(path: Path, name: str) -> int:
    """Adds new rows to the committed ones, sorted by name, and returns their number."""
    target, config, rows = RESULTS / name / "rows.jsonl", suite(name), {}
    for file in (target, path):
        for line in file.read_text().splitlines() if file.exists() else ():
            row = json.loads(line)
            if row["error"] is None and asked_for(config, row):
                rows.setdefault(row["cell"], line)
    before = len(target.read_text().splitlines()) if target.exists() else 0
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(f"{rows[cell]}\n" for cell in sorted(rows)))
    return len(rows) - before


def asked_for(config: BenchmarkConfig, row: dict[str, Any]) -> bool:
    """Returns whether the current suite has the cell of this row, with any learned weights."""
    tasks = [task for task in config.tasks if task.label == row["task"]]
    entrants = [entrant for entrant in config.entrants if entrant.name == row["entrant"]]
    if not tasks or not entrants or row["weights"]:
        return bool(tasks and row["weights"])
    without = undisturbed(tasks[0].task)
    for task, few in product([tasks[0].task, *([without] if without else [])], (True, False)):
        cell = ValidationCell(
            replace(tasks[0], task=task, steps=row["steps"]),
            entrants[0],
            row["hyperparameters"],
            row["seed"],
            evaluations=FEW_EVALUATIONS if few else EVALUATIONS,
            trial=config.protocol == "validation" and row["seed"] in config.tuning,
        )
        if cell.name == row["cell"]:
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("keep", "show", "ends"))
    parser.add_argument("path", type=Path, nargs="?", help="file of the rows to keep")
    parser.add_argument("suite")
    args = parser.parse_args()
    if args.what == "keep":
        print(f"{keep(args.path, args.suite)} new rows")
    elif args.what == "ends":
        print(ends(args.suite))
    else:
        make = real if suite(args.suite).protocol == "validation" else going_on
        print(make(args.suite))


if __name__ == "__main__":
    main()
