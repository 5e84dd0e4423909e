"""Finds geodesics of sublevel sets: shortest paths from θ_a to θ_b along which F ≤ λ(s)."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from geodesic.arguments import (
    Level,
    check_initial_path,
    check_pairs,
    describe,
    errors_of_points,
    set_level,
)
from geodesic.device import makes_tensors_on_cpu
from geodesic.dss import StringSampling, sample_strings
from geodesic.level_set import Samples, SublevelSet
from geodesic.path import chord, length, refine, resample
from geodesic.shortening import join, shorten

# Samples on the chord, and on each segment of a path while it is shortened and when it is
# certified. Shortening also covers the gaps between its samples (see SublevelSet.sample). A path
# that the finer certificate refuses is shortened once more on the certificate's samples.
CHORD_SAMPLES = 64
SHORTENING_SAMPLES = 4
CERTIFICATE_SAMPLES = 16
# Coordinates of the paths shortened at once. Memory holds a few dozen times as many numbers.
AT_ONCE = 2**24
# Heights of sideways bulges over the length of the chord, tried in turn if no start is feasible.
BULGES = (0.1, 0.5)
# The last resort. A step of Adam moves a bead by about a hundredth of the chord.
STRINGS = StringSampling(insertion="midpoint", max_depth=4, learning_rate=0.01, max_steps=200)


@dataclass
class Geodesic:
    """A path and its certificate.

    `find_geodesics` returns one object for a batch: each field has a leading dimension of pairs.

    Attributes:
        path: ``(num_segments + 1, d)``, from exactly θ_a to exactly θ_b.
        length: |γ|. If the path is certified, this is an upper bound on the geodesic's length.
        normalized_length: |γ| / |θ_a - θ_b|; it is exactly 1 for the chord.
        max_loss: the largest F among the dense samples.
        certified: whether the path passes the test that F is finite and F - λ(s) is at most min(tol
            · max(1, |λ|), |λ| / 1000), with tol = 1e-9 in float64 and 1e-6 in float32. The test
            covers the dense samples of every segment, 8 more around the largest sample of each
            segment and around gaps between samples in which a crest may hide, the knots of a
            `LevelProfile`, and estimated maxima between samples. False means that the search found
            no path that passes, not that none exists. If the level is near zero, rounding errors
            may exceed a thousandth of it; use float64 then. If the loss jumps, samples may miss a
            part above the level.
        chord_feasible: whether the chord is certified. The geodesic is then the chord.
        level: λ(0).
        loss_evaluations: the number of points at which F alone was computed.
        gradient_evaluations: the number of points at which F and its gradient were computed.
        iterations: the number of quadratic programs solved; 0 for the chord.
        residual: the H¹ norm of the last projected gradient, divided by the length. It is about
            √(2r) if the path could still be shortened by a share r of its length, 0 for the chord,
            and inf if the path is an initial path that was not shortened.
        error: why the pair was not searched, or "" if it was.
    """

    path: Tensor
    length: float | Tensor
    normalized_length: float | Tensor
    max_loss: float | Tensor
    certified: bool | Tensor
    chord_feasible: bool | Tensor
    level: float | Tensor
    loss_evaluations: int | Tensor
    gradient_evaluations: int | Tensor
    iterations: int | Tensor
    residual: float | Tensor
    error: str | list[str]


def find_geodesic(
    loss_fn: Callable[[Tensor], Tensor],
    theta_a: Tensor,
    theta_b: Tensor,
    level: Level = None,
    num_segments: int = 32,
    initial_path: Tensor | None = None,
    seed: int = 0,
) -> Geodesic:
    """Returns a short path from ``theta_a`` to ``theta_b`` in the sublevel set of ``loss_fn``.

        γ* = argmin |γ|   over γ from θ_a to θ_b with F(γ(s)) ≤ λ(s) for all s in [0, 1]

    This is `find_geodesics` for a single pair, and that function documents the arguments and the
    method. Here ``theta_a`` and ``theta_b`` are ``(d,)``, ``initial_path`` is ``(n, d)``, and the
    result's scalars are Python numbers.
    """
    for name, value in (("theta_a", theta_a), ("theta_b", theta_b)):
        if not torch.is_tensor(value) or value.ndim != 1:
            raise ValueError(
                f"{name} must be a (d,) tensor, got {describe(value)}; flatten the parameters "
                "(torch.nn.utils.parameters_to_vector), or use find_geodesics for a batch"
            )
    if torch.is_tensor(initial_path):
        initial_path = initial_path[None]
    if torch.is_tensor(level):
        level = level.reshape(-1)
    batch = find_geodesics(
        loss_fn, theta_a[None], theta_b[None], level, num_segments, initial_path, seed=seed
    )
    first = {field.name: getattr(batch, field.name)[0] for field in fields(batch)}
    return Geodesic(**{k: v if k in ("path", "error") else v.item() for k, v in first.items()})


@makes_tensors_on_cpu
def find_geodesics(
    loss_fn: Callable[..., Tensor],
    theta_a: Tensor,
    theta_b: Tensor,
    level: Level = None,
    num_segments: int = 32,
    initial_path: Tensor | None = None,
    loss_args: tuple[Tensor, ...] = (),
    seed: int = 0,
    chunk_size: int = 256,
    max_iterations: int = 60,
) -> Geodesic:
    """Returns short paths inside sublevel sets (Freeman & Bruna 2017, arXiv 1611.01540).

    All pairs are solved at once. For each pair, these steps are tried until a path is certified:

    1. The chord. If it is feasible, no path is shorter.
    2. The initial path, repaired if it exceeds the level a little, and shortened inside the set
       (see `geodesic.shortening`).
    3. Chords that bulge to a random side, pushed into the set and shortened.
    4. Dynamic String Sampling (`geodesic.dss`) for a bounded time, then shortened.

    A certified path is as short as the search can make it: a local minimum of the length among the
    paths into which its start can be deformed inside the set. It is never longer than a feasible
    initial path. If no path is certified, nothing is raised, and the path that exceeds the level
    least is returned. This also happens to a pair that has used up its budget of evaluations
    (`geodesic.level_set.BUDGET`). The budget keeps one pair from holding up the batch; it is more
    than twice what any certified pair of our studies took. A pair that cannot be searched, such as
    one with NaN, does not affect the others: its `error` says why, its path is the chord, which is
    not certified, and a warning gives the number of such pairs.

    Args:
        loss_fn: F; ``loss_fn(theta, *args)`` maps ``(d,)`` to a scalar. It must be deterministic
            and consist of operations that `torch.func.vmap` and `torch.func.grad` support.
        theta_a: ``(pairs, d)``, float32 or float64.
        theta_b: ``(pairs, d)``, of the same dtype.
        level: λ. None is F(θ_a). A float, or a tensor ``(pairs,)``, is constant along the path. A
            callable, such as `geodesic.sgd_profile` returns, maps a ``(pairs, m)`` tensor of
            arclength fractions to levels, and must not increase.
        num_segments: the number K of segments of the resulting polyline. With few segments a path
            around an obstacle is longer than the geodesic: on an arc of angle φ that takes m of the
            K segments, by about φ²/(12 m²) of its length.
        initial_path: ``(pairs, n, d)`` from θ_a to θ_b, such as a subsampled SGD trajectory. If it
            does not have K segments, it is resampled to K, and as many of its corners are kept as K
            allows.
        loss_args: tensors with a leading dimension of pairs, passed to ``loss_fn`` pair by pair.
        seed: the seed of the direction in which the chord bulges.
        chunk_size: the number of points evaluated at once; lower it if memory runs out.
        max_iterations: the largest number of quadratic programs for each pair and start.

    Raises:
        ValueError: a tensor is not on the CPU or has a wrong shape or dtype; or no pair can be
            searched, because values are not finite, θ_a equals θ_b, the initial path does not
            connect them, the level increases, or F(θ_a) or F(θ_b) exceeds the level.
    """
    counts = {"num_segments": num_segments, "chunk_size": chunk_size}
    check_pairs(theta_a, theta_b, loss_args, **counts, max_iterations=max_iterations)
    if theta_a.device.type != "cpu":
        raise ValueError(
            f"theta_a is on {theta_a.device}, but geodesics are found on CPUs only; move theta_a, "
            "theta_b, loss_args and the tensors that loss_fn closes over to the CPU"
        )
    check_initial_path(initial_path, theta_a)
    theta_a, theta_b = theta_a.detach(), theta_b.detach()
    pairs = len(theta_a)
    every = torch.arange(pairs)
    sublevel = SublevelSet(loss_fn, tuple(loss_args), pairs, chunk_size)
    distance = torch.linalg.vector_norm(theta_b - theta_a, dim=1)

    straight = chord(theta_a, theta_b, 1)
    losses = sublevel.losses(straight, max(CHORD_SAMPLES, 2 * num_segments), every)
    errors = errors_of_points(theta_a, theta_b, initial_path)
    set_level(sublevel, level, losses[:, 0, 0], losses[:, -1, -1], errors)
    good = torch.tensor([not error for error in errors])
    if not good.any():
        raise ValueError(errors[0])
    if not good.all():
        wrong = next(i for i, error in enumerate(errors) if error)
        warnings.warn(
            f"{int((~good).sum())} of {pairs} pairs are not searched, see `error`; pair {wrong}: "
            f"{errors[wrong]}",
            stacklevel=3,  # the caller of the decorated function
        )
    samples = sublevel.certify(straight, losses.shape[2] - 1, every, losses)
    samples.feasible &= good
    chord_feasible = samples.feasible.clone()
    best = _Best(chord(theta_a, theta_b, num_segments), samples)

    def bulging(rows: Tensor, size: float) -> Tensor:
        return _bulge(theta_a[rows], theta_b[rows], num_segments, size, seed)

    # Each start maps rows to paths. Only those of bulges are not feasible without shortening.
    starts: list[tuple[Callable[[Tensor], Tensor], bool]] = []
    if initial_path is not None:
        cuts = _cuts(initial_path.detach(), theta_a, theta_b, num_segments)
        starts += [(cut, True) for cut in cuts]
    starts += [(partial(bulging, size=size), False) for size in BULGES]
    starts.append((lambda rows: _strings(sublevel, loss_fn, straight, num_segments, rows), True))
    for start, may_do in starts:
        rows = (~best.certified & good & sublevel.affords(every, num_segments)).nonzero().squeeze(1)
        if len(rows) == 0 or num_segments == 1:
            break
        _search(sublevel, best, start(rows), rows, may_do, max_iterations)

    total = torch.where(chord_feasible, distance, best.length)
    ratio = torch.where(chord_feasible | (total == 0), torch.ones_like(total), total / distance)
    return Geodesic(
        path=best.path,
        length=total,
        normalized_length=ratio,
        max_loss=best.max_loss,
        certified=best.certified,
        chord_feasible=chord_feasible,
        level=sublevel.level(torch.zeros_like(distance)[:, None], every)[:, 0],
        loss_evaluations=sublevel.loss_evaluations,
        gradient_evaluations=sublevel.gradient_evaluations,
        iterations=best.iterations,
        residual=best.residual,
        error=errors,
    )


class _Best:
    """Keeps the best path of each pair, and what `Geodesic` says of its search.

    A certified path is better than one that is not. Of two certified paths the shorter is better;
    of two others, the one that exceeds the level less.
    """

    def __init__(self, path: Tensor, samples: Samples):
        self.path, self.length, self.certified = path, length(path), samples.feasible.clone()
        self.peak = samples.peak.amax(1)
        self.max_loss = samples.max_loss.clone()
        self.iterations = torch.zeros(len(path), dtype=torch.long)
        self.residual = torch.where(samples.feasible, 0.0, torch.inf).to(path)

    def update(self, rows: Tensor, path: Tensor, samples: Samples) -> Tensor:
        """Replaces paths by better ones, and returns the rows that changed."""
        new_length, new_peak = length(path), samples.peak.amax(1)
        better = torch.where(
            samples.feasible,
            ~self.certified[rows] | (new_length < self.length[rows]),
            ~self.certified[rows] & (new_peak < self.peak[rows]),
        )
        rows = rows[better]
        self.path[rows], self.length[rows] = path[better], new_length[better]
        self.certified[rows], self.peak[rows] = samples.feasible[better], new_peak[better]
        self.max_loss[rows] = samples.max_loss[better]
        return rows


def _search(
    sublevel: SublevelSet, best: _Best, first: Tensor, rows: Tensor, may_do: bool, limit: int
) -> None:
    """Shortens paths, and puts those that are better into `best`.

    Args:
        sublevel: the sublevel sets of all pairs.
        best: the best paths so far.
        first: the paths that the search starts from, (rows, K + 1, d).
        rows: the numbers of their pairs.
        may_do: whether these paths may be feasible without shortening.
        limit: the largest number of quadratic programs for each pair.
    """
    path, left, most = first, rows, limit
    for per_segment in (SHORTENING_SAMPLES, CERTIFICATE_SAMPLES):
        if len(left) == 0:
            break
        strict = per_segment == CERTIFICATE_SAMPLES
        blocks = torch.arange(len(left)).split(max(1, AT_ONCE // path[0].numel()))
        found = join(
            [shorten(sublevel, path[b], left[b], per_segment, most, strict) for b in blocks]
        )
        best.iterations[left] += found.iterations
        best.residual[left] = found.residual
        best.update(left, found.path, sublevel.certify(found.path, CERTIFICATE_SAMPLES, left))
        refused = found.feasible & ~best.certified[left]
        left, path, most = left[refused], found.path[refused], max(1, limit // 4)
    if may_do:
        # Shortening lowers the energy. With uneven beads that need not lower the length.
        unused = (best.length[rows] > length(first)) | ~best.certified[rows]
        left = rows[unused]
        if len(left):
            samples = sublevel.certify(first[unused], CERTIFICATE_SAMPLES, left)
            best.residual[best.update(left, first[unused], samples)] = torch.inf


def _cuts(
    given: Tensor, theta_a: Tensor, theta_b: Tensor, num_segments: int
) -> list[Callable[[Tensor], Tensor]]:
    """Returns functions that cut the given paths of some rows into segments, in different ways."""
    if given.shape[1] == num_segments + 1:
        cuts = [lambda path: path]  # given[rows] is a copy already
    else:  # even beads are easier to shorten
        cuts = [partial(resample, num_segments=num_segments)]
        if given.shape[1] <= num_segments:
            cuts.insert(0, lambda path: torch.stack([refine(p, num_segments) for p in path]))

    def between_ends(rows: Tensor, cut: Callable[[Tensor], Tensor]) -> Tensor:
        path = cut(given[rows])
        path[:, 0], path[:, -1] = theta_a[rows], theta_b[rows]
        return path

    return [partial(between_ends, cut=cut) for cut in cuts]


def _strings(
    sublevel: SublevelSet, loss_fn: Callable, ends: Tensor, num_segments: int, rows: Tensor
) -> Tensor:
    """Returns strings found by DSS, cut into segments.

    Parameters are scaled by the chord, so that the step size does not depend on their units.
    """
    ends, arguments = ends[rows], tuple(argument[rows] for argument in sublevel.loss_args)
    # A power of two, by which multiplication and division are exact.
    unit = ends.diff(dim=1).square().mean((1, 2)).sqrt().log2().round().exp2()
    found = sample_strings(
        lambda x, unit, *args: loss_fn(x * unit, *args),
        *(ends / unit[:, None, None]).unbind(1),
        lambda s: sublevel.level(s, rows),
        STRINGS,
        (unit, *arguments),
        chunk_size=sublevel.chunk_size,
    )
    sublevel.loss_evaluations[rows] += found.loss_evaluations
    sublevel.gradient_evaluations[rows] += found.gradient_evaluations
    paths = torch.stack([refine(path, num_segments) for path in found.paths])
    paths = paths * unit[:, None, None]
    paths[:, [0, -1]] = ends
    return paths


def _bulge(theta_a: Tensor, theta_b: Tensor, num_segments: int, size: float, seed: int) -> Tensor:
    """Returns the chord plus size·|θ_b - θ_a|·sin(πs) along a random direction orthogonal to it."""
    generator = torch.Generator().manual_seed(seed)
    # One draw, in float64, serves all pairs, so a pair's result does not depend on its batch.
    draw = torch.randn(theta_a.shape[1], generator=generator, dtype=torch.float64).to(theta_a)
    span = theta_b - theta_a
    unit = torch.nn.functional.normalize(span, dim=1)
    across = torch.nn.functional.normalize(draw - (unit @ draw)[:, None] * unit, dim=1)
    if theta_a.shape[1] == 1:
        across = torch.zeros_like(across)  # in one dimension nothing is orthogonal to the chord
    path = chord(theta_a, theta_b, num_segments)
    s = torch.linspace(0, 1, num_segments + 1).to(path)[1:-1]
    height = size * torch.linalg.vector_norm(span, dim=1)[:, None] * (torch.pi * s).sin()
    path[:, 1:-1] += height[..., None] * across[:, None]
    return path
