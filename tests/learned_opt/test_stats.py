"""The benchmark's statistics, compared with scipy and with cases computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from learned_opt.benchmarking.stats import (
    envelope,
    envelope_speed_up,
    iqm,
    performance_profile,
    probability_of_improvement,
    profile_score,
    smooth,
    steps_to_target,
    stratified_bootstrap,
    times_less,
)

INF = np.inf


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(1, 4), (3, 5), (7, 3), (2, 1)])
def test_iqm_is_scipys_trimmed_mean(shape: tuple[int, int], generator) -> None:
    scores = generator.lognormal(size=shape)
    assert iqm(scores) == pytest.approx(scipy_stats.trim_mean(scores.ravel(), 0.25), rel=1e-12)


def test_iqm_of_stacked_scores_is_that_of_each(generator) -> None:
    scores = generator.normal(size=(6, 3, 5))
    assert iqm(scores) == pytest.approx([iqm(s) for s in scores], rel=1e-12)


def test_iqm_bears_a_quarter_of_failures_and_no_more() -> None:
    assert iqm([[1.0, 1.0, 3.0, INF]]) == 2.0
    assert iqm([[1.0, 1.0, INF, INF]]) == INF


@pytest.mark.parametrize("statistic", ["iqm", "mean"])
def test_bootstrap_is_scipys_with_a_sample_a_task(statistic: str, generator) -> None:
    scores = generator.lognormal(size=(4, 10)) * [[1], [2], [3], [4]]
    ours = {"iqm": iqm, "mean": lambda s: s.mean((-2, -1))}[statistic]

    def theirs(*tasks, axis):
        pooled = np.concatenate(tasks, axis=axis)
        if statistic == "mean":
            return pooled.mean(axis)
        return scipy_stats.trim_mean(pooled, 0.25, axis=axis)

    interval = scipy_stats.bootstrap(
        tuple(scores), theirs, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    low, high = stratified_bootstrap(ours, scores, resamples=20_000)
    width = interval.high - interval.low
    assert abs(low - interval.low) < 0.03 * width and abs(high - interval.high) < 0.03 * width


def test_bootstrap_keeps_tasks_apart() -> None:
    """Each task has but one score, so nothing can vary, however far the tasks lie apart."""
    assert stratified_bootstrap(iqm, [[1.0] * 5, [100.0] * 5]) == (50.5, 50.5)


def test_bootstrap_is_the_same_twice_and_narrows_with_confidence(generator) -> None:
    scores = generator.normal(size=(3, 8))
    low, high = stratified_bootstrap(iqm, scores)
    assert (low, high) == stratified_bootstrap(iqm, scores)
    narrow = stratified_bootstrap(iqm, scores, confidence=0.5)
    assert low < narrow[0] < iqm(scores) < narrow[1] < high


def test_bootstrap_of_failures_has_an_infinite_end() -> None:
    low, high = stratified_bootstrap(iqm, [[1.0, 2.0, 3.0, INF]])
    assert 1.0 <= low < 3.0 and high == INF


def test_a_95_percent_interval_covers_about_that_often(generator) -> None:
    """The mean of 30 normal numbers, 300 times: the percentile interval is slightly too narrow."""
    covered = 0
    for _ in range(300):
        low, high = stratified_bootstrap(
            lambda s: s.mean((-2, -1)), generator.normal(size=(1, 30)), resamples=400
        )
        covered += low <= 0 <= high
    assert 0.88 < covered / 300 < 0.99


def test_probability_of_improvement_is_mann_whitneys_u(generator) -> None:
    x, y = generator.integers(4, size=(3, 6)), generator.integers(4, size=(3, 5))  # many ties
    u = [scipy_stats.mannwhitneyu(a, b).statistic / 30 for a, b in zip(x, y, strict=True)]
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(u), rel=1e-12)


def test_probability_of_improvement_by_hand() -> None:
    assert probability_of_improvement([[2.0, 3.0]], [[1.0, 2.0]]) == (1 + 0.5 + 1 + 1) / 4
    assert probability_of_improvement([[1.0], [0.0]], [[0.0], [1.0]]) == 0.5  # one task each
    assert probability_of_improvement([[-INF]], [[-INF]]) == 0.5  # both diverged


def test_an_entrant_ties_with_itself(generator) -> None:
    """Adam under another name, on the same seeds."""
    scores = generator.lognormal(size=(5, 5))
    assert probability_of_improvement(scores, scores) == 0.5
    low, high = stratified_bootstrap(probability_of_improvement, scores, scores)
    assert low < 0.5 < high


def test_a_better_entrant_is_told_from_a_worse_one(generator) -> None:
    scores = generator.normal(size=(5, 5))
    low, _ = stratified_bootstrap(probability_of_improvement, scores + 1, scores)
    assert low > 0.5


def test_smoothing_is_the_mean_of_the_last_twentieth() -> None:
    losses = np.arange(40.0)
    assert smooth(losses).tolist() == [0.0, *(np.arange(1, 40) - 0.5)]  # windows of two
    assert smooth(np.arange(19.0)).tolist() == np.arange(19.0).tolist()  # of one


def test_smoothing_keeps_small_losses_after_large_ones() -> None:
    losses = np.where(np.arange(100) < 50, 1e12, 1e-12)
    assert smooth(losses)[-1] == pytest.approx(1e-12, rel=1e-12)


def test_smoothing_never_recovers_from_a_divergence() -> None:
    assert smooth([3.0, np.nan, 1.0]).tolist() == [3.0, INF, INF]


def test_steps_to_target_by_hand() -> None:
    losses = [[4.0, 3.0, 2.0, 1.0], [4.0, 1.0, 3.0, 3.0], [4.0, 3.0, 3.0, 3.0], [4, 1, 1, np.nan]]
    assert steps_to_target(losses, [2.0, 2.0, 2.0, 2.0]).tolist() == [3.0, 2.0, INF, INF]
    assert steps_to_target([5.0, 5.0], 5.0) == 1.0


def test_adam_reaches_its_own_final_loss_with_a_speed_up_of_one(generator) -> None:
    losses = 2 * 0.99 ** np.arange(400) + 0.1 * generator.random((5, 400))
    steps = steps_to_target(losses, smooth(losses)[:, -1])
    assert (steps <= 400).all()
    assert times_less(steps, steps).tolist() == [1.0] * 5


def test_an_entrant_with_twice_the_rate_has_a_speed_up_of_two() -> None:
    time = np.arange(2000)
    slow, fast = np.exp(-time / 500), np.exp(-time / 250)
    target = smooth(slow)[-1]
    ratio = times_less(steps_to_target(slow, target), steps_to_target(fast, target))
    assert ratio == pytest.approx(2, rel=0.06)  # the window lags behind both by the same


def test_times_less_of_misses_and_zeros() -> None:
    assert times_less([8.0, 8.0, INF, INF, 0.0, 8.0], [4.0, INF, 4.0, INF, 0.0, 0.0]).tolist() == [
        2.0, 0.0, INF, 0.0, 1.0, INF,
    ]  # fmt: skip


def test_the_envelope_takes_the_best_rate_at_each_step() -> None:
    early, late = [[[8.0, 4.0, 4.0, 6.0]] * 2, [[8.0, 7.0, 5.0, 1.0]] * 2]
    assert envelope([early, late]).tolist() == [8.0, 4.0, 4.0, 1.0]
    diverged = [[8.0, 1.0, np.nan, np.nan], [8.0, 1.0, 1.0, 1.0]]  # one of its two runs
    assert envelope([early, diverged]).tolist() == [8.0, 1.0, 1.0, 1.0]


def test_envelope_speed_up_by_hand() -> None:
    best = np.array([8.0, 6.0, 4.0, 2.0])
    assert envelope_speed_up([8.0, 7.0, 6.0, 6.0], best) == 2 / 4  # ends where Adam is at step 2
    assert envelope_speed_up([8.0, 7.0, 6.0, 5.0], best) == 2.5 / 4  # in between
    assert envelope_speed_up([8.0, 6.0, 4.0, 2.0], best) == 1.0  # the envelope itself
    assert envelope_speed_up([8.0, 1.0, 0.5, 0.1], best) == 4 / 2  # below all of it at step 2
    assert envelope_speed_up([8.0, 1.0, 3.0, np.nan], best) == 0.0
    assert envelope_speed_up([9.0, 9.0, 9.0, 9.0], best) == 1 / 4  # never better than the start


def test_a_flat_envelope_counts_to_its_first_step() -> None:
    assert envelope_speed_up([8.0, 8.0, 4.0, 4.0], np.array([8.0, 4.0, 4.0, 4.0])) == 2 / 3


def test_performance_profile_by_hand() -> None:
    costs = [[10.0, 40.0, INF], [20.0, 10.0, INF]]  # nobody does the third task
    profile = performance_profile(costs, [1.0, 2.0, 3.9, 4.0])
    assert profile[0] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3])
    assert profile[1] == pytest.approx([1 / 3, 2 / 3, 2 / 3, 2 / 3])


def test_profile_score_is_the_mean_of_the_profile(generator) -> None:
    costs = generator.lognormal(size=(4, 6))
    costs[0, 0] = costs[:, 1] = INF
    mean = performance_profile(costs, np.linspace(1, 4, 30_001)).mean(1)
    assert profile_score(costs) == pytest.approx(mean, abs=1e-3)
