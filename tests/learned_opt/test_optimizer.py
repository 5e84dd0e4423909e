"""LearnedOptimizer's steps: their updates, what they skip, and errors."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from learned_opt import LearnedOptimizer, UpdateRule, make_rule
from learned_opt.rules import Layout, Observation, State
from learned_opt.tasks.data import load_images
from tests.learned_opt.drop_in import noisy_rule, parameters, run, set_gradients
from tests.learned_opt.rule_cases import DROP_IN


@pytest.fixture(params=DROP_IN)
def rule(request: pytest.FixtureRequest) -> UpdateRule:
    return noisy_rule(request.param)


@pytest.fixture
def untrained() -> UpdateRule:
    torch.manual_seed(0)
    return make_rule("geodesic_rnn", hidden=4)


def digits_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def digits_loss(model: nn.Module) -> Tensor:
    data = load_images("digits")
    return nn.functional.cross_entropy(model(data.train_x), data.train_y)


def train_on_digits(optimizer: LearnedOptimizer, model: nn.Module, steps: int = 100) -> float:
    """The loss on all training data after `steps` minibatches of 64."""
    data, rng = load_images("digits"), torch.Generator().manual_seed(0)
    for _ in range(steps):
        index = torch.randint(len(data.train_y), (64,), generator=rng)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.train_x[index]), data.train_y[index]).backward()
        optimizer.step()
    return digits_loss(model).item()


@pytest.mark.parametrize("num_steps", [None, 5])
def test_it_makes_the_rule_s_updates(rule: UpdateRule, num_steps: int | None) -> None:
    rule.decay, num_steps = 0.1, num_steps if rule.falls else None
    params = parameters()
    optimizer = LearnedOptimizer(params, weights=rule, num_steps=num_steps)
    theta = torch.cat([p.detach().flatten() for p in params])
    state = rule.init_state(theta, tuple(tuple(p.shape) for p in params))
    state = replace(state, num_steps=num_steps)
    for step in range(4):
        set_gradients(params, step)
        update, state = rule.update(torch.cat([p.grad.flatten() for p in params]), theta, state)
        theta = rule.moved(theta, update, state.layout)
        optimizer.step()
        torch.testing.assert_close(torch.cat([p.detach().flatten() for p in params]), theta)


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned(rule: UpdateRule) -> None:
    params, plain = ([torch.ones(3, requires_grad=True)] for _ in range(2))
    optimizer, reference = (LearnedOptimizer(p, weights=rule) for p in (params, plain))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 3.0
    plain[0].grad = 2 * torch.ones(3)
    assert reference.step() is None
    assert torch.equal(params[0], plain[0])


def test_groups_have_their_own_lr_and_weight_decay(rule: UpdateRule) -> None:
    settings = ({"lr": 1.0, "weight_decay": 0.0}, {"lr": 0.5, "weight_decay": 0.2})
    grouped = (parameters(), parameters())
    groups = [{"params": p, **s} for p, s in zip(grouped, settings, strict=True)]
    optimizer = LearnedOptimizer(groups, weights=rule)
    for step in range(3):
        for params in grouped:
            set_gradients(params, step)
        optimizer.step()
    for params, setting in zip(grouped, settings, strict=True):
        alone = parameters()
        expected = run(LearnedOptimizer(alone, weights=rule, **setting), alone, range(3))
        assert all(map(torch.equal, params, expected))


def test_lr_scales_the_update_and_weight_decay_is_relative(rule: UpdateRule) -> None:
    """p_i (1 − lr·wd·|u_i|/|p_i|) + lr·u_i for each row i"""
    lr, decay, start = 0.5, 0.2, parameters()
    plain, decayed = parameters(), parameters()
    run(LearnedOptimizer(plain, weights=rule, weight_decay=0.0), plain, range(1))
    run(LearnedOptimizer(decayed, weights=rule, lr=lr, weight_decay=decay), decayed, range(1))
    for p, moved, found in zip(start, plain, decayed, strict=True):
        u = moved - p
        rows = (len(p), p[:1].numel()) if p.dim() > 1 else (1, p.numel())
        norm, step = (x.reshape(rows).norm(dim=1, keepdim=True) for x in (p, u))
        shrink = 1 - lr * decay * step / norm
        torch.testing.assert_close(found, (p.reshape(rows) * shrink).view(p.shape) + lr * u)


def test_matrices_have_the_decay_of_their_weights_and_vectors_none() -> None:
    rule = make_rule("geodesic_rnn", hidden=3, decay=0.2)
    params, explicit, free = parameters(), parameters(), parameters()
    run(LearnedOptimizer(params, weights=rule), params, range(3))
    run(LearnedOptimizer(explicit, weights=rule, weight_decay=0.2), explicit, range(3))
    run(LearnedOptimizer(free, weights=rule, weight_decay=0.0), free, range(3))
    for p, matrix, vector in zip(params, explicit, free, strict=True):
        assert torch.equal(p, matrix if p.dim() > 1 else vector)
        assert not p.numel() or not torch.equal(matrix, vector)


def test_rows_that_do_not_move_do_not_decay() -> None:
    """As rows of an embedding of words that a batch does not have."""
    table, rule = torch.randn(300, 5), make_rule("geodesic_rnn", hidden=3, decay=0.2)
    start = table.clone()
    optimizer = LearnedOptimizer([table.requires_grad_()], weights=rule)
    for _ in range(3):
        table.grad = torch.zeros(300, 5)
        table.grad[7] = torch.randn(5)
        optimizer.step()
    moved = (table != start).any(1)
    assert moved[7] and moved.sum() == 1


def test_weight_decay_reaches_half_precision_parameters_of_large_norm(untrained) -> None:
    start = torch.full((300, 300), 300.0)  # its norm, 90,000, is beyond float16
    plain, decayed = (start.half().requires_grad_() for _ in range(2))
    run(LearnedOptimizer([plain], weights=untrained), [plain], range(1))
    run(LearnedOptimizer([decayed], weights=untrained, weight_decay=1.0), [decayed], range(1))
    share = (plain - start).norm() / start.norm()
    torch.testing.assert_close(decayed.float(), plain - share * start, atol=1.0, rtol=0)


def test_with_lr_zero_parameters_stay(rule: UpdateRule) -> None:
    params, start = parameters(), parameters()
    optimizer = LearnedOptimizer(params, weights=rule, lr=0.0, weight_decay=0.5)
    assert all(map(torch.equal, run(optimizer, params, range(2)), start))


def test_zero_gradients_are_an_exact_no_op() -> None:
    torch.manual_seed(0)
    rule = make_rule("geodesic_rnn", hidden=4)
    nn.init.normal_(rule.head.weight)
    params, start = parameters(), parameters()
    optimizer = LearnedOptimizer(params, weights=rule, weight_decay=0.1)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(map(torch.equal, params, start))


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e30])
def test_a_gradient_that_is_not_finite_is_as_if_it_had_not_been(rule, value) -> None:
    """1e30 is finite, its square is not."""
    params, others = parameters(), parameters()
    optimizer, reference = (LearnedOptimizer(p, weights=rule) for p in (params, others))
    for step, bad in enumerate([{1}, {0}, set(), {0, 6}, set()]):
        set_gradients(params, step)
        set_gradients(others, step)
        before = [(params[i].clone(), copy.deepcopy(optimizer.state[params[i]])) for i in bad]
        for i in bad:
            params[i].grad.view(-1)[-1] = value
            others[i].grad = None
        optimizer.step()
        reference.step()
        for i, (theta, state) in zip(bad, before, strict=True):
            assert torch.equal(params[i], theta)
            after = optimizer.state[params[i]]
            counted = ("skipped", "clock")
            assert all(torch.equal(after[k], v) for k, v in state.items() if k not in counted)
    torch.testing.assert_close(params, others)
    with pytest.warns(UserWarning, match="4 updates of tensors were skipped"):
        assert optimizer.skipped_steps() == 4
    fresh = LearnedOptimizer(params, weights=rule)
    assert fresh.skipped_steps() == 0
    fresh.load_state_dict(optimizer.state_dict())
    with pytest.warns(UserWarning):
        assert fresh.skipped_steps() == 4


def test_maximize_climbs_as_far_as_minimizing_the_opposite(rule: UpdateRule) -> None:
    params, others = parameters(), parameters()
    up = LearnedOptimizer([{"params": params, "maximize": True}], weights=rule)
    down = LearnedOptimizer(others, weights=rule)
    for step in range(3):
        set_gradients(params, step)
        set_gradients(others, step)
        kept = [p.grad.clone() for p in params]
        for p in others:
            p.grad.neg_()
        up.step()
        down.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, kept, strict=True))
    assert all(map(torch.equal, params, others))


def test_a_parameter_that_is_not_finite_rests_until_it_is(rule: UpdateRule) -> None:
    rule.decay = 0.1  # 0 · inf would be NaN
    params, others = parameters(), parameters()
    optimizer, reference = (LearnedOptimizer(p, weights=rule) for p in (params, others))
    for step, value in enumerate((None, float("-inf"), -1e20, None)):
        set_gradients(params, step)
        set_gradients(others, step)
        whole = params[0].detach().clone()
        if value is not None:
            params[0].data[0, 0] = value
            others[0].grad = None
        optimizer.step()
        reference.step()
        if value is not None:
            assert params[0][0, 0] == value
            params[0].data[0, 0] = whole[0, 0]
    torch.testing.assert_close(params, others)
    with pytest.warns(UserWarning, match="2 updates of tensors were skipped"):
        assert optimizer.skipped_steps() == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    expected = run(LearnedOptimizer(others := parameters()), others, range(3))
    params, before = parameters(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        optimizer = LearnedOptimizer(params)
        for step in range(3):
            rng = torch.Generator().manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=rng, dtype=torch.float32)
            optimizer.step()
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, params, expected))


@pytest.mark.parametrize("bad", [torch.ones(2), [], [torch.ones(2, requires_grad=True) * 2]])
def test_what_is_no_list_of_leaves_is_refused(bad, untrained: UpdateRule) -> None:
    with pytest.raises(TypeError if torch.is_tensor(bad) else ValueError):
        LearnedOptimizer(bad, weights=untrained)


def test_half_precision_runs_like_float32(untrained: UpdateRule) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        params, others = parameters(), parameters()
        params = [p.detach().to(dtype).requires_grad_() for p in params]
        found = run(LearnedOptimizer(params, weights=untrained), params, range(3))
        expected = run(LearnedOptimizer(others, weights=untrained), others, range(3))
        for p, q in zip(found, expected, strict=True):
            torch.testing.assert_close(p.float(), q, rtol=0.05, atol=0.05)


def test_an_lr_scheduler_drives_it(rule: UpdateRule) -> None:
    params = [torch.ones(4, requires_grad=True)]
    optimizer = LearnedOptimizer(params, weights=rule)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    moves = []
    for step in range(4):
        before = params[0].detach().clone()
        run(optimizer, params, range(step, step + 1))
        moves.append((params[0] - before).norm().item())
        scheduler.step()
    assert min(moves[:3]) > 0 and moves[3] == 0  # cos π: the rate is zero


def test_a_tensor_lr_of_one_element_is_a_number(rule: UpdateRule) -> None:
    settings = {"weights": rule, "weight_decay": 0.1}
    expected = run(LearnedOptimizer(others := parameters(), 0.5, **settings), others, range(2))
    for shape in ((), (1,), (1, 1)):
        lr = torch.full(shape, 0.5)
        found = run(LearnedOptimizer(params := parameters(), lr, **settings), params, range(2))
        assert all(map(torch.equal, found, expected))


def test_autocast_does_not_reach_inside(rule: UpdateRule) -> None:
    params, others = parameters(), parameters()
    with torch.autocast("cpu", torch.bfloat16):
        found = run(LearnedOptimizer(params, weights=rule), params, range(3))
    expected = run(LearnedOptimizer(others, weights=rule), others, range(3))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "1e-3", True, [0.1]])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_bad_setting_is_refused_by_name(name, value, untrained: UpdateRule) -> None:
    with pytest.raises(ValueError, match=name):
        LearnedOptimizer([torch.ones(2, requires_grad=True)], weights=untrained, **{name: value})
    group = {"params": [torch.ones(2, requires_grad=True)], name: value}
    with pytest.raises(ValueError, match=name):
        LearnedOptimizer([group], weights=untrained)
    optimizer = LearnedOptimizer([torch.ones(2, requires_grad=True)], weights=untrained)
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_compile_is_gone_and_the_error_says_since_when() -> None:
    with pytest.raises(
        TypeError, match=r"compile is True, but version 0\.1\.0 was the last with it"
    ):
        LearnedOptimizer(parameters(), compile=True)


@pytest.mark.parametrize("argument", [{"betas": (0.9, 0.99)}, {"momentum": 0.9}, {"fused": True}])
def test_settings_of_other_optimizers_are_refused_with_the_reason(argument: dict) -> None:
    ((name, value),) = argument.items()
    with pytest.raises(TypeError) as error:
        LearnedOptimizer([torch.ones(2, requires_grad=True)], **argument)
    text = str(error.value)
    assert f"{name}={value!r}" in text and "leave it out" in text and "weight_decay" in text


@pytest.mark.parametrize("lr", [1e-3, 0.02, torch.tensor(3e-4)])
def test_an_lr_as_for_adam_is_warned_of_where_it_is_given(lr, untrained: UpdateRule) -> None:
    params = [torch.ones(2, requires_grad=True) for _ in range(3)]
    text = f"lr is {float(lr):g}, but .* whole update.* trained for 1"
    with pytest.warns(UserWarning, match=text) as seen:
        LearnedOptimizer(params, lr, weights=untrained)
    assert len(seen) == 1 and seen[0].filename == __file__
    with pytest.warns(UserWarning, match=text) as seen:
        LearnedOptimizer([{"params": params[:1]}, {"params": params[1:2], "lr": lr}])
    assert len(seen) == 1 and seen[0].filename == __file__
    optimizer = LearnedOptimizer(params[:1], weights=untrained)
    with pytest.warns(UserWarning, match=text) as seen:
        optimizer.add_param_group({"params": params[1:], "lr": lr})
    assert len(seen) == 1 and seen[0].filename == __file__


@pytest.mark.parametrize("lr", [0.0, 0.021, 0.1, 1.0])
def test_other_lrs_are_no_cause_for_a_warning(lr: float, untrained: UpdateRule) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = LearnedOptimizer([torch.ones(2, requires_grad=True)], lr, weights=untrained)
        optimizer.add_param_group({"params": [torch.ones(3, requires_grad=True)], "lr": lr})
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-3)  # a warm-up


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_default_device_does_not_matter(rule: UpdateRule, device: str) -> None:
    """Parameters on the CPU take the same steps, and those without values take them too."""
    expected = run(LearnedOptimizer(others := parameters(), weights=rule), others, range(3))
    params = [p.detach().to(device).requires_grad_() for p in parameters()]
    gradients = [[torch.empty(0)] * len(params)] * 3
    if device == "cpu":
        gradients = []
        for step in range(3):
            set_gradients(others, step)
            gradients.append([p.grad.clone() for p in others])
    torch.set_default_device("meta")
    try:
        optimizer = LearnedOptimizer(params, weights=rule)
        for step in range(3):
            for p, grad in zip(params, gradients[step], strict=True):
                p.grad = grad if device == "cpu" else torch.zeros_like(p)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
    finally:
        torch.set_default_device(None)
    assert device == "meta" or all(map(torch.equal, params, expected))
    assert all(x.device.type == device for p in params for x in optimizer.state[p].values())


DEAD = {"rows": (slice(3, 5), slice(None)), "columns": (slice(None), slice(2, 4))}


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("shape", [(300, 200), (300, 300), (200, 300), (200, 200)])
def test_rows_without_gradient_stay_exactly_where_they_are(shape, dead: str) -> None:
    """As those of padding, masks and dead units. Sides are below and above 256, the largest that
    the shipped rule turns, and the covariance of the first gradients is degenerate."""
    where, rng = DEAD[dead], torch.Generator().manual_seed(0)
    p = (0.1 * torch.randn(shape, generator=rng)).requires_grad_()
    start = p.detach().clone()
    optimizer = LearnedOptimizer([p], weight_decay=0.0)  # which is of whole rows
    for step in range(10):
        p.grad = torch.randn(shape, generator=rng)
        if step < 5:
            p.grad = p.grad[:, :1] * p.grad[:1]  # of rank one
        p.grad[where] = 0
        optimizer.step()
    assert torch.equal(p[where], start[where]) and not torch.equal(p, start)


def test_a_tensor_lr_of_two_elements_is_refused(untrained: UpdateRule) -> None:
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        LearnedOptimizer([torch.ones(2, requires_grad=True)], torch.ones(2), weights=untrained)


def test_sparse_gradients_and_complex_parameters_are_refused(untrained: UpdateRule) -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients.*\(5, 3\)"):
        LearnedOptimizer(embedding.parameters(), weights=untrained).step()
    p = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="complex"):
        LearnedOptimizer([p], weights=untrained).step()


# Losses after 50 steps, when the weights were shipped: the update has to stay.
@pytest.mark.parametrize(
    ("rule", "loss"),
    [("tensor", 0.119226), ("basis", 0.115524), ("every", 0.119644), ("lstm", 2.700431)],
    indirect=["rule"],
)  # fmt: skip
def test_updates_are_what_shipped_weights_were_trained_with(rule: UpdateRule, loss: float) -> None:
    model = digits_model()
    found = train_on_digits(LearnedOptimizer(model.parameters(), weights=rule), model, steps=50)
    assert found == pytest.approx(loss, rel=1e-3)


def test_untrained_it_trains_on_digits(untrained: UpdateRule) -> None:
    model = digits_model()
    start = digits_loss(model).item()
    optimizer = LearnedOptimizer(model.parameters(), weights=untrained)
    assert train_on_digits(optimizer, model) < 0.3 * start


@pytest.mark.slow
def test_it_is_made_and_steps_without_a_word() -> None:
    script = (
        "import torch, learned_opt; p = torch.ones(3, requires_grad=True); p.grad = p.detach();"
        "learned_opt.LearnedOptimizer([p]).step()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class HeavyBall(UpdateRule):
    """v ← .9 v − .1 g; the update is v itself, as a view of the state."""

    name, hidden_per, config, entries = "heavy ball", "tensor", {}, ("v",)

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def init_state(self, params: Tensor, shapes: tuple) -> State:
        v = params.new_zeros(*params.shape[:-1], 1, params.shape[-1])
        hidden = params.new_zeros(*params.shape[:-1], 0, len(shapes))
        return State(Layout(shapes), 0, {"v": v}, {"hidden": hidden})

    def observe(self, grads: Tensor, params: Tensor, state: State, in_place: bool = False):
        v = state.coordinate["v"]
        v = (v if in_place else v.clone()).mul_(0.9).sub_(0.1 * grads.unsqueeze(-2))
        new = replace(state, step=state.step + 1, coordinate={"v": v})
        return Observation(v, grads.new_zeros(*grads.shape[:-1], 0, 1), state.layout), new

    def respond(self, observation: Observation, hidden: Tensor, in_place: bool = False):
        return observation.coordinate[..., 0, :], hidden


@pytest.mark.parametrize("settings", [{"lr": torch.tensor(0.5)}, {"weight_decay": 0.1}])
def test_a_rule_may_return_its_state_as_the_update(settings: dict) -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = LearnedOptimizer([p], weights=HeavyBall(), **settings)
    expected, v = torch.ones(3), torch.zeros(3)
    for _ in range(3):
        p.grad = torch.ones(3)
        optimizer.step()
        v = 0.9 * v - 0.1
        taken = settings.get("weight_decay", 0) * v.norm() / expected.norm() * expected
        expected = expected + settings.get("lr", 1) * v - taken
    torch.testing.assert_close(p.detach(), expected)
