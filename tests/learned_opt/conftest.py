"""Fixtures of the tests of rules and of their training."""

from __future__ import annotations

import pytest
import torch

from learned_opt.rules import UpdateRule, make_rule

RULES = {
    "tensor": ("geodesic_rnn", {"hidden": 5}),
    "basis": ("geodesic_rnn", {"hidden": 5, "basis": 9}),
    "every": ("geodesic_rnn", {"hidden": 5, "every": 3}),
    "careful": (
        "geodesic_rnn",
        {
            "hidden": 5,
            "horizon": True,
            "beginnings": True,
            "clip_squares": 10.0,
            "trained_starts": True,
        },
    ),
    "lstm": ("coordinatewise_lstm", {"hidden": 4, "output_scale": 0.1}),
    "scheduled": ("scheduled", {"base_config": {"hidden": 5}, "hidden": 3}),
    "scheduled lstm": (
        "scheduled",
        {"base": "coordinatewise_lstm", "base_config": {"hidden": 4, "output_scale": 0.1}},
    ),
    "rnnprop": ("rnnprop", {"hidden": 4}),
}


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> UpdateRule:
    """Each rule in float64, with weights that are far from the initial ones."""
    torch.manual_seed(0)
    name, config = RULES[request.param]
    rule = make_rule(name, **config).double()
    for p in rule.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return rule
