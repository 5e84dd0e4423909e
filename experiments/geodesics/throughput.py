"""Measures the cost of geodesics.

    python -m experiments.geodesics.throughput comparison pairs

This writes geodesics_*.csv and .json. `comparison` has several ways to find a path, see
comparison.py; it needs `pip install ase`.

`pairs` has a thousand pairs of SGD iterates, `scaling` the cost against segments, pairs and
parameters, and `profile` the time in each part. Seconds are CPU time of the thread, as in
comparison.py.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from experiments.geodesics.comparison import comparison, warm_up
from experiments.geodesics.problems import SEGMENTS, bump, ends
from experiments.result_files import RESULTS, markdown, read, save
from geodesic import (
    Geodesic,
    find_geodesics,
    sgd_profile,
)
from geodesic import shortening as shortening_module
from geodesic import solve as solve_module
from geodesic.level_set import SublevelSet
from geodesic.targets import Pairs, Problem, consecutive_pairs, run_teacher
from learned_opt.tasks.data import load_images
from learned_opt.tasks.mlp import MLPTask, TaskConfig

# The level, the pairs and the digits in F (None for all 1437), chosen to take minutes on one core.
PAIRS = (("constant", 1000, None), ("sgd_profile", 30, None), ("sgd_profile", 200, 128))
# Digits times points that are evaluated at once. The activations of twice as many do not fit into
# the cache, and F takes 1.5 times as long.
AT_ONCE = 50_000


def digits_runs(hidden: int, runs: int, size: int | None) -> Problem:
    """Returns SGD runs of 64-hidden-10 networks, with F on `size` digits (None for all)."""
    task = MLPTask(TaskConfig(hidden=(hidden,)), load_images("digits"), runs)
    x, y = (part[0] for part in task.fixed_batch(size))  # the same for all runs: no loss_args

    def grad_fn(theta: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return task.loss_and_grad(theta, task.batch(0, step))

    facts = {"task": task.name, "examples": len(y)}
    return Problem(task.init(0), grad_fn, lambda theta: task.loss(theta, (x, y)), (), facts)


def solve_saved(path: str, level: str, count: int, size: int | None) -> dict:
    """Solves saved pairs in a process of its own, whose peak memory is therefore the solver's."""
    torch.set_num_threads(1)
    problem, pairs = digits_runs(32, 1, size), Pairs(*torch.load(path, weights_only=True))
    # Early, middle and late pairs for any count.
    keep = torch.linspace(0, len(pairs.run) - 1, min(count, len(pairs.run))).long()
    points, chunk_size = pairs.points[keep], AT_ONCE // problem.facts["examples"]
    del pairs
    warm_up()
    before, start = peak_memory(), time.process_time()
    found = find_geodesics(
        problem.loss_fn,
        points[:, 0],
        points[:, -1],
        sgd_profile(problem.loss_fn, points, (), chunk_size) if level == "sgd_profile" else None,
        initial_path=points,
        chunk_size=chunk_size,
    )
    seconds = time.process_time() - start
    chords, certified = found.chord_feasible, found.certified
    shortened = found.normalized_length[certified & ~chords]
    return {
        "level": level,
        "pairs": len(points),
        "parameters": found.path.shape[-1],
        "examples": problem.facts["examples"],
        "chord": int(chords.sum()),
        "shortened": len(shortened),
        "not_certified": int((~certified).sum()),
        "normalized_length": float(shortened.mean()) if len(shortened) else math.nan,
        "seconds": seconds,
        "loss_evaluations": float(found.loss_evaluations.double().mean()),
        "gradient_evaluations": float(found.gradient_evaluations.double().mean()),
        "most_gradient_evaluations": int(found.gradient_evaluations.max()),
        "input_mb": points.nbytes / 2**20,
        "before_mb": before,
        "peak_mb": peak_memory(),
    }


def peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KiB


def pairs(output: Path) -> str:
    """Measures consecutive pairs of SGD runs, T = 320, as `learned-opt geodesics` makes them."""
    problem = digits_runs(32, 220, None)
    found = consecutive_pairs(run_teacher(problem, 1600, 10), 320)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "pairs.pt")
        torch.save(tuple(found), path)
        available = len(found.run)
        del problem, found
        for arguments in PAIRS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(solve_saved, (path, *arguments)))
            print(rows[-1], flush=True)
            save(output, "geodesics_pairs", rows, available=available)
    return markdown(rows)


def ball_batch(count: int, d: int, dtype: torch.dtype = torch.float64) -> tuple:
    angles = torch.linspace(2.2, 2.8, count).tolist() if count > 1 else [2.6]
    points = zip(*(ends(1.5, angle, d) for angle in angles), strict=True)
    return bump, *(torch.stack(end).to(dtype) for end in points), math.exp(-0.5)


def digits_pair(hidden: int, size: int | None = 128) -> tuple:
    """Returns the pair of a run's first 320 steps, under a level that the chord exceeds."""
    problem = digits_runs(hidden, 1, size)
    run = run_teacher(problem, 320, 10)
    points = run.points.transpose(0, 1)
    profile = sgd_profile(problem.loss_fn, points)
    return problem.loss_fn, points[:, 0], points[:, -1], profile, points


FITTED = ("seconds", "seconds_an_iteration", "gradient_evaluations", "loss_evaluations")


def _find(arguments: tuple, num_segments: int = SEGMENTS) -> Geodesic:
    loss_fn, theta_a, theta_b, level, *start = arguments
    chunk_size = max(8, min(256, 2**24 // theta_a.shape[1]))  # at most 64 MB of points in float32
    return find_geodesics(
        loss_fn, theta_a, theta_b, level, num_segments, *start, chunk_size=chunk_size
    )


def scaling(output: Path) -> str:
    """Measures the cost against one quantity at a time, and its exponent, the log-log slope."""
    digits = "digits 64-h-10, 128 examples, sgd_profile"
    series = [
        ("segments", "ball, d = 10, 8 pairs", (8, 16, 32, 64, 128), lambda _: ball_batch(8, 10)),
        ("pairs", "ball, d = 10", (1, 3, 10, 30, 100, 300, 1000), lambda n: ball_batch(n, 10)),
        ("parameters", "ball, float32", (1_000, 10_000, 100_000, 1_000_000),
         lambda d: ball_batch(1, d, torch.float32)),
        ("parameters", digits, (1_060, 10_060, 100_060), lambda d: digits_pair((d - 10) // 75)),
    ]  # fmt: skip
    warm_up()
    rows, exponents = [], {}
    for quantity, problem, values, make in series:
        group = []
        for value in values:
            arguments, seconds = make(value), []
            for _ in range(3 if value <= 10_000 else 1):
                start = time.process_time()
                found = _find(arguments, value if quantity == "segments" else SEGMENTS)
                seconds.append(time.process_time() - start)
            group.append(
                {
                    "quantity": quantity,
                    "problem": problem,
                    "value": value,
                    "certified": float(found.certified.double().mean()),
                    "iterations": float(found.iterations.double().mean()),
                    "gradient_evaluations": float(found.gradient_evaluations.double().mean()),
                    "loss_evaluations": float(found.loss_evaluations.double().mean()),
                    "seconds": min(seconds),
                    "seconds_an_iteration": min(seconds) / max(1, int(found.iterations.max())),
                }
            )
            print(group[-1], flush=True)
        logs = np.log([[row[k] for k in ("value", *FITTED)] for row in group])
        # At small values, constant costs hide the slope; the last three values show its limit.
        exponents[f"{quantity}, {problem}"] = {
            name: [float(np.polyfit(logs[at:, 0], logs[at:, i + 1], 1)[0]) for at in (0, -3)]
            for i, name in enumerate(FITTED)
        }
        rows += group
        save(output, "geodesics_scaling", rows, exponents_all_and_last_three=exponents)
    lines = [{"cost against": key} | {k: f"{v[0]:.2f}, {v[1]:.2f}" for k, v in fit.items()}
             for key, fit in exponents.items()]  # fmt: skip
    return markdown(rows) + "\n\n" + markdown(lines)


def scaling_table(folder: Path) -> str:
    """Returns a table of geodesics_scaling: ends of each series, and the exponent of seconds."""
    rows = read(folder / "geodesics_scaling.csv")
    facts = json.loads((folder / "geodesics_scaling.json").read_text())
    lines = []
    for name, fit in facts["exponents_all_and_last_three"].items():
        series = [row for row in rows if f"{row['quantity']}, {row['problem']}" == name]
        line = {"cost against": series[0]["quantity"], "problem": series[0]["problem"]}
        for column, text in {
            "value": "from, to",
            "gradient_evaluations": "gradients a pair",
            "loss_evaluations": "losses a pair",
            "seconds": "seconds",
        }.items():
            line[text] = ", ".join(f"{float(series[i][column]):.3g}" for i in (0, -1))
        exponents = ", ".join(f"{value:.2f}" for value in fit["seconds"])
        lines.append(line | {"exponent of seconds: all, last three": exponents})
    return markdown(lines)


def pairs_table(folder: Path) -> str:
    """Returns a table of geodesics_pairs."""
    rows = read(folder / "geodesics_pairs.csv")
    return markdown(
        [
            {
                "level": row["level"],
                "pairs": row["pairs"],
                "examples": row["examples"],
                "chord / shortened / not certified": " / ".join(
                    row[k] for k in ("chord", "shortened", "not_certified")
                ),
                "seconds": float(row["seconds"]),
                "gradients, losses a pair": f"{float(row['gradient_evaluations']):.0f}, "
                f"{float(row['loss_evaluations']):.0f}",
                "peak memory, before, MB": f"{float(row['peak_mb']):.0f}, "
                f"{float(row['before_mb']):.0f}",
            }
            for row in rows
        ]
    )


@contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Yields a dict of the exclusive seconds of the solver's parts."""
    seconds, running = defaultdict(float), []

    def timed(function: Callable, name: str) -> Callable:
        def wrapper(*args, **kwargs):
            start = time.process_time()
            running.append(0.0)
            result = function(*args, **kwargs)
            spent = time.process_time() - start
            seconds[name] += spent - running.pop()
            if running:
                running[-1] += spent
            return result

        return wrapper

    parts = {
        "F": (SublevelSet, "_evaluate"),
        "gradients": (SublevelSet, "gradients"),
        "level": (SublevelSet, "level"),
        "rest of sampling": (SublevelSet, "sample"),
        "dual problem": (shortening_module, "nonnegative_qp"),
        "Gram products and step": (shortening_module, "_step"),
        "rest of sites": (shortening_module, "_sites"),
        "copies of sites and samples": (shortening_module, "_put"),
        "rest of shortening": (solve_module, "shorten"),
        "DSS": (solve_module, "sample_strings"),
    }
    with ExitStack() as stack:
        for name, (owner, attribute) in parts.items():
            function = timed(getattr(owner, attribute), name)
            stack.enter_context(mock.patch.object(owner, attribute, function))
        yield seconds


def profile(output: Path) -> str:
    """Measures the share of each part in the solver's time."""
    warm_up()
    problems = {
        "ball, d = 10, 1 pair": ball_batch(1, 10),
        "ball, d = 10, 300 pairs": ball_batch(300, 10),
        "ball, d = 100,000, float32": ball_batch(1, 100_000, torch.float32),
        "digits 64-32-10, all 1437": digits_pair(32, None),
    }
    rows = []
    for problem, arguments in problems.items():
        with stopwatch() as seconds:
            start = time.process_time()
            _find(arguments)
            total = time.process_time() - start
        rows += [{"problem": problem, "seconds": total, "part": part, "share": spent / total}
                 for part, spent in sorted(seconds.items(), key=lambda item: -item[1])]  # fmt: skip
    save(output, "geodesics_profile", rows)
    return markdown(rows)


def main() -> None:
    parts = {"comparison": comparison, "pairs": pairs, "scaling": scaling, "profile": profile}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=parts)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for what in args.what:
        print(parts[what](args.output), flush=True)


if __name__ == "__main__":
    main()
