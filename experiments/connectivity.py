"""Does width join the level sets of small networks? See predictability.py.

Networks with one hidden layer of relu units on a fixed regression of two inputs. Pairs of
independently trained ones, raw and with hidden units aligned, are joined inside F ≤ λ. "Not
certified" means that a bounded search found no path, never that there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rows import markdown_table, read, save
from torch import Tensor
from torch.func import grad_and_value, vmap
from tqdm import tqdm

from geodesic.alignment import align, mlp_spec
from geodesic.solve import find_geodesics
from learned_opt.tasks.base import generator

RESULTS = Path(__file__).resolve().parent / "results"
# Levels: of every width alike, with networks as they first got there (the best constant has loss
# 1), and a multiple of what the worse of two networks ends at.
COMMON, SLACK = (0.5, 0.1), 2.0
WIDTHS = (2, 4, 8, 16, 32)


def relu_loss(width: int, points: int = 128) -> Callable[[Tensor], Tensor]:
    """F(θ) = mean (w₂·relu(W₁x + b₁) + b₂ − y)² on all of x in [-1, 1]² and y, a standardized
    product of waves."""
    x = 2 * torch.rand(points, 2, generator=generator("regression"), dtype=torch.float64) - 1
    y = (torch.pi * x[:, 0]).sin() * (torch.pi * x[:, 1] / 2).cos()
    y = (y - y.mean()) / y.std(correction=0)

    def loss(theta: Tensor) -> Tensor:
        w1, b1, w2, b2 = theta.split([2 * width, width, width, 1])
        return ((x @ w1.view(width, 2).T + b1).relu() @ w2 + b2 - y).square().mean()

    return loss


def train_nets(width: int, nets: int, steps: int) -> tuple[Tensor, Tensor]:
    """Where Adam ends, (nets, d), and where F first was at most each of COMMON, else NaN."""
    rng = generator("nets", width)
    layers = ((2 * width, 2), (width, 2), (width, width), (1, width))  # sizes and fan-ins
    parts = [
        fan_in**-0.5 * (2 * torch.rand(nets, size, generator=rng, dtype=torch.float64) - 1)
        for size, fan_in in layers
    ]
    theta = torch.cat(parts, 1)
    first = theta.new_full((len(COMMON), *theta.shape), torch.nan)
    optimizer = torch.optim.Adam([theta], lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    gradient = vmap(grad_and_value(relu_loss(width)))
    for _ in range(steps):
        theta.grad, losses = gradient(theta)
        new = (losses <= torch.tensor(COMMON)[:, None]) & first[..., 0].isnan()
        first = torch.where(new[..., None], theta, first)
        optimizer.step()
        schedule.step()
    return theta, first


def join(width: int, pairs: int, steps: int) -> list[dict]:
    """A row per pair, level and alignment; all of them in one search."""
    spec, loss = mlp_spec(((width, 2), (width,), (1, width), (1,))), vmap(relu_loss(width))
    # spares, since few narrow networks get down to COMMON
    final, first = train_nets(width, max(2 * pairs, 16 * pairs // width), steps)
    final = final[: 2 * pairs]
    # neighbours in rank: a level set by the worse of two unequal networks is slack for the better
    cases = [(f"{SLACK:g} × own", final[loss(final).argsort()], None)]
    for level, nets in zip(COMMON, first, strict=True):
        there = nets[~nets[:, 0].isnan()][: 2 * pairs]
        cases.append((f"{level:g}", there[: len(there) // 2 * 2], level))
    ends, rows = [], []
    for level, nets, bound in cases:
        for i, (a, b) in enumerate(zip(nets[::2], nets[1::2], strict=True)):
            worse = float(loss(torch.stack([a, b])).max())
            for aligned in (0, 1):
                ends.append((a, align(a, b, spec) if aligned else b))
                rows.append({"width": width, "level": level, "pair": i, "aligned": aligned,
                             "bound": SLACK * worse if bound is None else bound})  # fmt: skip
    theta_a, theta_b = (torch.stack(end) for end in zip(*ends, strict=True))
    bounds = torch.tensor([row["bound"] for row in rows], dtype=theta_a.dtype)
    found = find_geodesics(relu_loss(width), theta_a, theta_b, bounds, max_iterations=40)
    for i, row in enumerate(rows):
        row |= {
            "distance": round(float((theta_a[i] - theta_b[i]).norm()), 4),
            "chord_feasible": int(found.chord_feasible[i]),
            "certified": int(found.certified[i]),
            "normalized_length": round(float(found.normalized_length[i]), 5),
        }
    return rows


def width(output: Path, pairs: int, steps: int) -> None:
    rows = [row for width in tqdm(WIDTHS) for row in join(width, pairs, steps)]
    save(output, "width", rows, pairs=pairs, steps=steps)


def cells(folder: Path) -> dict[tuple[str, int, int], list[dict[str, str]]]:
    """Rows by level, width and alignment."""
    groups: dict = {}
    for row in read(folder / "width.csv"):
        key = (row["level"], int(row["width"]), int(row["aligned"]))
        groups.setdefault(key, []).append(row)
    return groups


def outcome(rows: list[dict[str, str]]) -> tuple[int, int, float]:
    """Chords feasible, certified, and the mean normalized length of the certified."""
    found = [float(row["normalized_length"]) for row in rows if row["certified"] == "1"]
    chords = sum(row["chord_feasible"] == "1" for row in rows)
    return chords, len(found), float(np.mean(found or [np.nan]))


def width_table(folder: Path = RESULTS) -> str:
    groups, lines = cells(folder), []
    for level, width in sorted({key[:2] for key in groups}):
        rows = groups[level, width, 0]
        both = [outcome(groups[level, width, aligned]) for aligned in (0, 1)]
        bound = np.median([float(row["bound"]) for row in rows])
        chords, certified, lengths = (
            " / ".join(f"{x:.3g}" if x == int(x) else f"{x:.3f}" for x in pair)
            for pair in zip(*both, strict=True)
        )
        lines.append(
            [level, str(width), f"{bound:.2g}", str(len(rows)), chords, certified, lengths]
        )
    return markdown_table(["level", "width", "median λ", "pairs", "chord feasible, raw / aligned",
                     "certified", "normalized length of the certified"], lines)  # fmt: skip
