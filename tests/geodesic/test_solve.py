"""Known answers around a ball and in a shell, falling levels, and bad input; see test_exact.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from geodesic import LevelProfile, ModelLoss, find_geodesic, find_geodesics, level_set, sgd_profile
from geodesic.level_set import SublevelSet
from geodesic.path import chord, fractions, length, points_at, subdivide
from geodesic.shortening import nonnegative_qp

BALL = math.exp(-0.5)  # the level at which the infeasible ball has radius 1


def bump(x):
    return torch.exp(-x.square().sum() / 2)


def shell(x):
    return (x.square().sum() - 1) ** 2


def ends(radius, angle, dimension, dtype=torch.float64):
    """Two points of one radius with an angle between them, in a random plane."""
    generator = torch.Generator().manual_seed(dimension)
    draw = torch.randn(dimension, 2, generator=generator, dtype=torch.float64)
    x, y = torch.linalg.qr(draw)[0].T
    return (radius * x).to(dtype), (radius * (math.cos(angle) * x + math.sin(angle) * y)).to(dtype)


def around_ball(radius, angle):
    """Exact length around the unit ball: two tangents and an arc."""
    return 2 * math.sqrt(radius**2 - 1) + angle - 2 * math.acos(1 / radius)


def assert_inside(loss_fn, result, level, tolerance):
    """Certify afresh, on samples four times as dense as the solver's own."""
    points = subdivide(result.path, 64)
    losses = torch.func.vmap(loss_fn)(points)
    s = fractions(points)
    level = level(s[None])[0] if callable(level) else torch.full_like(s, level)
    assert (losses - level).max() <= tolerance * max(1.0, level.abs().max().item())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("dimension", [2, 10, 1000])
@pytest.mark.parametrize(("num_segments", "error"), [(32, 3e-3), (64, 1e-3)])
@pytest.mark.parametrize(("radius", "angle"), [(1.5, 2.6), (1.5, math.pi), (3.0, 3.0)])
def test_ball_exterior(radius, angle, num_segments, error, dimension, dtype, tolerance):
    a, b = ends(radius, angle, dimension, dtype)
    result = find_geodesic(bump, a, b, BALL, num_segments)
    assert result.certified and not result.chord_feasible
    assert result.length == pytest.approx(around_ball(radius, angle), rel=error)
    assert result.length > around_ball(radius, angle) * (1 - 1e-6)
    assert result.path.shape == (num_segments + 1, dimension) and result.path.dtype == dtype
    assert torch.equal(result.path[0], a) and torch.equal(result.path[-1], b)
    assert result.max_loss <= BALL + tolerance and result.level == pytest.approx(BALL)
    assert result.gradient_evaluations < 60 * num_segments
    assert result.loss_evaluations < 190 * num_segments
    assert_inside(bump, result, BALL, tolerance)


@pytest.mark.parametrize("angle", [2.6, math.pi])
def test_ends_on_the_boundary(angle):
    a, b = ends(1.0, angle, 5)
    level = bump(a).item()
    result = find_geodesic(bump, a, b, max(level, bump(b).item()))
    assert result.certified
    assert result.length == pytest.approx(angle, rel=5e-3)
    assert_inside(bump, result, level, 1e-9)


@pytest.mark.parametrize("num_segments", [4, 8, 16, 64])
def test_length_is_between_exact_and_circumscribed(num_segments):
    # The solver's energy spaces beads evenly; a share of them is on the arc.
    a, b = ends(1.5, 2.6, 2)
    exact = around_ball(1.5, 2.6)
    arc = 2.6 - 2 * math.acos(1 / 1.5)
    beads = max(1, math.floor(num_segments * arc / exact) - 1)
    result = find_geodesic(bump, a, b, BALL, num_segments=num_segments)
    assert result.certified and result.path.shape == (num_segments + 1, 2)
    circumscribed = exact - arc + 2 * beads * math.tan(arc / (2 * beads))
    assert exact <= result.length <= circumscribed * 1.001


def test_feasible_chord_is_exact_and_costs_one_evaluation():
    a, b = ends(1.5, 1.0, 10)
    result = find_geodesic(bump, a, b, BALL, num_segments=7)
    assert result.certified and result.chord_feasible
    assert result.normalized_length == 1.0
    assert result.length == torch.linalg.vector_norm(b - a).item()
    assert torch.equal(result.path, chord(a, b, 7)) and torch.equal(result.path[-1], b)
    assert (result.loss_evaluations, result.gradient_evaluations) == (65 + 8, 0)
    assert (result.iterations, result.residual) == (0, 0.0)


@pytest.mark.parametrize("angle", [1.0, 2.0, 2.8])
@pytest.mark.parametrize("share", [0.02, 0.2, 0.6, 0.95, 1.0, 1.5])
def test_shell_length_against_level(angle, share):
    level = share * math.sin(angle / 2) ** 4
    inner = math.sqrt(1 - math.sqrt(level)) if level < 1 else 0.0
    exact = 1.0
    if share < 1:
        arc = 2 * math.sqrt(1 - inner**2) + inner * (angle - 2 * math.acos(inner))
        exact = arc / (2 * math.sin(angle / 2))
    a, b = ends(1.0, angle, 3)
    result = find_geodesic(shell, a, b, level)
    assert result.certified
    assert result.normalized_length == pytest.approx(exact, rel=2e-3)
    assert_inside(shell, result, level, 1e-9)


def falling_pair():
    """A valley bent along a circle, F falling along it; a trajectory that zigzags down it."""

    def loss_fn(x):
        return 4 * (x[:2].norm() - 1) ** 2 + x[2:].square().sum() + 0.5 * (1 + x[0])

    angle = torch.linspace(0, 2.8, 33, dtype=torch.float64)
    zigzag = 0.05 * (-1.0) ** torch.arange(33)
    zigzag[[0, -1]] = 0
    trajectory = torch.stack((angle.cos(), angle.sin(), zigzag, -zigzag), dim=1)
    return loss_fn, trajectory, torch.func.vmap(loss_fn)(trajectory)


def test_falling_level_shortens_the_trajectory():
    loss_fn, trajectory, losses = falling_pair()
    level = sgd_profile(loss_fn, trajectory)
    result = find_geodesic(loss_fn, trajectory[0], trajectory[-1], level, initial_path=trajectory)
    assert result.certified and not result.chord_feasible
    assert result.length < 0.95 * length(trajectory).item()
    assert 0 <= result.level - losses.max().item() < 1e-3  # F also rises between the points
    assert_inside(loss_fn, result, level, 1e-9)
    constant = find_geodesic(loss_fn, trajectory[0], trajectory[-1], initial_path=trajectory)
    assert constant.certified and constant.length <= result.length + 1e-9


def test_the_first_steps_of_a_network_are_shortened():
    """Where F falls fastest, steps are long and the level has most kinks."""
    torch.manual_seed(1)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images[:256]).float() / 8 - 1, torch.from_numpy(labels[:256])
    model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))
    loss_fn = ModelLoss(model, nn.functional.cross_entropy, x, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    points = [loss_fn.flatten(model)]
    for step in range(80):
        batch = torch.randperm(256)[:16]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        if step % 5 == 4:
            points.append(loss_fn.flatten(model))
    run = torch.stack(points)
    level = sgd_profile(loss_fn, run)
    result = find_geodesic(loss_fn, run[0], run[-1], level, initial_path=run)
    assert result.certified and not result.chord_feasible
    assert (run[-1] - run[0]).norm() < result.length < 0.8 * length(run)
    assert_inside(loss_fn, result, level, 1e-6)


def test_unevenly_resampled_start_is_never_lengthened():
    loss_fn, trajectory, losses = falling_pair()
    s = torch.linspace(0, 1, 21, dtype=torch.float64) ** 2
    start = points_at(trajectory, s)
    level = LevelProfile(losses + torch.linspace(0.2, 0, 33))
    result = find_geodesic(loss_fn, start[0], start[-1], level, 20, initial_path=start)
    assert result.certified and result.length <= length(start).item()


def test_batch_agrees_with_single_pairs():
    cases = [(1.5, 1.0), (1.5, 2.6), (2.0, math.pi), (1.5, 2.9)]
    a, b = (torch.stack(end) for end in zip(*(ends(r, phi, 6) for r, phi in cases), strict=True))
    scales = torch.tensor([1.0, 0.9, 1.1, 1.0], dtype=torch.float64)

    def scaled(x, scale):
        return bump(scale * x)

    batch = find_geodesics(scaled, a, b, BALL, loss_args=(scales,), chunk_size=50)
    assert batch.certified.all() and batch.chord_feasible.tolist() == [True, False, False, False]
    assert batch.path.shape == (4, 33, 6)
    for i, scale in enumerate(scales):
        single = find_geodesic(lambda x, k=scale: scaled(x, k), a[i], b[i], BALL)
        assert single.length == pytest.approx(batch.length[i].item(), rel=1e-6)
        torch.testing.assert_close(single.path, batch.path[i], atol=1e-3, rtol=0)
        assert single.chord_feasible == batch.chord_feasible[i].item()


def test_same_seed_same_bytes():
    a, b = ends(1.5, math.pi, 10)
    first, again, other = (find_geodesic(bump, a, b, BALL, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.path, again.path) and first.residual == again.residual
    assert not torch.equal(first.path, other.path) and other.certified


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    radius=st.floats(1.1, 3),
    angle=st.floats(0.1, 3.1),
    levels=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    dimension=st.integers(2, 8),
)
def test_a_higher_level_is_no_longer_way(radius, angle, levels, dimension):
    a, b = ends(radius, angle, dimension)
    start = max(bump(a).item(), bump(b).item())
    results = [
        find_geodesic(bump, a, b, start + share * (0.95 - start), num_segments=16)
        for share in sorted(levels)
    ]
    for result in results:
        assert result.certified and result.normalized_length >= 1 - 1e-12
        assert torch.equal(result.path[0], a) and torch.equal(result.path[-1], b)
    # Two polylines of 16 segments: each within half a percent of its own geodesic.
    assert results[1].length <= results[0].length * 1.005


def bumps(x, centres, heights, widths):
    """A bowl with Gaussian bumps and dents."""
    squares = (x - centres).square().sum(-1) / widths.square()
    return 0.05 * x.square().sum() + (heights * torch.exp(-squares / 2)).sum()


@pytest.mark.parametrize("falls", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("dimension", "count"), [(2, 6), (5, 10)])
def test_no_certified_path_leaves_a_random_set(dimension, count, dtype, tolerance, falls):
    """Ten times as dense as the certificate, on 25 problems each time."""
    generator, n = torch.Generator().manual_seed(dimension), 25

    def normal(*shape):
        return torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(dtype)

    args = (normal(count, dimension), 0.7 + 0.6 * normal(count), 0.3 + 0.5 * normal(count).abs())
    theta = 1.5 * normal(2, dimension)
    losses = torch.func.vmap(torch.func.vmap(bumps, (0, None, None, None)))(theta, *args)
    theta = theta.gather(1, losses.argsort(1, descending=True)[..., None].expand_as(theta))
    high, low = losses.amax(1), losses.amin(1)
    level = LevelProfile(torch.stack((high + 0.1, low + 0.02), 1)) if falls else high + 0.02
    found = find_geodesics(bumps, theta[:, 0], theta[:, 1], level, loss_args=args)
    assert found.certified.sum() > n / 2 and not found.chord_feasible.all()
    points = subdivide(found.path, 160)
    losses = torch.func.vmap(torch.func.vmap(bumps, (0, None, None, None)))(points, *args)
    level = level(fractions(points)) if falls else level[:, None]
    excess = (losses - level - tolerance * level.abs().clamp_min(1)).amax(1)
    assert (excess[found.certified] <= 0).all()


A, B = torch.tensor([1.5, 0.0]), torch.tensor([-1.6, 0.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(theta_a=A[None]), "theta_a must be a"),
        (dict(theta_b=torch.ones(3)), "theta_b must match"),
        (dict(theta_b=B.double()), "theta_b must match"),
        (dict(theta_a=A.half(), theta_b=B.half()), "float32 or float64"),
        (dict(theta_a=A * torch.nan), "theta_a must be finite"),
        (dict(level=0.1), r"level must be at least F\(theta_a\)"),
        (dict(theta_b=A.clone()), "theta_b must differ from theta_a"),
        (dict(theta_b=torch.ones(2, device="meta")), "theta_b must match"),
        (dict(theta_a=A.to("meta"), theta_b=B.to("meta")), "theta_a is on meta, .* CPUs only"),
        (dict(theta_b=0.5 * B), r"level must be at least F\(theta_b\)"),
        (dict(level=torch.ones(3)), "level must be a number"),
        (dict(level="high"), "level must be a number"),
        (dict(level=math.inf), "level must be finite"),
        (dict(level=-math.inf), "level must be finite"),
        (dict(level=lambda s: 1 + s), "level must not increase"),
        (dict(level=lambda s: math.exp(-s)), "level must map"),
        (dict(num_segments=0), "num_segments"),
        (dict(initial_path=torch.ones(5, 3)), "initial_path must have"),
        (dict(initial_path=torch.stack((B, A))), "initial_path must start"),
        (dict(initial_path=torch.stack((A, A * torch.nan, B))), "initial_path must be finite"),
        (dict(loss_fn=lambda x: x.sum() / 0), r"loss_fn\(theta_a\) must be finite"),
        (dict(loss_fn=lambda x: x.sum() * 0 - math.inf), r"loss_fn\(theta_a\) must be finite"),
        (dict(loss_fn=lambda x: x.sum().int()), "must return a float32 .* got torch.int32"),
        (dict(loss_fn=lambda x: x.sum() > 0), "must return a float32 .* got torch.bool"),
        (dict(loss_fn=lambda x: x.sum().half()), "must return a float32 .* got torch.float16"),
        (dict(loss_fn=lambda x: x.sum() + 0j), "must return a float32 .* got torch.complex64"),
        (dict(loss_fn=lambda x: 1.0), "must return a float32 .* got a float;"),
        (dict(loss_fn=lambda x: None), "must return a float32 .* got a NoneType;"),
        (dict(loss_fn=lambda x: (x.sum(), x)), "must return a float32 .* got a tuple;"),
        (dict(loss_fn=lambda x: x.square()), r"loss_fn must return a scalar, got shape \(2,\)"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        find_geodesic(**{"loss_fn": bump, "theta_a": A, "theta_b": B, **arguments})


@pytest.mark.parametrize("height", [1e-12, 1e-7, 1e-3])
def test_a_wall_five_times_as_high_as_a_small_level_is_seen(height):
    """Across the whole line there is no way round; in float32, where 1e-7 is close to rounding."""

    def loss_fn(x):
        return height * (1 + 4 * torch.exp(-(((x[0] - 0.5) / 0.1) ** 2)))

    a, b = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    walled = find_geodesic(loss_fn, a, b)
    assert not walled.certified and walled.max_loss > 4 * walled.level
    assert find_geodesic(loss_fn, a, b, 6 * height).chord_feasible


def test_a_default_device_elsewhere_changes_nothing():
    def loss_fn(x):  # with a tensor that names no device
        return bump(x - torch.zeros(5))

    a, b = ends(1.5, 2.6, 5)
    trajectory = chord(a, b, 4) * torch.tensor([1, 1.3, 1.5, 1.3, 1]).double()[:, None]
    expected = find_geodesic(loss_fn, a, b, BALL), sgd_profile(loss_fn, trajectory)
    torch.set_default_device("meta")
    try:
        found, profile = find_geodesic(loss_fn, a, b, BALL), sgd_profile(loss_fn, trajectory)
    finally:
        torch.set_default_device(None)
    assert found.certified and torch.equal(found.path, expected[0].path)
    assert torch.equal(profile.values, expected[1].values)


def hard_pairs():
    """A loss too rough for its samples, a strip of NaN across the chord, and the ordinary bump."""
    a, b = (torch.stack([end] * 3) for end in ends(1.5, 2.6, 4))

    def loss_fn(x, rough, strip):
        noise = 0.02 * torch.sin(1e3 * x).sum()
        across = (b[0] - a[0]) @ (x - (a[0] + b[0]) / 2)
        return torch.where(strip * (across.abs() < 0.02) > 0, torch.nan, bump(x) + rough * noise)

    return loss_fn, a, b, (torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]))


@pytest.mark.parametrize("budget", [None, 300])
def test_a_pathological_pair_stops_at_a_budget_of_evaluations(budget, monkeypatch):
    if budget is not None:
        monkeypatch.setattr(level_set, "BUDGET", budget)
    loss_fn, a, b, args = hard_pairs()
    found = find_geodesics(loss_fn, a, b, 0.7, loss_args=args, max_iterations=10_000)
    assert found.certified[1:].tolist() == [False, True] and found.error == [""] * 3
    spent = found.loss_evaluations + 3 * found.gradient_evaluations
    step = (24 + 3 * 8 + 16 + 3 * 2) * 32  # a certificate, a program's gradients
    strings = 3 * 200 * 15 * (budget is None)
    assert (spent <= level_set.BUDGET * 32 + 2 * step + strings).all()
    if budget is not None:
        assert spent[0] >= budget * 32
    assert found.max_loss[1].isinf()
    alone = find_geodesics(loss_fn, a[2:], b[2:], 0.7, loss_args=tuple(arg[2:] for arg in args))
    torch.testing.assert_close(alone.path[0], found.path[2], atol=1e-9, rtol=0)
    assert alone.gradient_evaluations == found.gradient_evaluations[2]


def test_a_program_with_nan_holds_up_no_other():
    draw = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix, vector = draw @ draw.mT, draw.sum(1)
    alone = nonnegative_qp(matrix[:2], vector[:2], 1e-10)
    matrix[2, 0] = torch.nan
    both = nonnegative_qp(matrix, vector, 1e-10)
    assert torch.equal(both[:2], alone) and alone.any() and (both[2] == 0).all()


def wall(x):
    return 0.1 * x.square().sum() + 12 * torch.exp(-(((x[0] - 0.26) / 0.1) ** 2))


def test_no_wall_hides_in_a_long_segment():
    """Beads bunched at both ends leave one segment, with gaps wider than the wall, between them."""
    a, b = torch.tensor([-5.1, 0.4]).double(), torch.tensor([5.0, 0.0]).double()
    bunched = torch.cat(
        (chord(a, torch.lerp(a, b, 0.01), 16), chord(torch.lerp(a, b, 0.99), b, 15))
    )
    sublevel = SublevelSet(wall, (), 1, 256)
    sublevel.set_level(wall(a)[None])
    rows = torch.zeros(1, dtype=torch.long)
    assert sublevel.sample(bunched[None], 16, rows).feasible  # its own samples miss the wall
    samples = sublevel.certify(bunched[None], 16, rows)
    assert not samples.feasible and samples.max_loss > 5
    assert not find_geodesic(wall, a, b, initial_path=bunched).certified


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_crest_between_samples_is_found(dtype):
    """Where F has no gradient its top is above any parabola through samples beside it."""
    sublevel, rows = SublevelSet(lambda x: 1 - x.abs().sum(), (), 1, 256), torch.zeros(1).long()
    for share in torch.linspace(0.001, 0.999, 37, dtype=dtype).tolist():
        path = torch.tensor([[[-share, 0.0], [1 - share, 0.0]]], dtype=dtype)
        for level, inside in ((1 - 1e-4, False), (1.02, True)):
            sublevel.set_level(torch.tensor([level], dtype=dtype))
            assert sublevel.certify(path, 16, rows).feasible == inside, share


def test_loss_args_must_be_batched():
    with pytest.raises(ValueError, match="loss_args"):
        find_geodesics(bump, A[None], B[None], loss_args=(torch.ones(2),))


def test_bad_pairs_are_named_and_spoil_no_other():
    a, b = (torch.stack([end] * 6) for end in ends(1.5, 2.6, 4))
    level = torch.full((6,), BALL, dtype=torch.float64)
    a[1, 2], b[2], level[3] = torch.nan, a[2], 0.1
    b[4] *= 1e200  # F underflows to 0, fine; its gradient too
    scale = torch.ones(6, dtype=torch.float64)
    scale[5] = torch.inf

    def loss_fn(x, scale):
        return bump(x) * scale

    with pytest.warns(UserWarning, match="4 of 6 pairs are not searched, see `error`; pair 1"):
        batch = find_geodesics(loss_fn, a, b, level, loss_args=(scale,))
    reasons = ["theta_a must be finite", "theta_b must differ", "level must be at least"]
    reasons = ["", *reasons, "", "loss_fn(theta_a) must be finite"]
    assert all(e.startswith(r) for e, r in zip(batch.error, reasons, strict=True))
    assert batch.certified.tolist() == [True, False, False, False, True, False]
    alone = find_geodesic(bump, a[0], b[0], BALL)
    assert alone.length == batch.length[0].item() and alone.error == ""
