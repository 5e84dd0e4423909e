"""Computes eigenbases of the gradients of matrices, in which rules can work.

For the gradients G (n, k) of a matrix let L = E[G Gᵀ] and R = E[Gᵀ G], averaged over past steps,
and let Q_L and Q_R be their orthonormal eigenvectors. The entries of Q_Lᵀ G Q_R are nearly
uncorrelated. Dividing each of them by its √v̂, as Adam does, amounts to Shampoo's preconditioner
(Gupta et al. 2018, arXiv 1802.09568). Running Adam in these bases is SOAP (Vyas et al. 2024, arXiv
2409.11321).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from learned_opt.rules.base import as_numbers, due, not_compiled
from learned_opt.rules.layout import Layout, State

BETA = 0.95  # the decay of the averages L and R
SELDOM = 1024  # the usual steps between two bases, and at first after 1, 2, 4, ..., see `due`
JITTER = 1e-3  # the most that is added to the diagonals of L and R, in units of their mean
SIDES = ("rows", "columns")
ENTRIES = tuple(f"{kind}_{side}" for kind in ("covariance", "basis") for side in SIDES)


@dataclass(frozen=True)
class Matrix:
    """A tensor seen as a matrix. The columns of a convolution are all its dimensions but the first.

    Attributes:
        index: the number of the tensor.
        where: the slice of its coordinates on this process.
        shape: the numbers of rows and columns.
        sides: those of SIDES that have an eigenbasis.
    """

    index: int
    where: slice
    shape: tuple[int, int]
    sides: tuple[str, ...]


def matrices(layout: Layout, limit: int) -> tuple[Matrix, ...]:
    """Returns the tensors with a side of 2 to `limit` rows or columns, as matrices."""
    return _matrices(layout.shapes, layout.sizes, limit)


@lru_cache(maxsize=256)
def _matrices(shapes: tuple, sizes: tuple[int, ...], limit: int) -> tuple[Matrix, ...]:
    found, start = [], 0
    for index, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
        if len(shape) > 1 and math.prod(shape):
            sides = shape[0], math.prod(shape[1:])
            turned = tuple(s for s, n in zip(SIDES, sides, strict=True) if 2 <= n <= limit)
            if turned:
                found.append(Matrix(index, slice(start, start + size), sides, turned))
        start += size
    return tuple(found)


@dataclass(frozen=True)
class Basis:
    """The bases Q_L and Q_R of the matrices of a layout.

    Attributes:
        layout: the layout of the coordinates.
        matrices: the matrices that have a basis.
        q: for each matrix, its bases (*tasks, n, n) by side. A new basis is made of new tensors,
            because training keeps the bases of all steps of a window.
    """

    layout: Layout
    matrices: tuple[Matrix, ...]
    q: tuple[dict[str, Tensor], ...]

    def turn(self, x: Tensor) -> Tensor:
        """Returns x (*tasks, d) or (*tasks, features, d) in the eigenbases: Q_Lᵀ X Q_R."""
        return self._turn_in_place(x.clone(), back=False)

    def turn_back(self, x: Tensor) -> Tensor:
        """Inverts `turn`, in place: Q_L X Q_Rᵀ."""
        return self._turn_in_place(x, back=True)

    def _turn_in_place(self, x: Tensor, back: bool) -> Tensor:
        with full_precision(x):
            for matrix, q in zip(self.matrices, self.q, strict=True):
                part = x[..., matrix.where]
                whole = _whole(part, matrix, self.layout)
                part.copy_(_own(_sandwich(whole, q, back), matrix, self.layout))
        return x


def start(params: Tensor, layout: Layout, limit: int) -> tuple[dict[str, Tensor], ...]:
    """Returns `State.matrix` before the first gradient, with identity matrices as bases."""
    entries: tuple[dict[str, Tensor], ...] = tuple({} for _ in layout.shapes)
    for matrix in matrices(layout, limit):
        for side, n in zip(SIDES, matrix.shape, strict=True):
            if side in matrix.sides:
                eye = torch.eye(n, dtype=params.dtype, device=params.device)
                eye = eye.expand(*params.shape[:-1], n, n)
                entries[matrix.index][f"covariance_{side}"] = torch.zeros_like(eye)
                entries[matrix.index][f"basis_{side}"] = eye.clone()
    return entries


def rescaled(
    matrix: tuple[dict[str, Tensor], ...], shares: Tensor
) -> tuple[dict[str, Tensor], ...]:
    """Returns `State.matrix` with L and R multiplied by each tensor's share, (*tasks, tensors)."""
    return tuple(
        {
            name: x * shares[..., i, None, None] if name.startswith("covariance") else x
            for name, x in entries.items()
        }
        for i, entries in enumerate(matrix)
    )


def full_precision(x: Tensor) -> AbstractContextManager:
    """Returns a context without autocast, because in bfloat16 bases would not be orthonormal."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()  # it is free, and torch.autocast does not support meta tensors
    return torch.autocast(x.device.type, enabled=False)


@not_compiled  # Python decides whether a new basis is due, and eigh is not compiled
def follow(
    grads: Tensor,
    rows: Tensor,
    state: State,
    limit: int,
    every: int = SELDOM,
    in_place: bool = False,
) -> tuple[Basis, tuple[dict[str, Tensor], ...]]:
    """Returns the basis for this step and the next `State.matrix`.

    Args:
        grads: the gradients, (*tasks, d). They are rotated into the basis in place.
        rows: (*tasks, 1 + momenta + 1, d), in the last basis: the last gradient, its averages, and
            r = √v̂. If the basis is new, averages and r are rotated in place. v uses the squared
            rotation, which assumes uncorrelated coordinates.
        state: the state before this gradient.
        limit: the most rows or columns for which a side has a basis.
        every: the steps between two bases, see `due`.
        in_place: whether L and R of `state` are overwritten.
    """
    with full_precision(grads):
        return _follow(grads, rows, state, limit, every, in_place)


def _follow(
    grads: Tensor, rows: Tensor, state: State, limit: int, every: int, in_place: bool
) -> tuple[Basis, tuple[dict[str, Tensor], ...]]:
    layout, kept, bases = state.layout, list(state.matrix), []
    found = matrices(layout, limit)
    steps = as_numbers(state.step)
    for matrix in found:
        t = steps[matrix.index % len(steps)] + 1
        entries = dict(kept[matrix.index])
        part = grads[..., matrix.where]
        g = _whole(part, matrix, layout)
        for side in matrix.sides:
            name, weight = f"covariance_{side}", (1 - BETA) / (1 - BETA**t)
            average, product = entries[name], g @ g.mT if side == "rows" else g.mT @ g
            entries[name] = (average.lerp_ if in_place else average.lerp)(product, weight)
        if due(t, every):
            _renew(entries, rows[..., matrix.where], matrix, layout)
        kept[matrix.index] = entries
        bases.append({side: entries[f"basis_{side}"] for side in matrix.sides})
        part.copy_(_own(_sandwich(g, bases[-1]), matrix, layout))
    return Basis(layout, found, tuple(bases)), tuple(kept)


def _renew(entries: dict[str, Tensor], rows: Tensor, matrix: Matrix, layout: Layout) -> None:
    """Computes a new basis of a matrix and rotates its `rows` (see `follow`) into it, in place."""
    old = {side: entries[f"basis_{side}"] for side in matrix.sides}
    for side in matrix.sides:
        entries[f"basis_{side}"] = _eigenvectors(entries[f"covariance_{side}"])
    moves = {side: q.mT @ entries[f"basis_{side}"] for side, q in old.items()}
    momenta = _whole(rows[..., 1:-1, :], matrix, layout)
    rows[..., 1:-1, :] = _own(_sandwich(momenta, moves), matrix, layout)
    squares = {side: move.square() for side, move in moves.items()}
    v = _whole(rows[..., -1:, :].square(), matrix, layout)
    v = _sandwich(v, squares).clamp(min=0)
    rows[..., -1:, :] = _own(v.sqrt(), matrix, layout)


def _whole(x: Tensor, matrix: Matrix, layout: Layout) -> Tensor:
    """Returns a matrix (*, rows, columns) from its coordinates on this process, (*, local)."""
    if layout.gather is not None:
        x = layout.gather(x, matrix.index)
    return x.view(*x.shape[:-1], *matrix.shape)


def _own(x: Tensor, matrix: Matrix, layout: Layout) -> Tensor:
    """Inverts `_whole`."""
    x = x.flatten(-2)
    return x if layout.gather is None else layout.scatter(x, matrix.index)


def _sandwich(x: Tensor, factors: dict[str, Tensor], back: bool = False) -> Tensor:
    """Returns rowsᵀ X columns, or rows X columnsᵀ if `back`.

    The factors are (*tasks, n, n) by side, and X is (*tasks, n, k) or (*tasks, features, n, k).
    """
    for side, factor in factors.items():
        if x.dim() > factor.dim():
            factor = factor.unsqueeze(-3)
        if back == (side == "columns"):
            factor = factor.mT
        x = factor @ x if side == "rows" else x @ factor
    return x


def _eigenvectors(covariance: Tensor) -> Tensor:
    """Returns the eigenvectors (*, n, n) of a covariance (*, n, n).

    Directions that never had a gradient, as those of padding or of dead units, are not mixed with
    the others, so that their parameters stay exactly as they are. A covariance that is not finite,
    as after a task diverged, is replaced by zero. If a covariance is degenerate, a small increasing
    diagonal selects the coordinate axes, instead of directions that depend on rounding.
    """
    n = covariance.shape[-1]
    rising = torch.arange(1, n + 1, dtype=covariance.dtype, device=covariance.device) / n
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    scaled = covariance / mean.clamp(min=torch.finfo(mean.dtype).tiny)
    good = scaled.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    scaled = torch.where(good, scaled, 0)
    dead = scaled.diagonal(dim1=-2, dim2=-1) == 0
    # All other eigenvalues are positive, so that these and their eigenvectors come first.
    scaled = scaled + torch.where(dead, rising - 2, JITTER * rising).diag_embed()
    if scaled.device.type == "mps":  # torch has no eigh there
        q = torch.linalg.eigh(scaled.cpu())[1].to(scaled.device)
    else:
        q = torch.linalg.eigh(scaled)[1]
    first = torch.arange(n, device=dead.device) < dead.sum(-1, keepdim=True)
    # Rounding may have left something there. In place: another layout of q would round otherwise.
    return q.masked_fill_(dead.unsqueeze(-1) != first.unsqueeze(-2), 0)
