"""Fixtures of the tests of rules and of their training."""

from __future__ import annotations

import pytest
import torch

from learned_opt.rules import UpdateRule, make_rule
from tests.learned_opt.rule_cases import ALONE, RULES


@pytest.fixture(params=ALONE)
def rule(request: pytest.FixtureRequest) -> UpdateRule:
    """Each rule in float64, with weights that are far from the initial ones."""
    torch.manual_seed(0)
    name, config = RULES[request.param]
    rule = make_rule(name, **config).double()
    for p in rule.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return rule
