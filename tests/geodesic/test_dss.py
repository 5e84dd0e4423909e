"""Known answers: a ball's exterior, the linear 1-p-1 net, and nets that no path joins."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch.func import vmap

from geodesic import LevelProfile
from geodesic.dss import PRESETS, StringSampling, sample_strings
from geodesic.path import fractions, subdivide

BALL = math.exp(-0.5)  # the level at which the infeasible ball has radius 1
QUICK = StringSampling(learning_rate=1e-2, max_steps=500)


def bump(x):
    return torch.exp(-x.square().sum() / 2)


def linear_net(x):
    u, v = x.chunk(2)
    return 0.5 * (u @ v - 1) ** 2


def ends(angle, dimension=2, radius=1.5):
    """Two points of one radius with an angle between them, (1, d) each."""
    generator = torch.Generator().manual_seed(dimension)
    draw = torch.randn(dimension, 2, generator=generator, dtype=torch.float64)
    x, y = torch.linalg.qr(draw)[0].T
    return radius * x[None], radius * (math.cos(angle) * x + math.sin(angle) * y)[None]


def turned(angle):
    """A zero of the linear 1-2-1 net, turned; its product u·v stays 1."""
    u = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    return torch.cat((u, u))[None]


def grid_losses(loss_fn, path, grid):
    return vmap(loss_fn)(subdivide(path, grid))


@pytest.mark.parametrize(
    "settings",
    [
        QUICK,
        replace(QUICK, insertion="midpoint", bead_target=0.98, slack=1.02, grid=7),
        replace(QUICK, optimizer="sgd", learning_rate=0.1, always_insert=True),
    ],
    ids=["worst", "midpoint", "sgd"],
)
@pytest.mark.parametrize("dimension", [2, 20])
def test_ball_exterior(dimension, settings):
    a, b = ends(2.6, dimension)
    result = sample_strings(bump, a, b, BALL, settings)
    path = result.paths[0]
    assert result.connected.tolist() == [True]
    assert torch.equal(path[0], a[0]) and torch.equal(path[-1], b[0])
    losses = grid_losses(bump, path, settings.grid)
    assert losses.max() <= settings.slack * BALL + 1e-9
    assert losses.max().item() == pytest.approx(result.max_loss.item(), rel=1e-12)
    assert vmap(bump)(path[1:-1]).max() <= settings.bead_target * BALL + 1e-12
    exact = 2 * math.sqrt(1.5**2 - 1) + 2.6 - 2 * math.acos(1 / 1.5)
    assert 0.99 * exact <= result.length.item() <= 1.1 * exact
    assert result.normalized_length.item() * (b - a).norm().item() == pytest.approx(
        result.length.item()
    )
    assert result.num_beads.item() == len(path) > 2 and result.rounds.item() >= 1


def test_slack_is_a_share_of_the_level():
    a, b = ends(2.6)
    highest = bump((a + b)[0] / 2).item()
    for loss, level in ((bump, highest / 1.05), (lambda x: bump(x) - 2, (highest - 2) * 1.05)):
        for slack, passes in ((1.04, False), (1.06, True)):
            result = sample_strings(loss, a, b, level, replace(QUICK, slack=slack, max_steps=1))
            assert result.connected.item() is passes


def test_a_feasible_chord_is_the_string_unless_a_bead_is_always_inserted():
    a, b = ends(1.0)
    chord = sample_strings(bump, a, b, BALL, QUICK)
    assert chord.connected.item() and torch.equal(chord.paths[0], torch.cat((a, b)))
    assert (chord.num_beads.item(), chord.rounds.item()) == (2, 0)
    assert (chord.loss_evaluations.item(), chord.gradient_evaluations.item()) == (21, 0)
    assert chord.normalized_length.item() == pytest.approx(1, abs=1e-12)
    published = sample_strings(bump, a, b, BALL, replace(QUICK, always_insert=True))
    assert published.connected.item() and published.normalized_length.item() > 1.0001
    assert (published.num_beads.item(), published.rounds.item()) == (3, 1)


@pytest.mark.parametrize("level", [0.01, 0.1, 0.4])
def test_linear_net_of_one_neuron_is_not_connected(level):
    a = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    settings = replace(QUICK, max_depth=6)
    # A start off the diagonal, too, or symmetry alone would keep the beads on it.
    b = torch.tensor([[-2.0, -0.5]], dtype=torch.float64)
    for other in (-a, b):
        result = sample_strings(linear_net, a, other, level, settings)
        assert not result.connected.item() and result.max_loss.item() > level
        assert torch.equal(result.paths[0][0], a[0]) and torch.equal(result.paths[0][-1], other[0])


@pytest.mark.parametrize("level", [0.01, 0.1])
def test_linear_net_of_two_neurons_connects(level):
    result = sample_strings(linear_net, turned(0.0), turned(3.0), level, QUICK)
    assert result.connected.item()
    assert grid_losses(linear_net, result.paths[0], 20).max() <= level + 1e-9
    assert result.normalized_length.item() < 2


def test_nets_with_two_neurons_swapped():
    """The paper's negative control, where it is provable.

    A 2-3-2 ReLU net maps x_j to x_{j+1}, three unit vectors 120° apart. The targets lie in no half
    plane, so the columns v of its output layer have to span the plane positively, and do so in one
    of two orientations. A swap of neurons turns one into the other; between them is a point where
    all v, hence all outputs, lie in a half plane {n·y ≤ 0}, where
    F ≥ ⅓ Σ_j max(0, n·y_j)² ≥ 1/6. Through the origin, where F = 1, the two are joined.
    """
    angles = 2 * torch.pi / 3 * torch.arange(3, dtype=torch.float64)
    x = torch.stack((angles.cos(), angles.sin()), dim=1)
    y = x.roll(-1, dims=0)

    def loss(theta):
        hidden = (x @ theta[:6].view(3, 2).T).relu()
        return (hidden @ theta[6:].view(3, 2) - y).square().sum(1).mean()

    def swapped(theta):
        return theta.view(2, 3, 2)[:, [1, 0, 2]].flatten()

    theta = torch.cat((x.flatten(), y.flatten()))
    generator = torch.Generator().manual_seed(0)
    theta = theta + 0.05 * torch.randn(12, generator=generator, dtype=torch.float64)
    a, b = theta.expand(2, -1), swapped(theta).expand(2, -1)
    settings = replace(QUICK, max_depth=6)
    result = sample_strings(loss, a, b, torch.tensor([0.1, 1.05]), settings)
    assert result.connected.tolist() == [False, True]
    assert result.max_loss[0] > 1 / 6 and result.max_loss[1] <= 1.05


def test_a_pair_does_not_depend_on_its_batch():
    def loss(x, centre):
        return bump(x - centre)

    def training(x, step, centre):
        return loss(x, centre) * (1 + 0.3 * math.sin(step))

    pairs = [ends(angle) for angle in (1.0, 2.0, 2.6, 3.1)]
    a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
    centre = torch.linspace(0, 0.3, 8, dtype=torch.float64).view(4, 2)
    level = torch.tensor([0.7, 0.62, 0.65, 0.65], dtype=torch.float64)
    for train_fn in (None, training):
        settings = replace(QUICK, check_every=3)
        batch = sample_strings(loss, a, b, level, settings, (centre,), train_fn, chunk_size=3)
        assert batch.connected.all() and len(set(batch.num_beads.tolist())) > 1
        for i in range(4):
            k = slice(i, i + 1)
            single = sample_strings(loss, a[k], b[k], level[k], settings, (centre[k],), train_fn)
            torch.testing.assert_close(batch.paths[i], single.paths[0], rtol=0, atol=1e-9)
            for name in ("num_beads", "rounds", "loss_evaluations", "gradient_evaluations"):
                assert getattr(batch, name)[i] == getattr(single, name)[0], name


@pytest.mark.parametrize("bead_target", [0.95, 1.0])
def test_level_that_falls_along_the_string(bead_target):
    a, b = ends(2.6, 3)
    profile = LevelProfile(torch.tensor([0.75, 0.65, 0.35], dtype=torch.float64))
    settings = replace(QUICK, bead_target=bead_target, slack=1.01)
    result = sample_strings(bump, a, b, profile, settings)
    assert result.connected.item()
    points = subdivide(result.paths[0], settings.grid)
    level = profile(fractions(points)[None])[0]
    assert (vmap(bump)(points) <= 1.01 * level + 1e-9).all()


def test_beads_that_the_level_fell_below_are_trained_further():
    # A bead at F = λ(s) with no slack is above λ as soon as the string behind it grows.
    a, b = ends(2.6)
    profile = LevelProfile(torch.tensor([0.9, 0.34], dtype=torch.float64))
    settings = replace(QUICK, bead_target=0.999, insertion="midpoint")
    result = sample_strings(bump, a, b, profile, settings)
    assert result.connected.item()


def test_beads_descend_another_function_than_decides():
    def error(x):  # 0 outside the ball, 1 in it: no gradient
        return (x.square().sum() < 1).to(x.dtype)

    a, b = ends(2.6, 5)
    assert not sample_strings(error, a, b, 0.5, replace(QUICK, max_steps=20)).connected.item()
    settings = replace(QUICK, insertion="midpoint", check_every=5)
    result = sample_strings(error, a, b, 0.5, settings, train_fn=lambda x, step: bump(x))
    assert result.connected.item()
    assert grid_losses(error, result.paths[0], 20).max() == 0


def test_convolutional_net_with_minibatches_and_dropout():
    """Test error of a small net on 8 × 8 images; dropout draws depend on nothing but the step."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (400,), generator=generator)
    images = torch.randn(400, 1, 8, 8, generator=generator)
    for quadrant in range(4):
        rows, columns = 4 * (quadrant // 2), 4 * (quadrant % 2)
        images[labels == quadrant, :, rows : rows + 4, columns : columns + 4] += 1
    shapes = ((4, 1, 3, 3), (4, 4 * 16))

    def net(theta, x, drop):
        kernel, weight = (
            part.view(shape) for part, shape in zip(theta.split([36, 256]), shapes, strict=True)
        )
        hidden = torch.nn.functional.conv2d(x, kernel, padding=1).relu()
        hidden = torch.nn.functional.max_pool2d(hidden, 2).flatten(1)
        return torch.nn.functional.dropout(hidden, 0.5, training=drop) @ weight.T

    def error(theta):
        return (net(theta, images[200:], False).argmax(1) != labels[200:]).to(theta.dtype).mean()

    def training(theta, step):
        batch = slice(20 * (step % 10), 20 * (step % 10) + 20)
        logits = net(theta, images[batch], True)
        return torch.nn.functional.cross_entropy(logits, labels[batch])

    theta = 0.3 * torch.randn(2, 292, generator=generator)
    settings = replace(PRESETS["mnist"], learning_rate=1e-2, check_every=10, max_steps=500)
    torch.manual_seed(0)
    for step in range(40):
        gradients = vmap(torch.func.grad(training), (0, None), randomness="same")(theta, step)
        theta = theta - 0.1 * gradients
    level = vmap(error)(theta).max().item()
    assert 0 < level < 0.5
    state = torch.random.get_rng_state()
    first = sample_strings(error, theta[:1], theta[1:], level, settings, train_fn=training)
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.connected.item() and first.max_loss.item() <= 1.02 * level + 1e-6
    torch.manual_seed(1)
    again = sample_strings(
        error, theta[:1], theta[1:], level, settings, train_fn=training, chunk_size=1
    )
    torch.testing.assert_close(first.paths, again.paths)


def test_evaluations_and_steps_are_counted():
    # Each unit of y takes 2 from F; at the midpoint that is all of the gradient. SGD of rate 0.05
    # from F = 2 there is first below 0.82 after 6 steps, after 12 with gradients of norm 1.
    def loss(p):
        return 2 - 2 * p[1] - 8 * (p[0] - 0.5) ** 2

    a = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    settings = StringSampling(bead_target=0.82, optimizer="sgd", learning_rate=0.05)
    seen = []

    def training(p, step):
        seen.append(step)
        return loss(p)

    for changes, train_fn, steps, looks in (
        ({}, None, 6, 0),
        ({"check_every": 4}, None, 8, 0),
        ({"check_every": 4, "max_steps": 7}, None, 7, 0),
        ({"max_gradient_norm": 1.0}, None, 12, 0),
        ({"check_every": 4}, training, 8, 2),
    ):
        result = sample_strings(loss, a, b, 1.0, replace(settings, **changes), train_fn=train_fn)
        assert result.connected.item() and result.num_beads.item() == 3
        height = 0.05 * steps if "max_gradient_norm" in changes else 0.1 * steps
        assert result.paths[0][1].tolist() == pytest.approx([0.5, height])
        # With F its own training function, the last gradient is computed for its value of F.
        assert result.gradient_evaluations.item() == steps + (train_fn is None)
        assert result.loss_evaluations.item() == 3 * 21 + looks
    assert seen == list(range(8))
    lost = sample_strings(loss, a, b, 1.0, replace(settings, max_steps=5))
    assert not lost.connected.item() and torch.equal(lost.paths[0], torch.cat((a, b)))
    assert lost.gradient_evaluations.item() == 6


def test_levels_below_zero():
    a, b = ends(2.6)
    result = sample_strings(lambda x: bump(x) - 1, a, b, BALL - 1, QUICK)
    assert result.connected.item()
    target = BALL - 1 - 0.05 * (1 - BALL)
    assert vmap(bump)(result.paths[0][1:-1]).max() - 1 <= target + 1e-12


def test_what_is_not_a_number_fails_its_pair_only():
    def loss(x):
        return bump(x) + 0 * (x.square().sum() - 0.25).sqrt()

    a, b = (torch.cat(side) for side in zip(ends(3.1), ends(2.0), strict=True))
    result = sample_strings(loss, a, b, BALL, QUICK)
    assert result.connected.tolist() == [False, True]
    assert torch.equal(result.paths[0], torch.stack((a[0], b[0])))
    assert result.max_loss[0] == torch.inf and result.gradient_evaluations[0] <= 2
    gap = sample_strings(
        bump, a, b, lambda s: torch.where((s - 0.5).abs() < 0.2, torch.nan, 1.0), QUICK
    )
    assert gap.connected.tolist() == [False, False]


def test_progress_ends_with_all_pairs_finished():
    calls = []
    a, b = ends(2.6)
    sample_strings(bump, a, b, BALL, QUICK, progress=lambda *counts: calls.append(counts))
    assert calls[0] == (0, 1) and calls[-1] == (1, 0)


def test_presets_are_as_published():
    # name: α, slack, insertion, grid, optimizer, learning rate (geodesics.md, "DSS, as published")
    table = {
        "cubic": (0.95, 1.1, "midpoint", 100, "adam", 1e-3),
        "quadratic": (0.95, 1.1, "midpoint", 100, "adam", 1e-3),
        "mnist": (0.98, 1.02, "worst", 20, "adam", 1e-4),
        "cifar": (0.98, 1.1, "worst", 20, "sgd", 0.1),
        "ptb": (0.98, 1.1, "midpoint", 20, "sgd", 1.0),
    }
    assert PRESETS.keys() == table.keys()
    for name, row in table.items():
        preset = PRESETS[name]
        assert row == (
            preset.bead_target,
            preset.slack,
            preset.insertion,
            preset.grid,
            preset.optimizer,
            preset.learning_rate,
        )
        assert preset.max_depth == 10 and preset.always_insert
        assert preset.max_gradient_norm == (5 if name == "ptb" else None)
        assert preset.max_steps % preset.check_every == 0
    with pytest.raises(FrozenInstanceError):
        PRESETS["cubic"].slack = 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bead_target", 0.0),
        ("bead_target", 1.1),
        ("slack", 0.9),
        ("slack", math.nan),
        ("insertion", "argmax"),
        ("grid", 1),
        ("grid", 20.0),
        ("max_depth", 0),
        ("optimizer", "rmsprop"),
        ("learning_rate", -1e-3),
        ("max_gradient_norm", 0.0),
        ("max_steps", 0),
        ("check_every", 0),
    ],
)
def test_settings_refuse(name, value):
    with pytest.raises(ValueError, match=rf"{name} must.*{value}"):
        StringSampling(**{name: value})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"theta_a": torch.zeros(2)}, "theta_a must"),
        ({"theta_a": torch.full((1, 2), torch.nan).double()}, "theta_a must"),
        ({"theta_a": torch.zeros(1, 2, dtype=torch.float16)}, "theta_a must"),
        ({"theta_b": torch.zeros(1, 3, dtype=torch.float64)}, "theta_b must"),
        ({"level": "low"}, "level must"),
        ({"level": torch.ones(2)}, "level must"),
        ({"level": math.nan}, "level must be finite"),
        ({"level": 0.1}, r"level must be at least F\(theta_a\)"),
        ({"loss_args": (1.0,)}, "loss_args must"),
        ({"loss_args": (torch.ones(2),)}, "loss_args must"),
        ({"chunk_size": 0}, "chunk_size must"),
    ],
)
def test_arguments_refuse(changes, named):
    a, b = ends(2.6)
    arguments = {"theta_a": a, "theta_b": b, "level": BALL, "settings": QUICK, **changes}
    with pytest.raises(ValueError, match=named):
        sample_strings(bump, **arguments)
