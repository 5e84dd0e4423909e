import io
import math

import numpy as np
import pytest
import torch

from geodesic import LevelProfile, points_at
from geodesic.manifest import DatasetError
from geodesic.path import chord
from geodesic.plot import (
    plot_dataset,
    plot_length_against_level,
    plot_loss,
    plot_plane,
    plot_stages,
    principal_plane,
)
from geodesic.targets import Problem, TargetConfig, write_dataset

L_SHAPE = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 1.0]], dtype=torch.float64)
LEVEL = math.exp(-0.5)  # outside of the unit ball


def bump(x):
    return torch.exp(-x.square().sum() / 2)


def basis(dimension):
    generator = torch.Generator().manual_seed(dimension)
    draw = torch.randn(dimension, 2, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(draw)[0].T


def arc(dimension):
    """Part of the circle of radius 1.2 around the origin, in a random plane through it."""
    angle = torch.linspace(0, 2.5, 40).double()[:, None]
    return 1.2 * torch.cat((angle.cos(), angle.sin()), dim=1) @ basis(dimension)


def line(axes, label):
    return next(line for line in axes.lines if line.get_label().startswith(label))


def contours(axes, level, filled=False):
    """Where the picture has the boundary of F ≤ level, or the region, (m, 2)."""
    found = [
        c
        for c in axes.collections
        if hasattr(c, "levels") and c.filled == filled and c.levels[-1] == level
    ]
    return torch.from_numpy(
        np.concatenate([path.vertices for c in found for path in c.get_paths()])
    )


def test_curves_are_the_loss_along_the_paths():
    paths = {"bent": L_SHAPE, "straight": chord(L_SHAPE[0], L_SHAPE[-1], 1)}
    axes = plot_loss(bump, paths, samples=40).axes[0]
    for label, path in paths.items():
        s, losses = (torch.from_numpy(v) for v in line(axes, label).get_data())
        assert len(s) >= 41 and {0.0, 1.0} < set(s.tolist())
        torch.testing.assert_close(losses, torch.func.vmap(bump)(points_at(path, s)))
    assert abs(line(axes, "bent").get_xdata() - 0.75).min() < 1e-12  # the bend itself
    assert line(axes, "bent").get_label().endswith(f"{4 / math.sqrt(10):.3f}")
    assert set(line(axes, "level").get_ydata()) == {1.0}


def test_the_level_is_as_given():
    falling = LevelProfile(torch.tensor([3.0, 2.0, 0.5], dtype=torch.float64))
    for level, expected in ((0.7, lambda s: 0.7 + 0 * s), (falling, lambda s: falling(s[None])[0])):
        s, drawn = line(plot_loss(bump, {"x": L_SHAPE}, level).axes[0], "level").get_data()
        torch.testing.assert_close(torch.from_numpy(drawn), expected(torch.from_numpy(s)))


def test_the_plane_of_a_planar_path_is_found_in_any_dimension():
    path, plane = arc(20), principal_plane(bump, arc(20))
    eye = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(plane.directions @ plane.directions.T, eye)
    inside = basis(20) @ plane.directions.T
    torch.testing.assert_close(inside @ inside.T, eye)  # nothing is lost by projecting
    assert sum(plane.shares) == pytest.approx(1)
    torch.testing.assert_close(plane.points(plane.coordinates(path)), path)
    x, y = plane.coordinates(path).T
    assert x[-1] > x[0] and y.argmax() in (19, 20)  # left to right, bulging upwards
    uneven = torch.cat((points_at(path, torch.linspace(0, 0.1, 99)), path[4:]))
    other = principal_plane(bump, uneven)  # all but the same curve, with most beads at one end
    torch.testing.assert_close(other.directions, plane.directions, atol=1e-4, rtol=0)
    even = points_at(path, torch.linspace(0, 1, 9999))
    torch.testing.assert_close(plane.centre, even.mean(0), atol=1e-4, rtol=0)
    variances = plane.coordinates(even).var(0)
    assert (variances / variances.sum()).tolist() == pytest.approx(plane.shares, abs=1e-4)


def test_the_picture_has_path_ends_and_sublevel_set_to_scale():
    path, apart = arc(20), chord(arc(20)[0], arc(20)[-1], 3)
    axes = plot_plane(bump, path, LEVEL, {"chord": apart}).axes[0]
    for label, points in (("geodesic", path), ("chord", apart)):
        drawn = torch.from_numpy(line(axes, label).get_xydata())
        torch.testing.assert_close(torch.cdist(drawn, drawn), torch.cdist(points, points))
    plane = principal_plane(bump, path)
    circle = plane.points(contours(axes, LEVEL)).norm(dim=1)
    torch.testing.assert_close(circle, torch.ones_like(circle), atol=1e-3, rtol=0)
    assert plane.points(contours(axes, LEVEL, filled=True)).norm(dim=1).min() > 0.99
    assert f"{plane.shares[0]:.1%}" in axes.get_xlabel()
    assert f"{plane.shares[1]:.1%}" in axes.get_ylabel()


def test_a_falling_level_has_two_regions_and_a_loss_that_is_no_number_is_outside():
    path = torch.tensor([[3.0, 0.0], [2.0, 1.0], [1.0, 0.0]])

    def loss_fn(x):
        return (x[0] - 0.5).sqrt()

    start, end = loss_fn(path[0]).item(), loss_fn(path[-1]).item()
    figure = plot_plane(loss_fn, path, LevelProfile(torch.tensor([start, end])))
    plane = principal_plane(loss_fn, path)
    for level, x in ((start, 3.0), (end, 1.0)):
        boundary = plane.points(contours(figure.axes[0], level))[:, 0]
        torch.testing.assert_close(boundary, torch.full_like(boundary, x), atol=0.01, rtol=0)
        region = plane.points(contours(figure.axes[0], level, filled=True))[:, 0]
        assert 0.5 <= region.min() and region.max() < x + 0.01
    figure.savefig(file := io.BytesIO(), format="png")
    assert file.getvalue().startswith(b"\x89PNG")


def test_what_numpy_does_not_take_as_it_is_can_be_drawn():
    """Matplotlib refuses a tensor with a gradient as it refuses one on a GPU."""
    path, lengths = arc(3).requires_grad_(), torch.ones(2, 3, requires_grad=True)
    levels = torch.arange(3.0, requires_grad=True)
    plain, drawn = (
        (
            plot_loss(bump, {"x": p}, LevelProfile(bump(p[0]) - torch.arange(2) / 9)),
            plot_plane(bump, p, LEVEL, {"chord": p[[0, -1]]}),
            plot_length_against_level({"a": (x, y)}),
            plot_stages(x, y[0], y[0] > 0),
        )
        for p, x, y in (
            (path.detach(), levels.detach(), lengths.detach()),
            (path, levels, lengths),
        )
    )
    for expected, figure in zip(plain, drawn, strict=True):
        for axes, other in zip(expected.axes, figure.axes, strict=True):
            for one, two in zip(axes.lines, other.lines, strict=True):
                np.testing.assert_array_equal(one.get_xydata(), two.get_xydata())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_straight_path_is_shown_with_the_gradient(dtype):
    path = chord(torch.full((20,), 5.0), torch.arange(20.0), 32).to(dtype)
    slope = torch.linspace(-1, 1, 20).square().to(dtype)
    plane = principal_plane(lambda x: slope @ x, path)
    along = torch.nn.functional.normalize((path[-1] - path[0]).double(), dim=0)
    across = slope.double() - slope.double() @ along * along
    expected = torch.stack((along, torch.nn.functional.normalize(across, dim=0)))
    torch.testing.assert_close(plane.directions, expected, atol=1e-5, rtol=0)
    assert plane.shares == (1.0, 0.0)


@pytest.mark.parametrize("loss_fn", [lambda x: 0 * x.sum(), lambda x: x[1]], ids=["zero", "along"])
def test_a_straight_path_without_a_gradient_across_it(loss_fn):
    path = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    directions = principal_plane(loss_fn, path).directions
    torch.testing.assert_close(directions @ directions.T, torch.eye(2, dtype=torch.float64))
    drawn = line(plot_plane(loss_fn, path).axes[0], "geodesic").get_xydata()
    np.testing.assert_allclose(drawn, [[-1, 0], [1, 0]], atol=1e-6)


def test_failures_are_counted_and_not_averaged():
    nan = math.nan
    lengths = torch.tensor([[3.0, 1.0, nan], [nan, 2.0, nan]])  # at the levels .2, .1 and .3
    axes = plot_length_against_level(
        {
            "a": (torch.tensor([0.2, 0.1, 0.3]), lengths),
            "b": (torch.tensor([0.1]), lengths[:, 1:2]),
        },
        log_x=True,
    ).axes[0]
    mean, hollow, band = axes.lines[0], axes.lines[1], axes.collections[0]
    assert mean.get_label() == "a, 3 of 6 failed (hollow)"
    np.testing.assert_allclose(mean.get_xydata(), [[0.1, 1.5], [0.2, 3], [0.3, nan]], rtol=1e-6)
    np.testing.assert_allclose(hollow.get_xdata(), [0.2, 0.3], rtol=1e-6)
    at_first = [y for path in band.get_paths() for x, y in path.vertices if abs(x - 0.1) < 1e-6]
    assert {min(at_first), max(at_first)} == {1.0, 2.0}
    assert line(axes, "b").get_label() == "b" and axes.get_xscale() == "log"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plot_loss(bump, {}), "at least one path"),
        (lambda: plot_loss(bump, {"SGD": L_SHAPE[None]}), r"paths\['SGD'\].*\(1, 3, 2\).*one pair"),
        (lambda: plot_loss(bump, {"SGD": L_SHAPE / 0}), r"paths\['SGD'\] must be finite"),
        (lambda: plot_loss(bump, {"x": L_SHAPE}, LevelProfile(torch.ones(5, 2))), "level must be"),
        (lambda: plot_plane(bump, L_SHAPE[:, :1]), "d ≥ 2.*plot_loss"),
        (lambda: plot_plane(bump, L_SHAPE[[0, 0]]), "path must move"),
        (lambda: plot_plane(bump, L_SHAPE, others={"SGD": 0}), r"others\['SGD'\].*got 0"),
        (lambda: plot_length_against_level({}), "at least one"),
        (lambda: plot_length_against_level({"a": (torch.ones(3), torch.ones(3, 2))}), "transpose"),
        (
            lambda: plot_length_against_level({"a": ([0.0], [[1.0]])}, log_x=True),
            "positive.*log_x=False",
        ),
    ],
)
def test_a_wrong_argument_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def problem(index):
    """Runs down a valley: SGD falls to its floor first, so its chord is above its loss profile."""
    curvature = torch.tensor([9.0, 1.0, 0.3], dtype=torch.float64)
    theta = torch.tensor([[1.0, 1.0, 0.2], [0.5, -1.0, 0.1 + index]], dtype=torch.float64)
    return Problem(
        theta,
        lambda theta, step: (theta.square() @ curvature / 2, theta * curvature),
        lambda theta, shift: theta.square() @ curvature / 2 + shift,
        (torch.tensor([1.0, 2.0], dtype=torch.float64),),
        {},
    )


def test_a_data_set_is_shown_with_the_run_it_came_from(tmp_path):
    config = TargetConfig(40, 4, pairs_per_run=2, stride=4, level="sgd_profile", num_segments=8)
    dataset = write_dataset(tmp_path, problem, 2, config, {})
    figures = dict(plot_dataset(dataset, problem))
    assert list(figures) == ["lengths", "pair-loss", "pair-plane"]

    shards = [dataset.shard(i) for i in range(2)]
    certified, straight = (
        torch.cat([t[name] for t in shards]) for name in ("certified", "chord_feasible")
    )
    above, below = figures["lengths"].axes
    assert f"{certified.sum()} of {len(certified)}" in line(below, "a path").get_label()
    assert f"{straight.sum()} of {len(straight)}" in line(below, "the chord").get_label()
    assert np.isfinite(line(above, "pair").get_ydata()).sum() == certified.sum()

    pair = int((shards[0]["certified"] & ~shards[0]["chord_feasible"]).nonzero()[0])
    axes = figures["pair-loss"].axes[0]
    run, shift = int(shards[0]["run"][pair]), 1.0 + int(shards[0]["run"][pair])
    assert f"shard 0, run {run}, SGD steps {int(shards[0]['time'][pair])} to" in (
        figures["pair-loss"].get_suptitle()
    )
    ends = [shards[0][name][pair].item() for name in ("loss_a", "loss_b")]
    for label in ("geodesic", "chord", "SGD", "level"):
        assert line(axes, label).get_ydata()[[0, -1]].tolist() == pytest.approx(ends)
    assert min(ends) > shift  # the pair's own loss_args
    level = line(axes, "level").get_data()
    above = {
        label: (line(axes, label).get_ydata() - np.interp(line(axes, label).get_xdata(), *level))
        for label in ("geodesic", "chord", "SGD")
    }
    # F is convex, so a run is nowhere above its own profile (but for the level's interpolation).
    assert (
        above["geodesic"].max() < 5e-3 and above["SGD"].max() < 5e-3 and above["chord"].max() > 0.1
    )
    drawn = line(figures["pair-plane"].axes[0], "geodesic").get_xydata()
    assert len(drawn) == config.num_segments + 1

    pictures = plot_dataset(
        dataset, lambda index: problem(index)._replace(theta=torch.ones(2, 3).double())
    )
    with pytest.raises(DatasetError, match="is not what SGD finds here"):
        list(pictures)
