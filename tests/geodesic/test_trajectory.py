"""SGD runs on quadratics, whose iterates are known; pairs of runs whose losses are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from geodesic.targets import consecutive_pairs
from geodesic.trajectory import Trajectory, probe_learning_rate, sgd_trajectory

CURVATURE = torch.tensor([[1.0, 4.0], [0.5, 2.0], [3.0, 3.0]], dtype=torch.float64)  # (runs, d)
START = torch.tensor([[1.0, -1.0], [2.0, 1.0], [-1.0, 3.0]], dtype=torch.float64)


def loss(theta: Tensor) -> Tensor:
    """F(θ) = ½ Σ h θ²."""
    return 0.5 * (CURVATURE * theta.square()).sum(-1)


def gradient(theta: Tensor, key: int) -> tuple[Tensor, Tensor]:
    return loss(theta), CURVATURE * theta


def test_sgd_on_a_quadratic_contracts_by_one_minus_rate_times_curvature() -> None:
    rate = torch.tensor([0.1, 0.4, 0.3], dtype=torch.float64)
    found = sgd_trajectory(gradient, loss, START, rate, steps=12, stride=4)
    for record, t in enumerate((0, 4, 8, 12)):
        expected = START * (1 - rate[:, None] * CURVATURE) ** t
        torch.testing.assert_close(found.points[record], expected)
        torch.testing.assert_close(found.losses[record], loss(expected))
    assert torch.equal(found.learning_rate, rate) and found.stride == 4


def test_each_step_has_its_own_key() -> None:
    """With gradient = key, θ_t = θ_0 − η (0 + 1 + … + t−1)."""
    rate = torch.tensor([0.5], dtype=torch.float64)
    found = sgd_trajectory(
        lambda theta, key: (theta.sum(-1), torch.full_like(theta, key)),
        lambda theta: theta.sum(-1),
        torch.zeros(1, 2, dtype=torch.float64),
        rate,
        steps=6,
        stride=3,
    )
    assert found.points[:, 0, 0].tolist() == [0.0, -1.5, -7.5]


def test_steps_that_the_stride_does_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="steps=10 is not a multiple of stride=4"):
        sgd_trajectory(gradient, loss, START, torch.ones(3), steps=10, stride=4)


def test_the_probe_finds_the_best_rate_of_each_run() -> None:
    """F ∝ (1 − η h)²ⁿ after n steps: the best η is the nearest to 1/h; too high ones give NaN."""
    curvature = torch.tensor([[1.0], [10.0], [1e3]])

    def grad_fn(theta: Tensor, key: int) -> tuple[Tensor, Tensor]:
        return 0.5 * (curvature * theta.square()).sum(-1), curvature * theta

    rate = probe_learning_rate(
        grad_fn,
        lambda theta: 0.5 * (curvature * theta.square()).sum(-1),
        torch.ones(3, 1),
        rates=(1.8, 1e-3, 0.5, 0.09),
        steps=40,
    )
    torch.testing.assert_close(rate, torch.tensor([0.5, 0.09, 1e-3]))


def test_diverged_and_stuck_runs_are_flagged() -> None:
    rate = torch.tensor([0.2, 1e-4, 1.0], dtype=torch.float64)  # good, too slow, 1 − ηh = −2
    found = sgd_trajectory(gradient, loss, START, rate, steps=20, stride=10)
    assert found.diverged.tolist() == [False, False, True]
    assert found.stuck.tolist() == [False, True, False]


def test_a_loss_that_was_not_finite_counts_as_diverged() -> None:
    losses = torch.tensor([[2.0, 2.0, 2.0], [float("nan"), float("inf"), 1.5], [0.1, 0.1, 0.1]])
    found = Trajectory(torch.zeros(3, 3, 1), losses, torch.ones(3), 1)
    assert found.diverged.tolist() == [True, True, False]
    assert not found.stuck.any()


LOSSES = torch.tensor(
    [
        [3.0, 3.5, 2.0, 2.0, 1.0, 1.0, 0.5],  # falls over every pair, though not at every record
        [3.0, 2.0, 1.0, 1.0, 1.5, 0.5, 0.1],  # rises over the second
        [3.0, 2.0, 1.0, 1.0, 1.0, 2.0, 4.0],  # diverges
        [3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 2.9],  # is stuck
        [3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0],  # stays level, which is admissible
    ]
).T


def test_consecutive_pairs_are_admissible_and_join_up() -> None:
    points = torch.arange(7.0)[:, None, None] + 10 * torch.arange(5.0)[:, None] + torch.zeros(2)
    pairs = consecutive_pairs(Trajectory(points, LOSSES, torch.ones(5), stride=10), horizon=20)
    assert pairs.run.tolist() == [0, 0, 0, 1, 4, 4, 4]
    assert pairs.start.tolist() == [0, 2, 4, 0, 0, 2, 4]
    assert pairs.points.shape == (7, 3, 2)
    for i, (run, first) in enumerate(zip(pairs.run, pairs.start, strict=True)):
        assert torch.equal(pairs.points[i], points[first : first + 3, run])
        assert torch.equal(pairs.losses[i], LOSSES[first : first + 3, run])
    assert torch.equal(pairs.points[0, -1], pairs.points[1, 0])  # θ_b of one is θ_a of the next
