"""Other optimizers as entrants: groups of tensors, several optimizers, schedules, modes."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor, nn

from learned_opt.benchmarking.entrants import FIELD, NAMED, Entrant, Group
from learned_opt.benchmarking.muon import Muon
from learned_opt.benchmarking.together import Together, warmup_cosine
from learned_opt.errors import ConfigError
from learned_opt.run import run_optimizer
from learned_opt.tasks.kinds import TaskConfig, make_task
from learned_opt.tasks.trainee import Parameters

REGRESSION = TaskConfig(kind="regression", data="breast_cancer", hidden=(8,), batch_size=16)


@pytest.fixture
def params() -> Parameters:
    """Of a small net with one tensor of each kind, and some vectors."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Embedding(5, 4), nn.Conv2d(3, 4, 2), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)
    )
    return Parameters.of(net)


def settings(optimizer: Together, params: Parameters, key: str) -> dict[str, object]:
    """The value of `key` by kind of tensor, of the optimizer and group that have it."""
    views = {id(m): p for o in optimizer.optimizers for p, m in getattr(o, "_whole", ())}
    found = {}
    for o in optimizer.optimizers:
        for group in o.param_groups:
            for p in group["params"]:
                index = [id(q) for q in params].index(id(views.get(id(p), p)))
                found[params.kinds[index]] = (type(o).__name__, group[key])
    return found


def test_adamw_decays_all_but_vectors(params: Parameters) -> None:
    optimizer = NAMED["AdamW warm-up cosine"].make_optimizer(params, {"lr": 0.1}, 10)
    assert settings(optimizer, params, "weight_decay") == {
        kind: ("AdamW", 0.0 if kind == "vector" else 0.1) for kind in params.kinds
    }


def test_muon_has_matrices_and_convolutions_and_adamw_the_rest(params: Parameters) -> None:
    optimizer = NAMED["Muon"].make_optimizer(params, {"lr": 0.1}, 10)
    assert settings(optimizer, params, "weight_decay") == {
        "matrix": ("Muon", 0.1),
        "convolution": ("Muon", 0.1),
        "embedding": ("AdamW", 0.1),
        "head": ("AdamW", 0.1),
        "vector": ("AdamW", 0.0),
    }
    assert {rate for _, rate in settings(optimizer, params, "lr").values()} == {0.1 / 1}


def gradients(tensors: list[Tensor], seed: int) -> None:
    torch.manual_seed(seed)
    for p in tensors:
        p.grad = torch.randn(p.shape)


def test_muon_is_torchs_but_for_rounding() -> None:
    ours, theirs = (torch.nn.Parameter(torch.ones(6, 4)) for _ in range(2))
    arguments = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    for p, optimizer in ((ours, Muon([ours], **arguments)),
                         (theirs, torch.optim.Muon([theirs], **arguments))):  # fmt: skip
        for seed in range(3):
            gradients([p], seed)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=3e-3, rtol=0)  # bfloat16 has three digits


def test_muon_takes_a_convolution_as_the_matrix_of_its_filters() -> None:
    kernel, matrix = nn.Parameter(torch.ones(4, 3, 2, 2)), nn.Parameter(torch.ones(4, 12))
    for p in (kernel, matrix):
        optimizer = Muon([p], lr=0.1)
        for seed in range(3):
            gradients([p], seed)
            optimizer.step()
        optimizer.zero_grad()
        assert p.grad is None
    torch.testing.assert_close(kernel.flatten(1), matrix)
    update = (kernel.detach() - 1).flatten(1)
    assert torch.linalg.svdvals(update).std() < 0.3 * torch.linalg.svdvals(update).mean()


def test_warmup_cosine() -> None:
    factor = warmup_cosine(100, 0.1)
    assert [factor(t) for t in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert factor(55) == pytest.approx(0.5) and factor(100) == 0.0
    assert factor(99) == pytest.approx((1 + math.cos(math.pi * 89 / 90)) / 2)
    assert warmup_cosine(3, 0.0)(0) == 1.0


def test_every_optimizer_of_an_entrant_follows_the_schedule(params: Parameters) -> None:
    optimizer = NAMED["Muon"].make_optimizer(params, {"lr": 0.2}, 40)
    rates = []
    for step in range(40):
        rates.append({group["lr"] for group in optimizer.param_groups})
        gradients(params, step)
        optimizer.step()
    factor = warmup_cosine(40, 0.05)
    assert all(len(rate) == 1 for rate in rates)
    assert [rate.pop() for rate in rates] == pytest.approx([0.2 * factor(t) for t in range(40)])


def test_arguments_may_say_the_number_of_steps() -> None:
    kwargs = {"momentum": 0.0, "lr": "{steps}", "weight_decay": "{0.02 * steps}"}
    entrant = Entrant("told", "torch.optim.SGD", kwargs)
    (group,) = entrant.make_optimizer([torch.ones(2, requires_grad=True)], {}, 150).param_groups
    assert (group["lr"], group["weight_decay"]) == (150, 3)
    assert entrant.knows_length and not Entrant("sgd", "torch.optim.SGD", {"lr": 0.1}).knows_length
    known = {e.name: e.knows_length for e in FIELD}
    assert [n for n, k in known.items() if not k] == ["Schedule-Free", "Schedule-Free tuned"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(ConfigError, match=r"pip install 'learned-opt\[field\]'"):
        NAMED["Schedule-Free"].check()


@pytest.mark.parametrize("wrong, message", [
    ({"groups": (Group(("kernels",)),)}, r"tensors=\['kernels'\]; use some of"),
    ({"groups": (Group(("vector",), "learned"),)}, "'learned' as the optimizer of a group"),
    ({"warmup": 1.0}, "warmup=1.0; use a share"),
])  # fmt: skip
def test_wrong_groups_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Entrant("wrong", "torch.optim.SGD", {"lr": 0.1}, **wrong)


class Watched(torch.optim.SGD):
    """Says of each training loss and evaluation in which mode it was."""

    said: list[str] = []  # noqa: RUF012

    def train(self) -> None:
        self.said.append("train")

    def eval(self) -> None:
        self.said.append("eval")


def test_an_optimizer_is_told_of_training_and_evaluation() -> None:
    Watched.said.clear()
    task = make_task(REGRESSION)
    run_optimizer(task, lambda p: Together([Watched(p, lr=0.01)]), 0, 4, [0, 2])
    assert Watched.said == ["train", *(["eval", "train"] * 3)]  # 0, 2 and the end


def test_schedule_free_is_evaluated_at_its_average() -> None:
    import schedulefree

    task, made = make_task(REGRESSION), []

    def make(params: Parameters) -> Together:
        made.append(schedulefree.AdamWScheduleFree(params, lr=0.05))
        return Together(made)

    run = run_optimizer(task, make, 0, 20, [20])
    trained = [p.clone() for p in made[0].param_groups[0]["params"]]
    made[0].eval()
    averaged = made[0].param_groups[0]["params"]
    assert any(not torch.allclose(a, b) for a, b in zip(trained, averaged, strict=True))
    net = task.network()
    for p, value in zip(net.parameters(), averaged, strict=True):
        p.data = value.detach()
    with torch.no_grad():
        expected = task.evaluate(net.eval(), "validation")[0]
    # its way from the one weights to the others and back rounds
    found = [run.evaluation["validation_loss"], run.validation[-1, 1]]
    assert found == pytest.approx([expected] * 2, rel=1e-5)
