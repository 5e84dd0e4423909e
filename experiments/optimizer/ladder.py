"""How do loss, time and memory depend on the size of a network and the length of a run?

    python -m experiments.optimizer.ladder losses     # takes hours; resumes
    python -m experiments.optimizer.ladder seconds    # takes minutes, on an idle machine
    python -m experiments.optimizer.ladder plot

The sizes are a transformer, a convolutional network and a GRU at 1, 2, 4 and 8 times a base width,
with 300 steps each. The lengths are 500 to 32,000 steps of a small transformer. AdamW has warm-up,
cosine decay of the rate, weight decay on matrices, and two rates. The learned optimizer runs with
its defaults and with weight decay. Losses are in results/ladder/rows.jsonl, and seconds in
ladder_seconds.csv, for which all optimizers take turns. MNIST is read from $LEARNED_OPT_DATA.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.result_files import RESULTS, ROOT, read, save
from experiments.speed.turns import TURN, TURNS, in_turn
from learned_opt.benchmarking import BenchmarkTask, Entrant
from learned_opt.benchmarking.entrants import NAMED, NO_DECAY
from learned_opt.benchmarking.runner import Runner
from learned_opt.benchmarking.stores import Rows
from learned_opt.benchmarking.validation import ValidationCell
from learned_opt.tasks.kinds import TaskConfig

FOLDER = RESULTS / "ladder"

WIDTHS, LENGTHS = (1, 2, 4, 8), (500, 2000, 8000, 32_000)
SIZE_STEPS, SEEDS = 300, (0, 1, 2)

TEXT = {"data": "python-docs", "batch_size": 8, "test_size": 200}
NETS = {
    "transformer": lambda k: TaskConfig(
        kind="transformer_lm", **TEXT, hidden=(64 * k,) * 3, options={"context": 32}
    ),
    "GRU": lambda k: TaskConfig(
        kind="gru_lm", **TEXT, hidden=(128 * k,), options={"context": 32}
    ),
    "conv net": lambda k: TaskConfig(
        kind="image_conv", data="mnist", hidden=(8 * k, 16 * k, 32 * k), batch_size=16,
        train_size=20_000, test_size=600, options={"pool": 2, "shift": 1},
    ),
}  # fmt: skip
SMALL = TaskConfig(
    kind="transformer_lm", **(TEXT | {"batch_size": 4}), hidden=(32, 32), options={"context": 32}
)
ENTRANTS = [
    NAMED["learned"],
    NAMED["learned num_steps"],
    *(
        Entrant(
            f"AdamW {rate:g}",
            "torch.optim.AdamW",
            {"lr": rate, "weight_decay": 0.1},
            groups=(NO_DECAY,),
            schedule="warmup_cosine",
        )
        for rate in (0.001, 0.003)
    ),
]
COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00")


def rungs() -> list[BenchmarkTask]:
    """Returns the tasks of all sizes, and then of all lengths."""
    sizes = [
        BenchmarkTask(net(k), SIZE_STEPS, f"{name}, {k} × as wide")
        for k, (name, net) in product(WIDTHS, NETS.items())
    ]
    return sizes + [BenchmarkTask(SMALL, n, f"small transformer, {n} steps") for n in LENGTHS]


def cells(tasks: Sequence[BenchmarkTask], seeds: Sequence[int]) -> list[ValidationCell]:
    return [ValidationCell(t, e, {}, seed) for t, seed, e in product(tasks, seeds, ENTRANTS)]


def losses(
    output: Path, tasks: Sequence[BenchmarkTask], seeds: Sequence[int], processes: int
) -> None:
    """Runs the missing cells, the cheap ones first."""
    store = Rows(output / "rows.jsonl")
    wanted = cells(tasks, seeds)
    with Runner(store, processes, time_limit=7200, total=len(wanted)) as runner:
        runner.run(wanted)


def seconds(output: Path, tasks: Sequence[BenchmarkTask]) -> None:
    torch.set_num_threads(1)
    rows = [row for task in tasks for row in in_turn(task, ENTRANTS)]
    save(output, "ladder_seconds", rows, turn=TURN, turns=TURNS)


def plot(output: Path, picture: Path) -> None:
    """Plots loss, time and memory by size, and loss by length, with AdamW at its better rate."""
    store = Rows(output / "rows.jsonl")
    timed = {(r["task"], r["entrant"]): float(r["times_last"])
             for r in read(output / "ladder_seconds.csv")}  # fmt: skip
    figure = Figure(figsize=(11, 6), layout="constrained")
    grid = figure.subplots(2, 3)
    for axes, name in zip(grid[0], NETS, strict=True):
        rung = [t for t in rungs() if t.label.startswith(f"{name}, ")]
        draw(axes, store, rung, WIDTHS, "validation_loss")
        axes.set(title=name, xlabel="times as wide", ylabel="final validation loss")
    lengths = [t for t in rungs() if t.task == SMALL]
    draw(grid[1, 0], store, lengths, LENGTHS, "validation_loss")
    grid[1, 0].set(title="small transformer", xlabel="steps", ylabel="final validation loss")
    wide = [t for t in rungs() if t.label.startswith("transformer, ")]
    draw(grid[1, 1], store, wide, WIDTHS, "peak_memory", 1e-6)
    grid[1, 1].set(title="transformer", xlabel="times as wide", ylabel="peak memory, MB")
    for entrant, colour in zip(ENTRANTS, COLOURS, strict=True):
        values = [timed[t.label, entrant.name] for t in wide]
        grid[1, 2].plot(WIDTHS, values, "o-", color=colour)
    grid[1, 2].set(title="transformer", xlabel="times as wide", ylabel="seconds a step, × AdamW's")
    for axes in grid.flat:
        axes.set(xscale="log")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def draw(axes, store: Rows, tasks, xs: Sequence[int], column: str, factor: float = 1.0) -> None:
    """Plots the mean of a column over seeds and its range, for each optimizer."""
    for entrant, colour in zip(ENTRANTS, COLOURS, strict=True):
        values = []
        for task in tasks:
            runs = [store.load(c) for c in cells([task], SEEDS) if c.entrant == entrant]
            values.append([factor * run[column] for run in runs if run] or [np.nan])
        axes.plot(xs, [np.mean(v) for v in values], "o-", color=colour, label=entrant.name)
        low, high = zip(*((min(v), max(v)) for v in values), strict=True)
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, lw=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("losses", "seconds", "plot"))
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="only two tasks of three steps")
    args = parser.parse_args()
    tasks, chosen = rungs(), SEEDS
    if args.smoke:
        tasks, chosen = [replace(task, steps=3) for task in (tasks[0], tasks[-1])], SEEDS[:1]
    if args.what == "losses":
        losses(args.output, tasks, chosen, args.processes)
    elif args.what == "seconds":
        seconds(args.output, tasks)
    else:
        plot(args.output, ROOT / "docs" / "ladder.png")


if __name__ == "__main__":
    main()
