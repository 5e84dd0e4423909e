"""Plots geodesics as matplotlib figures, without matplotlib's global state.

    figure = plot_plane(loss_fn, result.path)
    figure.savefig("plane.png")

A loss here maps one point ``(d,)`` to a scalar, supports `torch.func.vmap`, and closes over all
else that it needs. A path is ``(n, d)``. A level is None for F(θ_a), a number, or a callable of the
arclength fraction, as for `geodesic.find_geodesic`. All tensors must be on one device, on which the
loss is evaluated; results are copied to the CPU.

The package does not import this module, because importing matplotlib is slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from geodesic.dataset import PathDataset
from geodesic.level_set import sgd_profile
from geodesic.manifest import DatasetError
from geodesic.path import fractions, normalized_length, subdivide
from geodesic.targets import Problem, TargetConfig, run_teacher

Loss = Callable[[Tensor], Tensor]
Level = float | Callable[[Tensor], Tensor] | None

# Okabe & Ito 2008: readers with any color vision can tell these apart. The order makes neighbors
# differ in lightness as well. If there are more curves than colors, they differ in their dashes.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")
DASHES = ("-", "--", ":", "-.")
INSIDE, DEEPER = "#DCEAF4", "#B4D3E8"  # Ω_λ(0) and, if the level falls, Ω_λ(1)


class Plane(NamedTuple):
    """The plane {centre + x·directions[0] + y·directions[1]} in parameter space."""

    centre: Tensor  # (d,)
    directions: Tensor  # (2, d), orthonormal
    shares: tuple[float, float]  # the share of the path's variance along each direction

    def coordinates(self, points: Tensor) -> Tensor:
        """Returns the coordinates ``(..., 2)`` in the plane of the projections of ``(..., d)``."""
        return (points.to(self.centre) - self.centre) @ self.directions.T

    def points(self, coordinates: Tensor) -> Tensor:
        """Returns the points of the plane, ``(..., d)``, at coordinates ``(..., 2)``."""
        return self.centre + coordinates @ self.directions


def principal_plane(loss_fn: Loss, path: Tensor) -> Plane:
    """Returns the plane through the path's mean along its two leading principal directions.

    Mean and covariance are integrals over arclength, so the spacing of the beads does not matter.
    The first direction points from θ_a to θ_b, and the second to the side of the chord on which the
    path lies. A straight path has no second direction. It then is the part of ∇F at the middle that
    is orthogonal to the first; if that vanishes, the orthogonal part of a coordinate axis.

    Raises:
        ValueError: the path is not ``(n, d)`` with n, d ≥ 2, is not finite, or is a single point.
    """
    _check_path("path", path, least_dimension=2)
    # Simpson's rule: a segment's ends and middle give both moments of a polyline exactly.
    points, share = subdivide(path.double(), 2), fractions(path.double()).diff() / 6
    weight = share.new_zeros(len(points), 1)
    weight[:-1:2, 0] += share
    weight[1::2, 0] = 4 * share
    weight[2::2, 0] += share
    centre = (weight * points).sum(0)
    # Singular values up to this size are rounding errors of the path's own dtype.
    noise = 10 * torch.finfo(path.dtype).eps * torch.linalg.matrix_norm(weight.sqrt() * points)
    around = weight.sqrt() * (points - centre)
    _, values, directions = torch.linalg.svd(around, full_matrices=False)
    if values[0] <= noise:
        raise ValueError(
            f"path must move, got {len(path)} equal points; a pair needs two different ends"
        )
    values = values.where(values > noise, 0)
    first = directions[0] * (1 if directions[0] @ (path[-1] - path[0]).double() >= 0 else -1)
    if values[1] > 0:
        ends = path[[0, -1]].double().mean(0)
        second = directions[1] * (1 if directions[1] @ (centre - ends) >= 0 else -1)
    else:
        axis = torch.nn.functional.one_hot(first.abs().argmin(), len(first)).double()
        gradient = torch.func.grad(loss_fn)(centre.to(path.dtype)).double()
        across = [v - (v @ first) * first for v in (gradient, axis)]
        steep = across[0].norm() > 1e-6 * gradient.norm()  # False for a zero or NaN gradient
        second = torch.nn.functional.normalize(across[0 if steep else 1], dim=0)
    shares = values[:2].square() / values.square().sum()
    return Plane(centre, torch.stack((first, second)), tuple(shares.tolist()))


def plot_loss(
    loss_fn: Loss,
    paths: Mapping[str, Tensor],
    level: Level = None,
    samples: int = 512,
    chunk_size: int = 256,
) -> Figure:
    """Plots F along paths against arclength fraction, with the level.

    F is evaluated at exact points of each path, including its beads. The legend gives normalized
    lengths |γ| / |θ_a - θ_b|.

    Args:
        loss_fn: F, see the module.
        paths: the paths by label, such as ``{"geodesic": result.path, "SGD": trajectory}``.
        level: λ; None is F at the start of the first path.
        samples: the least number of points evaluated along each path.
        chunk_size: the number of points evaluated at once; lower it if memory runs out.

    Raises:
        ValueError: there are no paths, one is not ``(n, d)`` or not finite, or the level has a
            wrong shape.
    """
    if not paths:
        raise ValueError("paths must hold at least one path, got none; pass {'label': path}")
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for i, (label, path) in enumerate(paths.items()):
        _check_path(f"paths[{label!r}]", path)
        fine = subdivide(path, -(-samples // (len(path) - 1)))
        losses = _losses(loss_fn, fine, chunk_size)
        label = f"{label}, normalized length {normalized_length(path):.3f}"
        axes.plot(
            _host(fractions(fine)), losses, _dash(i), color=_colour(i), lw=_width(i), label=label
        )
    first = next(iter(paths.values()))
    s = torch.linspace(0, 1, samples + 1, dtype=first.dtype, device=first.device)
    levels = _levels(loss_fn, first, level, s)
    axes.plot(_host(s), levels, "k--", lw=1, label="level $\\lambda$")
    _finish(axes, "arclength fraction $s$", "loss $F$")
    axes.legend(frameon=False, fontsize=8)
    return figure


def plot_plane(
    loss_fn: Loss,
    path: Tensor,
    level: Level = None,
    others: Mapping[str, Tensor] | None = None,
    label: str = "geodesic",
    grid: int = 81,
    chunk_size: int = 256,
) -> Figure:
    """Plots a path and the sublevel set Ω_λ in the plane of the path's principal directions.

    The region F ≤ λ(0) of the plane is shaded, and F ≤ λ(1) is darker if the level falls. Both axes
    are in units of the parameters, at the same scale, and give their share of the path's variance.
    Paths are projected onto the plane, so if the two shares do not add up to 100 %, a path that
    stays in Ω_λ may seem to leave it.

    Args:
        loss_fn: F, see the module.
        path: the path that determines the plane, see `principal_plane`.
        level: λ; None is F at the path's start.
        others: further paths by label, such as the chord or the SGD trajectory.
        label: the label of `path`.
        grid: F is evaluated at grid × grid points.
        chunk_size: the number of points evaluated at once; lower it if memory runs out.

    Raises:
        ValueError: `principal_plane` refuses the path, or the level has a wrong shape.
    """
    plane = principal_plane(loss_fn, path)
    lines = {label: path, **(others or {})}
    for name, line in lines.items():
        _check_path(f"others[{name!r}]", line)
    lines = {name: plane.coordinates(line) for name, line in lines.items()}
    every = torch.cat(list(lines.values()))
    middle = (every.amax(0) + every.amin(0)) / 2
    half = 0.62 * (every.amax(0) - every.amin(0)).max()
    x, y = (m + half * torch.linspace(-1, 1, grid).to(middle) for m in middle)
    losses = _losses(
        lambda xy: loss_fn(plane.points(xy).to(path.dtype)), torch.cartesian_prod(x, y), chunk_size
    )
    # Points at which the loss is NaN or infinite are outside, whatever the level.
    losses = np.ma.masked_invalid(losses.reshape(grid, grid).T)
    start, end = _levels(loss_fn, path, level, torch.tensor([0.0, 1.0]).to(path))
    x, y, lines = _host(x), _host(y), {name: _host(line) for name, line in lines.items()}

    figure = Figure(figsize=(5.4, 5.4), layout="constrained")
    axes = figure.add_subplot(aspect="equal")
    if losses.count():
        steps = np.unique(np.quantile(losses.compressed(), np.linspace(0.05, 0.95, 10)))
        background = axes.contour(x, y, losses, steps, colors="0.75", linewidths=0.6)
        axes.clabel(background, fmt="%.3g", fontsize=6)
        _sublevel(axes, x, y, losses, start, "-", INSIDE, "0")
        if end < start:
            _sublevel(axes, x, y, losses, end, ":", DEEPER, "1")
    for i, (name, line) in enumerate(lines.items()):
        axes.plot(*line.T, _dash(i), color=_colour(i), lw=_width(i), label=name)
    for (px, py), name in zip(lines[label][[0, -1]].tolist(), "ab", strict=True):
        axes.plot(px, py, "ko", ms=5)
        # Below the point, because the path bulges upwards.
        axes.annotate(f"$\\theta_{name}$", (px, py), (-4, -15), textcoords="offset points")
    names = "principal direction 1", "principal direction 2" if plane.shares[1] else "across it"
    labels = [
        f"{n}: {s:.1%} of the path's variance" for n, s in zip(names, plane.shares, strict=True)
    ]
    _finish(axes, *labels)
    axes.grid(False)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return figure


def plot_length_against_level(
    curves: Mapping[str, tuple[Tensor, Tensor]], log_x: bool = False
) -> Figure:
    """Plots the mean normalized length over pairs against the level, with one standard deviation.

    This is Figure 1 of Freeman & Bruna 2017 (arXiv 1611.01540). Pairs without a certified path are
    left out of the mean and the band, and counted in the legend. The marker of a level at which
    pairs failed is hollow, because its mean is that of the other pairs.

    Args:
        curves: by label, the levels ``(levels,)`` and the normalized lengths ``(pairs, levels)``,
            NaN if no path was certified.
        log_x: whether the axis of levels is logarithmic.

    Raises:
        ValueError: there are no curves, shapes do not match, or a level is ≤ 0 with ``log_x``.
    """
    if not curves:
        raise ValueError("curves must hold at least one, got none; pass {'label': (levels, ...)}")
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for i, (label, (levels, lengths)) in enumerate(curves.items()):
        levels, lengths = (torch.as_tensor(v).detach().cpu() for v in (levels, lengths))
        if levels.ndim != 1 or lengths.ndim != 2 or lengths.shape[1] != len(levels):
            raise ValueError(
                f"curves[{label!r}] must be levels (levels,) and lengths (pairs, levels), got "
                f"{tuple(levels.shape)} and {tuple(lengths.shape)}; transpose the lengths, or add "
                "a dimension to the lengths of one pair with [None]"
            )
        if log_x and not (levels > 0).all():
            raise ValueError(
                f"levels of curves[{label!r}] must be positive on a logarithmic axis, got "
                f"{levels.min().item()}; use log_x=False"
            )
        levels, order = levels.sort()
        _mean_and_band(axes, levels, lengths.T[order], label, i)
    if log_x:
        axes.set_xscale("log")
    _finish(axes, "level $\\lambda$", "normalized length")
    axes.legend(frameon=False, fontsize=8)
    return figure


def plot_stages(times: Tensor, lengths: Tensor, chord_feasible: Tensor) -> Figure:
    """Plots the normalized lengths of a data set's geodesics against the stage of the SGD run.

    The upper panel has all certified lengths as dots, with mean and one standard deviation. The
    lower panel has the share of pairs with a certified path, and with a feasible chord.

    Args:
        times: ``(pairs,)``; the SGD step of θ_a.
        lengths: ``(pairs,)``; NaN if no path was certified.
        chord_feasible: ``(pairs,)`` bool.
    """
    times, lengths, chord_feasible = (v.detach().cpu() for v in (times, lengths, chord_feasible))
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    stages = times.unique()
    above.plot(times, lengths, "o", color=COLOURS[0], alpha=0.3, mew=0, ms=4, label="pair")
    columns = [lengths[times == stage] for stage in stages]
    _mean_and_band(above, stages, columns, "mean, one standard deviation", 0)
    for i, (label, which) in enumerate(
        {"a path certified": lengths.isfinite(), "the chord feasible": chord_feasible}.items()
    ):
        shares = [which[times == stage].double().mean() for stage in stages]
        label = f"{label}, {which.sum()} of {len(which)} pairs"
        below.plot(
            stages, shares, "-o", color=COLOURS[i + 1], lw=_width(i), ms=7 - 3 * i, label=label
        )
    below.set_ylim(-0.05, 1.05)
    _finish(above, "", "normalized length")
    _finish(below, "SGD step of $\\theta_a$", "share of pairs")
    for axes in (above, below):
        axes.legend(frameon=False, fontsize=8)
    return figure


def plot_dataset(
    dataset: PathDataset, problems: Callable[[int], Problem]
) -> Iterator[tuple[str, Figure]]:
    """Yields the name and the figure of each plot of a data set made by `write_dataset`.

    "lengths" is `plot_stages` of all pairs. "pair-loss" and "pair-plane" are `plot_loss` and
    `plot_plane` of the first certified pair whose chord was not feasible, or of the first pair if
    there is none. Shards do not contain SGD's iterates, so the SGD runs of that pair's shard are
    repeated. A data set without pairs has no plots.

    Args:
        dataset: the finished data set.
        problems: maps the number of a shard to its problem, as for `write_dataset`.

    Raises:
        DatasetError: the repeated run does not pass through the stored pair.
    """
    names = ("time", "normalized_length", "certified", "chord_feasible")
    shards = {i: tensors for i in range(len(dataset)) if (tensors := dataset.shard(i))}
    if not shards:
        return
    times, lengths, certified, chord = (
        torch.cat([tensors[name] for tensors in shards.values()]) for name in names
    )
    yield "lengths", plot_stages(times, lengths.where(certified, torch.nan), chord)

    where = [(index, i) for index, tensors in shards.items() for i in range(len(tensors["time"]))]
    index, i = where[int((certified & ~chord).int().argmax())]  # 0 if there is none
    tensors, config = shards[index], TargetConfig(**dataset.header["targets"])
    path = tensors["beads"][slice(*tensors["bead_offsets"][i : i + 2])]
    run, time = int(tensors["run"][i]), int(tensors["time"][i])
    problem = problems(index)
    trajectory = run_teacher(problem, time + config.horizon, config.stride)
    records = slice(time // config.stride, None)
    sgd = trajectory.points[records, run]
    path = path.to(sgd)
    gap = (sgd[[0, -1]] - path[[0, -1]]).norm() / (path[-1] - path[0]).norm()
    if not gap < 1e-3:  # a smaller gap is invisible in the plot
        raise DatasetError(
            f"pair {i} of shard {index} in {dataset.folder} is not what SGD finds here (off by "
            f"{gap:.1g} of its length); plot it with the version and on the kind of machine that "
            "made the data"
        )

    def loss_fn(theta: Tensor) -> Tensor:
        return problem.loss_fn(theta, *(argument[run] for argument in problem.loss_args))

    falls = config.level == "sgd_profile"
    # Chords and SGD's own trajectory were made without a level; plot the loss at their start.
    level = sgd_profile(loss_fn, sgd) if falls else loss_fn(sgd[0]).item()
    straight, label = len(path) == 2, config.path
    if straight and label == "geodesic":
        label = "geodesic, the chord"
    if not tensors["certified"][i]:
        label = "best path, not certified"
    title = f"shard {index}, run {run}, SGD steps {time} to {time + config.horizon}"
    others = {"SGD": sgd} if straight else {"chord": path[[0, -1]], "SGD": sgd}
    for name, figure in (
        ("pair-loss", plot_loss(loss_fn, {label: path, **others}, level)),
        ("pair-plane", plot_plane(loss_fn, path, level, others, label)),
    ):
        figure.suptitle(title, fontsize=9)
        yield name, figure


def _mean_and_band(
    axes: Axes, x: Tensor, columns: Sequence[Tensor] | Tensor, label: str, number: int
) -> None:
    """Draws mean and one standard deviation of each column's finite values, and counts the rest."""
    found = [column[column.isfinite()].double() for column in columns]
    failed = torch.tensor([len(c) for c in columns]) - torch.tensor([len(f) for f in found])
    total = sum(map(len, columns))
    mean = torch.stack([f.mean() for f in found])  # NaN, which is a gap in the plot, if all failed
    sd = torch.stack([(f - f.mean()).square().mean().sqrt() for f in found])
    if failed.any():
        label = f"{label}, {failed.sum()} of {total} failed (hollow)"
    colour = _colour(number)
    axes.plot(x, mean, _dash(number) + "o", color=colour, lw=1.5, ms=4, label=label)
    axes.plot(x[failed > 0], mean[failed > 0], "o", color=colour, mfc="white", ms=4)
    axes.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.2, lw=0)


def _sublevel(axes: Axes, x, y, losses, level: float, line: str, fill: str, s: str) -> None:
    """Fills the region F ≤ λ(s) and draws its boundary, if they are in the picture."""
    least, most = losses.min(), losses.max()
    if least <= level:
        axes.contourf(x, y, losses, [least - 1, level], colors=fill)
    if least < level < most:
        axes.contour(x, y, losses, [level], colors="k", linestyles=line, linewidths=1)
    label = f"$F \\leq \\lambda({s})$ = {level:.4g}"
    axes.fill([], [], fc=fill, ec="k", ls=line, label=label)


def _finish(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def _losses(loss_fn: Loss, points: Tensor, chunk_size: int) -> np.ndarray:
    """Returns F ``(m,)`` at points ``(m, d)``."""
    return _host(torch.func.vmap(loss_fn, chunk_size=chunk_size)(points.detach()))


def _host(values: Tensor) -> np.ndarray:
    """Returns a numpy array on the CPU, as matplotlib needs it."""
    return values.detach().cpu().numpy()


def _levels(loss_fn: Loss, path: Tensor, level: Level, s: Tensor) -> np.ndarray:
    """Returns λ ``(m,)`` at fractions ``(m,)``."""
    if level is None:
        level = loss_fn(path[0])
    try:  # a LevelProfile needs a dimension of pairs
        values = torch.as_tensor(level(s[None]) if callable(level) else level, dtype=s.dtype)
        return _host(values.flatten().expand(len(s)))
    except Exception as error:
        raise ValueError(
            f"level must be None, a number or a callable that maps fractions to levels, got "
            f"{error!r}; if a LevelProfile has many pairs, make one of this pair"
        ) from error


def _check_path(name: str, path: Tensor, least_dimension: int = 1) -> None:
    if not torch.is_tensor(path) or path.ndim != 2 or len(path) < 2:
        got = tuple(path.shape) if torch.is_tensor(path) else repr(path)
        raise ValueError(
            f"{name} must be a tensor of n ≥ 2 points (n, d), got {got}; pass one pair of a batch"
        )
    if path.shape[1] < least_dimension:
        raise ValueError(f"{name} must have d ≥ 2, got {tuple(path.shape)}; use plot_loss instead")
    if not path.isfinite().all():
        raise ValueError(f"{name} must be finite, got inf or nan; drop paths of diverged runs")


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _dash(number: int) -> str:
    return DASHES[number // len(COLOURS) % len(DASHES)]


def _width(number: int) -> float:
    """Returns a broad width for the first line and a narrow one for those drawn over it."""
    return 1.2 if number else 2.5
