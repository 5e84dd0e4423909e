"""Measures the seconds of training steps while all optimizers take turns on one machine.

    python -m experiments.speed.turns real_dev  # a suite of configs/benchmark, on an idle machine

A machine's speed can change between runs that are minutes apart. Here, all optimizers train the
same task at the same time, and take turns of TURN steps. Writes results/<suite>/seconds.csv, with a
row for each task and entrant, which has the milliseconds of a whole training step and of the
optimizer's own step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import torch

from experiments.result_files import RESULTS, ROOT, save
from learned_opt.benchmarking import BenchmarkTask, Entrant
from learned_opt.cli import parse
from learned_opt.tasks.kinds import make_task

TURN, TURNS = 10, 8  # the number of steps in a turn, and of turns
TUNED = {"lr": 1e-3}  # for optimizers whose rate is tuned; seconds do not depend on it


def in_turn(
    task: BenchmarkTask,
    entrants: Sequence[Entrant],
    turns: int = TURNS,
    data_root: str | None = None,
) -> Iterator[dict]:
    """Returns a row for each entrant, with medians over its turns and their ratio to the last's."""
    made = make_task(task.task, data_root)
    runs = []
    for entrant in entrants:
        trainee = made.trainee(0)
        chosen = TUNED if entrant.search else {}
        runs.append((trainee, entrant.make_optimizer(trainee.params, chosen, task.steps)))
    seconds = np.zeros((2, turns + 1, len(runs)))  # of whole steps, and of the optimizer's
    for turn, (i, (trainee, optimizer)) in product(range(turns + 1), enumerate(runs)):
        for step in range(turn * TURN, (turn + 1) * TURN):
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = trainee.loss(step)
            loss.item()
            loss.backward()
            before = time.perf_counter()
            optimizer.step()
            end = time.perf_counter()
            seconds[:, turn, i] += np.array([end - start, end - before]) / TURN
    whole, own = np.median(seconds[:, 1:], 1)  # without the first turn, which allocates
    for i, entrant in enumerate(entrants):
        yield {
            "task": task.label,
            "parameters": made.dim,
            "entrant": entrant.name,
            "ms": 1e3 * whole[i],
            "optimizer_ms": 1e3 * own[i],
            "times_last": whole[i] / whole[-1],
            "optimizer_times_last": own[i] / own[-1],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", help="a file in configs/benchmark, without .yaml")
    parser.add_argument("--data_root", help="by default $LEARNED_OPT_DATA")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = ROOT / "configs" / "benchmark" / f"{args.suite}.yaml"
    _, config, _ = parse(["benchmark", "--config", str(path), "--output", "unused"])
    last = [e for e in config.entrants if e.name == config.validation_baseline]
    entrants = [e for e in config.entrants if e not in last] + last
    rows = [row for task in config.tasks for row in in_turn(task, entrants, TURNS, args.data_root)]
    save(RESULTS / args.suite, "seconds", rows, turn=TURN, turns=TURNS)


if __name__ == "__main__":
    main()
