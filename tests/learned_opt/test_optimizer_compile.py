"""LearnedOptimizer under torch.compile, and on a GPU."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch

from learned_opt import LearnedOptimizer, UpdateRule, make_rule
from tests.learned_opt.drop_in import noisy_rule, parameters, run, set_gradients
from tests.learned_opt.rule_cases import DROP_IN


def losses(rule: UpdateRule, compiled: bool) -> list[float]:
    """Of two groups and two heads, the second of which is in use at times."""
    torch.manual_seed(0)
    model = torch.nn.ModuleList(torch.nn.Linear(n, m) for n, m in ((8, 16), (16, 1), (16, 1)))
    x, y = torch.randn(32, 8), torch.randn(32, 1)
    groups = [[p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (0, 1)]
    groups = [{"params": ps, "weight_decay": 0.1 * i} for i, ps in enumerate(groups)]
    optimizer = LearnedOptimizer(groups, weights=rule)

    def train(head: torch.nn.Module) -> torch.Tensor:
        optimizer.zero_grad()
        loss = (head(model[0](x).tanh()) - y).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    step = torch.compile(train, backend="eager") if compiled else train
    return [step(model[1 + i % 3 // 2]).item() for i in range(8)]


@pytest.mark.slow
def test_a_compiled_training_step_does_the_same_from_the_first(rule: UpdateRule) -> None:
    torch.compiler.reset()
    for _ in range(2):  # and another model in the same process
        assert losses(rule, True) == pytest.approx(losses(rule, False), rel=1e-3)


one_graph = pytest.mark.parametrize(
    "rule", [name for name in DROP_IN if name not in ("basis", "every", "horizon")], indirect=True
)


@pytest.fixture(params=DROP_IN)
def rule(request: pytest.FixtureRequest) -> UpdateRule:
    return noisy_rule(request.param)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("rule", ["tensor", "horizon"], indirect=True)
def test_compiled_to_c_it_does_the_same(rule: UpdateRule) -> None:
    torch.compiler.reset()
    params, others = ([torch.ones(6, 5, requires_grad=True) for _ in range(2)] for _ in range(2))
    optimizer, reference = (LearnedOptimizer(p, weights=rule) for p in (params, others))
    compiled = torch.compile(lambda: optimizer.step(), dynamic=False)
    for number in range(5):
        for step, its_params in ((compiled, params), (reference.step, others)):
            set_gradients(its_params, number)
            if number == 3:
                its_params[1].grad[0, 0] = float("nan")
            step()
    torch.testing.assert_close(params, others)
    kept, expected = (  # the first row of averages is scratch
        [x | {"averages": x["averages"][..., 1:]} for x in o.state.values()]
        for o in (optimizer, reference)
    )
    torch.testing.assert_close(kept, expected)


@one_graph
def test_dynamo_takes_a_step_in_one_graph(rule: UpdateRule) -> None:
    """After a first one in Python; a graph break is an error here."""
    params, others = ([torch.ones(6, 5), torch.ones(6)] for _ in range(2))
    for p in (*params, *others):
        p.requires_grad_()
    optimizer, reference = (LearnedOptimizer(p, weights=rule) for p in (params, others))
    run(optimizer, params, range(1))
    run(reference, others, range(1))
    step = torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)
    for number in range(1, 4):
        set_gradients(params, number)
        step()
    run(reference, others, range(1, 4))
    torch.testing.assert_close(params, others)
    for each, its_params in ((optimizer, params), (reference, others)):
        run(each, its_params, range(4, 5))
        assert [int(each.state[p]["clock"]) for p in its_params] == [5, 5]


@pytest.mark.slow
@pytest.mark.parametrize("basis", [0, 20])
def test_past_the_limit_of_recompilations_it_does_the_same(basis: int) -> None:
    """A frame that torch compiles no more runs in Python, those that it calls do not."""
    torch.compiler.reset()
    torch.manual_seed(0)
    rule = make_rule("geodesic_rnn", hidden=5, every=10, basis=basis)
    for p in rule.parameters():
        p.data += 0.1 * torch.randn_like(p)
    shapes = ((20, 14), (15,), (10, 15), (10,), (3, 5))
    params, others = ([torch.ones(s).requires_grad_() for s in shapes] for _ in range(2))
    optimizer, reference = (
        LearnedOptimizer([{"params": [p]} for p in group], weights=rule)
        for group in (params, others)
    )
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for number in range(16):
        set_gradients(params, number)
        set_gradients(others, number)
        step()
        reference.step()
    torch.testing.assert_close(params, others, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@one_graph
def test_on_a_gpu_nothing_waits_for_it(rule: UpdateRule) -> None:
    params = [p.detach().cuda().requires_grad_() for p in parameters()]
    others = parameters()
    optimizer = LearnedOptimizer(params, weights=copy.deepcopy(rule))
    reference = LearnedOptimizer(others, weights=rule)
    for step in range(5):
        set_gradients(others, step)
        if step == 3:
            others[0].grad[0, 0] = float("nan")
        for p, q in zip(params, others, strict=True):
            p.grad = q.grad.cuda()
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        reference.step()
    torch.testing.assert_close([p.cpu() for p in params], others, rtol=1e-3, atol=1e-5)
