"""How often is the chord between two SGD iterates feasible, and when is a geodesic more than it?

Pairs (θ_t, θ_{t+T}) of SGD runs on the default family of tasks, by T, by the third of the run that
t is in, and by the level along the path. Unlike a data set, whose joined-up pairs end where the
loss first rises, this takes every pair with F(θ_b) ≤ F(θ_a), so that late and short ones count.

    python experiments/feasibility.py --draws 6 --output experiments/results

writes feasibility.csv, a row per pair, and feasibility.json, how it was made.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import torch
from rows import save
from tqdm import tqdm

from geodesic.targets import Pairs, Problem, run_teacher, solve_pairs
from geodesic.trajectory import Trajectory
from learned_opt.config import GeodesicsConfig
from learned_opt.geodesics import make_problem
from learned_opt.tasks.base import generator

STAGES = ("early", "middle", "late")  # thirds of a run
LEVELS = ("constant", "sgd_profile")
STRIDE, NUM_SEGMENTS = 10, 32  # as TargetConfig has them


def choose_pairs(
    trajectory: Trajectory, horizon: int, limit: int, seed: int
) -> tuple[Pairs, list[str]]:
    """At random `limit` of the admissible pairs of each stage, and their stages."""
    span, records = horizon // STRIDE, len(trajectory.points)
    starts = torch.arange(0, records - span, span)
    admissible = trajectory.losses[starts + span] <= trajectory.losses[starts]
    admissible &= ~(trajectory.diverged | trajectory.stuck)
    which, run = admissible.nonzero(as_tuple=True)
    start, stage = starts[which], starts[which] * len(STAGES) // (records - 1)
    order = torch.randperm(len(run), generator=generator("feasibility", seed, horizon))
    chosen = torch.cat([order[stage[order] == i][:limit] for i in range(len(STAGES))])
    run, start = run[chosen], start[chosen]
    along = start[:, None] + torch.arange(span + 1)
    pairs = Pairs(
        run,
        start,
        trajectory.points[along, run[:, None]],
        trajectory.losses[along, run[:, None]],
    )
    return pairs, [STAGES[i] for i in stage[chosen]]


def solve(problem: Problem, pairs: Pairs, stages: list[str], level: str) -> list[dict]:
    """A row per pair."""
    found = solve_pairs(problem, pairs, level, NUM_SEGMENTS)
    return [
        {
            "draw": problem.facts["index"],
            "task": problem.facts["task"],
            "batch_size": problem.facts["batch_size"],
            "run": int(pairs.run[i]),
            "horizon": STRIDE * (pairs.losses.shape[1] - 1),
            "start": STRIDE * int(pairs.start[i]),
            "stage": stage,
            "level": level,
            "loss_a": float(pairs.losses[i, 0]),
            "loss_b": float(pairs.losses[i, -1]),
            "chord_feasible": int(found.chord_feasible[i]),
            "certified": int(found.certified[i]),
            "normalized_length": float(found.normalized_length[i]),
            "iterations": int(found.iterations[i]),
        }
        for i, stage in enumerate(stages)
    ]


def table(path: Path) -> str:
    """Markdown from feasibility.csv. Lengths are means over certified paths."""
    cells = defaultdict(list)
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            cells[int(row["horizon"]), STAGES.index(row["stage"]), row["level"]].append(row)
    lines = [
        "| T | stage | level | pairs | chord feasible | shortened, certified | not certified "
        "| normalized length |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (horizon, stage, level), rows in sorted(cells.items()):
        chords = sum(row["chord_feasible"] == "1" for row in rows)
        lengths = [float(row["normalized_length"]) for row in rows if row["certified"] == "1"]
        counts = (chords, len(lengths) - chords, len(rows) - len(lengths))
        shares = " | ".join(f"{count / len(rows):.0%}" for count in counts)
        mean = f"{sum(lengths) / len(lengths):.4f}" if lengths else "–"
        lines.append(f"| {horizon} | {STAGES[stage]} | {level} | {len(rows)} | {shares} | {mean} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=6, help="from the family, 8 runs each")
    parser.add_argument("--steps", type=int, default=1600, help="of SGD")
    parser.add_argument("--horizons", type=int, nargs="+", default=[20, 80, 320], help="T")
    parser.add_argument("--pairs", type=int, default=8, help="at most, per draw, T and stage")
    parser.add_argument("--output", type=Path, default=Path("experiments/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    config, rows = GeodesicsConfig(), []
    for draw in tqdm(range(args.draws)):
        problem = make_problem(config, draw)
        trajectory = run_teacher(problem, args.steps, STRIDE)
        for horizon in args.horizons:
            pairs, stages = choose_pairs(trajectory, horizon, args.pairs, draw)
            if stages:
                rows += [row for level in LEVELS for row in solve(problem, pairs, stages, level)]
    arguments = {k: v for k, v in vars(args).items() if k != "output"}
    save(args.output, "feasibility", rows, arguments=arguments)
    print(table(args.output / "feasibility.csv"))


if __name__ == "__main__":
    main()
