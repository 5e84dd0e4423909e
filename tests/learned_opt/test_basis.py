"""Rules in the eigenbases of the gradients of matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from learned_opt import LearnedOptimizer
from learned_opt.errors import ConfigError
from learned_opt.rules import UpdateRule, basis, make_rule
from learned_opt.rules.basis import Basis

SHAPES = ((5, 4), (6,), (12, 3), (2, 3, 2), (1, 3), (7, 8))  # of two no side, of three one
LIMIT = 6
SIZES = [math.prod(shape) for shape in SHAPES]
STEPS = 23


def rule_of(limit: int) -> UpdateRule:
    torch.manual_seed(0)
    rule = make_rule("geodesic_rnn", hidden=5, basis=limit).double()
    for p in rule.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return rule


def gradients() -> Tensor:
    """(STEPS, 2 tasks, d), of correlated rows and columns, all of one size: none is clipped."""
    rng = torch.Generator().manual_seed(1)
    mix = torch.randn(sum(SIZES), sum(SIZES), generator=rng, dtype=torch.float64)
    grads = torch.randn(STEPS, 2, sum(SIZES), generator=rng, dtype=torch.float64) @ mix
    return torch.cat([g / g.norm(dim=-1, keepdim=True) for g in grads.split(SIZES, -1)], -1)


def run(limit: int) -> tuple[list[Tensor], list[Basis | None], list[dict[str, Tensor]]]:
    """Updates, bases and states."""
    grads, rule = gradients(), rule_of(limit)
    theta = torch.ones_like(grads[0])
    state = rule.init_state(theta, SHAPES)
    updates, bases, states = [], [], []
    for grad in grads:
        seen, state = rule.observe(grad, theta, state)
        update, state = rule.advance(seen, state)
        updates.append(update.detach())
        bases.append(seen.basis)
        states.append(state.coordinate | state.tensor)
    return updates, bases, states


def test_momenta_and_mean_squares_are_those_of_the_coordinates() -> None:
    """To turn is linear and keeps norms; neither does a change of basis lose anything."""
    (_, bases, turned), (_, _, plain) = run(LIMIT), run(0)
    for now, own, other in zip(bases, turned, plain, strict=True):
        back = now.turn_back(own["averages"][..., :-1, :])
        torch.testing.assert_close(back, other["averages"][..., :-1, :])
        torch.testing.assert_close(own["gradient_rms"], other["gradient_rms"], rtol=1e-5, atol=0)


def test_vectors_and_what_is_too_large_are_left_as_they_are() -> None:
    turned, plain = run(LIMIT)[0], run(0)[0]
    for own, other in zip(turned, plain, strict=True):
        same = [
            torch.allclose(a, b, rtol=1e-9)
            for a, b in zip(own.split(SIZES, -1), other.split(SIZES, -1), strict=True)
        ]
        assert same[1] and same[5] and not any(same[i] for i in (0, 2, 3))


def test_the_basis_makes_the_gradients_covariance_diagonal() -> None:
    """L = Σ_s β^{t−s} G_s G_sᵀ, in the basis that is made at t, and R of the other side."""
    grads, bases = gradients(), run(LIMIT)[1]
    t = 16  # steps, after which a basis is due
    weights = basis.BETA ** torch.arange(t - 1, -1, -1, dtype=torch.float64)
    g = grads[:t, :, : SIZES[0]].unflatten(-1, SHAPES[0])
    weighted = weights[:, None, None, None] * g
    for side, covariance in (
        ("rows", (weighted @ g.mT).sum(0)), ("columns", (weighted.mT @ g).sum(0))
    ):  # fmt: skip
        q = bases[t - 1].q[0][side].squeeze(-3)
        torch.testing.assert_close(q.mT @ q, torch.eye(q.shape[-1]).double().expand_as(q))
        found = q.mT @ covariance @ q
        diagonal = found.diagonal(dim1=-2, dim2=-1)
        off = found - diagonal.diag_embed()
        assert off.abs().max() < 2 * basis.JITTER * diagonal.mean()
        assert off.abs().max() < 0.01 * (covariance - covariance.tril()).abs().max()


def test_updates_turn_with_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of F(U Θ Vᵀ), U and V orthogonal, the run is that of F, turned."""
    monkeypatch.setattr(basis, "JITTER", 0.0)
    rng, shape = torch.Generator().manual_seed(0), (4, 4)
    u, v = (torch.linalg.qr(torch.randn(4, 4, generator=rng, dtype=torch.float64))[0] for _ in "uv")
    grads = 1e-4 * torch.randn(15, *shape, generator=rng, dtype=torch.float64)
    theta, rule = torch.randn(shape, generator=rng, dtype=torch.float64), rule_of(4)

    def updates(turn) -> Tensor:
        found, state = [], rule.init_state(turn(theta).flatten(), (shape,))
        for g in grads:
            update, state = rule.update(turn(g).flatten(), turn(theta).flatten(), state)
            found.append(update.view(shape))
        return torch.stack(found)

    plain, turned = updates(lambda x: x), updates(lambda x: u @ x @ v.mT)
    torch.testing.assert_close(turned, u @ plain @ v.mT, rtol=1e-4, atol=1e-4 * plain.abs().max())


def test_a_parameter_keeps_its_factors() -> None:
    torch.manual_seed(0)
    p, bias = (torch.randn(s, requires_grad=True) for s in ((3, 8), (3,)))
    optimizer = LearnedOptimizer([p, bias], weights=make_rule("geodesic_rnn", basis=6))
    (p.sum() ** 2 + bias.sum() ** 2).backward()
    optimizer.step()
    assert optimizer.state[p]["basis_rows"].shape == (3, 3)
    assert "basis_columns" not in optimizer.state[p] and "basis_rows" not in optimizer.state[bias]


def test_some_coordinates_alone_are_refused() -> None:
    rule = rule_of(LIMIT)
    theta = gradients()[0]
    seen, _ = rule.observe(theta, theta, rule.init_state(theta, SHAPES))
    with pytest.raises(ValueError, match="basis"):
        seen.pick(torch.tensor([0, 1]))


def test_the_first_update_does_not_hang_on_rounding() -> None:
    """In the basis of one gradient of low rank only rounding is left of most coordinates."""
    rng, shape = torch.Generator().manual_seed(0), (24, 24)
    grad = torch.randn(24, 6, generator=rng) @ torch.randn(6, 24, generator=rng)
    rule, theta = rule_of(24).float(), 0.1 * torch.randn(shape, generator=rng).flatten()
    first, other = (
        rule.update(g.flatten(), theta, rule.init_state(theta, (shape,)))[0]
        for g in (grad, grad * (1 + 1e-6 * torch.randn(shape, generator=rng)))
    )
    assert (other - first).norm() < 0.1 * first.norm()


def test_one_outlier_does_not_make_the_basis() -> None:
    """As it counts at most CLIP times the usual, in the basis too."""
    rng, shape = torch.Generator().manual_seed(0), (6, 6)
    grads = torch.randn(60, 1, 36, generator=rng, dtype=torch.float64) * torch.arange(1.0, 37)
    rule, theta = rule_of(6), torch.ones(1, 36, dtype=torch.float64)
    found = []
    for size in (1.0, 1e25):
        state = rule.init_state(theta, (shape,))
        for t, grad in enumerate(grads):
            seen, state = rule.observe(grad * (size if t == 30 else 1.0), theta, state)
        found.append(seen.basis.q[0]["rows"])
    assert ((found[0].mT @ found[1]).abs().amax(-1) > 0.9).all()


@pytest.mark.parametrize(
    ("config", "said"),
    [({"basis": -1}, "basis -1;"), ({"per": "coordinate"}, "version 0.1.0 was the last")],
)
def test_refused(config: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_rule("geodesic_rnn", **config)
