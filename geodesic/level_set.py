"""Evaluates and certifies whether a path stays in the sublevel set Ω_λ = {θ : F(θ) ≤ λ(s)}.

The level is constant (Freeman & Bruna 2017, arXiv 1611.01540) or falls along the path: then λ(s) is
non-increasing in the arclength fraction s, from at least F(θ_a) to at least F(θ_b).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from geodesic.device import makes_tensors_on_cpu
from geodesic.path import fractions, points_at, segment_lengths, subdivide

# The budget of the search for one pair, in evaluations of F per segment of its path. A gradient
# counts as three. Hard problems that end certified take up to 1600.
BUDGET, GRADIENT_COST = 4000, 3
# Extra evaluations of F around the largest sample of each segment, see `certify`.
REFINEMENT = 8
# How often the search for a crest between samples narrows its cell, by REFINEMENT points each time.
ZOOMS = 3
# A path with a segment longer than this many mean lengths is also sampled evenly in arclength.
LONG_SEGMENT = 2
# Samples of each segment between recorded iterates in `sgd_profile`, as many as in the certificate.
PROFILE_SAMPLES = 16
# The dtypes in which a level can be certified, see `allowance`. 1e-6 is 16 float32 rounding units.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}
# The largest share of a level by which F may exceed it, however close the level is to zero.
LARGEST_SHARE = 1e-3


def allowance(level: Tensor) -> Tensor:
    """Returns by how much F may exceed the levels λ (of any shape) and still count as inside.

        min(tol · max(1, |λ|), |λ| / 1000)        tol = 1e-9 in float64, 1e-6 in float32

    The first term is the rounding error of a loss whose terms are of size one, or of the size of
    the level. For a level near zero that may be too much, because the terms of the loss may be as
    small as the level, which the level alone does not tell. The second term therefore limits the
    allowance to a thousandth of the level. A level of zero allows nothing.
    """
    size = level.abs()
    return torch.minimum(TOLERANCE[level.dtype] * size.clamp_min(1), LARGEST_SHARE * size)


def check_loss(loss: object) -> Tensor:
    """Returns ``loss``, what F returned, or raises if it is not a scalar that can be certified."""
    if not torch.is_tensor(loss) or loss.dtype not in TOLERANCE:
        got = loss.dtype if torch.is_tensor(loss) else f"a {type(loss).__name__}"
        raise ValueError(
            f"loss_fn must return a float32 or float64 tensor, got {got}; compute the loss with "
            "torch operations on theta, in its dtype, and return it"
        )
    if loss.ndim:
        raise ValueError(
            f"loss_fn must return a scalar, got shape {tuple(loss.shape)}; sum it or average it "
            "(give a torch loss reduction='mean')"
        )
    return loss


class LevelProfile:
    """A level that falls along the path, linear between knots, with one profile for each pair.

    Args:
        values: ``(m,)`` or ``(pairs, m)`` levels at the knots. If they increase anywhere, they are
            raised by a running maximum from the far end, λ_k = max_{j ≥ k} values_j. No level is
            lowered, so a path that is feasible for the values stays feasible.
        fractions: the arclength fractions of the knots, of the same shape, non-decreasing from 0 to
            1. None spaces them evenly.

    Raises:
        ValueError: a shape is wrong, a value is not finite, or the knots are out of order.
    """

    def __init__(self, values: Tensor, fractions: Tensor | None = None):
        if not torch.is_tensor(values) or values.ndim not in (1, 2) or values.shape[-1] < 2:
            raise ValueError(
                f"values must be a tensor (m,) or (pairs, m) with m ≥ 2, got "
                f"{tuple(values.shape) if torch.is_tensor(values) else values!r}; give one level "
                "for each knot, or pass a float as the level itself if it does not fall"
            )
        values = values.detach().reshape(-1, values.shape[-1])
        if not values.isfinite().all():
            raise ValueError("values must be finite; drop the points where the loss diverged")
        if fractions is None:
            fractions = torch.linspace(
                0, 1, values.shape[1], dtype=values.dtype, device=values.device
            ).expand(values.shape)
        fractions = fractions.detach().reshape(-1, fractions.shape[-1])
        if (
            fractions.shape != values.shape
            or not (fractions.diff(dim=1) >= 0).all()
            or not ((fractions[:, 0] == 0) & (fractions[:, -1] == 1)).all()
        ):
            raise ValueError(
                f"fractions must rise from 0 to 1 in the shape of values {tuple(values.shape)}, "
                f"got shape {tuple(fractions.shape)}; geodesic.path.fractions gives those of a path"
            )
        self.values = values.flip(1).cummax(1).values.flip(1)
        self.fractions = fractions.contiguous()

    def __call__(self, s: Tensor) -> Tensor:
        """Returns λ(s) at fractions ``(pairs, k)``; one profile serves any number of pairs."""
        shape = (s.shape[0], self.values.shape[1])
        values, knots = self.values.expand(shape), self.fractions.expand(shape).contiguous()
        s = s.to(knots.dtype).contiguous()
        cell = torch.searchsorted(knots, s, right=True).sub(1).clamp(0, shape[1] - 2)
        left, right = knots.gather(1, cell), knots.gather(1, cell + 1)
        weight = ((s - left) / (right - left).clamp_min(torch.finfo(s.dtype).tiny)).clamp(0, 1)
        return torch.lerp(values.gather(1, cell), values.gather(1, cell + 1), weight)


@makes_tensors_on_cpu
def sgd_profile(
    loss_fn: Callable[..., Tensor],
    trajectory: Tensor,
    loss_args: tuple[Tensor, ...] = (),
    chunk_size: int = 256,
) -> LevelProfile:
    """Returns SGD's own loss along its trajectory as a level, below which the trajectory stays.

        λ(s_k) = max over j ≥ k - 1 of F(γ(s_j)) + ¼ max(0, -Δ²F(γ(s_j))),    λ(1) = F(θ_b)

    Here γ is the polyline through the recorded iterates, and s_j are the arclength fractions of 16
    even samples of each of its segments. The running maximum holds the level up to the height of
    any later bump, so λ(0) is F(θ_a) unless SGD climbed above it. Two margins keep F below λ
    between the samples as well. First, the index j starts one sample early. Second, the term with
    the second difference Δ² is twice the height by which a parabola through three samples rises
    above them. Without these margins the trajectory would exceed its own level, because F is often
    concave between iterates.

    Args:
        loss_fn: F, ``loss_fn(theta, *args)``, as for `geodesic.find_geodesics`.
        trajectory: ``(n, d)`` or ``(pairs, n, d)``, from θ_a to θ_b.
        loss_args: tensors with a leading dimension of pairs.
        chunk_size: the number of points evaluated at once.

    Raises:
        ValueError: the trajectory has a wrong shape, or F is not finite on it.
    """
    if trajectory.ndim not in (2, 3) or trajectory.shape[-2] < 2:
        raise ValueError(
            f"trajectory must be (n, d) or (pairs, n, d) with n ≥ 2, got {tuple(trajectory.shape)};"
            " include both ends"
        )
    path = trajectory.detach().reshape(-1, *trajectory.shape[-2:])
    sublevel = SublevelSet(loss_fn, tuple(loss_args), len(path), chunk_size)
    losses = sublevel.losses(path, PROFILE_SAMPLES, torch.arange(len(path)))
    losses = torch.cat((losses[..., :-1].flatten(1), losses[:, -1, -1:]), dim=1)
    bulge = torch.nn.functional.pad(-losses.diff(n=2, dim=1), (1, 1)).clamp_min(0) / 4
    values = torch.cat((losses[:, :1], (losses + bulge)[:, :-1]), dim=1)
    values[:, -1] = losses[:, -1]
    return LevelProfile(values, fractions(subdivide(path, PROFILE_SAMPLES)))


@dataclass
class Samples:
    """Dense samples of paths: n + 1 on each of K segments, ends included."""

    losses: Tensor  # (rows, K, n + 1)
    excess: Tensor  # (rows, K, 4n + 1): F - λ(s), with F interpolated by parabolas between samples
    peak: Tensor  # (rows, K): the largest excess on each segment, also between the samples
    inner: Tensor  # (rows, K): the largest excess on each segment without its beads
    max_loss: Tensor  # (rows,): the largest F that was computed
    feasible: Tensor  # (rows,): peak ≤ allowance(λ) on every segment


class SublevelSet:
    """Evaluates F and λ for a batch of pairs, counts the evaluations, and certifies paths.

    ``rows`` is always a long tensor with the numbers of the pairs to which a batch of points or
    fractions belongs. At most ``chunk_size`` points are evaluated at once, which bounds the memory.
    """

    def __init__(
        self, loss_fn: Callable[..., Tensor], loss_args: tuple, num_pairs: int, chunk_size: int
    ):
        self.loss_args, self.chunk_size = loss_args, chunk_size
        unbatched = (0, *(None for _ in loss_args))

        def checked(*arguments: Tensor) -> Tensor:
            return check_loss(loss_fn(*arguments))

        self._loss = vmap(vmap(checked, unbatched, chunk_size=chunk_size))
        self._gradient = vmap(vmap(grad_and_value(checked), unbatched, chunk_size=chunk_size))
        self.loss_evaluations = torch.zeros(num_pairs, dtype=torch.long)
        self.gradient_evaluations = torch.zeros(num_pairs, dtype=torch.long)
        self._level: Callable[[Tensor], Tensor]

    def set_level(self, level: Tensor | Callable[[Tensor], Tensor]) -> None:
        """Sets λ: constants ``(pairs,)``, or a callable from fractions ``(pairs, k)`` to levels."""
        self._level = level if callable(level) else lambda s: level[:, None].expand_as(s)

    def level(self, s: Tensor, rows: Tensor) -> Tensor:
        """Returns λ at fractions ``(rows, k)``."""
        every = s.new_zeros(len(self.loss_evaluations), s.shape[1])
        every[rows] = s
        level = torch.as_tensor(self._level(every), dtype=s.dtype, device=s.device)
        return level.expand_as(every)[rows]

    def slope(self, s: Tensor, rows: Tensor, width: float) -> Tensor:
        """Returns dλ/ds by differences over ``width`` to either side, one-sided at the ends."""
        low, high = (s - width).clamp_min(0), (s + width).clamp_max(1)
        return (self.level(high, rows) - self.level(low, rows)) / (high - low)

    def affords(self, rows: Tensor, num_segments: int) -> Tensor:
        """Which of the pairs have not used up what a search may cost, ``(rows,)``."""
        spent = self.loss_evaluations + GRADIENT_COST * self.gradient_evaluations
        return spent[rows] < BUDGET * num_segments

    def _chunks(self, points_per_row: int, count: int):
        yield from torch.arange(count).split(max(1, self.chunk_size // points_per_row))

    def _arguments(self, rows: Tensor) -> list:
        return [argument[rows] for argument in self.loss_args]

    def gradients(self, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns F ``(rows, m)`` and its gradients ``(rows, m, d)`` at points ``(rows, m, d)``."""
        self.gradient_evaluations.index_add_(0, rows, torch.full_like(rows, points.shape[1]))
        parts = [
            self._gradient(points[part], *self._arguments(rows[part]))
            for part in self._chunks(points.shape[1], len(rows))
        ]
        gradients, losses = (torch.cat(kind) for kind in zip(*parts, strict=True))
        return losses, gradients

    def losses(self, path: Tensor, per_segment: int, rows: Tensor) -> Tensor:
        """Returns F at every sample of the paths, ``(rows, K, n + 1)``; inf where not finite."""
        count = (path.shape[1] - 1) * per_segment + 1
        losses = self._evaluate(lambda part: subdivide(path[part], per_segment), count, rows)
        return losses.unfold(1, per_segment + 1, per_segment)

    def _evaluate(self, points: Callable[[Tensor], Tensor], count: int, rows: Tensor) -> Tensor:
        """Returns F ``(rows, count)``; ``points`` maps part of the rows to ``(part, count, d)``."""
        self.loss_evaluations.index_add_(0, rows, torch.full_like(rows, count))
        parts = [
            self._loss(points(part), *self._arguments(rows[part]))
            for part in self._chunks(count, len(rows))
        ]
        losses = torch.cat(parts)
        # -inf counts as outside, as NaN does: the loss has left its domain.
        return losses.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)

    def sample(
        self, path: Tensor, per_segment: int, rows: Tensor, losses: Tensor | None = None
    ) -> Samples:
        """Returns dense samples of paths ``(rows, K + 1, d)`` and whether they are feasible.

        The peak of a segment is the largest excess of its samples, or the maximum of the parabola
        through neighboring samples if that is larger, so that maxima between samples count.
        """
        if losses is None:
            losses = self.losses(path, per_segment, rows)
        knots, fine = fractions(path), _refine(losses)
        t = torch.linspace(0, 1, fine.shape[-1], dtype=path.dtype, device=path.device)
        s = torch.lerp(knots[:, :-1, None], knots[:, 1:, None], t)
        level = self.level(s.flatten(1), rows).view_as(s)
        excess = fine - level
        # Across a kink of λ the parabola is meaningless; there the fine samples of λ are exact.
        smooth = level.diff(n=2).abs() <= fine.diff(n=2).abs()
        inner = torch.where(smooth, _vertex(excess)[1], excess[..., 1:-1]).amax(-1)
        peak = torch.maximum(excess.amax(-1), inner)
        feasible = (peak <= self._allowed(level)).all(-1)
        return Samples(losses, excess, peak, inner, losses.amax((1, 2)), feasible)

    @staticmethod
    def _allowed(level: Tensor) -> Tensor:
        """Returns by how much F may exceed the levels ``(rows, K, ...)``, ``(rows, K)``."""
        return allowance(level).amin(-1)

    def certify(
        self, path: Tensor, per_segment: int, rows: Tensor, losses: Tensor | None = None
    ) -> Samples:
        """Returns what `sample` does, after more evaluations where F - λ may peak.

        F is evaluated

        - between the samples around the largest of each segment;
        - where the lines through the samples on either side of a cell meet above λ, as at the crest
          of a loss without a gradient, in ever smaller cells;
        - at the knots of λ if it has any, as a `LevelProfile` does;
        - evenly in arclength, if a segment is much longer than the mean. The samples of a long
          segment are far apart, and shortening would find the gaps and move a wall into one.
        """
        found = self.sample(path, per_segment, rows, losses)
        knots = fractions(path)
        near = found.excess[..., ::4].argmax(-1).clamp(1, per_segment - 1)
        steps = torch.linspace(0, 1, REFINEMENT + 2).to(path)
        # (rows, K, REFINEMENT + 2), the ends known
        t = (near[..., None] + torch.linspace(-1, 1, REFINEMENT + 2).to(path)) / per_segment

        def level_at(t: Tensor) -> Tensor:
            s = torch.lerp(knots[:, :-1, None], knots[:, 1:, None], t)
            return self.level(s.flatten(1), rows).view_as(s)

        def points(part: Tensor) -> Tensor:
            start, step = path[part, :-1, None], path[part].diff(dim=1)[:, :, None]
            return (start + t[part, :, 1:-1, None] * step).flatten(1, 2)

        level = level_at(t[..., 1:-1])
        losses = self._evaluate(points, level[0].numel(), rows).view_as(level)
        over, allowed = losses - level, self._allowed(level)
        excess, max_loss = over.amax(-1), torch.maximum(found.max_loss, losses.amax((1, 2)))

        beside = found.excess[..., ::4].gather(-1, torch.stack((near - 1, near + 1), -1))
        values = torch.cat((beside[..., :1], over, beside[..., 1:]), dim=-1)
        hidden = torch.ones_like(near, dtype=torch.bool)
        for _ in range(ZOOMS):
            cell, height = _crest(values)
            hidden &= (height > allowed) & (excess <= allowed)
            if not hidden.any():
                break
            ends = torch.stack((cell, cell + 1), -1)
            t, known = t.gather(-1, ends), values.gather(-1, ends)
            t = torch.lerp(t[..., :1], t[..., 1:], steps)
            row, segment = hidden.nonzero(as_tuple=True)
            start, end = path[row, segment], path[row, segment + 1]
            inside = torch.lerp(start[:, None], end[:, None], t[row, segment, 1:-1, None])
            losses = self._evaluate(lambda part: inside[part], REFINEMENT, rows[row])  # noqa: B023
            over = torch.full_like(t[..., 1:-1], -torch.inf)
            over[row, segment] = losses - level_at(t[..., 1:-1])[row, segment]
            values = torch.cat((known[..., :1], over, known[..., 1:]), dim=-1)
            excess = torch.maximum(excess, over.amax(-1))
            max_loss.scatter_reduce_(0, row, losses.amax(-1), "amax")

        def measure_at(which: Tensor, s: Tensor) -> None:
            """Takes F at fractions s ``(paths, m)`` of the paths `which` into account."""
            taken = lambda part: points_at(path[which[part]], s[part])  # noqa: E731
            losses = self._evaluate(taken, s.shape[1], rows[which])
            segment = torch.searchsorted(knots[which].contiguous(), s.contiguous(), right=True) - 1
            segment = segment.clamp(0, path.shape[1] - 2)
            over = losses - self.level(s, rows[which])
            excess[which] = excess[which].scatter_reduce(1, segment, over, "amax")
            max_loss[which] = torch.maximum(max_loss[which], losses.amax(1))

        at_knots = getattr(self._level, "fractions", None)
        if at_knots is not None:
            every = torch.arange(len(rows))
            measure_at(every, at_knots.expand(len(self.loss_evaluations), -1)[rows].to(path))
        lengths = segment_lengths(path)
        uneven = (lengths.amax(1) > LONG_SEGMENT * lengths.mean(1)).nonzero().squeeze(1)
        if len(uneven):
            s = torch.linspace(0, 1, lengths.shape[1] * per_segment + 1).to(path)
            measure_at(uneven, s.expand(len(uneven), -1))
        return Samples(
            found.losses,
            found.excess,
            torch.maximum(found.peak, excess),
            torch.maximum(found.inner, excess),
            max_loss,
            found.feasible & (excess <= self._allowed(level)).all(-1),
        )


def _refine(losses: Tensor) -> Tensor:
    """Returns samples ``(..., n + 1)`` with 3 interpolated values in each gap, ``(..., 4n + 1)``.

    The values are those of the parabola through the two samples and a neighbor; n must be at least
    2. The finer grid compares F with a level that bends between samples.
    """
    t = torch.arange(4, dtype=losses.dtype, device=losses.device) / 4
    bend = losses.diff(n=2)
    bend = torch.cat((bend[..., :1], bend), dim=-1)[..., None].nan_to_num(0, 0, 0)
    fine = torch.lerp(losses[..., :-1, None], losses[..., 1:, None], t) - bend * t * (1 - t) / 2
    return torch.cat((fine.flatten(-2), losses[..., -1:]), dim=-1).nan_to_num(nan=torch.inf)


def _vertex(values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns place and height of the peak of the parabola through each three neighbors.

    ``values`` is ``(..., n + 1)`` and both results are ``(..., n - 1)``. The place is in grid steps
    from the first value. Where the parabola has no peak between its outer two values, the result is
    the middle value.
    """
    before, middle, after = values[..., :-2], values[..., 1:-1], values[..., 2:]
    bend = before - 2 * middle + after
    offset = (before - after) / (2 * bend)
    peaks = (bend < 0) & (offset.abs() <= 1)
    offset = torch.where(peaks, offset, torch.zeros_like(offset))
    height = torch.where(peaks, middle - (after - before).square() / (8 * bend), middle)
    return offset + torch.arange(1, values.shape[-1] - 1).to(values), height


def _crest(values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the cell that may hide the highest crest, and the height it can have, both ``(...)``.

    The samples are ``(..., n + 1)``, on a grid of n cells. The crest of a cell is where the lines
    through the two samples to its left and the two to its right meet. The first cell has a line on
    its right alone, and the last one on its left; these bound the height of the crest.
    """
    slope = values.diff()
    rise, fall = slope[..., :-2], -slope[..., 2:]
    left, right = values[..., 1:-2], values[..., 2:-1]
    offset = (right - left + fall) / (rise + fall)  # of the crest in its cell
    meets = (rise > 0) & (fall > 0) & (offset >= 0) & (offset <= 1)
    inner = torch.where(meets, left + rise * offset, -torch.inf)
    first = values[..., 1:2] - slope[..., 1:2]
    last = values[..., -2:-1] + slope[..., -2:-1]
    height, cell = torch.cat((first, inner, last), dim=-1).nan_to_num(-torch.inf).max(-1)
    return cell, height


def worst_interior(excess: Tensor) -> Tensor:
    """Returns where in (0, 1) a segment's excess ``(..., m + 1)`` is largest off its beads."""
    return excess[..., 1:-1].argmax(-1).add(1).to(excess.dtype) / (excess.shape[-1] - 1)
