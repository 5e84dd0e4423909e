"""Reproduces Figure 1 of Freeman & Bruna 2017 (arXiv 1611.01540): length and beads against level.

Pairs of networks from different initial weights are trained until F ≤ L0. Dynamic String Sampling
joins them as published (`geodesic.dss.PRESETS`). `geodesic.find_geodesics` then shortens the string
inside the set that DSS allows, F ≤ slack · L0. This gives two lengths for the same pair at the same
level. A classification error has no gradient. There, the set is the smallest sublevel set of the
cross-entropy that contains the string.

    python -m experiments.geodesics.figure1 run --setting cubic quadratic
    LEARNED_OPT_DATA=folder python -m experiments.geodesics.figure1 run --setting mnist cifar ptb
    python -m experiments.geodesics.figure1 plot    # docs/figure1.png; README: --setting cubic
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imsave
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor
from torch.func import grad, vmap
from tqdm import tqdm

from experiments.geodesics.figure1_problems import Problem, images, language, polynomial
from experiments.result_files import RESULTS, read, save
from geodesic.dss import PRESETS, StringSampling, sample_strings
from geodesic.path import length, normalized_length, resample, subdivide
from geodesic.plot import plot_length_against_level
from geodesic.solve import find_geodesics

METHODS = ("DSS", "shortened")
COLUMNS = {  # published lengths are of the weights only, and shortening counts all parameters
    "normalized_length_weights": "normalized length, weights only",
    "normalized_length": "normalized length, all parameters",
    "beads": "beads, both ends counted",
}


@dataclass(frozen=True)
class Setting:
    """A row of the figure.

    Attributes:
        problem: returns the problem.
        unit: the unit of the level.
        lengths, bands, beads: the published values by level: the mean normalized length and, if
            they can be read off the figure, its band to either side and the mean number of beads.
        sampling: the settings of DSS, whose optimizer also trains the networks.
        pairs: the number of pairs at each level.
        steps: the largest number of steps to a level; the published script has no limit.
        check_every: the number of steps between checks whether a network has reached a level.
        segments, iterations: the settings of shortening.
        chunk_size: the number of networks that are evaluated at once.
    """

    problem: Callable[[], Problem]
    unit: str
    lengths: dict[float, float]
    bands: dict[float, float]
    beads: dict[float, float]
    sampling: StringSampling
    pairs: int
    steps: int
    check_every: int
    segments: int = 32
    iterations: int = 60
    chunk_size: int = 64


# A bead of the published scripts may take forever. Here a pair fails if one takes max_steps.
# Polynomials are checked every 5 steps, as in the scripts. Published values are read off the vector
# figures of arXiv 1611.01540.
# fmt: off
SETTINGS = {
    "cubic": Setting(
        lambda: polynomial(lambda x: 8 * x**3 - 10 * x**2 + 3 * x, bias=True),
        unit="mean absolute error",
        lengths={
            0.01: 1.872, 0.02: 1.688, 0.03: 1.509, 0.05: 1.428, 0.08: 1.394, 0.10: 1.382,
            0.12: 1.375, 0.14: 1.422, 0.15: 1.657, 0.154: 1.989, 0.156: 2.415, 0.158: 2.538,
            0.16: 2.278, 0.162: 1.870, 0.164: 1.523, 0.168: 1.006, 0.20: 1.004, 0.32: 1.003,
        },
        bands={0.01: 0.087, 0.158: 0.157},
        beads={0.01: 46.3, 0.02: 27.3, 0.05: 14.0, 0.10: 7.6, 0.158: 3.4},
        sampling=replace(PRESETS["cubic"], max_steps=20_000),
        pairs=30, steps=30_000, check_every=5,
    ),
    "quadratic": Setting(
        lambda: polynomial(lambda x: 0.5 * x**2 + 0.25 * x + 0.1, bias=False),
        unit="mean absolute error",
        lengths={0.001: 1.863, 0.0025: 1.754, 0.005: 1.661, 0.01: 1.476, 0.05: 1.366, 0.125: 1.270},
        bands={},
        beads={0.001: 62.4, 0.01: 13.8, 0.125: 4.0},
        sampling=replace(PRESETS["quadratic"], max_steps=20_000),
        pairs=20, steps=30_000, check_every=5,
    ),
    "mnist": Setting(  # ten times the learning rate, and a tenth of the steps, also between checks
        lambda: images("mnist", (8, 16), std=0.1, dropout=0.5, batch=100),
        unit="test error, %",
        lengths={1.5: 1.0077, 2: 1.0053, 4: 1.0033},
        bands={},
        beads={4: 4.1},
        sampling=replace(PRESETS["mnist"], learning_rate=1e-3, max_steps=5500, check_every=55),
        pairs=5, steps=3500, check_every=20, segments=8, iterations=8, chunk_size=8,
    ),
    "cifar": Setting(
        lambda: images("cifar10_jpeg", (8, 16), std=0.05),
        unit="test error, %",
        lengths={50: 1.005, 60: 1.005, 70: 1.005},  # at most
        bands={},
        beads={},
        sampling=replace(PRESETS["cifar"], max_steps=1000, check_every=20),
        pairs=5, steps=1200, check_every=20, segments=8, iterations=8, chunk_size=8,
    ),
    "ptb": Setting(
        lambda: language(vocabulary=2000, width=32),
        unit="perplexity",
        lengths={135: 1.178, 150: 1.278, 200: 1.346, 300: 1.086, 700: 1.091},
        bands={},
        beads={},
        sampling=replace(PRESETS["ptb"], max_steps=1000, check_every=20),
        pairs=5, steps=1000, check_every=5, segments=8, iterations=10, chunk_size=8,
    ),
}
# fmt: on


@torch.no_grad()
def train(problem: Problem, setting: Setting, nets: int) -> tuple[Tensor, Tensor]:
    """Trains networks, and returns them where F is first at most each level, ``(levels, nets, d)``.

    Also returns whether F ever is. Levels are sorted in ascending order, and one run serves all of
    them. Seed i gives network i for any number of networks.
    """
    start = []
    for seed in range(nets):
        torch.manual_seed(seed)
        start.append(problem.loss.flatten(problem.module()))
    theta, sampling = torch.stack(start), setting.sampling
    optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[sampling.optimizer]
    optimizer = optimizer([theta], sampling.learning_rate)  # elementwise, as if for each net
    loss = vmap(problem.loss, chunk_size=setting.chunk_size)
    objective = problem.train_fn or (lambda theta, step: problem.loss(theta))
    gradient = vmap(grad(objective), (0, None), chunk_size=setting.chunk_size, randomness="same")
    bounds = torch.tensor(sorted(setting.lengths))[:, None]
    snapshots = theta.new_full((len(bounds), *theta.shape), torch.nan)
    reached = torch.zeros(len(bounds), nets, dtype=torch.bool)
    left = torch.arange(nets)
    for step in tqdm(range(1, setting.steps + 1), "training", mininterval=10):
        torch.manual_seed(step)  # for dropout
        theta.grad = gradient(theta, step)
        if sampling.max_gradient_norm is not None:
            norms = theta.grad.norm(dim=1, keepdim=True)
            theta.grad *= (sampling.max_gradient_norm / norms).clamp_max(1)
        optimizer.step()
        if step % setting.check_every == 0:
            first = (loss(theta) <= bounds) & ~reached[:, left]
            which, net = first.nonzero(as_tuple=True)
            snapshots[which, left[net]] = theta[net]
            reached[which, left[net]] = True
            if first[0].any():  # networks at the lowest level are done
                stay, theta.grad = ~reached[0, left], None
                left, theta.data = left[stay], theta[stay]
                for name, value in optimizer.state[theta].items():
                    if value.ndim:
                        optimizer.state[theta][name] = value[stay]
                if not len(left):
                    break
    return snapshots, reached


def solve(problem: Problem, setting: Setting, nets: Tensor, level: float) -> list[dict]:
    """Returns two rows for each pair, one for each method; nets are ``(2 · pairs, d)``."""
    sampling, smooth, chunk = setting.sampling, problem.smooth, setting.chunk_size
    strings = sample_strings(
        problem.loss, nets[::2], nets[1::2], level, sampling, (), problem.train_fn, chunk
    )
    paths = [path.to(smooth.dtype) for path in strings.paths]
    if problem.bound is not None:
        bound = problem.bound(sampling.slack * level)
        bounds = torch.full((len(paths),), bound, dtype=smooth.dtype)
    else:  # the smallest sublevel set of another loss that contains the string or else the chord
        losses, each = vmap(smooth, chunk_size=chunk), zip(paths, strings.connected, strict=True)
        held = [path if connected else path[[0, -1]] for path, connected in each]
        bounds = torch.stack([losses(subdivide(path, sampling.grid)).max() for path in held])
    start = torch.stack([resample(path, setting.segments) for path in paths])
    found = find_geodesics(
        smooth,
        start[:, 0],
        start[:, -1],
        bounds,
        setting.segments,
        start,
        chunk_size=chunk,
        max_iterations=setting.iterations,
    )
    weights = torch.cat([torch.full((s.numel(),), len(s) > 1) for s in smooth.shapes.values()])
    rows = []
    for i, string in enumerate(paths):
        connected, certified = bool(strings.connected[i]), bool(found.certified[i])
        if problem.bound is None:
            certified &= connected  # without a string there is no set, and a chord would be trivial
        shorter = found.path[i]
        # If the resampled string could not be moved back into the set, the result is DSS's own.
        fallback = connected and not (certified and found.length[i] <= length(string))
        if fallback:
            shorter = string
        assert not connected or length(shorter) <= length(string)
        for method, path in zip(METHODS, (string, shorter), strict=True):
            ours = method == "shortened"
            rows.append(
                {
                    "level": level,
                    "pair": i,
                    "method": method,
                    "found": int(connected or (ours and certified)),
                    "normalized_length": float(normalized_length(path)),
                    "normalized_length_weights": float(normalized_length(path[:, weights])),
                    "beads": len(path),
                    "bound": float(bounds[i]) if ours else level * sampling.slack,
                    "max_loss": float((found if ours else strings).max_loss[i]),
                    "fallback": int(ours and fallback),
                    "residual": float(found.residual[i]) if ours else "",
                    "chord_feasible": int(found.chord_feasible[i]),
                    "loss_evaluations": int((found if ours else strings).loss_evaluations[i]),
                    "gradient_evaluations": int(
                        (found if ours else strings).gradient_evaluations[i]
                    ),
                }
            )
    return rows


def run(name: str, setting: Setting, levels: list[float], output: Path, cache: Path) -> None:
    """Solves the levels that are missing in output/name.csv, and adds them one by one."""
    facts = asdict(setting) | {"problem": name, "published": sorted(setting.lengths)}
    facts = {k: v for k, v in facts.items() if k not in ("unit", "lengths", "bands", "beads")}
    table, rows = output / f"{name}.csv", []
    if table.exists():
        if json.loads(table.with_suffix(".json").read_text())["arguments"] != facts:
            raise SystemExit(f"{table} was made with other settings; use another --results")
        rows = read(table)
    levels = [level for level in levels if level not in {float(row["level"]) for row in rows}]
    if not levels:
        return
    problem, file = setting.problem(), cache / f"{name}.pt"
    trained = torch.load(file, weights_only=True) if file.exists() else {}
    if trained.get("arguments") != facts:
        snapshots, reached = train(problem, setting, setting.pairs * 7 // 3)  # some never reach it
        trained = {"arguments": facts, "snapshots": snapshots, "reached": reached}
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(trained, file)
    for level in sorted(levels, reverse=True):
        index = sorted(setting.lengths).index(level)
        pool = trained["snapshots"][index][trained["reached"][index]][: 2 * setting.pairs]
        began = time.time()
        rows += solve(problem, setting, pool[: len(pool) // 2 * 2], level)
        save(output, name, rows, arguments=facts)
        print(f"{name} {level}: {time.time() - began:.0f} s", flush=True)


def panel(name: str, rows: list[dict[str, str]], column: str) -> np.ndarray:
    """Plots a quantity of a setting, and returns the image.

    Shortened paths are plotted only for the length that shortening minimizes.
    """
    levels = sorted({float(row["level"]) for row in rows})
    pairs, log_x = 1 + max(int(row["pair"]) for row in rows), levels[-1] > 100 * levels[0]
    curves = {}
    for method in METHODS if column == "normalized_length" else METHODS[:1]:
        values = torch.full((pairs, len(levels)), torch.nan)
        for row in rows:
            if row["method"] == method and row["found"] == "1":
                values[int(row["pair"]), levels.index(float(row["level"]))] = float(row[column])
        curves[method] = (torch.tensor(levels), values)
    figure = plot_length_against_level(curves, log_x)
    (axes,) = figure.axes
    setting = SETTINGS[name]
    published = {
        "normalized_length_weights": (setting.lengths, setting.bands),
        "beads": (setting.beads, {}),
    }
    marks, bands = published.get(column, ({}, {}))
    marks = {x: y for x, y in marks.items() if x in levels}
    if marks:
        bands = [bands.get(x, torch.nan) for x in marks]
        label = {"fmt": "kx", "ms": 5, "capsize": 2, "lw": 1, "label": "DSS, published"}
        axes.errorbar(list(marks), list(marks.values()), bands, **label)
    if column == "beads":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{name}, {pairs} pairs a level")
    axes.set_xlabel(f"level $\\lambda$: {setting.unit}")
    axes.set_ylabel(COLUMNS[column], fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    figure.set(figwidth=4.2, figheight=3.1, dpi=130)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def plot(results: Path, picture: Path, settings: list[str]) -> None:
    """Plots a row of panels for each setting with results."""
    tables = {name: results / f"{name}.csv" for name in settings}
    tables = {name: read(table) for name, table in tables.items() if table.exists()}
    strips = [[panel(name, rows, column) for column in COLUMNS] for name, rows in tables.items()]
    picture.parent.mkdir(parents=True, exist_ok=True)
    imsave(picture, np.concatenate([np.concatenate(strip, axis=1) for strip in strips]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "plot"))
    parser.add_argument("--setting", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--levels", type=float, nargs="+", help="published levels; by default all")
    parser.add_argument("--pairs", type=int, help="pairs at each level; by default the setting's")
    parser.add_argument("--steps", type=int, help="most training steps; by default the setting's")
    parser.add_argument("--results", type=Path, default=RESULTS / "figure1")
    parser.add_argument("--picture", type=Path, default=Path("docs/figure1.png"))
    parser.add_argument("--cache", type=Path, default=Path("runs/figure1"), help="trained networks")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.command == "plot":
        return plot(args.results, args.picture, args.setting)
    for name in args.setting:
        chosen = {"pairs": args.pairs, "steps": args.steps}
        setting = replace(SETTINGS[name], **{k: v for k, v in chosen.items() if v})
        run(name, setting, args.levels or list(setting.lengths), args.results, args.cache)


if __name__ == "__main__":
    main()
