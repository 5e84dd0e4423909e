"""Checks the arguments of `find_geodesics`.

A mistake in the call raises an error. A mistake in one pair is recorded as the error of that pair,
so that the other pairs are still solved.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from geodesic.level_set import TOLERANCE, SublevelSet, allowance

Level = float | Tensor | Callable[[Tensor], Tensor] | None


def errors_of_points(theta_a: Tensor, theta_b: Tensor, initial_path: Tensor | None) -> list[str]:
    """Returns what is wrong with the points of each pair, "" where nothing is."""
    errors = []
    for i, (a, b) in enumerate(zip(theta_a, theta_b, strict=True)):
        error = ""
        for name, value in (("theta_a", a), ("theta_b", b)):
            if not value.isfinite().all():
                error = (
                    error or f"{name} must be finite, got inf or nan; drop pairs of a diverged run"
                )
        if torch.equal(a, b):
            error = (
                error or "theta_b must differ from theta_a; drop pairs of a run that does not move"
            )
        if initial_path is not None and not error:
            error = _error_of_start(a, b, initial_path[i])
        errors.append(error)
    return errors


def _error_of_start(theta_a: Tensor, theta_b: Tensor, initial_path: Tensor) -> str:
    """Returns what is wrong with the initial path of one pair, "" if nothing is."""
    if not initial_path.isfinite().all():
        return "initial_path must be finite, got inf or nan; drop pairs of a diverged run"
    for name, end, point in (("theta_a", theta_a, 0), ("theta_b", theta_b, -1)):
        gap = (initial_path[point] - end).abs().amax().item()
        if gap > 1e-5 * max(1.0, end.abs().amax().item()):
            return (
                f"initial_path must start at theta_a and end at theta_b, got a gap of {gap} to "
                f"{name}; add both end points to the subsampled trajectory"
            )
    return ""


def set_level(
    sublevel: SublevelSet, level: Level, start_loss: Tensor, end_loss: Tensor, errors: list[str]
) -> None:
    """Sets the level of `sublevel`, and records in `errors` what is wrong with it for each pair."""
    pairs = len(start_loss)
    if level is None:
        level = start_loss
    elif not callable(level):
        level = constant_level(level, start_loss)
    sublevel.set_level(level)
    s = torch.linspace(0, 1, 257).to(start_loss).expand(pairs, -1)
    try:
        values = sublevel.level(s, torch.arange(pairs))
    except Exception as error:
        raise ValueError(
            f"level must map a ({pairs}, m) tensor of fractions to levels, got {error!r}; write it "
            "with tensor operations, or use a LevelProfile with one profile for each pair"
        ) from error
    allowed = allowance(values)
    for i, (a, b) in enumerate(zip(start_loss.tolist(), end_loss.tolist(), strict=True)):
        errors[i] = errors[i] or _error_of_level(a, b, values[i], allowed[i])


def constant_level(level: float | Tensor, like: Tensor) -> Tensor:
    """Returns λ ``(pairs,)`` with the dtype and device of ``like`` ``(pairs, ...)``."""
    try:
        level = torch.as_tensor(level, dtype=like.dtype, device=like.device).detach()
        if level.ndim > 1:
            raise ValueError
        return level.expand(len(like))
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"level must be a number, a tensor ({len(like)},) of one for each pair, or a callable, "
            f"got {describe(level)}; for a level that falls along the path use LevelProfile"
        ) from None


def _error_of_level(start_loss: float, end_loss: float, values: Tensor, allowed: Tensor) -> str:
    """Returns what is wrong with the level of one pair, "" if nothing is."""
    ends = (("theta_a", start_loss, 0, 0), ("theta_b", end_loss, -1, 1))
    for name, loss, _, _ in ends:
        if not math.isfinite(loss):
            return (
                f"loss_fn({name}) must be finite, got inf, -inf or nan; drop pairs of a diverged "
                "run"
            )
    if not values.isfinite().all():
        return f"level must be finite, got {values[0].item()}; use None for F(theta_a)"
    rise = values.diff() - allowed[1:]
    if (rise > 0).any():
        k = int((rise > 0).nonzero()[0])
        return (
            f"level must not increase in s, got {values[k].item()} at s = {k / 256:.3f} and "
            f"{values[k + 1].item()} after it; LevelProfile makes it monotone"
        )
    for name, loss, k, end in ends:
        if loss > values[k] + allowed[k]:
            return (
                f"level must be at least F({name}) = {loss} at s = {end}, got {values[k].item()}; "
                "the usual level is F(theta_a), with theta_b the later, lower point"
            )
    return ""


def check_pairs(theta_a, theta_b, loss_args, **counts) -> None:
    """Raises ValueError for pairs, loss_args or counts of a wrong shape, dtype or value."""
    for name, value in (("theta_a", theta_a), ("theta_b", theta_b)):
        if not torch.is_tensor(value) or value.ndim != 2 or 0 in value.shape:
            raise ValueError(
                f"{name} must be a non-empty (pairs, d) tensor, got {describe(value)}; "
                "use find_geodesic for one pair, or add a dimension with [None]"
            )
        if value.dtype not in TOLERANCE:
            raise ValueError(
                f"{name} must be float32 or float64, got {value.dtype}; convert it with .float(), "
                "because lower precision cannot certify a level"
            )
    if _kind(theta_b) != _kind(theta_a):
        raise ValueError(
            f"theta_b must match theta_a, {describe(theta_a)}, got {describe(theta_b)}; "
            "convert with theta_b.to(theta_a)"
        )
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{name} must be a positive integer, got {value!r}; leave it out for the default"
            )
    for argument in loss_args:
        if not torch.is_tensor(argument) or argument.shape[:1] != theta_a.shape[:1]:
            raise ValueError(
                f"loss_args must be tensors with a leading dimension of {len(theta_a)} pairs, got "
                f"{describe(argument)}; let loss_fn close over what all pairs share"
            )


def check_initial_path(initial_path, theta_a) -> None:
    """Raises ValueError for an initial path of a wrong shape, dtype or device."""
    if initial_path is not None and (
        not torch.is_tensor(initial_path)
        or initial_path.ndim != theta_a.ndim + 1
        or initial_path.shape[1] < 2
        or initial_path.shape[::2] != theta_a.shape
        or _kind(initial_path)[1:] != _kind(theta_a)[1:]
    ):
        raise ValueError(
            "initial_path must have n ≥ 2 points for each pair, of the dimension, dtype and device "
            f"of theta_a, {describe(theta_a)}, got {describe(initial_path)}; include both ends"
        )


def _kind(value: Tensor) -> tuple:
    return value.shape, value.dtype, value.device


def describe(value) -> str:
    """Returns shape, dtype and device of a tensor for an error message, else the repr."""
    if torch.is_tensor(value):
        return f"{tuple(value.shape)} {value.dtype} on {value.device}"
    return repr(value)
