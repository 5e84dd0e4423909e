"""Makes the tables of docs/training_speed.md from the results of throughput.py."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from experiments.result_files import markdown_table, read

PARTS = ("minibatch", "task_gradient", "features", "network", "statistics", "backward", "rest")


def _read(folder: Path, name: str) -> list[dict[str, str]]:
    path = folder / f"{name}.csv"
    return read(path) if path.exists() else []


def speed_table(folder: Path) -> str:
    """Returns a table of inner steps per second, beside the naive loop and the floors."""
    header = ["rule", "method", "tasks", "unroll", "inner steps/s", "× naive",
              "share of the ceiling, autograd", "share of the ceiling, closed form"]  # fmt: skip
    names = ("inner_steps_per_second", "ratio_to_naive", "of_floor_autograd", "of_floor")
    rows = [
        [r["rule"], r["way"], r["tasks"], r["unroll"], *(f"{float(r[n]):.3g}" for n in names)]
        for r in _read(folder, "training_throughput")
    ]
    return markdown_table(header, rows)


def shares_table(folder: Path) -> str:
    """Returns a table of the share of each part in the time, in percent, at unroll 20."""
    header = ["rule", "method", "tasks", *(p.replace("_", " ") for p in PARTS)]
    rows = [
        [r["rule"], r["way"], r["tasks"], *(f"{100 * float(r[f'share_{p}']):.0f}" for p in PARTS)]
        for r in _read(folder, "training_throughput")
        if r["unroll"] == "20" and r["way"] != "naive"
    ]
    return markdown_table(header, rows)


def memory_table(folder: Path) -> str:
    """Returns a table of the peak MB that a window adds, by unroll and by tasks."""
    cells: dict = defaultdict(dict)
    for r in _read(folder, "training_memory"):
        cells[r["rule"], r["way"]][int(r["tasks"]), int(r["unroll"])] = float(r["peak_memory_mb"])
    sizes = sorted({size for row in cells.values() for size in row})
    header = ["rule", "method", *(f"{tasks} × {unroll}" for tasks, unroll in sizes)]
    rows = [[*key, *(f"{row[size]:.0f}" for size in sizes)] for key, row in cells.items()]
    return markdown_table(header, rows)


def growth_table(folder: Path) -> str:
    """Returns a table of the exponents of a step's cost, the log-log slopes of the upper half."""
    costs = defaultdict(list)
    for r in _read(folder, "training_scaling"):
        costs[r["rule"], r["way"]].append(
            tuple(float(r[n]) for n in ("tasks", "coordinates", "ms_per_step"))
        )
    rows = []
    for key, found in costs.items():
        line = []
        for axis in (0, 1):
            other = 1 - axis
            fixed = (8.0, 2410.0)[other]
            curve = sorted((f[axis], f[2]) for f in found if f[other] == fixed)
            x, y = np.log(curve[len(curve) // 2 - 1 :]).T
            line.append(f"{np.polyfit(x, y, 1)[0]:.2f}")
        rows.append([*key, *line])
    return markdown_table(["rule", "method", "in tasks", "in coordinates"], rows)


def weak_table(folder: Path) -> str:
    """Returns a table of two processes beside one."""
    rows = [
        [r["objective"], r["family"],
         "two, joined" if r["joined"] == "True" else ("one", "two, apart")[int(r["processes"]) - 1],
         f"{float(r['inner_steps_per_second']):.0f}",
         f"{float(r['ratio_to_one']):.2f}"]
        for r in _read(folder, "weak_scaling")
    ]  # fmt: skip
    return markdown_table(
        ["objective", "tasks", "processes", "inner steps/s", "× one process"], rows
    )
