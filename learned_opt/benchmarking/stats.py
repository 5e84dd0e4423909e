"""The statistics of a benchmark: pure functions of arrays of losses, steps and scores.

Scores are (tasks, runs). A run that diverged or failed has an infinite loss. Sources:
rliable (Agarwal et al. 2021, arXiv 2108.13264), AlgoPerf (Dahl et al. 2023, arXiv 2306.07179),
Dolan & Moré 2002, VeLO (Metz et al. 2022, arXiv 2211.09760).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray
TAU_MAX = 4.0  # as in AlgoPerf, where being more than four times slower counts as a miss
PROFILE_TASKS = 5  # with fewer tasks, a profile has too few steps to be useful


def smooth(losses: ArrayLike) -> Array:
    """Returns the mean of the last w = steps // 20 losses at each step, (..., steps).

    The first steps have fewer losses. The mean is infinite from the step at which a run diverged.
    """
    losses = np.asarray(losses, dtype=np.float64)
    steps = losses.shape[-1]
    window = max(1, steps // 20)
    losses = np.where(np.isfinite(losses), losses, np.inf)
    # Sums of windows: differences of running sums would lose a loss of 1e-12 after one of 1e3.
    filled = np.concatenate([np.zeros((*losses.shape[:-1], window - 1)), losses], axis=-1)
    sums = np.lib.stride_tricks.sliding_window_view(filled, window, axis=-1).sum(-1)
    means = sums / np.minimum(np.arange(1, steps + 1), window)
    return np.where(np.maximum.accumulate(losses, axis=-1) < np.inf, means, np.inf)


def steps_to_target(losses: ArrayLike, target: ArrayLike) -> Array:
    """Returns the first step, from 1, after which the smoothed loss is at most `target`.

    A miss is ∞, and so is a run that diverges later. losses: (..., steps); target: (...).
    """
    curves = smooth(losses)
    reached = curves <= np.asarray(target, dtype=np.float64)[..., None]
    hit = reached.any(-1) & np.isfinite(curves[..., -1])
    return np.where(hit, reached.argmax(-1) + 1.0, np.inf)


def times_less(reference: ArrayLike, value: ArrayLike) -> Array:
    """Returns reference / value, the factor by which a cost (steps, seconds or loss) is lower.

    It is 0 if the value is infinite (a miss or a divergence), otherwise ∞ if the reference is
    infinite, and 1 if both are the same finite number, including zero.
    """
    reference, value = np.broadcast_arrays(*map(np.asarray, (reference, value)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(reference == value, 1.0, reference / value)
    return np.where(np.isposinf(value), 0.0, ratio)


def envelope(curves: ArrayLike) -> Array:
    """Returns the lowest loss until each step with any rate: (rates, runs, steps) -> (steps,).

    e_t is the minimum over s <= t and learning rates of the smoothed mean over runs. VeLO's code
    smooths with an exponential average of decay .95 instead.
    """
    means = np.where(np.isfinite(curves), curves, np.inf).mean(1)
    return np.minimum.accumulate(smooth(means).min(0))


def envelope_speed_up(losses: ArrayLike, best: Array) -> Array:
    """Returns the steps of best-envelope Adam for the loss of a run, over those of the run: (...).

    This is N(ℓ_t) / t at the last step t, where N(ℓ) is the first step at which `best`, an
    `envelope`, is at most ℓ, interpolated linearly between steps (VeLO's normalizer). VeLO runs
    Adam ten times longer than the optimizers that are compared with it. Here both have equally many
    steps, so if a run gets below the whole envelope, t is the step at which it does. A run that
    diverged has 0.

    losses: (..., steps).
    """
    steps = np.arange(1.0, len(best) + 1)
    curves = smooth(losses)
    final = curves[..., -1]
    passed = steps_to_target(losses, np.broadcast_to(best[-1], final.shape))
    needed = np.interp(np.maximum(final, best[-1]), best[::-1], steps[::-1])
    needed = np.where(np.isfinite(passed), steps[best.argmin()], needed)
    return np.where(np.isfinite(final), needed / np.minimum(passed, curves.shape[-1]), 0.0)


def iqm(scores: ArrayLike) -> Array:
    """Returns the interquartile mean of all runs of all tasks, (..., tasks, runs) -> (...).

    It is the mean of the middle half, as in scipy.stats.trim_mean(scores, 0.25) (rliable, section
    4.3).
    """
    scores = np.asarray(scores, dtype=np.float64)
    ordered = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def geometric_mean(scores: ArrayLike, miss: float = 0.5) -> Array:
    """Returns the geometric mean of all runs of all tasks, (..., tasks, runs) -> (...).

    A score of 0, which is a miss, counts as `miss`, so that one miss does not hide everything else.
    """
    scores = np.asarray(scores, dtype=np.float64)
    return np.exp(np.log(np.where(scores == 0, miss, scores)).mean((-2, -1)))


def probability_of_improvement(x: ArrayLike, y: ArrayLike) -> Array:
    """Returns the mean over tasks of P(X > Y) + P(X = Y) / 2.

    The shapes are (..., tasks, n) and (..., tasks, m) -> (...). For each task, this is the
    Mann-Whitney statistic U / (n m) over all pairs of runs (rliable, section 4.3).
    """
    x, y = np.asarray(x)[..., :, None], np.asarray(y)[..., None, :]
    return ((x > y) + 0.5 * (x == y)).mean((-3, -2, -1))


def stratified_bootstrap(
    statistic: Callable[..., Array],
    *scores: ArrayLike,
    confidence: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the percentile interval of statistic(*scores), with the runs of each task resampled.

    Runs are drawn with replacement, as in scipy.stats.bootstrap(method="percentile") with a sample
    for each task (rliable, section 4.1). Each of the scores, (tasks, runs), is drawn independently
    of the others.

    statistic: maps scores (resamples, tasks, runs) to (resamples,).
    """
    generator = np.random.default_rng(seed)
    drawn = []
    for values in map(np.asarray, scores):
        index = generator.integers(values.shape[1], size=(resamples, *values.shape))
        drawn.append(np.take_along_axis(values[None], index, axis=2))
    tail = 50 * (1 - confidence)
    # Infinite values cannot be interpolated, because ∞ - ∞ is NaN: use order statistics.
    method = "linear" if all(np.isfinite(d).all() for d in drawn) else "nearest"
    low, high = np.percentile(statistic(*drawn), [tail, 100 - tail], method=method)
    return float(low), float(high)


def performance_profile(costs: ArrayLike, taus: ArrayLike) -> Array:
    """Returns ρ_s(τ), the share of tasks on which s costs at most τ times as much as the best.

    The shapes are (entrants, tasks) and (taus,) -> (entrants, taus). The profile is Dolan & Moré's;
    in AlgoPerf the cost is the time to a target. An infinite cost is a miss, and not within any τ.
    """
    costs = np.asarray(costs, dtype=np.float64)
    best = costs.min(0)
    within = costs[..., None] <= np.asarray(taus) * best[:, None]
    return (within & np.isfinite(costs)[..., None]).mean(1)


def profile_score(costs: ArrayLike) -> Array:
    """Returns AlgoPerf's score, the mean of ρ_s over 1 <= τ <= 4: (entrants, tasks) -> (entrants,).

    In closed form, each task adds the share of that range that lies above its ratio to the best.
    """
    costs = np.asarray(costs, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        ratios = np.where(np.isfinite(costs), costs / costs.min(0), np.inf)
    return np.clip((TAU_MAX - ratios) / (TAU_MAX - 1), 0, 1).mean(1)
