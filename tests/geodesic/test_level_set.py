import pytest
import torch

from geodesic import LevelProfile, sgd_profile
from geodesic.level_set import SublevelSet
from geodesic.path import chord, fractions, subdivide

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


def rough(x):
    return 2 - x[0].tanh() + 0.2 * (5 * x[1]).sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sgd_profile_is_kept_by_its_own_trajectory(dtype):
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(8, 12, 2, generator=generator, dtype=torch.float64).mul(0.3)
    steps[..., 0] += 0.5
    trajectory = steps.cumsum(1).to(dtype)
    profile, rows = sgd_profile(rough, trajectory), torch.arange(8)
    sublevel = SublevelSet(rough, (), num_pairs=8, chunk_size=4096)
    sublevel.set_level(profile)
    assert sublevel.certify(trajectory, 16, rows).feasible.all()
    assert sublevel.sample(trajectory, 160, rows).feasible.all()
    # Hardly higher than it has to be: what is ahead, from two samples of 1/16 segment back on.
    losses = sublevel.losses(trajectory, 16, rows)[..., :-1].flatten(1)
    ahead = losses.flip(1).cummax(1).values.flip(1)
    level = profile(fractions(subdivide(trajectory, 16)))
    assert (level.diff(dim=1) <= 0).all() and (level[:, 2:-1] <= ahead[:, :-2] + 2e-2).all()
    torch.testing.assert_close(level[:, -1], torch.func.vmap(rough)(trajectory[:, -1]))
    assert (level[:, 0] >= losses.amax(1)).all() and (level[:, 0] < losses.amax(1) + 2e-2).all()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("height", [1e-30, 1e-12, 1e-7, 1e-4])
def test_tolerance_is_a_thousandth_of_small_levels_at_most(dtype, height):
    path = chord(torch.zeros(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype), 2)
    for factor, inside in ((1.0, True), (1.002, False), (5.0, False)):
        level = torch.tensor([height], dtype=dtype)
        sublevel = sublevel_set(lambda x, f=factor: 0 * x[0] + f * height, level)
        assert sublevel.sample(path, 4, ROWS).feasible.item() is inside


def test_a_level_of_zero_allows_nothing():
    path = chord(torch.zeros(1, 1), torch.ones(1, 1), 2)
    for height, inside in ((0.0, True), (1e-30, False)):
        sublevel = sublevel_set(lambda x, h=height: 0 * x[0] + h, torch.zeros(1))
        assert sublevel.certify(path, 4, ROWS).feasible.item() is inside


@pytest.mark.parametrize("low", [-torch.inf, torch.nan, torch.inf])
def test_what_is_not_finite_is_outside(low):
    def loss(x):
        return torch.where((x[0] - 0.5).abs() < 0.2, low, 0 * x[0])

    samples = sublevel_set(loss, torch.ones(1)).certify(
        chord(torch.zeros(1, 1), torch.ones(1, 1), 2), 4, ROWS
    )
    assert not samples.feasible and samples.max_loss == torch.inf


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


def test_sgd_profile_refuses_a_single_point():
    with pytest.raises(ValueError, match="trajectory"):
        sgd_profile(rough, torch.ones(1, 2))
