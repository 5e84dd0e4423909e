"""Do certificates hold between their samples? Tests them densely on 200 random problems.

    python -m experiments.geodesics.certificates --output experiments/results/certificates

There are twenty problems in float32 and twenty in float64 of each of five kinds:

smooth          a bowl with Gaussian bumps and dents
disconnected    two wells behind a wall that no path can pass, so any certificate is wrong
kinks           cones instead of the bumps; F has a crest without a gradient at the top of each
network         F of a random ReLU network, whose level sets have corners
jumps           F rises by a step inside each of several balls, so it is not continuous

Every third level falls along the path. Each path is then evaluated on 160 samples of each segment,
ten times as many as the certificate uses. rows.csv has a row for each problem, with the largest
excess F - λ, the tolerance that the certificate states, and whether it is violated. This takes a
minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.func import vmap

from experiments.result_files import RESULTS, markdown_table, read, save
from geodesic import LevelProfile, find_geodesics
from geodesic.level_set import allowance
from geodesic.path import fractions, subdivide
from geodesic.solve import CERTIFICATE_SAMPLES

FOLDER = RESULTS / "certificates"

PER_KIND, CLOSER, BUMPS, DIMENSIONS = 20, 10, 8, (2, 5, 20)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
Loss = Callable[..., Tensor]  # of theta (d,), centers (BUMPS, d), heights and widths (BUMPS,)


def bowl(x: Tensor) -> Tensor:
    return 0.05 * x.square().sum()


def smooth(x: Tensor, centres: Tensor, heights: Tensor, widths: Tensor) -> Tensor:
    squares = (x - centres).square().sum(-1) / widths.square()
    return bowl(x) + (heights * (-squares / 2).exp()).sum()


def disconnected(x: Tensor, centres: Tensor, heights: Tensor, widths: Tensor) -> Tensor:
    """Returns F with a wall of height 12 at x₀ = 0; everything else is below 8."""
    return smooth(x, centres, heights.clamp(-1, 1), widths) + 12 * (-((x[0] / 0.1) ** 2)).exp()


def kinks(x: Tensor, centres: Tensor, heights: Tensor, widths: Tensor) -> Tensor:
    distances = (x - centres).abs().amax(-1) / widths
    return bowl(x) + (heights * (1 - distances).clamp_min(0)).sum()


def network(x: Tensor, centres: Tensor, heights: Tensor, widths: Tensor) -> Tensor:
    return bowl(x) + (heights * (centres @ x - widths).relu()).sum().square()


def jumps(x: Tensor, centres: Tensor, heights: Tensor, widths: Tensor) -> Tensor:
    inside = (x - centres).norm(dim=-1) < widths
    return bowl(x) + (heights.abs() * inside).sum()


KINDS: dict[str, Loss] = {f.__name__: f for f in (smooth, disconnected, kinks, network, jumps)}


def solve(kind: str, dtype: str, dimension: int, seed: int, count: int, falls: bool) -> list[dict]:
    """Solves all problems in one search, and returns a row for each."""
    loss_fn, generator = KINDS[kind], torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
        return drawn.to(DTYPES[dtype])

    args = (normal(BUMPS, dimension), 0.7 + 0.6 * normal(BUMPS), 0.3 + 0.5 * normal(BUMPS).abs())
    theta = 1.5 * normal(2, dimension)
    if kind == "disconnected":
        theta[:, 0, 0], theta[:, 1, 0] = -1 - theta[:, 0, 0].abs(), 1 + theta[:, 1, 0].abs()
    evaluate = vmap(vmap(loss_fn, (0, None, None, None)))
    values = evaluate(theta, *args)
    theta = theta.gather(1, values.argsort(1, descending=True)[..., None].expand_as(theta))
    high, low = values.amax(1), values.amin(1)
    level = LevelProfile(torch.stack((high + 0.1, low + 0.02), 1)) if falls else high + 0.02
    found = find_geodesics(loss_fn, theta[:, 0], theta[:, 1], level, loss_args=args)

    points = subdivide(found.path, CLOSER * CERTIFICATE_SAMPLES)
    levels = level(fractions(points)) if falls else level[:, None].expand(points.shape[:2])
    excess, tolerance = evaluate(points, *args) - levels, allowance(levels)
    worst = (excess - tolerance).argmax(1, keepdim=True)
    take = lambda values: values.gather(1, worst)[:, 0].tolist()  # noqa: E731
    columns = zip(take(excess), take(tolerance), take(levels), strict=True)
    return [
        {
            "kind": kind,
            "dtype": dtype,
            "dimension": dimension,
            "level": "falling" if falls else "constant",
            "seed": seed,
            "problem": i,
            "chord_feasible": int(found.chord_feasible[i]),
            "certified": int(found.certified[i]),
            "normalized_length": float(found.normalized_length[i]),
            "samples": points.shape[1],
            "level_there": there,
            "largest_excess": over,
            "tolerance": allowed,
            "violated": int(bool(found.certified[i]) and not over <= allowed),
        }
        for i, (over, allowed, there) in enumerate(columns)
    ]


def run(per_kind: int = PER_KIND) -> list[dict]:
    rows = []
    for seed, (kind, dtype) in enumerate((k, d) for k in KINDS for d in DTYPES):
        cases = [(d, falls) for d in DIMENSIONS for falls in (False, False, True)]
        for i, (dimension, falls) in enumerate(cases):
            count = len(range(i, per_kind, len(cases)))
            if count:
                rows += solve(kind, dtype, dimension, 100 * seed + i, count, falls)
    return rows


def table(folder: Path = FOLDER) -> str:
    """Returns a table of the problems, certificates and violations of each kind and dtype."""
    rows, lines = read(folder / "rows.csv"), []
    for kind, dtype in dict.fromkeys((row["kind"], row["dtype"]) for row in rows):
        cell = [row for row in rows if (row["kind"], row["dtype"]) == (kind, dtype)]
        certified = [row for row in cell if row["certified"] == "1"]
        violated = [row for row in certified if row["violated"] == "1"]
        over = [float(r["largest_excess"]) / abs(float(r["level_there"])) for r in violated]
        chords = sum(row["chord_feasible"] == "1" for row in certified)
        worst = f"{max(over):.2g}" if over else "–"
        counts = (len(cell), len(certified), chords, len(violated))
        lines.append([kind, dtype, *map(str, counts), worst])
    counts = [str(sum(int(line[i]) for line in lines)) for i in range(2, 6)]
    header = ["F", "dtype", "problems", "certified", "of which chords", "violations",
              "largest excess / level"]  # fmt: skip
    return markdown_table(header, [*lines, ["all", "", *counts, ""]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--per-kind", type=int, default=PER_KIND, help="of each kind and dtype")
    args = parser.parse_args()
    torch.set_num_threads(1)
    save(args.output, "rows", run(args.per_kind), closer=CLOSER)
    print(table(args.output))


if __name__ == "__main__":
    main()
