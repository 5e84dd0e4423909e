"""Nets that were trained before are told from fresh ones, and treated with care."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from learned_opt import LearnedOptimizer, make_rule
from learned_opt.errors import ConfigError
from learned_opt.rules.trained import is_trained

CAREFUL = {"hidden": 3, "decay_after": 300, "horizon": True, "trained_starts": True}


def orthogonal(w: Tensor) -> Tensor:
    return nn.init.orthogonal_(w, 1.4)


def small(w: Tensor) -> Tensor:
    return nn.init.uniform_(w, -1e-3, 1e-3)


INITS = (
    nn.init.normal_, nn.init.xavier_uniform_, nn.init.kaiming_normal_, nn.init.trunc_normal_,
    orthogonal, small,
)  # fmt: skip


def fresh(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 3))
    return nn.Sequential(*layers)


def examples() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    hidden, mix, noise = (torch.randn(s, generator=rng) for s in ((400, 5), (5, 40), (400, 40)))
    return hidden @ mix + 0.3 * noise, hidden[:, :3].argmax(-1)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x, y = examples()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()


def pretrained() -> nn.Module:
    net = fresh()
    train(net, torch.optim.AdamW(net.parameters(), lr=0.003), 300)
    return net


def matrices(net: nn.Module) -> list[Tensor]:
    return [p for p in net.parameters() if p.dim() > 1]


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("shape", [(2, 2), (3, 50), (12, 8, 3, 3), (64, 64), (500, 20), (1, 30)])
def test_no_usual_init_looks_trained(init, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    assert not any(is_trained([init(torch.empty(shape))]) for _ in range(100))


def test_modules_of_torch_look_trained_only_when_they_are() -> None:
    modules = (nn.LSTM(20, 30), nn.Transformer(32, 4, 1, 1, 64), nn.Embedding(100, 20))
    assert not any(is_trained(matrices(m)) for m in (*map(fresh, range(20)), *modules))
    assert is_trained(matrices(pretrained()))
    assert not is_trained([]) and not is_trained([torch.zeros(4, 4), torch.zeros(0, 3)])
    assert not is_trained([torch.full((9, 9), float("nan"))])


def test_all_groups_of_the_optimizer_know_and_a_checkpoint_keeps_it() -> None:
    net = pretrained()
    rule = make_rule("geodesic_rnn", **CAREFUL)
    vectors = [p for p in net.parameters() if p.dim() < 2]

    def groups() -> list[dict]:
        return [{"params": vectors}, {"params": matrices(net)}]

    optimizer = LearnedOptimizer(groups(), weights=rule)
    net[4].weight.requires_grad_(False)
    train(net, optimizer, 2)
    assert len(optimizer.state) == 5 and all(x["trained"] == 1 for x in optimizer.state.values())
    again = LearnedOptimizer(groups(), weights=rule)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in net.parameters():  # nothing of what was learned is left, and a layer takes part late
        p.data.copy_(1e-2 * torch.randn_like(p))
    net[4].weight.requires_grad_()
    train(net, again, 1)
    assert len(again.state) == 6 and all(x["trained"] == 1 for x in again.state.values())


def test_a_net_that_this_run_trains_stays_fresh() -> None:
    net = fresh()
    net[0].requires_grad_(False)
    optimizer = LearnedOptimizer(net.parameters(), weights=make_rule("geodesic_rnn", **CAREFUL))
    train(net, optimizer, 200)
    net[0].requires_grad_()
    train(net, optimizer, 1)
    assert is_trained(matrices(net))
    assert all(entries["trained"] == 0 for entries in optimizer.state.values())


def test_adapters_of_a_frozen_net_are_fresh() -> None:
    net = pretrained().requires_grad_(False)
    net[2] = nn.Sequential(nn.Linear(30, 4, bias=False), nn.Linear(4, 30, bias=False))
    nn.init.zeros_(net[2][1].weight)
    optimizer = LearnedOptimizer(net.parameters(), weights=make_rule("geodesic_rnn", **CAREFUL))
    train(net, optimizer, 1)
    assert [float(entries["trained"]) for entries in optimizer.state.values()] == [0, 0]


@pytest.mark.parametrize("num_steps", [None, 100])
def test_in_a_trained_net_the_network_has_no_say(num_steps: int | None) -> None:
    """Steps are those of the untrained rule; they rise over 20 steps and fall by 1 / (1 + t / 100),
    or to zero if the length of the run is known."""
    torch.manual_seed(0)
    theta, gradient = torch.full((1, 12), 0.3), torch.ones(1, 12)
    plain, rule = make_rule("geodesic_rnn", hidden=3), make_rule("geodesic_rnn", **CAREFUL)
    for p in rule.parameters():
        p.data += torch.randn_like(p)
    for t in (1, 15, 20, 100):
        states = (r.init_state(theta, ((3, 4),)) for r in (plain, rule, rule))
        usual, fresh_net, trained = (
            replace(state, step=t - 1, num_steps=num_steps) for state in states
        )
        trained.tensor["trained"].fill_(1)
        updates = [r.update(gradient, theta, x)[0] for r, x in ((plain, usual), (rule, trained))]
        share = min(1, t / 20) / (1 + t / 100) if num_steps is None else 1 - (t - 1) / num_steps
        torch.testing.assert_close(updates[1], share * updates[0])
        assert not torch.allclose(rule.update(gradient, theta, fresh_net)[0], updates[1], rtol=0.05)


def test_care_needs_the_horizon() -> None:
    with pytest.raises(ConfigError, match="trained_starts is True, but horizon is False"):
        make_rule("geodesic_rnn", trained_starts=True)
