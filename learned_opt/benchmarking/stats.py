"""What a benchmark's figures mean: pure functions on arrays of losses, steps and scores.

Scores are (tasks, runs). An infinite loss is that of a run that diverged or failed. Sources:
rliable (Agarwal et al. 2021, arXiv 2108.13264), AlgoPerf (Dahl et al. 2023, arXiv 2306.07179),
Dolan & Moré 2002, VeLO (Metz et al. 2022, arXiv 2211.09760).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray
TAU_MAX = 4.0  # of AlgoPerf: who is more than four times slower counts as not having arrived
PROFILE_TASKS = 5  # of fewer tasks a profile has too few steps to tell anything


def smooth(losses: ArrayLike) -> Array:
    """Mean of the last w losses, w = steps // 20, of fewer at the start: (..., steps), the same.

    From the step on at which a run diverged it is infinite.
    """
    losses = np.asarray(losses, dtype=np.float64)
    steps = losses.shape[-1]
    window = max(1, steps // 20)
    losses = np.where(np.isfinite(losses), losses, np.inf)
    # Sums of windows, not differences of running sums: a loss of 1e-12 after one of 1e3 counts.
    filled = np.concatenate([np.zeros((*losses.shape[:-1], window - 1)), losses], axis=-1)
    sums = np.lib.stride_tricks.sliding_window_view(filled, window, axis=-1).sum(-1)
    means = sums / np.minimum(np.arange(1, steps + 1), window)
    return np.where(np.maximum.accumulate(losses, axis=-1) < np.inf, means, np.inf)


def steps_to_target(losses: ArrayLike, target: ArrayLike) -> Array:
    """The first step, from 1, after which the smoothed loss is at most `target`; ∞ for a miss.

    losses: (..., steps); target: (...). A run that diverges later on has missed it too.
    """
    curves = smooth(losses)
    reached = curves <= np.asarray(target, dtype=np.float64)[..., None]
    hit = reached.any(-1) & np.isfinite(curves[..., -1])
    return np.where(hit, reached.argmax(-1) + 1.0, np.inf)


def times_less(reference: ArrayLike, value: ArrayLike) -> Array:
    """reference / value: how many times less of a cost, be it steps, seconds or loss.

    0 where the value is infinite (a miss, a divergence), else ∞ where the reference is; 1 where
    both are the same finite number, zero included.
    """
    reference, value = np.broadcast_arrays(*map(np.asarray, (reference, value)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(reference == value, 1.0, reference / value)
    return np.where(np.isposinf(value), 0.0, ratio)


def envelope(curves: ArrayLike) -> Array:
    """The least loss reached by each step with any learning rate: (rates, runs, steps) -> (steps,).

    e_t = min over s <= t and rates of the smoothed mean over runs. VeLO's code smooths by an
    exponential average, .95 a step.
    """
    means = np.where(np.isfinite(curves), curves, np.inf).mean(1)
    return np.minimum.accumulate(smooth(means).min(0))


def envelope_speed_up(losses: ArrayLike, best: Array) -> Array:
    """Steps of best-envelope Adam for the loss of a run, over the steps of the run: (...).

    N(ℓ_t) / t at the last step t, where N(ℓ) is the first step at which `best`, an `envelope`, is
    at most ℓ, linear between steps (VeLO's normaliser). VeLO runs Adam ten times longer than what
    it is compared with. Here both have as many steps, so for a run that gets below the whole
    envelope t is the step at which it does. 0 for a run that diverged.

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
    """Interquartile mean: of the middle half of all runs of all tasks, (..., tasks, runs) -> (...).

    As scipy.stats.trim_mean(scores, 0.25) (rliable, section 4.3).
    """
    scores = np.asarray(scores, dtype=np.float64)
    ordered = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def geometric_mean(scores: ArrayLike, miss: float = 0.5) -> Array:
    """exp of the mean logarithm over all runs of all tasks, (..., tasks, runs) -> (...).

    A score of 0, a miss, counts as `miss`, so that one miss does not hide everything else.
    """
    scores = np.asarray(scores, dtype=np.float64)
    return np.exp(np.log(np.where(scores == 0, miss, scores)).mean((-2, -1)))


def probability_of_improvement(x: ArrayLike, y: ArrayLike) -> Array:
    """P(X > Y) + P(X = Y) / 2, mean over tasks: (..., tasks, n) and (..., tasks, m) -> (...).

    Per task the Mann-Whitney statistic U / (n m) over all pairs of runs (rliable, section 4.3).
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
    """Percentile interval of statistic(*scores), the runs of each task drawn anew with replacement.

    As scipy.stats.bootstrap(method="percentile") with a sample a task (rliable, section 4.1). Each
    of the scores, (tasks, runs), is drawn independently of the others.

    statistic: maps scores (resamples, tasks, runs) to (resamples,).
    """
    generator = np.random.default_rng(seed)
    drawn = []
    for values in map(np.asarray, scores):
        index = generator.integers(values.shape[1], size=(resamples, *values.shape))
        drawn.append(np.take_along_axis(values[None], index, axis=2))
    tail = 50 * (1 - confidence)
    # Order statistics rather than interpolation where values may be infinite: ∞ - ∞ is no number.
    method = "linear" if all(np.isfinite(d).all() for d in drawn) else "nearest"
    low, high = np.percentile(statistic(*drawn), [tail, 100 - tail], method=method)
    return float(low), float(high)


def performance_profile(costs: ArrayLike, taus: ArrayLike) -> Array:
    """ρ_s(τ): on what share of the tasks s costs at most τ times what the best one does.

    (entrants, tasks) and (taus,) -> (entrants, taus) (Dolan & Moré; in AlgoPerf the cost is
    the time to a target). An infinite cost is a miss, never within any τ.
    """
    costs = np.asarray(costs, dtype=np.float64)
    best = costs.min(0)
    within = costs[..., None] <= np.asarray(taus) * best[:, None]
    return (within & np.isfinite(costs)[..., None]).mean(1)


def profile_score(costs: ArrayLike) -> Array:
    """AlgoPerf's score, the mean of ρ_s over 1 <= τ <= 4: (entrants, tasks) -> (entrants,).

    In closed form: a task adds the share of that range which is above its ratio to the best.
    """
    costs = np.asarray(costs, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        ratios = np.where(np.isfinite(costs), costs / costs.min(0), np.inf)
    return np.clip((TAU_MAX - ratios) / (TAU_MAX - 1), 0, 1).mean(1)
