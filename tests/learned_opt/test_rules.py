"""Every update rule fulfills the contract of `UpdateRule` and computes what its docstring says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from learned_opt.errors import ConfigError
from learned_opt.rules import State, UpdateRule, make_rule
from learned_opt.rules.base import _REGISTRY
from learned_opt.rules.cell import LSTMCell
from learned_opt.rules.geodesic_rnn import LARGEST, MAX_STEP, STEP, VECTOR_SIZE
from learned_opt.rules.layout import CHUNK, SMALL
from tests.learned_opt.rule_cases import ALONE, RULES

SHAPES = ((6, 5), (6,), ())
D = 37
per_tensor = pytest.mark.parametrize("rule", ["tensor"], indirect=True)
coordinates_alone = pytest.mark.parametrize(
    "rule", [name for name in ALONE if name != "basis"], indirect=True
)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(rule: UpdateRule, grads: Tensor, params: Tensor, shapes=SHAPES, in_place=False) -> Tensor:
    """The updates (steps, *tasks, d) that gradients (steps, *tasks, d) bring about."""
    state, updates = rule.init_state(params, shapes), []
    for grad in grads:
        update, state = rule.update(grad, params, state, in_place)
        updates.append(update)
        params = params + update
    return torch.stack(updates)


def test_all_rules_are_tested() -> None:
    ours = {name for name, rule in _REGISTRY.items() if rule.__module__.startswith("learned_opt.")}
    assert ours == {name for name, _ in RULES.values()}


def test_a_batch_of_tasks_equals_each_task_alone(rule: UpdateRule) -> None:
    grads, params = numbers(4, 3, D), numbers(3, D, seed=1)
    together = run(rule, grads, params)
    for i in range(3):
        torch.testing.assert_close(together[:, i], run(rule, grads[:, i], params[i]))


def test_tensors_together_equal_each_tensor_alone(rule: UpdateRule) -> None:
    shapes = ((250, 264), (130,), (190, 100), (7,), (5, 3), (3, 5), (4,))
    sizes = [math.prod(s) for s in shapes]
    assert sizes[0] > CHUNK and sum(sizes[3:]) < SMALL
    grads, params = numbers(2, sum(sizes)), numbers(sum(sizes), seed=1)
    together = run(rule, grads, params, shapes).split(sizes, -1)
    for i, (g, p) in enumerate(zip(grads.split(sizes, -1), params.split(sizes), strict=True)):
        torch.testing.assert_close(together[i], run(rule, g, p, (shapes[i],)))


@coordinates_alone
def test_which_chunk_a_coordinate_is_in_does_not_matter(rule: UpdateRule) -> None:
    shape = (2, CHUNK + 77)
    d = math.prod(shape)
    grads, params = numbers(2, d), numbers(d, seed=1)
    order = torch.randperm(d, generator=torch.Generator().manual_seed(0))
    shuffled = run(rule, grads[:, order], params[order], (shape,))
    torch.testing.assert_close(shuffled, run(rule, grads, params, (shape,))[:, order])


def everything(state: State) -> list[Tensor]:
    kinds = (state.coordinate, state.tensor, *state.matrix)
    return [x for entries in kinds for x in entries.values()]


def test_out_of_place_alters_nothing_and_in_place_gives_the_same(rule: UpdateRule) -> None:
    grads, params = numbers(4, 2, D), numbers(2, D, seed=1)
    state = rule.init_state(params, SHAPES)
    for grad in grads[:-1]:
        _, state = rule.update(grad, params, state)
    inputs = [grads[-1], params, *everything(state)]
    before = [x.clone() for x in inputs]
    update, after = rule.update(grads[-1], params, state)
    assert all(map(torch.equal, inputs, before))
    assert state.step == 3 and after.step == 4
    same, same_state = rule.update(grads[-1], params, state, in_place=True)
    assert torch.equal(update, same)
    for state in (after, same_state):  # a row that the next step overwrites
        state.coordinate.get("averages", torch.empty(0, 1, 0))[..., 0, :] = 0
    assert all(map(torch.equal, everything(after), everything(same_state)))


@coordinates_alone
def test_replay_of_some_coordinates_gives_their_updates(rule: UpdateRule) -> None:
    grads, params = numbers(4, 3, D), numbers(3, D, seed=1)
    index = torch.randperm(3 * D, generator=torch.Generator().manual_seed(0))[:20]
    state = rule.init_state(params, SHAPES)
    hidden = rule.pick_hidden(state, index)
    for grad in grads:
        observation, state = rule.observe(grad, params, state)
        replayed, hidden = rule.respond(observation.pick(index), hidden)
        with torch.no_grad():
            update, state = rule.advance(observation, state)
        assert replayed.requires_grad
        torch.testing.assert_close(replayed.detach(), update.flatten()[index])


def test_the_cell_is_torch_s_lstm_and_runs_under_vmap() -> None:
    cell, reference = LSTMCell(3, 4), nn.LSTMCell(3, 4)
    cell.bias.data.normal_()
    reference.weight_ih.data = cell.weight.data[:, :3].clone()
    reference.weight_hh.data = cell.weight.data[:, 3:].clone()
    reference.bias_ih.data = cell.bias.data.clone()
    reference.bias_hh.data.zero_()
    x, state = torch.randn(6, 3, 5), torch.randn(6, 8, 5)
    h, after = cell(x, state)
    for i in range(6):
        expected = reference(x[i].T, tuple(s.T for s in state[i].chunk(2)))
        torch.testing.assert_close(h[i].T, expected[0])
        torch.testing.assert_close(after[i].T, torch.cat(expected, -1))
    torch.testing.assert_close(torch.func.vmap(cell)(x, state), (h, after))


@per_tensor
def test_no_gradient_no_update(rule: UpdateRule) -> None:
    assert (run(rule, torch.zeros(3, 2, D).double(), numbers(2, D)) == 0).all()


@per_tensor
def test_the_update_does_not_see_the_scale_of_the_loss(rule: UpdateRule) -> None:
    grads, params = numbers(5, D), numbers(D, seed=1)
    torch.testing.assert_close(run(rule, 1000 * grads, params), run(rule, grads, params))


@per_tensor
def test_the_update_is_odd_in_the_gradient(rule: UpdateRule) -> None:
    grads, params = numbers(5, D), numbers(D, seed=1)
    state, mirrored = (rule.init_state(params, SHAPES) for _ in range(2))
    for grad in grads:
        update, state = rule.update(grad, params, state)
        opposite, mirrored = rule.update(-grad, params, mirrored)
        torch.testing.assert_close(opposite, -update)


def size_of(p: Tensor, shape: tuple[int, ...]) -> Tensor:
    """RMS(p), from once to LARGEST times the usual: 1/√(3 fan_in), that of U(±1/√fan_in)."""
    usual = (3 * math.prod(shape[1:])) ** -0.5 if len(shape) > 1 else VECTOR_SIZE
    return p.square().mean().sqrt().clamp(usual, LARGEST * usual)


@per_tensor
@pytest.mark.parametrize("scale", [0.01, 0.5, 100])
def test_no_tensor_moves_by_more_than_its_size(rule: UpdateRule, scale: float) -> None:
    rule.head.bias.data[-1] = 10.0  # asks for the largest step there is
    params, sizes = scale * numbers(D, seed=1), [math.prod(shape) for shape in SHAPES]
    for update in run(rule, numbers(3, D), params):
        for u, p, shape in zip(update.split(sizes), params.split(sizes), SHAPES, strict=True):
            share = u.square().mean().sqrt() / size_of(p, shape)
            assert 0.3 * MAX_STEP < share <= MAX_STEP * (1 + 1e-9)
        params = params + update


def test_untrained_it_is_adam_with_a_relative_step() -> None:
    """u = −STEP ρ a / (1 + STEP RMS(a) / MAX_STEP) with Adam's a = m̂/√v̂, ρ the tensor's size."""
    rule = make_rule("geodesic_rnn", hidden=3).double()
    matrix, bias = numbers(6, 5, seed=1), torch.zeros(6, dtype=torch.float64)
    params = torch.cat([matrix.flatten(), bias])
    reference = [torch.zeros_like(matrix, requires_grad=True), bias.clone().requires_grad_()]
    adam = torch.optim.Adam(reference, lr=1.0, betas=(0.9, 0.99), eps=0.0)
    state = rule.init_state(params, SHAPES[:2])
    for grad in numbers(5, 36):
        update, state = rule.update(grad, params, state)
        before = [p.detach().clone() for p in reference]
        for p, g in zip(reference, grad.split([30, 6]), strict=True):
            p.grad = g.view_as(p).clone()
        adam.step()
        sizes = [size_of(p, p.shape) for p in (matrix, bias)]
        for u, p, old, rho in zip(update.split([30, 6]), reference, before, sizes, strict=True):
            a = (old - p.detach()).flatten()
            limit = 1 + STEP * a.square().mean().sqrt() / MAX_STEP
            torch.testing.assert_close(u, -STEP * rho * a / limit)


def test_steps_fall_harmonically_after_the_longest_training_runs() -> None:
    rules = [make_rule("geodesic_rnn", hidden=3, decay_after=n) for n in (4, 1000)]
    params, states = numbers(D), [rule.double().init_state(numbers(D), SHAPES) for rule in rules]
    for t, grad in enumerate(numbers(9, D, seed=1), 1):
        (short, states[0]), (long, states[1]) = (
            rule.update(grad, params, state) for rule, state in zip(rules, states, strict=True)
        )
        torch.testing.assert_close(short, long * min(1, 4 / t))


@pytest.mark.parametrize(("preset", "k"), [("deepmind-code", 5), ("paper", 10)])
def test_log_and_sign_is_that_of_the_paper(preset: str, k: int) -> None:
    """(log|g| / k, sgn g) if |g| ≥ e⁻ᵏ, else (−1, eᵏ g)."""
    rule = make_rule("coordinatewise_lstm", preset=preset)
    grads = [3.0, 1.0, -0.5, math.exp(-k), math.exp(-k - 1), -math.exp(-k - 2), 0.0]
    paper = [
        (math.log(abs(g)) / k, math.copysign(1, g)) if abs(g) >= math.exp(-k) else
        (-1, math.exp(k) * g) for g in grads
    ]  # fmt: skip
    grads = torch.tensor(grads)
    observed, _ = rule.observe(grads, grads, rule.init_state(grads, ((7,),)))
    torch.testing.assert_close(observed.coordinate, torch.tensor(paper).T, atol=3e-4, rtol=1e-4)


def test_presets_scale_the_output_and_can_be_overridden() -> None:
    grads, updates = numbers(2, D), {}
    for preset in ("deepmind-code", "paper", "quadratic"):
        torch.manual_seed(0)
        rule = make_rule("coordinatewise_lstm", preset=preset, log_scale=0).double()
        updates[preset] = run(rule, grads, numbers(D, seed=1))
    torch.testing.assert_close(updates["paper"], 10 * updates["deepmind-code"])
    torch.testing.assert_close(updates["quadratic"], 10 * updates["paper"])
    rule = make_rule("coordinatewise_lstm", preset="quadratic")
    observed, _ = rule.observe(grads[0], grads[0], rule.init_state(grads[0], SHAPES))
    assert torch.equal(observed.coordinate, grads[:1])  # no LogAndSign
    assert rule.config == {"hidden": 20, "layers": 2, "log_scale": 0, "output_scale": 1}
    with pytest.raises(ConfigError, match=r"preset is 'papr'.*deepmind-code, paper, quadratic"):
        make_rule("coordinatewise_lstm", preset="papr")


def test_the_lstm_starts_with_open_forget_gates() -> None:
    for cell in make_rule("coordinatewise_lstm", hidden=3).cells:
        assert cell.bias.tolist() == [0] * 3 + [1] * 3 + [0] * 6


def test_the_published_lstm_moves_a_parameter_without_gradient() -> None:
    rule, params = make_rule("coordinatewise_lstm"), torch.ones(4)
    update, _ = rule.update(torch.zeros(4), params, rule.init_state(params, ((4,),)))
    assert (update != 0).all()


def test_rnnprop_sees_what_adam_makes_of_the_gradients() -> None:
    """m̂/√v̂ is Adam's step at lr = 1; g/√v̂ is RMSprop's, whose average is not bias-corrected."""
    rule, params = make_rule("rnnprop", hidden=3).double(), numbers(D, seed=1)
    a, r = (params.clone().requires_grad_() for _ in range(2))
    adam = torch.optim.Adam([a], lr=1.0, betas=(0.95, 0.95), eps=1e-8)
    rms = torch.optim.RMSprop([r], lr=1.0, alpha=0.95, eps=0.0)
    state = rule.init_state(params, SHAPES)
    for t, grad in enumerate(numbers(6, D), start=1):
        before = a.detach().clone(), r.detach().clone()
        a.grad, r.grad = grad.clone(), grad.clone()
        adam.step()
        rms.step()
        g, m = before[1] - r.detach(), before[0] - a.detach()
        observed, state = rule.observe(grad, params, state)
        expected = torch.stack([g * (1 - 0.95**t) ** 0.5, m])
        torch.testing.assert_close(observed.coordinate, expected, rtol=1e-5, atol=1e-8)


def test_rnnprop_is_its_formula() -> None:
    rule = make_rule("rnnprop", hidden=3, alpha=0.2).double()
    lstm = nn.LSTM(3, 3, num_layers=2).double()
    for i, cell in enumerate(rule.cells):
        for name, part in (("weight_ih", cell.weight[:, :3]), ("weight_hh", cell.weight[:, 3:]),
                           ("bias_ih", cell.bias), ("bias_hh", 0 * cell.bias)):  # fmt: skip
            getattr(lstm, f"{name}_l{i}").data = part.data.clone()
    grads, params, seen = numbers(6, D), numbers(D, seed=1), []
    state = rule.init_state(params, SHAPES)
    for grad in grads:
        observed, state = rule.observe(grad, params, state)
        seen.append(observed.coordinate.T)
    h, _ = lstm(nn.functional.elu(rule.inlet(torch.stack(seen))))
    expected = -0.2 * rule.head(h).tanh().squeeze(-1).detach()
    torch.testing.assert_close(run(rule, grads, params), expected)


def test_rnnprop_bounds_its_steps_and_sees_no_scale_but_is_neither_odd_nor_gated() -> None:
    torch.manual_seed(0)
    rule = make_rule("rnnprop").double()
    grads, params = numbers(5, D), numbers(D, seed=1)
    updates = run(rule, grads, params)
    torch.testing.assert_close(run(rule, 1000 * grads, params), updates, rtol=1e-5, atol=1e-8)
    assert (run(rule, -grads, params) + updates).abs().max() > 1e-3
    assert (run(rule, 0 * grads, params) != 0).all()
    rule.head.bias.data.fill_(100.0)
    torch.testing.assert_close(run(rule, grads, params), torch.full_like(grads, -0.1))


def test_between_looks_what_the_network_said_last_holds() -> None:
    torch.manual_seed(0)
    rule, params = make_rule("geodesic_rnn", hidden=5, every=4).double(), numbers(D, seed=1)
    rule.head.weight.data = numbers(5, 5, seed=2)
    state, gains, looked = rule.init_state(params, SHAPES), None, []
    for step, grad in enumerate(numbers(9, D), start=1):
        seen, state = rule.observe(grad, params, state)
        before, last = rule.hidden(state), gains
        gains, hidden = rule.gains(seen.tensor, before)
        torch.testing.assert_close(rule.mix(gains, seen), rule.advance(seen, state)[0])
        state = rule.with_hidden(state, hidden)
        if seen.tensor.numel():
            looked.append(step)
            assert last is None or (gains != last).all()
        else:
            assert torch.equal(gains, last) and torch.equal(hidden, before)
    assert looked == [1, 2, 3, 5, 9]


def test_a_matrix_has_grown_only_beyond_its_usual_size() -> None:
    rule, shapes = make_rule("geodesic_rnn", hidden=4), ((6, 5), (6,))
    usual, grad = (3 * 5) ** -0.5, numbers(36)

    def told(start: float, now: float) -> Tensor:
        state = rule.init_state(grad, shapes)
        _, state = rule.observe(grad, torch.full_like(grad, start), state)
        return rule.observe(grad, torch.full_like(grad, now), state)[0].tensor

    matrix, vector = (told(0.2 * usual, 2 * usual) - told(usual, 2 * usual)).T
    assert matrix.abs().max() < 1e-12 and vector.abs().max() > 0.1
    assert (told(usual, 3 * usual) != told(2 * usual, 3 * usual))[:, 0].any()


def test_unknown_rules_and_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'nope'.*coordinatewise_lstm, geodesic_rnn, rnnprop"):
        make_rule("nope")
    with pytest.raises(ConfigError, match="hiden"):
        make_rule("geodesic_rnn", hiden=3)
    with pytest.raises(ConfigError, match="per is 'row'"):
        make_rule("geodesic_rnn", per="row")


def test_config_builds_the_rule_again(rule: UpdateRule) -> None:
    again = make_rule(rule.name, **rule.config).double()
    again.load_state_dict(rule.state_dict())
    grads, params = numbers(2, D), numbers(D, seed=1)
    assert torch.equal(run(again, grads, params), run(rule, grads, params))


@pytest.mark.parametrize("clip_squares", [1.5, 10.0])
def test_squares_follow_gradients_that_explode(clip_squares: float) -> None:
    """r̄² ← .99 r̄² + .01 g², with g clipped to `clip_squares` times r̄."""
    rule = make_rule("geodesic_rnn", hidden=3, clip_squares=clip_squares).double()
    theta = torch.full((1, 12), 0.3, dtype=torch.float64)
    state = replace(rule.init_state(theta, ((3, 4),)), step=10_000)
    state.coordinate["averages"][..., -1, :] = state.tensor["gradient_rms"][...] = 1.0
    _, state = rule.update(1e3 * torch.ones_like(theta), theta, state)
    expected = (0.99 + 0.01 * clip_squares**2) ** 0.5
    assert float(state.tensor["gradient_rms"]) == pytest.approx(expected)
    assert state.coordinate["averages"][..., 1:-1, :].max() <= 1.5 + 1e-9
