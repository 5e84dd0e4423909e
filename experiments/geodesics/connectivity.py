"""Are level sets of wider networks more connected? See predictability.py.

The networks have one hidden layer of ReLU units and a fixed regression task with two inputs. Pairs
of independently trained networks, raw and with aligned hidden units, are joined inside F ≤ λ. "Not
certified" means that a bounded search found no path, not that there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from tqdm import tqdm

from experiments.result_files import RESULTS, markdown_table, read, save
from geodesic.alignment import align, mlp_spec
from geodesic.solve import find_geodesics
from learned_opt.tasks.base import generator

# The levels. COMMON are the same for every width, and the networks are those at the first step that
# reaches the level (the best constant has loss 1). The other level is a multiple of the larger of
# the two networks' final losses.
COMMON, SLACK = (0.5, 0.1), 2.0
WIDTHS = (2, 4, 8, 16, 32)


def relu_loss(width: int, points: int = 128) -> Callable[[Tensor], Tensor]:
    """Returns F(θ) = mean (w₂·relu(W₁x + b₁) + b₂ − y)².

    The mean is over points x in [-1, 1]², and y is a standardized product of waves.
    """
    x = 2 * torch.rand(points, 2, generator=generator("regression"), dtype=torch.float64) - 1
    y = (torch.pi * x[:, 0]).sin() * (torch.pi * x[:, 1] / 2).cos()
    y = (y - y.mean()) / y.std(correction=0)

    def loss(theta: Tensor) -> Tensor:
        w1, b1, w2, b2 = theta.split([2 * width, width, width, 1])
        return ((x @ w1.view(width, 2).T + b1).relu() @ w2 + b2 - y).square().mean()

    return loss


def train_nets(width: int, nets: int, steps: int) -> tuple[Tensor, Tensor]:
    """Trains networks with Adam.

    Returns the final parameters, (nets, d), and those of the first step at which F was at most each
    of COMMON, which are NaN if F never was.
    """
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
    """Joins the pairs in one search, and returns a row for each pair, level and alignment."""
    spec, loss = mlp_spec(((width, 2), (width,), (1, width), (1,))), vmap(relu_loss(width))
    # More networks than needed, because few narrow ones reach COMMON.
    final, first = train_nets(width, max(2 * pairs, 16 * pairs // width), steps)
    final = final[: 2 * pairs]
    # Pairs are neighbors in rank, because the level of a worse network is loose for a better one.
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
    """Returns the rows by level, width and alignment."""
    groups: dict = {}
    for row in read(folder / "width.csv"):
        key = (row["level"], int(row["width"]), int(row["aligned"]))
        groups.setdefault(key, []).append(row)
    return groups


def outcome(rows: list[dict[str, str]]) -> tuple[int, int, float]:
    """Returns the numbers of feasible chords and of certified paths, and the latter's mean length.

    The length is normalized.
    """
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
