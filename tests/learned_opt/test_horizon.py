"""Runs of a known length, `LearnedOptimizer(params, num_steps=N)`."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace

import pytest
import torch

from learned_opt import LearnedOptimizer, UpdateRule, make_rule
from learned_opt.rules import Layout
from tests.learned_opt.drop_in import noisy_rule, parameters, run, set_gradients

N = 3000


@pytest.fixture(params=["tensor", "horizon"])
def rule(request: pytest.FixtureRequest) -> UpdateRule:
    return noisy_rule(request.param)


def relative(p: torch.Tensor, before: torch.Tensor) -> float:
    return float((p.detach() - before).norm() / before.norm().clamp(min=1e-9))


def move(optimizer: LearnedOptimizer, clock: int) -> None:
    """As if the run had come to step `clock`."""
    state = optimizer.state_dict()
    for entries in state["state"].values():
        entries["clock"].fill_(clock)
    optimizer.load_state_dict(state)


@pytest.mark.parametrize("beginnings", [False, True])
@pytest.mark.parametrize("num_steps", [200, 1200, 30_000])
def test_steps_fall_to_the_end_of_the_run(num_steps: int, beginnings: bool) -> None:
    """By (300 / t)^(1−k) (1 − t / N)^k, k = 1 − min(1, 300 / N); with a warm-up over N / 20."""
    rule = make_rule("geodesic_rnn", hidden=3, decay_after=300, beginnings=beginnings)
    theta, gradient, k = torch.full((1, 12), 0.3), torch.ones(1, 12), 1 - min(1, 300 / num_steps)
    for made in (0, 7, num_steps // 2, num_steps - 1, 2 * num_steps):
        state = replace(rule.init_state(theta, ((3, 4),)), step=made)
        plain, told = (
            float(rule.update(gradient, theta, replace(state, num_steps=n))[0].norm())
            for n in (None, num_steps)
        )
        anytime = min(1, 300 / (made + 1))
        fall = 1 - min(made, num_steps - 1) / num_steps
        if beginnings:
            fall *= min(1, (made + 1) / (num_steps / 20))
        assert told / plain == pytest.approx(anytime ** (1 - k) * fall**k / anytime, rel=0.1)


def test_a_run_that_is_resumed_keeps_its_length_and_its_time(rule: UpdateRule) -> None:
    params = parameters()
    optimizer = LearnedOptimizer(params, weights=rule, num_steps=N)
    run(optimizer, params, range(3))
    saved = copy.deepcopy((params, optimizer.state_dict()))
    expected = run(optimizer, params, range(3, 8))
    fresh = LearnedOptimizer(saved[0], weights=rule)  # told nothing, but the state is
    fresh.load_state_dict(saved[1])
    assert all(map(torch.equal, run(fresh, saved[0], range(3, 8)), expected))
    assert fresh.param_groups[0]["num_steps"] == N


def test_a_layer_that_is_unfrozen_late_rests_when_the_run_does(rule: UpdateRule) -> None:
    params = parameters()
    optimizer = LearnedOptimizer(params, weights=rule, num_steps=N)
    late, moved = params[2], []
    for step in range(200):
        if step == 100:
            move(optimizer, N - 100)
        set_gradients(params, step % 7)
        if step < 10:
            late.grad = None
        before = late.detach().clone()
        optimizer.step()
        moved.append(relative(late, before))
    assert moved[9] == 0 < moved[10]
    assert moved[-1] < 0.05 * max(moved[:100]) and moved[-1] < 0.05 * max(moved[100:])


def test_the_first_steps_of_a_layer_are_short() -> None:
    """With `beginnings`, over its own first N / 20; a little shorter still if it begins late."""
    rule = make_rule("geodesic_rnn", hidden=3, beginnings=True)
    early, late = (torch.full((4, 3), 0.3, requires_grad=True) for _ in range(2))
    optimizer = LearnedOptimizer([early, late], weights=rule, num_steps=N)
    lengths: list[tuple[float, float]] = []
    for step in range(220):
        here = (early, late) if step >= 200 else (early,)
        for p in here:
            p.data.fill_(0.3)
            p.grad = torch.ones_like(p)
        optimizer.step()
        lengths.append(tuple(relative(p, torch.full_like(p, 0.3)) for p in (early, late)))
    assert lengths[0][0] < 0.02 * lengths[-1][0]
    assert lengths[200][1] < 0.02 * lengths[200][0]
    assert lengths[219][1] == pytest.approx((20 / 50) ** 0.1 * lengths[19][0], rel=0.1)


def test_a_layer_that_joins_late_begins_with_short_steps_and_one_that_skips_does_not() -> None:
    """Nothing told: over its first 50 steps, or over as many as it is late."""
    rule = make_rule("geodesic_rnn", hidden=3, beginnings=True)
    starts = {"early": 0, "soon": 10, "late": 100, "every other": 0}
    params = {name: torch.zeros(4, 3, requires_grad=True) for name in starts}
    optimizer = LearnedOptimizer(list(params.values()), weights=rule)
    moved: dict[str, list[float]] = {name: [] for name in starts}
    for step in range(180):
        for name, p in params.items():
            p.data.fill_(0.3)
            here = step >= starts[name] and (name != "every other" or step % 2 == 0)
            p.grad = torch.ones_like(p) if here else None
        optimizer.step()
        for name, p in params.items():
            if p.grad is not None:
                moved[name].append(relative(p, torch.full_like(p, 0.3)))
    for name, rising in {"early": 1, "soon": 10, "late": 50, "every other": 1}.items():
        full = [min(1, (t + 1) / rising) * m for t, m in enumerate(moved["early"][:60])]
        assert moved[name][:60] == pytest.approx(full, rel=0.1)


@pytest.mark.parametrize("kind", ["first", "later"])
def test_averages_follow_gradients_that_fall_at_once(kind: str) -> None:
    """A first gradient a million times too large, or a loss that is rescaled in mid-run."""
    rule = make_rule("geodesic_rnn", hidden=3, basis=9, beginnings=True)
    plain, spoilt = (torch.randn(6, 4, generator=rng(0)).requires_grad_() for _ in range(2))
    target = torch.randn(6, 4, generator=rng(1))
    optimizers = [LearnedOptimizer([p], weights=rule) for p in (plain, spoilt)]
    for step in range(300):
        scale = 1e6 if (step == 0 if kind == "first" else step < 150) else 1.0
        for p, optimizer, factor in zip((plain, spoilt), optimizers, (1.0, scale), strict=True):
            noise = torch.randn(6, 4, generator=rng(step))
            p.grad = factor * (p.detach() - target + 0.1 * noise)
            optimizer.step()
    ends = [float((p.detach() - target).norm() / target.norm()) for p in (plain, spoilt)]
    assert ends[1] < max(1.5 * ends[0], 0.1)


def test_gradients_that_fall_little_by_little_are_remembered() -> None:
    """As those of a net that has learned its data by heart: its steps should become small."""
    rule, theta = make_rule("geodesic_rnn", hidden=3, beginnings=True), torch.ones(1, 12)
    state = rule.init_state(theta, ((3, 4),))
    for step in range(200):
        gradient = 10 ** (-step / 20) * torch.ones(1, 12)
        _, state = rule.update(gradient, theta, state)
    assert float(state.tensor["gradient_rms"]) > 100 * float(gradient[0, 0])


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_groups_may_have_lengths_of_their_own_or_none() -> None:
    rule = make_rule("geodesic_rnn", hidden=3)
    short, free = (torch.ones(3, 2, requires_grad=True) for _ in range(2))
    optimizer = LearnedOptimizer(
        [{"params": [short], "num_steps": N}, {"params": [free]}], weights=rule
    )
    before = run(optimizer, [short, free], range(3))
    move(optimizer, N - 1)
    after = run(optimizer, [short, free], range(1))
    moved = [(a - b).norm() for a, b in zip(after, before, strict=True)]
    assert moved[0] < 0.1 * moved[1]


def test_a_run_that_goes_on_is_noticed_once_and_goes_on() -> None:
    params = parameters()
    optimizer = LearnedOptimizer(params, weights=make_rule("geodesic_rnn", hidden=3), num_steps=N)
    run(optimizer, params, range(3))
    move(optimizer, N - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ended = run(optimizer, params, range(1))
    with pytest.warns(UserWarning, match=f"num_steps is {N}, and the run goes on") as told:
        set_gradients(params, N)
        optimizer.step()
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        beyond = run(optimizer, params, range(5))
    assert not any(torch.equal(a, b) for a, b in zip(ended, beyond, strict=True) if a.numel())
    tiny = run(optimizer, params, range(1))
    optimizer.param_groups[0]["num_steps"] = 10 * N  # as the warning says
    usual = run(optimizer, params, range(1))
    assert (usual[0] - tiny[0]).norm() > 10 * (tiny[0] - beyond[0]).norm()


@pytest.mark.parametrize("value", [0, -3, 2.5, "many", True, float("nan")])
def test_a_length_that_is_none_is_refused(value: object) -> None:
    params = parameters()
    with pytest.raises(ValueError, match=r"num_steps is .*; use a positive int"):
        LearnedOptimizer(params, num_steps=value)
    optimizer = LearnedOptimizer(params)
    with pytest.raises(ValueError, match="num_steps is"):
        optimizer.add_param_group({"params": [torch.ones(2)], "num_steps": value})
    assert len(optimizer.param_groups) == 1


def test_a_rule_that_knows_no_length_refuses_one() -> None:
    with pytest.raises(ValueError, match="num_steps is 5, but rule 'rnnprop' does not use it"):
        LearnedOptimizer(parameters(), weights=noisy_rule("rnnprop"), num_steps=5)


def test_a_length_that_is_set_later_is_checked_and_noticed() -> None:
    params = parameters()
    optimizer = LearnedOptimizer(params, weights=make_rule("geodesic_rnn", hidden=3))
    run(optimizer, params, range(5))
    optimizer.param_groups[0]["num_steps"] = 0
    with pytest.raises(ValueError, match="num_steps is 0; use a positive int"):
        run(optimizer, params, range(1))
    optimizer.param_groups[0]["num_steps"] = 3  # is over
    with pytest.warns(UserWarning, match="num_steps is 3, and the run goes on"):
        run(optimizer, params, range(1))


def test_a_run_whose_state_was_cleared_begins_anew() -> None:
    params = parameters()
    optimizer = LearnedOptimizer(params, weights=make_rule("geodesic_rnn", hidden=3), num_steps=N)
    run(optimizer, params, range(5))
    optimizer.state.clear()
    run(optimizer, params, range(2))
    assert [int(optimizer.state[params[0]][name]) for name in ("step", "clock")] == [2, 2]


def test_optimizers_and_checkpoints_from_before_there_were_lengths() -> None:
    params = parameters()
    optimizer = LearnedOptimizer(params, weights=make_rule("geodesic_rnn", hidden=3))
    run(optimizer, params, range(2))
    older = copy.deepcopy(optimizer)
    for group in (older.defaults, *older.param_groups):
        del group["num_steps"]
    for name in ("renew", "horizon", "beginnings", "decay"):
        del older.rule.__dict__[name]
    for entries in older.state.values():
        del entries["clock"]
    again = pickle.loads(pickle.dumps(older))
    its = again.param_groups[0]["params"]
    assert all(map(torch.equal, run(again, its, range(2, 4)), run(optimizer, params, range(2, 4))))
    assert int(again.state[its[0]]["clock"]) == 4


def test_runs_by_backpropagation_may_have_decay() -> None:
    """A row of zeros has no direction to decay in."""
    rule, theta = make_rule("geodesic_rnn", hidden=3, decay=0.1), torch.zeros(1, 12)
    theta[:, 4:] = 0.3
    theta.requires_grad_()
    moved = rule.moved(theta, torch.ones(1, 12), Layout(((3, 4),)))
    (gradient,) = torch.autograd.grad(moved.sum(), theta)
    assert torch.equal(gradient, torch.ones(1, 12))
    assert (moved[:, :4] == 1).all() and (moved[:, 4:] < 1.3).all()
