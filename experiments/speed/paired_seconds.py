"""Measures seconds to tuned Adam's final loss, while the shipped rule and Adam take turns.

    python -m experiments.speed.paired_seconds --data '{"cifar10": "cifar10_jpeg"}'

Runs of a benchmark are minutes apart, and a machine's speed can change in between. Here, Adam and
the rule train every held-out task at the same time, and alternate after BLOCK steps. This measures
the cost of a step of the rule relative to Adam. Together with the steps to the target in
results/benchmark, it gives the speed-up in seconds. Writes paired_seconds.csv, with a row for each
run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from experiments.pages.benchmark_tables import folders
from experiments.result_files import RESULTS, markdown_table, read, save
from experiments.training.ablation import held_out_tasks
from learned_opt import LearnedOptimizer
from learned_opt.benchmarking.stats import iqm, stratified_bootstrap
from learned_opt.run import MakeOptimizer, train
from learned_opt.tasks.base import Task
from learned_opt.tasks.kinds import make_task

BLOCK = 10  # the number of steps between runs of the rule's network
NAME = "paired_seconds"


def blocks(task: Task, make: MakeOptimizer, seed: int, steps: int) -> Iterator[float]:
    """Yields the seconds of each BLOCK steps, or of the remaining ones."""
    trainee = task.trainee(seed)
    run = train(trainee, make(trainee.params), steps)
    for _ in range(0, steps, BLOCK):
        start = time.perf_counter()
        deque(islice(run, BLOCK), maxlen=0)
        yield time.perf_counter() - start


def in_turn(task: Task, lr: float, seed: int, steps: int) -> tuple[float, float]:
    """Returns the seconds of Adam and of the shipped rule."""
    runs = (lambda params: torch.optim.Adam(params, lr=lr), LearnedOptimizer)
    for make in runs:
        next(blocks(task, make, seed, BLOCK))  # torch's one-time costs
    pairs = list(zip(*(blocks(task, make, seed, steps) for make in runs), strict=True))
    return tuple(map(sum, zip(*pairs, strict=True)))


def measure(output: Path, data: dict[str, str]) -> None:
    rows = []
    for folder in folders(RESULTS):
        scores = {
            (r["task"], r["seed"]): float(r["steps_speed_up"])
            for r in read(folder / "scores.csv")
            if r["entrant"] == "learned"
        }
        rates = {
            r["task"]: float(r["lr"])
            for r in read(folder / "results.csv")
            if r["entrant"] == "Adam"
        }
        for entry, runs in held_out_tasks(folder, data):
            task = make_task(entry.task)
            for seed in (run["seed"] for run in runs):
                adam, learned = in_turn(task, rates[entry.label], int(seed), entry.steps)
                sooner = scores[entry.label, seed]
                rows.append({
                    "task": entry.label,
                    "seed": seed,
                    "adam_ms": 1e3 * adam / entry.steps,
                    "learned_ms": 1e3 * learned / entry.steps,
                    "step_ratio": learned / adam,
                    "steps_speed_up": sooner,
                    "seconds_speed_up": sooner * adam / learned,
                })  # fmt: skip
            print(rows[-1], flush=True)
    save(output, NAME, rows, block=BLOCK)


def table(results: Path) -> str:
    """Returns a table of the median run of each held-out task, and of the IQM of all runs."""
    rows = read(results / f"{NAME}.csv")
    tasks = {task: [r for r in rows if r["task"] == task] for task in {r["task"]: 0 for r in rows}}
    columns = ("adam_ms", "step_ratio", "steps_speed_up", "seconds_speed_up")
    lines = [
        [task, *(f"{np.median([float(r[name]) for r in mine]):.2f}" for name in columns)]
        for task, mine in tasks.items()
    ]
    scores = [np.array([[float(r[n]) for r in mine] for mine in tasks.values()]) for n in columns]
    ends = (f"**{iqm(x):.2f}** [{low:.2f}, {high:.2f}]" for x in scores[2:]
            for low, high in [stratified_bootstrap(iqm, x)])  # fmt: skip
    lines.append(["**all, IQM**", "", "", *ends])
    header = [
        "task",
        "Adam's step, ms",
        "learned step / Adam's",
        "speed-up, steps",
        "speed-up, seconds",
    ]
    return markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=json.loads, default={}, help="as in learned-opt benchmark")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    measure(args.output, args.data)


if __name__ == "__main__":
    main()
