"""Helpers of the tests of the drop-in optimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from learned_opt import LearnedOptimizer, UpdateRule, make_rule
from learned_opt.rules.layout import CHUNK
from tests.learned_opt.rule_cases import RULES


def noisy_rule(kind: str) -> UpdateRule:
    """One of RULES, with weights that are not the initial ones."""
    torch.manual_seed(0)
    name, config = RULES[kind]
    rule = make_rule(name, **config)
    for p in rule.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return rule


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Small and large ones, one transposed, one 0-dim, one empty."""
    rng = torch.Generator().manual_seed(0)
    shapes = ((250, 264), (150,), (10, 150), (10,), (), (0, 3))
    assert 250 * 264 > CHUNK
    params = [torch.randn(s, generator=rng).to(dtype) for s in shapes]
    params.append(torch.randn(4, 3, generator=rng).to(dtype).t())
    return [p.requires_grad_() for p in params]


def set_gradients(params: list[Tensor], step: int) -> None:
    rng = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=rng).to(p.dtype)


def run(optimizer: LearnedOptimizer, params: list[Tensor], steps: range) -> list[Tensor]:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()
    return [p.detach().clone() for p in params]
