"""Geodesics of sublevel sets: the shortest path from θ_a to θ_b along which F ≤ λ(s)."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from geodesic.level_set import TOLERANCE, Samples, SublevelSet
from geodesic.path import chord, length, resample
from geodesic.shortening import shorten

# Samples on the chord, and on each segment of a path while shortened and when certified.
# Shortening also covers what lies between its samples (see SublevelSet.sample); a path that the
# finer certificate refuses is shortened once more on those samples.
CHORD_SAMPLES = 64
SHORTENING_SAMPLES = 4
CERTIFICATE_SAMPLES = 16
# Sideways bulges of the chord, over its length, tried in turn where nothing else is feasible.
BULGES = (0.1, 0.5)

Level = float | Tensor | Callable[[Tensor], Tensor] | None


@dataclass
class Geodesic:
    """A path and its certificate; `find_geodesics` adds a leading dimension of pairs to each field.

    Attributes:
        path: ``(num_segments + 1, d)``, from exactly θ_a to exactly θ_b.
        length: |γ|, an upper bound on the geodesic's if certified.
        normalized_length: |γ| / |θ_a - θ_b|, exactly 1 for the chord.
        max_loss: largest F among the dense samples.
        certified: F - λ(s) ≤ tol · max(1, |λ|) at every dense sample on the segments and at the
            estimated maximum between them; tol is 1e-9 in float64, 1e-6 in float32. False means
            that no such path was found, not that there is none.
        chord_feasible: the chord is certified; the geodesic is then the chord.
        level: λ(0).
        loss_evaluations, gradient_evaluations: points at which F, and F with its gradient, was
            computed.
        iterations: quadratic programs solved; 0 for the chord.
        residual: H¹ norm of the last projected gradient over the length: about √(2 × the share of
            the length still to gain). 0 for the chord.
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


def find_geodesic(
    loss_fn: Callable[[Tensor], Tensor],
    theta_a: Tensor,
    theta_b: Tensor,
    level: Level = None,
    num_segments: int = 32,
    initial_path: Tensor | None = None,
    seed: int = 0,
) -> Geodesic:
    """Shortest path from ``theta_a`` to ``theta_b`` inside the sublevel set of ``loss_fn``.

        γ* = argmin |γ|   over γ from θ_a to θ_b with F(γ(s)) ≤ λ(s) for all s in [0, 1]

    The same as `find_geodesics` on one pair, which see; ``theta_a`` and ``theta_b`` are ``(d,)``,
    ``initial_path`` is ``(n, d)`` and the result's scalars are Python numbers.
    """
    for name, value in (("theta_a", theta_a), ("theta_b", theta_b)):
        if not torch.is_tensor(value) or value.ndim != 1:
            raise ValueError(
                f"{name} must be a (d,) tensor, got {_describe(value)}; flatten the parameters "
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
    return Geodesic(**{k: v if k == "path" else v.item() for k, v in first.items()})


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
    """Shortest paths inside sublevel sets (Freeman & Bruna 2017, arXiv 1611.01540), many at once.

    The chord is tried first: one dense evaluation, and where it is feasible nothing is shorter.
    Else the initial path is repaired if it sticks out a little, and shortened inside the set (see
    `geodesic.shortening`). Without one, or where it cannot be repaired, a chord bulging to a random
    side is pushed into the set. That finds simple ways round only; a failure is reported, not
    raised, with the path that exceeds the level least. A certified path is never longer than a
    feasible initial one. It is a local minimum of the length, in the homotopy class of its start.

    Args:
        loss_fn: F, ``loss_fn(theta, *args)`` from ``(d,)`` to a scalar; deterministic, and made of
            operations that `torch.func.vmap` and `torch.func.grad` support.
        theta_a: ``(pairs, d)``, float32 or float64.
        theta_b: ``(pairs, d)``, same dtype.
        level: λ. None is F(θ_a); a float or a tensor ``(pairs,)`` is constant along the path; a
            callable maps a ``(pairs, m)`` tensor of arclength fractions to levels and must not
            increase, such as `geodesic.sgd_profile`.
        num_segments: K, segments of the resulting polyline. With few of them a path around an
            obstacle is longer than the geodesic, by about φ²/12m² for m segments on an arc φ.
        initial_path: ``(pairs, n, d)`` from θ_a to θ_b, such as a subsampled SGD trajectory; it is
            resampled evenly unless n = K + 1.
        loss_args: tensors with a leading dimension of pairs, handed to ``loss_fn`` pair by pair.
        seed: of the direction in which a chord is made to bulge.
        chunk_size: points evaluated at once; lower it if memory runs out.
        max_iterations: quadratic programs a pair and start.

    Raises:
        ValueError: for wrong shapes, mixed or unsupported dtypes, values that are not finite, an
            initial path that does not join the pair, and a level that increases or that θ_a or θ_b
            exceeds.
    """
    _check_arguments(
        theta_a, theta_b, num_segments, initial_path, loss_args, chunk_size, max_iterations
    )
    theta_a, theta_b = theta_a.detach(), theta_b.detach()
    pairs = len(theta_a)
    every = torch.arange(pairs)
    sublevel = SublevelSet(loss_fn, tuple(loss_args), pairs, chunk_size)
    distance = torch.linalg.vector_norm(theta_b - theta_a, dim=1)

    straight = chord(theta_a, theta_b, 1)
    losses = sublevel.losses(straight, max(CHORD_SAMPLES, 2 * num_segments), every)
    start_loss, end_loss = losses[:, 0, 0], losses[:, -1, -1]
    _set_level(sublevel, level, start_loss, end_loss)
    samples = sublevel.sample(straight, losses.shape[2] - 1, every, losses)
    best = _Best(chord(theta_a, theta_b, num_segments), samples)
    chord_feasible = samples.feasible.clone()
    iterations = torch.zeros(pairs, dtype=torch.long)
    residual = torch.where(chord_feasible, 0.0, torch.inf).to(theta_a)

    starts = []
    if initial_path is not None:
        initial_path = initial_path.detach()
        if initial_path.shape[1] != num_segments + 1:
            initial_path = resample(initial_path, num_segments)
        initial_path = torch.cat((theta_a[:, None], initial_path[:, 1:-1], theta_b[:, None]), dim=1)
        starts.append(initial_path)
    if num_segments > 1:
        starts += [_bulge(theta_a, theta_b, num_segments, size, seed) for size in BULGES]
    for start in starts:
        rows = (~best.certified).nonzero().squeeze(1)
        path, limit = start[rows], max_iterations
        for per_segment in (SHORTENING_SAMPLES, CERTIFICATE_SAMPLES):
            if len(rows) == 0 or num_segments == 1:
                break
            found = shorten(sublevel, path, rows, per_segment, limit)
            iterations[rows] += found.iterations
            residual[rows] = found.residual
            best.update(rows, found.path, sublevel.sample(found.path, CERTIFICATE_SAMPLES, rows))
            refused = found.feasible & ~best.certified[rows]
            rows, path, limit = rows[refused], found.path[refused], max(1, max_iterations // 4)

    if initial_path is not None:
        # Shortening lowers the energy, which for unevenly spaced beads need not lower the length.
        longer = best.length > length(initial_path)
        rows = (~chord_feasible & (longer | ~best.certified)).nonzero().squeeze(1)
        if len(rows):
            best.update(
                rows,
                initial_path[rows],
                sublevel.sample(initial_path[rows], CERTIFICATE_SAMPLES, rows),
            )
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
        iterations=iterations,
        residual=residual,
    )


class _Best:
    """The best path of each pair: certified before not, then the shorter, or the less violating."""

    def __init__(self, path: Tensor, samples: Samples):
        self.path, self.length, self.certified = path, length(path), samples.feasible.clone()
        self.peak = samples.peak.amax(1)
        self.max_loss = samples.losses.amax((1, 2))

    def update(self, rows: Tensor, path: Tensor, samples: Samples) -> None:
        new_length, new_peak = length(path), samples.peak.amax(1)
        better = torch.where(
            samples.feasible,
            ~self.certified[rows] | (new_length < self.length[rows]),
            ~self.certified[rows] & (new_peak < self.peak[rows]),
        )
        rows = rows[better]
        self.path[rows], self.length[rows] = path[better], new_length[better]
        self.certified[rows], self.peak[rows] = samples.feasible[better], new_peak[better]
        self.max_loss[rows] = samples.losses[better].amax((1, 2))


def _bulge(theta_a: Tensor, theta_b: Tensor, num_segments: int, size: float, seed: int) -> Tensor:
    """The chord plus size·|θ_b - θ_a|·sin(πs) along one random direction across it."""
    generator = torch.Generator().manual_seed(seed)
    # Drawn in float64 whatever the dtype, and the same for each pair: a pair's result does not
    # depend on its batch.
    draw = torch.randn(theta_a.shape[1], generator=generator, dtype=torch.float64).to(theta_a)
    span = theta_b - theta_a
    unit = torch.nn.functional.normalize(span, dim=1)
    across = torch.nn.functional.normalize(draw - (unit @ draw)[:, None] * unit, dim=1)
    if theta_a.shape[1] == 1:
        across = torch.zeros_like(across)  # a line has no side
    path = chord(theta_a, theta_b, num_segments)
    s = torch.linspace(0, 1, num_segments + 1).to(path)[1:-1]
    height = size * torch.linalg.vector_norm(span, dim=1)[:, None] * (torch.pi * s).sin()
    path[:, 1:-1] += height[..., None] * across[:, None]
    return path


def _set_level(sublevel: SublevelSet, level: Level, start_loss: Tensor, end_loss: Tensor) -> None:
    pairs, dtype = len(start_loss), start_loss.dtype
    for name, losses in (("theta_a", start_loss), ("theta_b", end_loss)):
        if not losses.isfinite().all():
            row = int((~losses.isfinite()).nonzero()[0])
            raise ValueError(
                f"loss_fn({name}) must be finite, got {losses[row].item()} for pair {row}; "
                "drop pairs from a diverged run"
            )
    if level is None:
        level = start_loss
    elif not callable(level):
        try:
            level = torch.as_tensor(level, dtype=dtype, device=start_loss.device).detach()
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"level must be None, a number, a (pairs,) tensor or a callable, got {level!r}; "
                "None means F(theta_a)"
            ) from None
        if level.ndim > 1 or level.numel() not in (1, pairs):
            raise ValueError(
                f"level must be a float or ({pairs},) for {pairs} pairs, got shape "
                f"{tuple(level.shape)}; for a level that falls along the path use LevelProfile"
            )
        level = level.expand(pairs)
    sublevel.set_level(level)
    s = torch.linspace(0, 1, 257).to(start_loss).expand(pairs, -1)
    try:
        values = sublevel.level(s, torch.arange(pairs))
    except Exception as error:
        raise ValueError(
            f"level must map a ({pairs}, m) tensor of fractions to levels, got {error!r}; write it "
            "with tensor operations, and a LevelProfile with one profile a pair"
        ) from error
    if not values.isfinite().all():
        row = int((~values.isfinite()).any(1).nonzero()[0])
        raise ValueError(
            f"level must be finite, got {values[row]} for pair {row}; None is F(theta_a)"
        )
    allowed = TOLERANCE[dtype] * values.abs().clamp_min(1)
    rise = values.diff(dim=1) - allowed[:, 1:]
    if (rise > 0).any():
        row, k = (int(i) for i in (rise > 0).nonzero()[0])
        raise ValueError(
            f"level must not increase in s, got {values[row, k].item()} at s = {k / 256:.3f} and "
            f"{values[row, k + 1].item()} after it for pair {row}; LevelProfile makes it monotone"
        )
    for name, losses, k, end in (("theta_a", start_loss, 0, 0), ("theta_b", end_loss, -1, 1)):
        above = losses > values[:, k] + allowed[:, k]
        if above.any():
            row = int(above.nonzero()[0])
            raise ValueError(
                f"level must be at least F({name}) = {losses[row].item()} at s = {end}, got "
                f"{values[row, k].item()} for pair {row}; the usual level is F(theta_a), with "
                "theta_b the later, lower point"
            )


def _check_arguments(
    theta_a, theta_b, num_segments, initial_path, loss_args, chunk_size, max_iterations
) -> None:
    for name, value in (("theta_a", theta_a), ("theta_b", theta_b)):
        if not torch.is_tensor(value) or value.ndim != 2 or 0 in value.shape:
            raise ValueError(
                f"{name} must be a non-empty (pairs, d) tensor, got {_describe(value)}; "
                "use find_geodesic for one pair, or add a dimension with [None]"
            )
        if value.dtype not in TOLERANCE:
            raise ValueError(
                f"{name} must be float32 or float64, got {value.dtype}; convert it with .float(): "
                "lower precision cannot certify a level"
            )
        if not value.isfinite().all():
            raise ValueError(f"{name} must be finite, got inf or nan; drop pairs of a diverged run")
    if theta_b.shape != theta_a.shape or theta_b.dtype != theta_a.dtype:
        raise ValueError(
            f"theta_b must match theta_a, {_describe(theta_a)}, got {_describe(theta_b)}; "
            "convert with theta_b.to(theta_a)"
        )
    for name, value in (
        ("num_segments", num_segments),
        ("chunk_size", chunk_size),
        ("max_iterations", max_iterations),
    ):
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{name} must be a positive integer, got {value!r}; 32 serves for most"
            )
    for argument in loss_args:
        if not torch.is_tensor(argument) or argument.shape[:1] != theta_a.shape[:1]:
            raise ValueError(
                f"loss_args must be tensors with a leading dimension of {len(theta_a)} pairs, got "
                f"{_describe(argument)}; close over what all pairs share"
            )
    if initial_path is None:
        return
    if (
        not torch.is_tensor(initial_path)
        or initial_path.ndim != theta_a.ndim + 1
        or initial_path.shape[1] < 2
        or initial_path.shape[::2] != theta_a.shape
        or initial_path.dtype != theta_a.dtype
    ):
        raise ValueError(
            f"initial_path must have n ≥ 2 points of each pair's dimension and dtype, beside "
            f"theta_a {_describe(theta_a)}, got {_describe(initial_path)}; include both ends"
        )
    if not initial_path.isfinite().all():
        raise ValueError(
            "initial_path must be finite, got inf or nan; drop pairs of a diverged run"
        )
    for name, end, point in (("theta_a", theta_a, 0), ("theta_b", theta_b, -1)):
        gap = (initial_path[:, point] - end).abs().amax().item()
        if gap > 1e-5 * max(1.0, end.abs().amax().item()):
            raise ValueError(
                f"initial_path must start at theta_a and end at theta_b, got a gap of {gap} to "
                f"{name}; add the end points to the subsampled trajectory"
            )


def _describe(value) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if torch.is_tensor(value) else repr(value)
