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
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby

import torch
from torch import Tensor

from learned_opt.rules.layout import CHUNK, Layout, State
from learned_opt.rules.steps import as_numbers, due, not_compiled

BETA = 0.95  # the decay of the averages L and R
SELDOM = 1024  # the usual steps between two bases, and at first after 1, 2, 4, ..., see `due`
JITTER = 1e-3  # the most that is added to the diagonals of L and R, in units of their mean
LONGEST = 4096  # matrices with a longer side, such as a vocabulary, have no basis
TOGETHER = CHUNK  # coordinates of small matrices of one shape whose products are computed together
SIDES = ("rows", "columns")
ENTRIES = tuple(f"{kind}_{side}" for kind in ("covariance", "basis") for side in SIDES)


@dataclass(frozen=True)
class Matrices:
    """Neighboring tensors of one shape, seen as matrices.

    The columns of a convolution are all its dimensions but the first.

    Attributes:
        first: the number of the first tensor.
        count: how many there are.
        where: the slice of their coordinates on this process.
        shape: the numbers of rows and columns.
        sides: those of SIDES that have an eigenbasis.
    """

    first: int
    count: int
    where: slice
    shape: tuple[int, int]
    sides: tuple[str, ...]

    @property
    def tensors(self) -> range:
        """The numbers of the tensors."""
        return range(self.first, self.first + self.count)

    @cached_property
    def single(self) -> list[Matrices]:
        """Each of the matrices by itself."""
        size = (self.where.stop - self.where.start) // self.count
        starts = [self.where.start + k * size for k in range(self.count)]
        return [
            replace(self, first=i, count=1, where=slice(start, start + size))
            for i, start in zip(self.tensors, starts, strict=True)
        ]


def matrices(layout: Layout, limit: int, every: int = SELDOM) -> tuple[Matrices, ...]:
    """Returns the tensors with a side that has an eigenbasis, small ones of one shape together.

    These are sides of 2 to `limit` rows or columns. If bases are renewed often, which is what
    `every` says, no side is longer than LONGEST.
    """
    together = 1 if layout.gather else TOGETHER  # parts of several tensors cannot be gathered
    longest = LONGEST if every < SELDOM else math.inf
    return _matrices(layout.shapes, layout.sizes, limit, together, longest)


@lru_cache(maxsize=256)
def _matrices(
    shapes: tuple, sizes: tuple[int, ...], limit: int, together: int, longest: float
) -> tuple[Matrices, ...]:
    found, first, start = [], 0, 0
    for (shape, size), same in groupby(zip(shapes, sizes, strict=True)):
        last = first + len(list(same))
        sides = math.prod(shape[:1]), math.prod(shape[1:])
        turned = tuple(s for s, n in zip(SIDES, sides, strict=True) if 2 <= n <= limit)
        if len(shape) > 1 and turned and 0 < min(sides) and max(sides) <= longest:
            step = max(1, together // math.prod(shape))
            for i in range(first, last, step):
                count, begin = min(step, last - i), start + (i - first) * size
                where = slice(begin, begin + count * size)
                found.append(Matrices(i, count, where, sides, turned))
        start, first = start + (last - first) * size, last
    return tuple(found)


@dataclass(frozen=True)
class Basis:
    """The bases Q_L and Q_R of the matrices of a layout.

    Attributes:
        layout: the layout of the coordinates.
        matrices: the matrices that have a basis.
        q: for each of `matrices`, their bases (*tasks, count, n, n) by side. A new basis is made of
            new tensors, because training keeps the bases of all steps of a window.
    """

    layout: Layout
    matrices: tuple[Matrices, ...]
    q: tuple[dict[str, Tensor], ...]

    def turn(self, x: Tensor) -> Tensor:
        """Returns x (*tasks, d) or (*tasks, features, d) in the eigenbases: Q_Lᵀ X Q_R."""
        return self._turn_in_place(x.clone(), back=False)

    def turn_back(self, x: Tensor) -> Tensor:
        """Inverts `turn`, in place: Q_L X Q_Rᵀ."""
        return self._turn_in_place(x, back=True)

    def _turn_in_place(self, x: Tensor, back: bool) -> Tensor:
        with full_precision(x):
            for group, q in zip(self.matrices, self.q, strict=True):
                part = x[..., group.where]
                whole = _whole(part, group, self.layout)
                part.copy_(_own(_sandwich(whole, q, back), group, self.layout))
        return x


def start(
    params: Tensor, layout: Layout, limit: int, every: int = SELDOM
) -> tuple[dict[str, Tensor], ...]:
    """Returns `State.matrix` before the first gradient, with identity matrices as bases."""
    entries: tuple[dict[str, Tensor], ...] = tuple({} for _ in layout.shapes)
    for group in matrices(layout, limit, every):
        for side, n in zip(SIDES, group.shape, strict=True):
            for number in group.tensors if side in group.sides else ():
                eye = torch.eye(n, dtype=params.dtype, device=params.device)
                eye = eye.expand(*params.shape[:-1], n, n)
                entries[number][f"covariance_{side}"] = torch.zeros_like(eye)
                entries[number][f"basis_{side}"] = eye.clone()
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
        rows: (*tasks, 1 + momenta + 1, d), in the last basis: this gradient, the averages, and
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
    found = matrices(layout, limit, every)
    steps = as_numbers(state.step)
    for group in found:
        counts = [steps[i % len(steps)] + 1 for i in group.tensors]
        weights = [(1 - BETA) / (1 - BETA**t) for t in counts]
        g = _whole(grads[..., group.where], group, layout)
        for side in group.sides:
            name, products = f"covariance_{side}", g @ g.mT if side == "rows" else g.mT @ g
            averages = [kept[i][name] for i in group.tensors]
            lerp = torch._foreach_lerp_ if in_place else torch._foreach_lerp
            moved = lerp(averages, products.unbind(-3), weights)
            for i, average in zip(group.tensors, moved or averages, strict=True):
                kept[i] = kept[i] | {name: average}
        for matrix, t in zip(group.single, counts, strict=True):
            if due(t, every):
                kept[matrix.first] = _renew(kept[matrix.first], rows, matrix, layout)
        q = {
            side: _stack([kept[i][f"basis_{side}"] for i in group.tensors]) for side in group.sides
        }
        bases.append(q)
        grads[..., group.where] = _own(_sandwich(g, q), group, layout)
    return Basis(layout, found, tuple(bases)), tuple(kept)


def _renew(
    entries: dict[str, Tensor], rows: Tensor, matrix: Matrices, layout: Layout
) -> dict[str, Tensor]:
    """Returns the entries of one matrix with a new basis, and turns `rows` (see `follow`) into it.

    The rows are overwritten.
    """
    new = {side: _eigenvectors(entries[f"covariance_{side}"]) for side in matrix.sides}
    moves = {side: (entries[f"basis_{side}"].mT @ q).unsqueeze(-3) for side, q in new.items()}
    rows = rows[..., matrix.where]
    momenta = _whole(rows[..., 1:-1, :], matrix, layout)
    rows[..., 1:-1, :] = _own(_sandwich(momenta, moves), matrix, layout)
    squares = {side: move.square() for side, move in moves.items()}
    v = _whole(rows[..., -1:, :].square(), matrix, layout)
    v = _sandwich(v, squares).clamp(min=0)
    rows[..., -1:, :] = _own(v.sqrt(), matrix, layout)
    return entries | {f"basis_{side}": q for side, q in new.items()}


def _stack(matrices: list[Tensor]) -> Tensor:
    """Stacks matrices (*tasks, n, n) to (*tasks, count, n, n); of one it returns a view."""
    return matrices[0].unsqueeze(-3) if len(matrices) == 1 else torch.stack(matrices, -3)


def _whole(x: Tensor, group: Matrices, layout: Layout) -> Tensor:
    """Returns matrices (*, count, rows, columns) from their coordinates here, (*, local)."""
    if layout.gather is not None:
        x = layout.gather(x, group.first)
    return x.view(*x.shape[:-1], group.count, *group.shape)


def _own(x: Tensor, group: Matrices, layout: Layout) -> Tensor:
    """Inverts `_whole`."""
    x = x.flatten(-3)
    return x if layout.gather is None else layout.scatter(x, group.first)


def _sandwich(x: Tensor, factors: dict[str, Tensor], back: bool = False) -> Tensor:
    """Returns rowsᵀ X columns, or rows X columnsᵀ if `back`.

    The factors are (*tasks, count, n, n) by side, and X is (*tasks, count, n, k) or
    (*tasks, features, count, n, k).
    """
    for side, factor in factors.items():
        if x.dim() > factor.dim():
            factor = factor.unsqueeze(-4)
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
