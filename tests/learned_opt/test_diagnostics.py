"""`LearnedOptimizer.diagnostics` describes the last step and does not change it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from learned_opt import LearnedOptimizer, UpdateRule, make_rule


def trained(rule: UpdateRule | None = None, steps: int = 5, **settings) -> tuple:
    """A model, its optimizer, and the parameters before the last step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    optimizer = LearnedOptimizer(model.named_parameters(), weights=rule, **settings)
    x = torch.randn(20, 3)
    for _ in range(steps):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model, optimizer, before


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def test_the_relative_step_is_that_of_the_parameters():
    model, optimizer, before = trained(lr=0.5, weight_decay=0.0, diagnose=True)
    facts = optimizer.diagnostics()
    assert list(facts) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for name, p in model.named_parameters():
        moved = rms(p.detach() - before[name]) / rms(before[name])
        assert facts[name]["relative_step"] == pytest.approx(moved, rel=1e-4)
        assert facts[name]["decay"] == 0 and facts[name]["skipped"] == 0


def test_decay_is_the_share_that_it_took():
    plain, _, before = trained(steps=1, weight_decay=0.0)
    model, optimizer, _ = trained(steps=1, weight_decay=0.2, diagnose=True)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        share = rms(q.detach() - p.detach()) / rms(before[name])
        assert optimizer.diagnostics()[name]["decay"] == pytest.approx(share, rel=1e-3)
        step = optimizer.diagnostics()[name]["relative_step"]  # the decay of each row is .2 of its
        assert optimizer.diagnostics()[name]["decay"] == pytest.approx(0.2 * step, rel=1e-5)


@pytest.mark.parametrize("every", [1, 3])
def test_the_gains_make_the_step(every: int):
    """With the gradient and what the state keeps of averages and r (rows of "averages")."""
    torch.manual_seed(1)
    rule = make_rule("geodesic_rnn", hidden=5, every=every)
    for p in rule.parameters():
        p.data += 0.2 * torch.randn_like(p)
    model, optimizer, before = trained(rule, diagnose=True)
    for name, p in model.named_parameters():
        gains = optimizer.diagnostics()[name]["gains"]
        assert list(gains) == ["gradient", "average 0.5", "average 0.9", "average 0.99"]
        _, *averages, r = optimizer.state[p]["averages"].unbind(-1)
        own, *others = gains.values()
        step = sum(gain * m / r for gain, m in zip(others, averages, strict=True))
        gradient = (p.detach() - before[name] - step) * r / own
        share = rms(gradient) / rms(p.grad)  # it is clipped
        assert 0.2 < share < 1 + 1e-3
        torch.testing.assert_close(gradient, share * p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"lr": 0.3, "weight_decay": 0.0}])
@pytest.mark.parametrize("name", ["scheduled", "coordinatewise_lstm", "rnnprop", None])
def test_it_changes_no_step_and_no_state(name: str | None, settings: dict):
    rule = name and make_rule(name)
    plain, told = (trained(copy.deepcopy(rule), diagnose=on, **settings) for on in (False, True))
    for p, q in zip(plain[0].parameters(), told[0].parameters(), strict=True):
        assert p.equal(q)
    states = (optimizer.state_dict()["state"] for _, optimizer, _ in (plain, told))
    for ours, theirs in zip(*(state.values() for state in states), strict=True):
        assert list(ours) == list(theirs) and all(ours[key].equal(theirs[key]) for key in ours)
    assert len(told[1].diagnostics()) == 4


def test_a_skipped_step_is_told_and_so_is_who_took_no_part():
    p, q, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = LearnedOptimizer([{"params": [p]}, {"params": [unused, q]}], diagnose=True)
    p.grad, q.grad = torch.full((3,), torch.nan), torch.ones(3)
    optimizer.step()
    facts = optimizer.diagnostics()
    assert list(facts) == [(0, 0), (1, 1)]
    assert facts[0, 0]["skipped"] == 1 and facts[0, 0]["relative_step"] == 0
    assert set(facts[0, 0]["gains"].values()) == {0}
    assert facts[1, 1]["skipped"] == 0 and facts[1, 1]["relative_step"] > 0


def test_it_may_be_switched_on_later_and_is_off_until_then():
    _, optimizer, _ = trained()
    with pytest.raises(RuntimeError, match="diagnose=True"):
        optimizer.diagnostics()
    optimizer.diagnose = True
    assert optimizer.diagnostics() == {}
    optimizer.step()
    assert len(optimizer.diagnostics()) == 4
    assert pickle.loads(pickle.dumps(optimizer)).diagnose
