"""Runs of a known length, `LearnedOptimizer(params, num_steps=N)`."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from learned_opt import LearnedOptimizer, UpdateRule, make_rule
from tests.learned_opt.drop_in import noisy_rule, parameters, run, set_gradients

N = 8


@pytest.fixture(params=["tensor", "horizon", "coordinate"])
def rule(request: pytest.FixtureRequest) -> UpdateRule:
    return noisy_rule(request.param)


def relative(p: torch.Tensor, before: torch.Tensor) -> float:
    return float((p.detach() - before).norm() / before.norm().clamp(min=1e-9))


def test_steps_fall_to_the_end_of_the_run() -> None:
    """Beside a twin that is told nothing, at the same points, before its own steps fall."""
    rule = make_rule("geodesic_rnn", hidden=3, decay_after=1000)
    p = torch.full((3, 4), 0.3, requires_grad=True)
    twin = p.detach().clone().requires_grad_()
    told, plain = LearnedOptimizer([p], num_steps=N, weights=rule), LearnedOptimizer(
        [twin], weights=rule
    )  # fmt: skip
    for t in range(N):
        start = twin.detach().clone()
        for optimizer, tensor in ((told, p), (plain, twin)):
            tensor.data.copy_(start)
            set_gradients([tensor], t)
            optimizer.step()
        long, short = (torch.linalg.norm(x.detach() - start) for x in (twin, p))
        fall = 1 - t / N
        # a soft limit makes long steps a little shorter
        assert float(short / long) == pytest.approx(fall, rel=0.2, abs=1e-3)


def test_a_run_that_is_resumed_keeps_its_length_and_its_time(rule: UpdateRule) -> None:
    params = parameters()
    optimizer = LearnedOptimizer(params, weights=rule, num_steps=N)
    run(optimizer, params, range(3))
    saved = copy.deepcopy((params, optimizer.state_dict()))
    expected = run(optimizer, params, range(3, N))
    fresh = LearnedOptimizer(saved[0], weights=rule)  # told nothing, but the state is
    fresh.load_state_dict(saved[1])
    assert all(map(torch.equal, run(fresh, saved[0], range(3, N)), expected))
    assert fresh.param_groups[0]["num_steps"] == N


def test_a_layer_that_is_unfrozen_late_rests_when_the_run_does(rule: UpdateRule) -> None:
    params = parameters()
    optimizer = LearnedOptimizer(params, weights=rule, num_steps=400)
    late, moved = params[2], []
    for step in range(400):
        set_gradients(params, step % 7)
        if step < 300:
            late.grad = None
        before = [p.detach().clone() for p in params]
        optimizer.step()
        moved.append([relative(p, b) for p, b in zip(params, before, strict=True)])
    assert moved[299][2] == 0 < moved[300][2]
    assert moved[-1][2] < 0.03 * max(share[2] for share in moved[300:])


def test_the_first_steps_of_a_layer_are_short() -> None:
    """With `beginnings`, over its own first N / 20, however late it begins."""
    rule = make_rule("geodesic_rnn", hidden=3, beginnings=True)
    early, late = (torch.full((4, 3), 0.3, requires_grad=True) for _ in range(2))
    optimizer = LearnedOptimizer([early, late], weights=rule, num_steps=400)
    lengths = {id(early): [], id(late): []}
    for step in range(240):
        for p in (early, late) if step >= 200 else (early,):
            p.data.fill_(0.3)
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p in (early, late) if step >= 200 else (early,):
            lengths[id(p)].append(relative(p, torch.full_like(p, 0.3)))
    for moved, begin in ((lengths[id(early)], 0), (lengths[id(late)], 200)):
        falls = [x / (1 - (begin + t) / 400) for t, x in enumerate(moved)]
        assert falls[0] == pytest.approx(falls[-1] / 20, rel=0.1)
        assert falls[9] == pytest.approx(falls[-1] / 2, rel=0.1)
        assert falls[19] == pytest.approx(falls[39], rel=1e-3)


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
        [{"params": [short], "num_steps": 20}, {"params": [free]}], weights=rule
    )
    run(optimizer, [short, free], range(19))
    before = short.detach().clone(), free.detach().clone()
    run(optimizer, [short, free], range(19, 20))
    assert (short - before[0]).norm() < 0.1 * (free - before[1]).norm()


def test_a_run_that_goes_on_is_noticed_once_and_goes_on() -> None:
    rule = make_rule("geodesic_rnn", hidden=3)
    params = parameters()
    optimizer = LearnedOptimizer(params, weights=rule, num_steps=N)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ended = run(optimizer, params, range(N))
    with pytest.warns(UserWarning, match=f"num_steps is {N}, and the run goes on") as told:
        set_gradients(params, N)
        optimizer.step()
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        beyond = run(optimizer, params, range(N + 1, N + 5))
    assert not any(torch.equal(a, b) for a, b in zip(ended, beyond, strict=True) if a.numel())
    tiny = run(optimizer, params, range(1))
    optimizer.param_groups[0]["num_steps"] = 10 * N  # as the warning says
    usual = run(optimizer, params, range(1))
    assert (usual[0] - tiny[0]).norm() > 3 * (tiny[0] - beyond[0]).norm()


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
