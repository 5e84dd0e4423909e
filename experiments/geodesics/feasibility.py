"""How much does a geodesic differ from its chord along the SGD runs that rules learn from?

The pairs (θ_a, θ_b) = (θ_t, θ_{t+T}) are of SGD runs on the default family of tasks, grouped by T
and by the third of the run that contains t. A data set has only consecutive pairs up to the first
rise of the loss. This script uses every pair with F(θ_b) ≤ F(θ_a), so late and short pairs count.
The level is

    λ_α(s) = max(F(θ_b), (1 − α) F(θ_a) + α P(s)),    P = sgd_profile.

It is the constant of Bruna 2016 at α = 0 and SGD's own falling loss at α = 1. Beyond that, SGD's
path is not feasible.

    python -m experiments.geodesics.feasibility run   # feasibility.csv, a row per pair and level
    python -m experiments.geodesics.feasibility plot  # docs/feasibility.png, and prints the tables
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.special import log_softmax
from torch import Tensor
from tqdm import tqdm

from experiments.result_files import RESULTS, ROOT, markdown_table, read, save
from geodesic.level_set import LevelProfile, SublevelSet, allowance, sgd_profile
from geodesic.path import normalized_length
from geodesic.plot import COLOURS
from geodesic.solve import find_geodesics
from geodesic.targets import Pairs, Problem, run_teacher
from geodesic.trajectory import Trajectory
from learned_opt.config import GeodesicsConfig
from learned_opt.target_paths import make_problem
from learned_opt.tasks.base import generator

PICTURE = ROOT / "docs" / "feasibility.png"
STAGES = ("early", "middle", "late")  # thirds of a run
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
TABULATED = (0.0, 0.5, 1.0, 1.25)  # the values of α in tables; the figure has all
STRIDE, NUM_SEGMENTS = 10, 32  # as in TargetConfig
RESAMPLES, EXPONENTS = 1000, np.linspace(0, 10, 501)


def choose_pairs(
    trajectory: Trajectory, horizon: int, limit: int, seed: int
) -> tuple[Pairs, list[str]]:
    """Returns at most `limit` random admissible pairs of each stage, and their stages."""
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


def mixed_level(profile: LevelProfile, losses: Tensor, alpha: Tensor) -> LevelProfile:
    """Returns λ_α of pairs, from SGD's profile and losses ``(pairs, n)`` and α ``(pairs,)``."""
    start, end = losses[:, :1], losses[:, -1:]
    values = torch.lerp(start, profile.values, alpha[:, None]).maximum(end)
    return LevelProfile(values, profile.fractions)


def critical_alpha(problem: Problem, pairs: Pairs, profile: LevelProfile) -> Tensor:
    """Returns the largest α at which the chord is feasible, ``(pairs,)``; infinite if it always is.

    It is the minimum over s of (F(θ_a) − F(s)) / (F(θ_a) − P(s)) where F on the chord is above
    F(θ_b).
    """
    ends, rows = pairs.points[:, [0, -1]], torch.arange(len(pairs.run))
    args = tuple(arg[pairs.run] for arg in problem.loss_args)
    chord = SublevelSet(problem.loss_fn, args, len(rows), 256).losses(ends, 256, rows)[:, 0]
    start, end = pairs.losses[:, :1], pairs.losses[:, -1:]
    room = start + allowance(start) - chord
    fall = start - profile(torch.linspace(0, 1, 257).expand_as(chord))
    alpha = torch.where(fall > 0, room / fall, room.sign() * torch.inf)
    return alpha.where(chord > end + allowance(end), torch.inf).amin(1).clamp_min(0)


def solve(problem: Problem, pairs: Pairs, stages: list[str]) -> list[dict]:
    """Solves all pairs and levels in one search, and returns a row for each."""
    args = tuple(arg[pairs.run] for arg in problem.loss_args)
    profile = sgd_profile(problem.loss_fn, pairs.points, args)
    critical = critical_alpha(problem, pairs, profile).tolist()
    alpha = torch.tensor(ALPHAS).repeat(len(stages))
    every = torch.arange(len(stages)).repeat_interleave(len(ALPHAS))
    points, losses, run = pairs.points[every], pairs.losses[every], pairs.run[every]
    profile = LevelProfile(profile.values[every], profile.fractions[every])
    level = mixed_level(profile, losses, alpha)
    found = find_geodesics(
        problem.loss_fn, points[:, 0], points[:, -1], level, NUM_SEGMENTS, points,
        loss_args=tuple(arg[run] for arg in problem.loss_args),
    )  # fmt: skip
    half_way = level(torch.full((len(run), 1), 0.5))[:, 0]
    return [
        {
            "draw": problem.facts["index"],
            "task": problem.facts["task"],
            "batch_size": problem.facts["batch_size"],
            "run": int(run[i]),
            "horizon": STRIDE * (losses.shape[1] - 1),
            "start": STRIDE * int(pairs.start[pair]),
            "stage": stages[pair],
            "alpha": float(alpha[i]),
            "loss_a": float(losses[i, 0]),
            "loss_b": float(losses[i, -1]),
            "profile_start": float(profile.values[i, 0]),  # above F(θ_a) if SGD climbed
            "level_half_way": float(half_way[i]),
            "sgd_normalized_length": round(float(normalized_length(points[i])), 5),
            "critical_alpha": critical[pair],
            "chord_feasible": int(found.chord_feasible[i]),
            "certified": int(found.certified[i]),
            "normalized_length": float(found.normalized_length[i]),
            "residual": float(found.residual[i]),
            "iterations": int(found.iterations[i]),
        }
        for i, pair in enumerate(every.tolist())
    ]


def run(
    output: Path, config: GeodesicsConfig, draws: int, steps: int, horizons: list[int], limit: int
) -> None:
    rows = []
    for draw in tqdm(range(draws)):
        problem = make_problem(config, draw)
        trajectory = run_teacher(problem, steps, STRIDE)
        for horizon in horizons:
            pairs, stages = choose_pairs(trajectory, horizon, limit, draw)
            if stages:
                rows += solve(problem, pairs, stages)
        facts = {"draws": draw + 1, "steps": steps, "horizons": horizons, "pairs": limit}
        save(output, "feasibility", rows, arguments=facts)


def load(folder: Path = RESULTS) -> dict[tuple[int, str], dict[str, np.ndarray]]:
    """Returns the cells by T and stage, with their columns as (pairs, levels).

    The column "excess" is the normalized length minus 1, and NaN if no path was certified. A path
    below λ_α is also below every higher level of its pair. Therefore the shortest path at a level
    or below it counts. Levels are nested like this unless SGD itself climbs above F(θ_a).
    """
    rows = read(folder / "feasibility.csv")
    cells = {}
    for key in sorted({(int(row["horizon"]), STAGES.index(row["stage"])) for row in rows}):
        horizon, stage = key[0], STAGES[key[1]]
        cell = [r for r in rows if r["horizon"] == str(horizon) and r["stage"] == stage]
        data = {
            name: np.array([float(row[name]) for row in cell]).reshape(-1, len(ALPHAS))
            for name in list(rows[0])
            if name not in ("task", "stage")
        }
        excess = np.where(data["certified"] == 1, data["normalized_length"] - 1, np.inf)
        nested = np.minimum.accumulate(excess[:, ::-1], axis=1)[:, ::-1]
        climbs = data["profile_start"] > data["loss_a"] * (1 + 1e-5)  # more than by rounding
        excess = np.where(climbs, excess, nested)
        cells[horizon, stage] = data | {"excess": np.where(np.isinf(excess), np.nan, excess)}
    return cells


def exponent(
    critical: np.ndarray, excess: np.ndarray, draw: np.ndarray
) -> tuple[float, float, float]:
    """Fits q of excess = C_i (α − α_i)^q, where each pair i has its own C_i and critical α_i.

    The multinomial quasi-likelihood (Papke & Wooldridge 1996) fits each level's share of a pair's
    total excess. An excess of zero or nearly zero has its proper weight, while least squares on
    logarithms would drop or overweight it. All pairs have equal weight, since otherwise a few long
    paths that were hardly shortened would decide. Levels without a certified path are left out.

    Args:
        critical: α_i, ``(pairs,)``.
        excess: the excess at each of ALPHAS, ``(pairs, levels)``; NaN if it is unknown.
        draw: the draw of the family, ``(pairs,)``.

    Returns:
        q and the ends of its 95 % interval from a bootstrap over draws, because the pairs of a draw
        share an architecture. NaN if no pair determines q.
    """
    beyond = np.array(ALPHAS) - critical[:, None]
    known = np.isfinite(excess) & (beyond > 0)
    tells = (np.where(known, excess, 0) > 0).any(1) & (known.sum(1) > 1)
    if not tells.any():
        return np.nan, np.nan, np.nan
    known, excess = known[tells], np.where(known, excess, 0)[tells]
    share = excess / excess.sum(1, keepdims=True)
    x = np.log(beyond[tells], where=known, out=np.zeros_like(excess))[:, None]
    fitted = log_softmax(np.where(known[:, None], EXPONENTS[:, None] * x, -1e9), axis=2)
    likelihood = (share[:, None] * fitted).sum(2)  # (pairs, exponents)
    of_draw = [likelihood[draw[tells] == which].sum(0) for which in np.unique(draw)]
    n = len(of_draw)
    times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    resampled = (times @ np.stack(of_draw)).argmax(1)
    low, high = np.percentile(EXPONENTS[resampled], [2.5, 97.5])
    return EXPONENTS[likelihood.sum(0).argmax()], low, high


def quartiles(excess: np.ndarray) -> np.ndarray:
    """Returns the quartiles of the excess over pairs.

    A pair without a certified path counts as longer than any other. A quartile is NaN if it falls
    on such a pair.
    """
    found = np.quantile(np.nan_to_num(excess, nan=np.inf), (0.25, 0.5, 0.75), method="inverted_cdf")
    return np.where(np.isfinite(found), found, np.nan)


def outcome(data: dict[str, np.ndarray], alpha: float) -> tuple[str, str, str]:
    """Returns the shares of feasible chords and of certified paths, and the median length.

    The median is over the normalized lengths of paths other than chords.
    """
    level = ALPHAS.index(alpha)
    chord, excess = data["chord_feasible"][:, level] == 1, data["excess"][:, level]
    median = np.nan if chord.all() else quartiles(excess[~chord])[1]
    length = "–" if np.isnan(median) else f"{1 + median:.3f}"
    return f"{chord.mean():.0%}", f"{np.isfinite(excess).mean():.0%}", length


def readme_table(folder: Path = RESULTS) -> str:
    lines = []
    for (horizon, stage), data in load(folder).items():
        both = zip(outcome(data, 0.0), outcome(data, 1.0), strict=True)
        lines.append([str(horizon), stage, str(len(data["draw"])), *map(" / ".join, both)])
    header = ["T", "stage", "pairs", "chord feasible, constant / sgd_profile",
              "certified, constant / sgd_profile",
              "median length of the other pairs, constant / sgd_profile"]  # fmt: skip
    return markdown_table(header, lines)


def table(folder: Path = RESULTS) -> str:
    """Returns the tables of the cells and of the fits by T, by stage and over all pairs."""
    lines, groups = [], defaultdict(list)
    for (horizon, stage), data in load(folder).items():
        critical, excess, draw = data["critical_alpha"], data["excess"], data["draw"][:, :1]
        columns = [" / ".join(outcome(data, alpha)) for alpha in TABULATED]
        own = np.median(data["sgd_normalized_length"][:, 0])
        pairs = f"{len(draw)} of {len(np.unique(draw))}"
        lines.append([str(horizon), stage, pairs, *columns, f"{own:.2f}"])
        for group in (f"T = {horizon}", stage, "all"):
            groups[group].append(np.hstack((draw, critical[:, :1], excess)))
    header = ["T", "stage", "pairs of draws", *(f"α = {alpha:g}" for alpha in TABULATED)]
    fits = []
    for group in sorted(groups, key=lambda name: (name == "all", name in STAGES)):
        values = np.concatenate(groups[group])
        beyond = (values[:, 2:] > 0).any(1).sum()
        q, low, high = exponent(values[:, 1], values[:, 2:], values[:, 0])
        pairs = f"{beyond} of {len(values)}"
        fits.append([group, pairs, f"{q:.1f} [{low:.1f}, {high:.1f}]"])
    return "\n\n".join(
        (
            markdown_table([*header, "SGD's path"], lines),
            markdown_table(["pairs", "longer than the chord", "exponent q"], fits),
        )
    )


def plot(cells: dict[tuple[int, str], dict[str, np.ndarray]], picture: Path) -> None:
    """Plots shares of pairs (top) and the excess length (bottom) against α, in a column per T."""
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    horizons = sorted({horizon for horizon, _ in cells})
    panels = figure.subplots(2, len(horizons), sharex=True, sharey="row", squeeze=False)
    for (horizon, stage), data in cells.items():
        above, below = panels[:, horizons.index(horizon)]
        number = STAGES.index(stage)
        look = {"color": COLOURS[number], "lw": 1.5, "ms": 6 - number}
        above.plot(ALPHAS, data["chord_feasible"].mean(0), "o-", label=stage, **look)
        above.plot(ALPHAS, np.isfinite(data["excess"]).mean(0), "x--", **look)
        low, median, high = np.array([quartiles(column) for column in data["excess"].T]).T
        below.plot(ALPHAS, median, "o-", **look)
        below.fill_between(ALPHAS, low, high, color=COLOURS[number], alpha=0.15, lw=0)
        above.set_title(f"T = {horizon}", fontsize="medium")
        below.set_yscale("symlog", linthresh=1e-4)
    panels[0, 0].set(ylabel="share of pairs", ylim=(-0.05, 1.05))
    panels[1, 0].set(ylabel="normalized length − 1", ylim=(0, None))
    panels[0, 0].plot([], [], "o-", color="0.4", label="chord feasible; median")
    panels[0, 0].plot([], [], "x--", color="0.4", label="a path certified")
    panels[0, 0].fill_between([], [], color="0.8", label="quartiles")
    for axis in panels.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.93")
        axis.set_axisbelow(True)
    figure.supxlabel("level: α of the way from the constant F(θ_a) to SGD's own falling loss",
                     fontsize="medium")  # fmt: skip
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=6, frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "plot"))
    parser.add_argument("--draws", type=int, default=12, help="draws from the family, 8 runs each")
    parser.add_argument("--steps", type=int, default=1600, help="SGD steps")
    parser.add_argument("--horizons", type=int, nargs="+", default=[20, 80, 320], help="T")
    parser.add_argument("--pairs", type=int, default=2, help="most pairs per draw, T and stage")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "run":
        run(args.output, GeodesicsConfig(), args.draws, args.steps, args.horizons, args.pairs)
    else:
        plot(load(args.output), PICTURE)
        print(readme_table(args.output), table(args.output), sep="\n\n")


if __name__ == "__main__":
    main()
