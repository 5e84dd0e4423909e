"""Tables of README.md and docs/model_card.md, from the suites of `learned-opt benchmark`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from rows import markdown_table, read

from learned_opt.benchmark.report import meaning_of, overview_of

SUITES = ("digits", "mnist", "cifar", "text", "mixed")  # folders of results/benchmark
OVERVIEW = ("speed-up, steps", "speed-up, seconds", "× lower final loss", "P(lower final loss)",
            "P(lower mean loss)", "P(lower test loss)", "profile", "diverged")  # fmt: skip
SCORES = {
    "steps_speed_up": "speed-up, steps",
    "seconds_speed_up": "speed-up, seconds",
    "final_train_loss_ratio": "× lower final loss",
    "mean_loss_ratio": "× lower mean loss",
    "test_loss_ratio": "× lower test loss",
}


def folders(results: Path) -> list[Path]:
    return [path for suite in SUITES if (path := results / "benchmark" / suite).exists()]


def benchmark(results: Path) -> str:
    """All held-out tasks, then each suite whose results are there, over all its tasks."""
    found = folders(results)
    held_out, chances = "held-out", [name for name in OVERVIEW if name.startswith("P(")]
    parts = [
        "**All tasks that are held out**, of all suites",
        overview_of(found, OVERVIEW, held_out),
        "The same, beside Adam whose learning rate is tuned too and falls to zero as a cosine:",
        overview_of(found, chances, held_out, "Adam cosine"),
    ]
    for path in found:
        parts += [heading(path), overview_of([path], OVERVIEW)]
    return "\n\n".join([*parts, *map(meaning_of, found[:1])])


def heading(path: Path) -> str:
    families = [t["family"] for t in json.loads((path / "benchmark.json").read_text())["tasks"]]
    trained = families.count("in-family")
    return f"**{path.name}** ({trained or 'none'} of {len(families)} tasks like those trained on)"


def task_by_task(results: Path) -> str:
    """The shipped optimizer, without tuning, beside tuned Adam: the median run of each task."""
    lines = []
    for path in folders(results):
        facts = json.loads((path / "benchmark.json").read_text())
        rows = [row for row in read(path / "scores.csv") if row["entrant"] == "learned"]
        for task in facts["tasks"]:
            mine = [row for row in rows if row["task"] == task["label"]]
            medians = (np.median([float(row[name]) for row in mine]) for name in SCORES)
            family, steps = task["family"], str(task["steps"])
            lines.append([task["label"], family, steps, *(f"{m:.2f}" for m in medians)])
    return markdown_table(["task", "how far from training", "steps", *SCORES.values()], lines)
