"""Exact answers, in any dimension: lengths within .3 % above the truth at 32 segments and .1 % at
64, connectivity that flips at a saddle, and sets that no path joins."""

import math

import pytest
import torch

from experiments.geodesics.problems import muller_brown
from geodesic import LevelProfile, find_geodesics

ERROR = {32: 3e-3, 64: 1e-3}
every_size = pytest.mark.parametrize("num_segments", ERROR)
every_dimension = pytest.mark.parametrize("dimension", [2, 10, 1000])


def shell(x):
    return (x.square().sum() - 1) ** 2


def linear_net(x):
    u, v = x.chunk(2)
    return 0.5 * (u @ v - 1) ** 2


def plane(dimension):
    """Two orthonormal directions."""
    generator = torch.Generator().manual_seed(dimension)
    draw = torch.randn(dimension, 2, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(draw)[0].T


def around(radius, inner, angle):
    """The shortest way around a ball between two points of one radius: the chord, or two tangents
    and an arc."""
    arc = angle - 2 * math.acos(inner / radius)
    if arc <= 0:
        return 2 * radius * math.sin(angle / 2)
    return 2 * math.sqrt(radius**2 - inner**2) + inner * arc


def assert_exact(found, exact, below=1e-6):
    """Certified, and longer than the truth by no more than polylines are."""
    assert found.certified.all()
    error = found.length / torch.tensor(exact, dtype=found.length.dtype) - 1
    assert error.min() > -below and error.max() < ERROR[found.path.shape[1] - 1], error


@every_size
@every_dimension
def test_length_against_level_in_a_shell(dimension, num_segments):
    x, y = plane(dimension)
    cases = [(angle, share) for angle in (1.0, 2.0, 2.8) for share in (0.02, 0.2, 0.6, 0.95, 1.1)]
    a = x.expand(len(cases), -1)
    b = torch.stack([math.cos(angle) * x + math.sin(angle) * y for angle, _ in cases])
    level = [share * math.sin(angle / 2) ** 4 for angle, share in cases]  # 1: the chord's
    inner = [math.sqrt(1 - math.sqrt(min(1, value))) for value in level]
    found = find_geodesics(shell, a, b, torch.tensor(level).double(), num_segments)
    angles = [angle for angle, _ in cases]
    assert_exact(found, [around(1, r, angle) for r, angle in zip(inner, angles, strict=True)])
    assert found.chord_feasible.tolist() == [share > 1 for _, share in cases]


@every_size
@pytest.mark.parametrize("width", [2, 10, 500])
def test_linear_net_between_opposite_weights(width, num_segments):
    a = torch.zeros(4, 2 * width, dtype=torch.float64)
    a[:, [0, width]] = 1
    level = torch.tensor([0.01, 0.1, 0.4, 0.5], dtype=torch.float64)
    found = find_geodesics(linear_net, a, -a, level, num_segments)
    ratios = torch.tensor([1.4743, 1.2920, 1.0533, 1.0])
    torch.testing.assert_close(found.normalized_length.float(), ratios, rtol=3e-3, atol=0)
    inner = [math.sqrt(2 * (1 - math.sqrt(2 * value))) for value in level[:3]]
    assert_exact(found, [around(math.sqrt(2), r, math.pi) for r in (*inner, 0.0)])


@every_size
@every_dimension
def test_level_that_falls_faster_than_the_chord(dimension, num_segments):
    """F = |x|² falls from |a|² = 2.25 to 1 in the first half of the way, and |b| = 1.

    Each half of the way is |γ|/2 long, so |γ| ≥ 2 max(|a − c|, |c − b|) of its middle c, which is
    in the unit ball. The least of that is at equal distances, on the unit sphere where the plane
    halfway between a and b meets it on the side of their middle. The broken line a, c, b is of
    that length, and feasible as F is convex on it.
    """
    x, y = plane(dimension)
    angles = torch.tensor([0.92, 1.0], dtype=torch.float64)[:, None]
    a, b = 1.5 * x.expand(2, -1), angles.cos() * x + angles.sin() * y
    across, distance = torch.nn.functional.normalize(a - b, dim=1), (a - b).norm(dim=1)[:, None]
    foot = (1.5**2 - 1) / 2 / distance  # of that plane, from the origin
    aside = torch.nn.functional.normalize((a + b) / 2 - foot * across, dim=1)
    c = foot * across + (1 - foot**2).sqrt() * aside
    exact = 2 * (a - c).norm(dim=1)
    torch.testing.assert_close(exact, 2 * (b - c).norm(dim=1))
    values, knots = torch.tensor([[2.25, 1, 1], [0, 0.5, 1]], dtype=torch.float64)
    found = find_geodesics(
        lambda x: x.square().sum(), a, b, LevelProfile(values, knots), num_segments
    )
    assert_exact(found, exact.tolist())
    assert not found.chord_feasible.any()


def test_muller_brown_connects_at_its_saddles():
    """Minima at -146.70, -80.77 and -108.17; saddles between the first two and the last two."""
    minima = [[-0.558224, 1.441726], [-0.050011, 0.466694], [0.623499, 0.028038]]
    minima = torch.tensor(minima, dtype=torch.float64)
    saddles = torch.tensor([-40.664844, -72.24894], dtype=torch.float64)
    level = torch.cat((saddles - 0.01, saddles + 0.01))
    found = find_geodesics(muller_brown, minima[[0, 1, 0, 1]], minima[[1, 2, 1, 2]], level)
    assert found.certified.tolist() == [False, False, True, True]


def test_linear_net_of_one_neuron_is_never_connected():
    """F = ½ where u·v = 0, which lies between (1, 1) and the quadrant opposite on any way."""
    level = torch.tensor([0.01, 0.1, 0.4, 0.499], dtype=torch.float64).repeat(2)
    a = torch.ones(8, 2, dtype=torch.float64)
    b = -a * torch.tensor([[1.0, 1.0], [2.0, 0.5]]).repeat_interleave(4, 0)
    found = find_geodesics(linear_net, a, b, level)
    assert not found.certified.any() and (found.max_loss > level).all()


def test_nets_with_two_neurons_swapped_are_never_connected():
    """Freeman & Bruna's negative control; test_dss.py tells why F ≥ 1/6 on any way."""
    angles = 2 * torch.pi / 3 * torch.arange(3, dtype=torch.float64)
    x = torch.stack((angles.cos(), angles.sin()), dim=1)
    y = x.roll(-1, dims=0)

    def loss(theta):
        hidden = (x @ theta[:6].view(3, 2).T).relu()
        return (hidden @ theta[6:].view(3, 2) - y).square().sum(1).mean()

    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(4, 12, generator=generator, dtype=torch.float64)
    a = torch.cat((x.flatten(), y.flatten())) + noise
    b = a.view(4, 2, 3, 2)[:, :, [1, 0, 2]].flatten(1)
    level = torch.tensor([0.05, 0.1, 0.16, 1.05], dtype=torch.float64)
    found = find_geodesics(loss, a, b, level)
    assert found.certified.tolist() == [False, False, False, True]
    assert (found.max_loss[:3] > 1 / 6).all()
