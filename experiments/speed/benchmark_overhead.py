"""Measures what a benchmark costs: the suites, the harness, and the gain from a second process.

    python -m experiments.speed.benchmark_overhead cost     # estimated core-hours of each suite
    python -m experiments.speed.benchmark_overhead harness  # wall-clock time against training time

`cost` times a few steps and one evaluation of each task and default entrant in every suite under
configs/benchmark, multiplies them by the numbers of steps and cells, and writes CPU seconds to
results/benchmark_cost.csv. It does not extend tuning grids, so a suite may take a little longer.
`harness` runs the digits suite with one process and with two, and writes
results/benchmark_overhead.csv. The overhead is everything except an optimizer's steps: evaluations,
files, start-up, waiting processes and the report.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser

from experiments.result_files import RESULTS, ROOT, markdown, save
from learned_opt.benchmarking import BenchmarkConfig, benchmark
from learned_opt.benchmarking.tables import read_rows
from learned_opt.run import run_optimizer
from learned_opt.tasks.kinds import make_task

SUITES = ("digits", "mnist", "cifar", "text", "mixed")
STEPS = 20  # the number of timed steps, which take about a second on the slowest task
LEARNING_RATE = 1e-3  # small enough that no run diverges, which would make it cheaper


def load(suite: str, **settings) -> BenchmarkConfig:
    values = yaml.safe_load((ROOT / "configs" / "benchmark" / f"{suite}.yaml").read_text())
    parser = ArgumentParser()
    parser.add_class_arguments(BenchmarkConfig, "config")
    return parser.instantiate(parser.parse_object({"config": values | settings})).config


def cost(data: dict[str, str], suites: list[str]) -> Iterator[dict]:
    for suite in suites:
        config = load(suite, data=data)
        for entry in config.tasks:
            task = make_task(entry.task, config.data_root)
            for entrant in config.entrants:
                chosen = {"lr": LEARNING_RATE} if entrant.search else {}

                def make(params, entrant=entrant, chosen=chosen):
                    return entrant.make_optimizer(params, chosen, STEPS)

                run_optimizer(task, make, 0, 2)
                start = time.process_time()
                run_optimizer(task, make, 0, 1)
                once, start = time.process_time() - start, time.process_time()
                run_optimizer(task, make, 0, 1 + STEPS)
                step = (time.process_time() - start - once) / STEPS
                tuned = config.settings * len(config.tuning) if entrant.search else 0
                cells, seconds = tuned + len(config.reporting), once + step * entry.steps
                yield {
                    "suite": suite,
                    "task": entry.label,
                    "entrant": entrant.name,
                    "parameters": task.dim,
                    "steps": entry.steps,
                    "step_ms": 1e3 * step,
                    "evaluation_seconds": once,
                    "cell_seconds": seconds,
                    "cells": cells,
                    "core_hours": cells * seconds / 3600,
                }


def harness() -> Iterator[dict]:
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            config, start = load("digits", processes=processes), time.perf_counter()
            benchmark(config, folder)
            wall = time.perf_counter() - start
            facts = yaml.safe_load(Path(folder, "benchmark.json").read_text())
            assert len(read_rows(Path(folder, "results.csv"))) and not facts["failures"]
        yield {
            "processes": processes,
            "cells": facts["cells"],
            "wall_seconds": wall,
            "training_seconds": facts["training_seconds"],
            "overhead": processes * wall / facts["training_seconds"] - 1,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["cost", "harness"])
    parser.add_argument("--data", type=yaml.safe_load, default={}, help="as in a benchmark config")
    parser.add_argument("--suites", nargs="+", default=list(SUITES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part == "cost":
        rows = list(cost(args.data, args.suites))
        save(args.output, "benchmark_cost", rows)
        totals = []
        for suite in args.suites:
            mine = [row for row in rows if row["suite"] == suite]
            totals.append(
                {
                    "suite": suite,
                    "cells": sum(row["cells"] for row in mine),
                    "longest cell, s": max(row["cell_seconds"] for row in mine),
                    "core-hours": float(np.sum([row["core_hours"] for row in mine])),
                }
            )
        print(markdown(totals))
    else:
        rows = list(harness())
        save(args.output, "benchmark_overhead", rows)
        print(markdown(rows))
        print(f"two processes: {rows[0]['wall_seconds'] / rows[1]['wall_seconds']:.3g}× as fast")


if __name__ == "__main__":
    main()
