"""Averages of gradients, their scale, and the moments of a tensor that the network is told."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from learned_opt.rules.basis import rescaled
from learned_opt.rules.layout import Chunk, State
from learned_opt.rules.steps import as_tensor

BETAS = (0.5, 0.9, 0.99)  # momenta: a few steps, Adam's, and one that averages out noise
BETA_V = 0.99  # second moment
RATES = tuple((beta,) for beta in (*BETAS, BETA_V))
DIRECTIONS = 1 + len(BETAS)
EPS = 1e-12  # below any gradient that matters, so that the rule is independent of the loss's scale
CLIP = 1.5  # gradients are clipped to so many times their usual RMS, so that outliers do no harm
FALLEN = 30.0  # averages are rescaled when gradients fall, all at once, to less than r̄ over this
PAST = 8  # for about so many steps
RECENT = "recent_gradient"  # of State.tensor, the largest RMS(g) in the last and this PAST steps


def clip(rms: Tensor, state: State, most: float = CLIP) -> Tensor:
    """Returns the factor that clips each tensor's gradient, (*tasks, tensors).

    It is min(1, most · r̄ / RMS(g)) with the r̄ of the step before.
    """
    usual = state.tensor["gradient_rms"].squeeze(-2)
    left = (most * usual / rms.clamp(min=EPS)).clamp(max=1)
    return torch.where(usual > 2 * EPS, left, 1)  # before a first gradient r̄ is unknown


def rescale(rows: Tensor, size: Tensor, state: State) -> State:
    """Brings averages to the scale of gradients that have fallen all at once, `rows` in place.

    That is so after a first gradient that was far too large, or if the loss is rescaled. The
    averages would remember the old scale for hundreds of steps, with steps of almost nothing.
    Gradients that fall little by little, as those of a net that has learned its data by heart,
    do not count: their steps should become small.

    Args:
        rows: a row that is not used here, the averages and r, (*tasks, 5, d).
        size: RMS(g) of each tensor, (*tasks, tensors).
        state: the state before this step.
    """
    before, now = state.tensor[RECENT].unbind(-2)
    usual, turn = state.tensor["gradient_rms"].squeeze(-2), as_tensor(state.step, size) % PAST
    before, now = torch.where(turn == 0, now, before), torch.where(turn == 0, 0, now)
    now = torch.maximum(now, size)
    sudden = (now > 0) & (torch.minimum(before, usual) > FALLEN * now)
    fallen = sudden & (turn == PAST - 1)
    kept = {RECENT: torch.stack([before, now], -2)}
    if torch.compiler.is_compiling() or size.device.type != "cpu" or fallen.any():
        share = torch.where(fallen, now / usual, 1)
        rows[..., 1:, :] *= state.layout.expand(share).unsqueeze(-2)
        names = ("peak_gradient", "gradient_rms")
        kept |= {name: state.tensor[name] * share.unsqueeze(-2) for name in names}
        state = replace(state, matrix=rescaled(state.matrix, share.square()))
    return replace(state, tensor=state.tensor | kept)


def average(
    row: Tensor, g: Tensor, weights: Tensor, floor: Tensor, louder: Tensor | None, compiling: bool
) -> Tensor:
    """Returns the rows [g, m̂, r] (*, 5, n, size) after a step with the gradient g (*, n, size).

    Unless `compiling`, `row` is updated in place and must contain g already. The gradient of which
    r takes the average is `louder` times g, with a number of each tensor, (*, n, 1); None is 1.
    """
    g, m, r = g.unsqueeze(-3), row[..., 1:-1, :, :], row[..., -1:, :, :]
    squares = g * g if louder is None else (g * louder.unsqueeze(-3)).square_()
    if compiling:  # the compiler fuses this into one loop, but not writes to views
        m = m.lerp(g, weights[:-1])
        r = r.square().lerp(squares, weights[-1:]).sqrt().maximum(floor.unsqueeze(-3))
        return torch.cat([g, m, r], -3)
    m.lerp_(g, weights[:-1])
    r.square_().lerp_(squares, weights[-1:]).sqrt_().clamp_(min=floor.unsqueeze(-3))
    return row


def add_moments(sums: Tensor, chunk: Chunk, row: Tensor, params: Tensor) -> None:
    """Adds ⟨m̂_j/r, m̂_k/r⟩ and the squares of g, r and θ to `sums` (*, tensors, 16 + 3).

    The rows [g, m̂, r] are (*, 5, n, size), and params (*, n, size).
    """
    gram, squares = sums.split([DIRECTIONS**2, 3], -1)
    gram, squares = gram.unflatten(-1, (DIRECTIONS, DIRECTIONS)), squares.mT
    normed = row[..., :-1, :, :] / row[..., -1:, :, :]
    for (own, directions), (_, new), (_, theta) in zip(
        *map(chunk.parts, (normed, row, params)), strict=True
    ):
        gram[..., own, :, :].add_(_gram(directions))
        ends = new[..., ::DIRECTIONS, :, :]  # g and r
        squares[..., :-1, own].add_(torch.linalg.vecdot(ends, ends))
        squares[..., -1, own].add_(torch.linalg.vecdot(theta, theta))


def _gram(normal: Tensor) -> Tensor:
    """Returns ⟨m̂_j/r, m̂_k/r⟩, (*, n, 4, 4), of m̂_k/r (*, 4, n, size)."""
    normal = normal.movedim(-2, -3)
    if not torch.compiler.is_compiling():
        return normal @ normal.mT
    rows = normal.unbind(-2)
    products = {
        (i, j): (rows[i] * rows[j]).sum(-1) for j in range(DIRECTIONS) for i in range(j + 1)
    }
    lines = [[products[min(i, j), max(i, j)] for j in range(DIRECTIONS)] for i in range(DIRECTIONS)]
    return torch.stack([torch.stack(line, -1) for line in lines], -2)


def normal(rows: Tensor) -> Tensor:
    """Returns m̂_k/r (*, 4, n) from rows [m̂_k, r] (*, 5, n)."""
    return rows[..., :-1, :] / rows[..., -1:, :]
