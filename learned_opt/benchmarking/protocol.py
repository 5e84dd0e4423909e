"""Describes how a benchmark was run, in sentences and in tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from learned_opt.benchmarking.scores import Row
from learned_opt.benchmarking.summary import Entry, Table, number
from learned_opt.benchmarking.verdict import counted

VERSIONS = ("commit", "python", "learned-opt", "torch", "numpy", "lightning")
Facts = Mapping[str, Any]


def title(facts: Facts) -> str:
    return f"Benchmark of optimizers: {facts['suite']}" if facts["suite"] else "Optimizer benchmark"


def size(facts: Facts) -> str:
    """Returns the size of the benchmark in one line."""
    tasks, entrants, seeds = map(len, (facts["tasks"], facts["entrants"], facts["reporting_seeds"]))
    return size_text(entrants, tasks, seeds)


def size_text(entrants: int, tasks: int, seeds: int) -> str:
    return ", ".join(
        [counted(entrants, "optimizer"), counted(tasks, "task"), counted(seeds, "seed")]
    )


def protocol(facts: Facts, tuning: Sequence[Row]) -> list[str]:
    """Returns sentences on what is held equal, what is tuned, and on which seeds."""
    budget = facts["budget"]
    searches = {(row["task"], row["entrant"]): row for row in tuning}.values()
    grown = sum(row["extensions"] > 0 for row in searches)
    edges = sum(row["at_edge"] for row in searches)
    searched = [
        "An optimizer that is tuned has the same budget on each task: "
        f"{counted(budget['settings'], 'setting')}, spread log-uniformly, on "
        f"{seeds_text(facts['tuning_seeds'])}, on which nothing is reported. The setting with the "
        "lowest final loss on all training data, averaged over these seeds, is the one reported.",
    ]
    of_searches = f"of {counted(len(searches), 'search', 'searches')}"
    if budget["max_extensions"]:
        searched.append(
            f"The range grew by up to {counted(budget['max_extensions'], 'setting')} where the "
            f"best one was at its end, in {grown} {of_searches}; in {edges} it still is."
        )
    else:
        searched.append(f"In {edges} {of_searches} that setting is at an end of its range.")
    return [
        "Every optimizer starts from the same weights and sees the same minibatches for a seed.",
        f"The report is on {seeds_text(facts['reporting_seeds'])}.",
        *(searched if searches else []),
        "A run that diverged or failed has an infinite loss, and so has one that took longer than "
        f"{facts['time_limit']:g} seconds.",
        f"Seconds are those of the training steps alone, on {facts['device']}, with "
        f"processes={facts['processes'] * facts['ranks']} and threads={facts['threads']}.",
        f"In all there were {counted(facts['cells'], 'run')}, of which {facts['failures']} failed, "
        f"and {facts['training_seconds']:.0f} seconds of training.",
    ]


def task_list(facts: Facts) -> Table:
    headings = ["task", "kind", "data", "network", "parameters", "batch", "steps",
                "loss of a guess", "shipped weights"]  # fmt: skip
    return _table(
        headings,
        [
            [
                task["label"],
                task["kind"],
                task["data"],
                " ".join([*map(str, task["hidden"]), task["activation"]])
                + "".join(f", {k} {v}" for k, v in task["options"].items()),
                task["parameters"],
                task["batch_size"],
                task["steps"],
                float(task["chance"]),
                task["family"] or "–",
            ]
            for task in facts["tasks"]
        ],
    )


def entrant_list(facts: Facts) -> Table:
    return _table(
        ["name", "optimizer", "arguments", "schedule", "tuned", "tuning runs"],
        [
            [
                entrant["name"],
                " ".join(filter(None, (entrant["optimizer"], entrant["weights"]))),
                ", ".join(f"{k}={v}" for k, v in entrant["kwargs"].items()) or "–",
                entrant["schedule"],
                ", ".join(f"{k} {_space(v)}" for k, v in entrant["search"].items()) or "–",
                facts["tuning_runs"].get(entrant["name"], 0),
            ]
            for entrant in facts["entrants"]
        ],
    )


def tuning_table(tuning: Sequence[Row]) -> Table:
    """Returns a table of every setting that was tried, with the chosen ones in bold."""
    rows = [
        [
            Entry(row["task"], row["task"]),
            Entry(row["entrant"], row["entrant"]),
            Entry(_setting(row), row["lr"] or 0),
            Entry(number(row["final_train_loss"]), row["final_train_loss"], row["chosen"]),
        ]
        for row in tuning
    ]
    return Table(["task", "optimizer", "setting", "final loss"], rows)


def environment(provenance: Sequence[Facts], rows: Sequence[Row]) -> Table:
    """Returns a table of versions and hardware; it has all of them if they differ between runs."""
    facts = {"started": f"{provenance[0]['started']}", "last started": provenance[-1]["started"]}
    for key in VERSIONS:
        facts[key] = ", ".join({str(row[key]): None for row in rows if row.get(key)})
    for key in ("platform", "cpu", "cores", "gpu"):
        facts[key] = ", ".join({str(p[key]): None for p in provenance if p[key]})
    return _table(["", ""], [[key, value] for key, value in facts.items() if value])


def _setting(row: Row) -> str:
    setting = json.loads(row["hyperparameters"])
    return ", ".join(f"{k} {number(v) if isinstance(v, float) else v}" for k, v in setting.items())


def _space(space: Any) -> str:
    """Describes a search, which is [low, high] or {values: [...]}."""
    if isinstance(space, dict):
        return "of " + ", ".join(map(str, space["values"]))
    return f"{space[0]:g} to {space[1]:g}"


def seeds_text(seeds: Sequence[int]) -> str:
    """Describes seeds; consecutive ones by the first and the last."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seeds {', '.join(map(str, seeds))}"


def _table(headings: list[str], rows: Sequence[Sequence[Any]]) -> Table:
    return Table(
        headings,
        [[Entry(number(v) if isinstance(v, float) else str(v), v) for v in row] for row in rows],
    )
