"""The scheduler, which scales another rule's steps depending on the progress of the run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from learned_opt import LearnedOptimizer
from learned_opt.errors import ConfigError
from learned_opt.rules import UpdateRule, make_rule
from learned_opt.rules.scheduled import INPUTS

BASES = [
    ("geodesic_rnn", {"hidden": 4}),
    ("coordinatewise_lstm", {"hidden": 4}),
]
bases = pytest.mark.parametrize(("base", "config"), BASES, ids=["tensor", "lstm"])
SHAPES = ((3, 4), (5,))
D = 17


def updates(rule: UpdateRule, steps: int = 4) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    params = torch.randn(2, D, generator=rng)
    state, made = rule.init_state(params, SHAPES), []
    for _ in range(steps):
        update, state = rule.update(torch.randn(2, D, generator=rng), params, state)
        params = params + update
        made.append(update)
    return torch.stack(made)


def worn(base: str, config: dict) -> tuple[UpdateRule, UpdateRule]:
    torch.manual_seed(0)
    rule = make_rule("scheduled", base=base, base_config=config, hidden=3)
    return rule, rule.base


@bases
def test_untrained_it_is_its_base(base: str, config: dict) -> None:
    rule, bare = worn(base, config)
    torch.testing.assert_close(updates(rule), updates(bare), rtol=1e-5, atol=1e-8)


@bases
def test_a_constant_factor_multiplies_every_step(base: str, config: dict) -> None:
    rule, bare = worn(base, config)
    rule.head.bias.data.fill_(math.log(0.5))
    torch.testing.assert_close(updates(rule, 1), 0.5 * updates(bare, 1))


def inputs(slopes: list[float]) -> Tensor:
    """What the scheduler sees of one tensor with moves of 1 along the first axis, and gradients of
    given slope along it and norm 1."""
    rule = make_rule("scheduled", base_config={"hidden": 2})
    params = torch.tensor([3.0, 4.0])
    state = rule.init_state(params, ((2,),))
    for slope in slopes:
        grad = torch.tensor([slope, math.sqrt(1 - slope**2)])
        observation, state = rule.observe(grad, params, state)
        params = params + torch.tensor([1.0, 0.0])
    return observation.tensor[-INPUTS:, 0]


def test_progress_is_the_mean_cosine_of_gradient_and_move_over_its_rms() -> None:
    cosines = [-1.0, 0.5, -0.2]  # of the moves; there is none before the first step
    seen = inputs([0.0, *cosines])
    for i, beta in enumerate((0.5, 0.9, 0.99)):
        weights = [(1 - beta) * beta ** (2 - t) / (1 - beta**3) for t in range(3)]
        mean = sum(w * c for w, c in zip(weights, cosines, strict=True))
        square = sum(w * c * c for w, c in zip(weights, cosines, strict=True))
        assert float(seen[i]) == pytest.approx(mean / math.sqrt(square), rel=1e-5)
        assert float(seen[3 + i]) == pytest.approx(math.asinh(mean * math.sqrt(2)) / 3, rel=1e-5)
    length = math.hypot(3 + 3, 4)  # of θ after three moves
    assert float(seen[7]) == pytest.approx(math.log(1 / length) / 4 + 1, rel=1e-5)


def test_the_scheduler_sees_steps_that_fall_short_and_steps_that_overshoot() -> None:
    """F = θ²/2 from θ = 1: a step η g leaves the slope (1 − η) g, of the move's opposite sign."""

    def progress(step: float) -> float:
        rule = make_rule("scheduled", base_config={"hidden": 2})
        params = torch.ones(1)
        state = rule.init_state(params, ((1,),))
        for _ in range(3):
            observation, state = rule.observe(params, params, state)
            params = params - step * params
        return float(observation.tensor[-INPUTS, 0])

    assert progress(0.1) == pytest.approx(-1)
    assert progress(1.9) == pytest.approx(1)


def test_the_move_includes_what_others_do_to_the_parameters() -> None:
    """The drop-in's lr and weight decay change what the rule asked for; the move is what was."""
    seen = []
    for lr in (1.0, 0.25):
        p = torch.nn.Parameter(torch.ones(4))
        optimizer = LearnedOptimizer([p], lr=lr, weights=make_rule("scheduled"))
        p.grad = torch.ones(4)
        optimizer.step()
        before = p.detach().clone()
        optimizer.step()
        assert torch.equal(optimizer.state[p]["previous"].squeeze(-1), before)
        seen.append(1 - before)
    torch.testing.assert_close(seen[1], 0.25 * seen[0])


@pytest.mark.parametrize("config", [{"base": "scheduled"}, {"hidden": 0}, {"base": "nope"}])
def test_what_cannot_be_worn_is_refused(config: dict) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(config.values())))):
        make_rule("scheduled", **config)
