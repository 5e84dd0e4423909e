"""LearnedOptimizer's state, which is saved, loaded, copied, replaced and freed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from learned_opt import LearnedOptimizer, UpdateRule, make_rule
from learned_opt.rules.base import known_entries
from tests.learned_opt.drop_in import noisy_rule, parameters, run, set_gradients
from tests.learned_opt.rule_cases import DROP_IN


@pytest.fixture(params=DROP_IN)
def rule(request: pytest.FixtureRequest) -> UpdateRule:
    return noisy_rule(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_run_goes_on_bit_for_bit(rule: UpdateRule, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = LearnedOptimizer(params, weights=rule, lr=0.7, weight_decay=0.1)
    run(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
    expected = run(optimizer, params, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = LearnedOptimizer(saved["params"], weights=rule)
    fresh.load_state_dict(saved["optimizer"])
    assert all(map(torch.equal, run(fresh, saved["params"], range(3, 6)), expected))
    state = [v for p in saved["params"] for v in fresh.state[p].values()]
    assert state and all(v.dtype == torch.float32 for v in state)


def test_parameters_may_get_other_data(rule: UpdateRule) -> None:
    """As `vector_to_parameters`, `module.to(…)` and some trainers do."""
    params, twins = parameters(), parameters()
    first, second = (LearnedOptimizer(p, weights=rule) for p in (params, twins))
    for optimizer, its_params in ((first, params), (second, twins)):
        run(optimizer, its_params, range(2))
    for p, twin in zip(params, twins, strict=True):
        p.data = p.data + 1
        twin.data.add_(1)
    expected = run(second, twins, range(2, 4))
    assert all(map(torch.equal, run(first, params, range(2, 4)), expected))


def test_states_hold_no_more_memory_than_they_need(rule: UpdateRule) -> None:
    """Where another parameter each step has a gradient."""
    params = [torch.randn(20, 30).requires_grad_() for _ in range(12)]
    optimizer = LearnedOptimizer(params, weights=rule)
    for step in range(12):
        set_gradients(params, step)
        for p in params[2:]:
            p.grad = p.grad if step == 0 or p is params[step] else None
        optimizer.step()
    tensors = [x for p in params for x in optimizer.state[p].values()]
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    assert sum(held.values()) <= 1.01 * sum(x.numel() * x.element_size() for x in tensors)


def test_a_group_that_is_taken_out_is_freed(rule: UpdateRule) -> None:
    params, others = parameters(), parameters()
    optimizer = LearnedOptimizer([{"params": p} for p in (params, others)], weights=rule)
    run(optimizer, params + others, range(1))
    optimizer.param_groups.pop()
    gone = [weakref.ref(p) for p in others]
    for p in others:
        optimizer.state.pop(p, None)
    del others, p
    run(optimizer, params, range(1))
    assert not any(ref() is not None for ref in gone)


@pytest.mark.parametrize("kind", ["Adam", "SGD"])
def test_the_state_of_another_optimizer_is_refused(rule: UpdateRule, kind: str) -> None:
    params = parameters()
    other = getattr(torch.optim, kind)(params, lr=0.1, **{"SGD": {"momentum": 0.9}}.get(kind, {}))
    set_gradients(params, 0)
    other.step()
    optimizer = LearnedOptimizer(params, weights=rule, lr=0.5)
    run(optimizer, params, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"param_groups\[0\] .* has .* of another optimizer"):
        optimizer.load_state_dict(other.state_dict())
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    entries = other.state_dict() | {"param_groups": optimizer.state_dict()["param_groups"]}
    if kind == "Adam":  # a momentum_buffer alone might be a wrapper's
        optimizer.load_state_dict(entries)
        with pytest.raises(ValueError, match=r"state has .* but the rule keeps"):
            optimizer.step()


def test_groups_that_are_not_ours_are_refused_before_anything_changes() -> None:
    params = [torch.ones(3, requires_grad=True)]
    optimizer = LearnedOptimizer(params)
    run(optimizer, params, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    for kind in torch.optim.Optimizer.__subclasses__():
        if kind.__module__.startswith("torch.optim.") and kind.__name__ != "Muon":  # of matrices
            with pytest.raises(ValueError, match="load what the state_dict"):
                optimizer.load_state_dict(kind(params, lr=0.01).state_dict())
    bare = {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    with pytest.raises(ValueError, match=r"lacks weight_decay"):
        optimizer.load_state_dict(bare)
    with pytest.raises(ValueError, match=r"\['model', 'optimizer'\]"):
        optimizer.load_state_dict({"model": {}, "optimizer": optimizer.state_dict()})
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


def test_what_schedulers_and_users_add_to_groups_is_loaded() -> None:
    params, others = ([torch.ones(3, requires_grad=True)] for _ in range(2))
    optimizer, fresh = LearnedOptimizer(params), LearnedOptimizer(others)
    run(optimizer, params, range(1))
    schedule = torch.optim.lr_scheduler
    schedule.OneCycleLR(optimizer, max_lr=1.0, total_steps=9, cycle_momentum=False)
    torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.5)
    optimizer.param_groups[0] |= {"tag": "head", "eps": 0.5}
    fresh.param_groups[0]["eps"] = 0.1  # where it is in use, it may be loaded
    saved = optimizer.state_dict()
    assert {"initial_lr", "max_lr", "swa_lr", "tag"} <= saved["param_groups"][0].keys()
    fresh.load_state_dict(saved)
    assert fresh.state_dict()["param_groups"] == saved["param_groups"]


def test_a_hook_may_convert_the_state_of_another_optimizer() -> None:
    """Groups are judged after the user's hooks, as torch's sizes are."""
    params = [torch.ones(3, requires_grad=True)]
    optimizer = LearnedOptimizer(params)
    mine = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda *_: mine)
    optimizer.load_state_dict(torch.optim.SGD(params, lr=0.1).state_dict())
    assert optimizer.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("basis", [0, 8])
def test_the_state_of_a_rule_that_keeps_less_or_more_is_refused(basis: int) -> None:
    rules = [make_rule("geodesic_rnn", hidden=3, basis=b) for b in (basis, 8 - basis)]
    params = parameters()
    before, after = (LearnedOptimizer(params, weights=rule) for rule in rules)
    run(before, params, range(2))
    after.load_state_dict(before.state_dict())
    set_gradients(params, 2)
    with pytest.raises(ValueError, match=r"state has .* but the rule keeps"):
        after.step()


def test_the_state_of_other_shapes_is_refused(rule: UpdateRule) -> None:
    small, large = (torch.ones(n, 4, requires_grad=True) for n in (1, 6))
    first, second = (LearnedOptimizer([p], weights=rule) for p in (small, large))
    run(first, [small], range(1))
    second.load_state_dict(first.state_dict())
    set_gradients([large], 0)
    with pytest.raises(ValueError, match=r"\(1, 4, \d+\).* but the rule keeps"):
        second.step()
    large.data, large.grad = large.data.t().contiguous(), None
    second = LearnedOptimizer([large], weights=rule)
    run(second, [large], range(1))
    large.data = large.data.t().contiguous()
    large.grad = None
    set_gradients([large], 1)
    with pytest.raises(ValueError, match="but the rule keeps"):
        second.step()


def test_loading_a_state_dict_does_not_tie_two_optimizers(rule: UpdateRule) -> None:
    params, others = parameters(), parameters()
    first, second = (LearnedOptimizer(p, weights=rule) for p in (params, others))
    expected = run(first, params, range(3))
    second.load_state_dict(first.state_dict())
    run(second, others, range(5, 8))
    expected = run(LearnedOptimizer(twin := parameters(), weights=rule), twin, range(6))
    assert all(map(torch.equal, run(first, params, range(3, 6)), expected))


def test_copies_go_on_alike_and_apart(rule: UpdateRule) -> None:
    params = parameters()
    optimizer = LearnedOptimizer(params, weights=rule)
    run(optimizer, params, range(2))
    copied = copy.deepcopy((optimizer, params))
    pickled = pickle.loads(pickle.dumps((optimizer, params)))
    expected = run(optimizer, params, range(2, 4))
    for other, its_params in (copied, pickled):
        assert all(map(torch.equal, run(other, its_params, range(2, 4)), expected))


def test_a_copy_loads_in_float32_too(rule: UpdateRule) -> None:
    """Hooks would be lost by copying."""
    params = parameters(torch.bfloat16)
    optimizer = LearnedOptimizer(params, weights=rule)
    run(optimizer, params, range(2))
    copied, its_params = copy.deepcopy((optimizer, params))
    copied.load_state_dict(optimizer.state_dict())
    assert all(v.dtype == torch.float32 for p in its_params for v in copied.state[p].values())
    expected = run(optimizer, params, range(2, 4))
    assert all(map(torch.equal, run(copied, its_params, range(2, 4)), expected))


def test_names_round_trip(rule: UpdateRule) -> None:
    model = nn.Linear(3, 2)
    optimizer = LearnedOptimizer(model.named_parameters(), weights=rule)
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    again = LearnedOptimizer(nn.Linear(3, 2).named_parameters(), weights=rule)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["param_names"] == names


def test_the_loss_scaler_skips_a_step_and_leaves_all_as_it_is(rule: UpdateRule) -> None:
    params = parameters()
    optimizer = LearnedOptimizer(params, weights=rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=100)
    run(optimizer, params, range(2))
    before = copy.deepcopy((params, optimizer.state_dict()))
    params[0].grad = torch.full_like(params[0], float("inf"))
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1.0
    torch.testing.assert_close((params, optimizer.state_dict()), before, rtol=0, atol=0)
    set_gradients(params, 2)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    expected = run(LearnedOptimizer(twin := parameters(), weights=rule), twin, range(2))
    assert not torch.equal(params[0], expected[0])


def test_an_optimizer_is_freed_at_once(rule: UpdateRule) -> None:
    params = parameters()
    optimizer = LearnedOptimizer(params, weights=rule)
    run(optimizer, params, range(2))
    optimizer.load_state_dict(optimizer.state_dict())
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None  # no reference cycle
    finally:
        gc.enable()


@pytest.mark.parametrize("replaced", ["dicts", "entries"])
def test_state_that_is_replaced_from_outside_is_used(rule: UpdateRule, replaced: str) -> None:
    """As Lightning does to move an optimizer to a device, or offloading one entry at a time."""
    params, others = parameters(), parameters()
    optimizer, reference = (LearnedOptimizer(p, weights=rule) for p in (params, others))
    run(optimizer, params, range(2))
    run(reference, others, range(2))
    for p in params if replaced == "dicts" else ():
        optimizer.state[p] = {name: v.clone() for name, v in optimizer.state[p].items()}
    for name, value in optimizer.state[params[0]].items():
        optimizer.state[params[0]][name] = torch.zeros_like(value)
    found = run(optimizer, params, range(2, 4))
    expected = run(reference, others, range(2, 4))
    assert not torch.equal(found[0], expected[0])
    assert all(map(torch.equal, found[1:], expected[1:]))


def test_a_parameter_may_join_later_with_its_own_step_count(rule: UpdateRule) -> None:
    """It moves as beside any other parameter, and the others as if it were not there."""
    early, late = (torch.randn(5, 4).requires_grad_() for _ in range(2))
    alone, again = (p.detach().clone().requires_grad_() for p in (early, late))
    other = torch.randn(7, 2).requires_grad_()
    for first, second in ((early, late), (other, again)):
        optimizer = LearnedOptimizer([first, second], weights=rule)
        start = second.detach().clone()
        for step in range(5):
            set_gradients([first], step)
            if step >= 3:
                set_gradients([second], step)
            else:
                assert torch.equal(second, start)
            optimizer.step()
        assert [int(optimizer.state[p]["step"]) for p in (first, second)] == [5, 2]
    run(LearnedOptimizer([alone], weights=rule), [alone], range(5))
    torch.testing.assert_close((early, late), (alone, again))


def test_the_state_has_the_documented_size() -> None:
    for name, config, size in (
        ("geodesic_rnn", {}, 20),
        ("coordinatewise_lstm", {}, 320),
    ):
        p = torch.ones(5, 40, requires_grad=True)
        optimizer = LearnedOptimizer([p], weights=make_rule(name, **config))
        run(optimizer, [p], range(1))
        state = [s for s in optimizer.state[p].values() if s.shape[:2] == p.shape]
        assert sum(s.numel() * s.element_size() for s in state) == size * p.numel()


def test_what_others_keep_in_the_state_stays(rule: UpdateRule) -> None:
    """As wrappers of optimizers do: added before the first step and later, of any type."""
    params, plain = parameters(), parameters()
    optimizer, reference = (LearnedOptimizer(p, weights=rule) for p in (params, plain))
    slow = params[1].detach().clone()
    kept = {"k": 5, "slow": [slow]}
    optimizer.state[params[0]]["mine"] = kept
    optimizer.state["wrapper"] = {"alpha": 0.5}  # of no parameter
    entries = optimizer.state[params[0]]
    run(optimizer, params, range(2))
    assert optimizer.state[params[0]] is entries
    optimizer.state[params[1]]["mine"] = slow
    optimizer.state[params[2]]["mine"] = "text"
    run(optimizer, params, range(2, 4))
    params[1].grad = plain[1].grad = None  # blocks are built anew
    run(reference, plain, range(4))
    for each, its_params in ((optimizer, params), (reference, plain)):
        set_gradients(its_params, 4)
        its_params[1].grad = None
        each.step()
    assert optimizer.state[params[0]]["mine"] is kept
    assert optimizer.state[params[1]]["mine"] is slow
    assert optimizer.skipped_steps() == 0
    others = [p.detach().clone().requires_grad_() for p in params]
    fresh = LearnedOptimizer(others, weights=rule)
    fresh.load_state_dict(optimizer.state_dict())
    for each in (copy.deepcopy((optimizer, params)), (fresh, others)):
        again, its_params = each
        run(again, its_params, range(5, 7))
        assert again.state[its_params[0]]["mine"]["k"] == 5
        loaded = again.state[its_params[0]]["mine"]["slow"][0], again.state[its_params[1]]["mine"]
        assert all(torch.equal(x, slow) and x is not slow for x in loaded)
        assert again.state[its_params[2]]["mine"] == "text"
        assert again.state["wrapper"] == {"alpha": 0.5}
    expected = run(reference, plain, range(5, 7))
    assert all(map(torch.equal, run(optimizer, params, range(5, 7)), expected))
    assert all(map(torch.equal, [p.detach() for p in others], expected))


def test_rules_name_all_that_they_keep(rule: UpdateRule) -> None:
    """By which a rule that keeps less knows the state of another from a wrapper's entries."""
    optimizer = LearnedOptimizer(params := parameters(), weights=rule)
    run(optimizer, params, range(1))
    kept = {name for p in params for name in optimizer.state[p]}
    assert kept - {"step", "skipped", "clock"} <= known_entries()


def bytes_of(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_what_is_saved_has_storage_of_its_own(rule: UpdateRule) -> None:
    """One entry, one parameter's, or all: as large as its numbers, and a plain tensor."""
    params = parameters()
    optimizer = LearnedOptimizer(params, weights=rule)
    run(optimizer, params, range(2))
    small = optimizer.state[params[3]]  # of 10 coordinates, in a block of 36,000
    numbers = sum(x.numel() * x.element_size() for x in small.values())
    assert len(bytes_of(small)) < numbers + 700 * len(small) + 2000
    for value in (*small.values(), small["step"]):
        assert len(bytes_of(value)) < value.numel() * value.element_size() + 2500
    loaded = torch.load(io.BytesIO(bytes_of(small)), weights_only=True)
    assert {type(x) for x in loaded.values()} == {Tensor}
    torch.testing.assert_close(loaded, dict(small), rtol=0, atol=0)
    copied = copy.deepcopy(small)
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in copied.values())


def test_safetensors_saves_what_state_dict_returns(rule: UpdateRule) -> None:
    params = parameters()
    optimizer = LearnedOptimizer(params, weights=rule)
    run(optimizer, params, range(3))
    params[1].grad = None  # its state leaves the block
    optimizer.step()
    saved = optimizer.state_dict()
    flat = {f"{i}.{k}": x for i, entries in saved["state"].items() for k, x in entries.items()}
    again: dict[int, dict[str, Tensor]] = {}
    for name, value in load(save(flat)).items():
        number, entry = name.split(".")
        again.setdefault(int(number), {})[entry] = value
    fresh = LearnedOptimizer(others := copy.deepcopy(params), weights=rule)
    fresh.load_state_dict(saved | {"state": again})
    expected = run(optimizer, params, range(4, 6))
    assert all(map(torch.equal, run(fresh, others, range(4, 6)), expected))


def test_steps_do_not_change_a_state_dict(rule: UpdateRule) -> None:
    params = parameters()
    optimizer = LearnedOptimizer(params, weights=rule)
    run(optimizer, params, range(2))
    optimizer.load_state_dict(optimizer.state_dict())
    for step in range(2, 4):  # before blocks are built, and after
        saved = optimizer.state_dict()
        before = copy.deepcopy(saved)
        run(optimizer, params, range(step, step + 1))
        torch.testing.assert_close(saved, before, rtol=0, atol=0)


def test_live_entries_may_be_changed_in_place() -> None:
    params, others = parameters(), parameters()
    rule = noisy_rule("basis")
    optimizer, reference = (LearnedOptimizer(p, weights=rule) for p in (params, others))
    run(optimizer, params, range(2))
    run(reference, others, range(2))
    optimizer.state[params[0]]["averages"].zero_()
    found, expected = run(optimizer, params, range(2, 3)), run(reference, others, range(2, 3))
    assert not torch.equal(found[0], expected[0])
    assert all(map(torch.equal, found[1:], expected[1:]))
