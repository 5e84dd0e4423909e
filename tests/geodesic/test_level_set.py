import pytest
import torch

from geodesic import LevelProfile, sgd_profile
from geodesic.level_set import SublevelSet
from geodesic.path import chord, fractions

ROWS = torch.arange(1)


def sublevel_set(loss_fn, level):
    sublevel = SublevelSet(loss_fn, (), num_pairs=1, chunk_size=7)
    sublevel.set_level(level)
    return sublevel


def test_profile_is_linear_between_even_knots():
    profile = LevelProfile(torch.tensor([[4.0, 2.0, 1.0], [1.0, 1.0, 0.0]]))
    s = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).expand(2, 5)
    assert profile(s).tolist() == [[4, 3, 2, 1.5, 1], [1, 1, 1, 0.5, 0]]


def test_profile_becomes_non_increasing_without_going_below_a_value():
    values = torch.tensor([1.0, 3.0, 2.0, 2.5, 0.0])
    assert LevelProfile(values).values.tolist() == [[3.0, 3.0, 2.5, 2.5, 0.0]]


def test_sgd_profile_covers_the_trajectory_and_ends_at_its_losses():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(3, 20, 4, generator=generator, dtype=torch.float64).cumsum(1)
    losses = torch.linspace(3, 1, 20) + 0.5 * torch.rand(3, 20, generator=generator).double()
    losses[:, 0], losses[:, -1] = 4, 0.5
    profile = sgd_profile(losses, points)
    at_points = profile(fractions(points))
    assert (at_points >= losses - 1e-12).all() and (at_points.diff(dim=1) <= 1e-12).all()
    torch.testing.assert_close(at_points[:, [0, -1]], losses[:, [0, -1]])
    # The least such level: each value is the loss at some later point.
    assert (at_points[..., None] - losses[:, None]).abs().amin(-1).max() < 1e-12


def test_sampling_finds_the_peak_between_samples():
    # F = 1 - (x - 0.4)² on [0, 1] peaks at 1 between the samples 0.25 and 0.5.
    sublevel = sublevel_set(
        lambda x: 1 - (x[0] - 0.4) ** 2, torch.tensor([0.99], dtype=torch.float64)
    )
    path = chord(torch.zeros(1, 1).double(), torch.ones(1, 1).double(), 1)
    samples = sublevel.sample(path, 4, ROWS)
    assert samples.losses.max() < 0.9901
    assert samples.peak.item() == pytest.approx(0.01, abs=1e-12)
    assert not samples.feasible
    assert sublevel.loss_evaluations.tolist() == [5]


def test_the_certificate_refines_what_sampling_misses():
    sublevel = sublevel_set(lambda x: (-((x[0] - 0.4) / 0.06).square()).exp(), torch.tensor([0.9]))
    path = chord(torch.zeros(1, 1), torch.ones(1, 1), 1)
    assert sublevel.sample(path, 4, ROWS).feasible
    certificate = sublevel.certify(path, 4, ROWS)
    assert not certificate.feasible and certificate.max_loss > 0.9


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
def test_tolerance_is_relative_to_large_levels(dtype, tolerance):
    path = chord(torch.zeros(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype), 2)
    for factor, inside in ((0.5, True), (2, False)):
        height = 100 * (1 + factor * tolerance)
        sublevel = sublevel_set(
            lambda x, h=height: 0 * x[0] + h, torch.tensor([100.0], dtype=dtype)
        )
        assert sublevel.sample(path, 4, ROWS).feasible.item() is inside


def test_what_is_not_a_number_is_outside():
    sublevel = sublevel_set(lambda x: x[0].sub(0.5).sqrt(), torch.ones(1))
    samples = sublevel.sample(chord(torch.zeros(1, 1), torch.ones(1, 1), 2), 2, ROWS)
    assert not samples.feasible and samples.losses.max() == torch.inf


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((1.0,), "values"),
        ((torch.ones(1),), "values"),
        ((torch.tensor([1.0, torch.nan]),), "finite"),
        ((torch.ones(3), torch.tensor([0.0, 0.7, 0.5])), "fractions"),
    ],
)
def test_profile_refuses(arguments, named):
    with pytest.raises(ValueError, match=named):
        LevelProfile(*arguments)


def test_sgd_profile_refuses_unequal_counts():
    with pytest.raises(ValueError, match="trajectory_losses"):
        sgd_profile(torch.ones(3), torch.ones(4, 2))
