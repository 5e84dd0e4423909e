"""Families: draws that never change, mixtures of kinds, and rescaled tasks."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from learned_opt.benchmarking import BenchmarkConfig
from learned_opt.cli import parse
from learned_opt.config import GeodesicsConfig
from learned_opt.errors import ConfigError
from learned_opt.run import run_optimizer
from learned_opt.target_paths import write_geodesics
from learned_opt.tasks import base, kinds, module
from learned_opt.tasks.augment import RescaledTask, equal_gradients
from learned_opt.tasks.base import Task, seed_of
from learned_opt.tasks.families import FamilyConfig, sample_tasks
from learned_opt.tasks.kinds import KINDS, Draw, TaskConfig, make_task

ROOT = Path(__file__).parents[2]
SMALL = FamilyConfig(num_tasks=2, width=(4, 8), batch_sizes=(8, 16), input_sizes=(9,))
MIXED = replace(SMALL, kinds=dict.fromkeys(KINDS, 1.0))

FAMILIES = {
    "default": FamilyConfig(),
    "shipped": FamilyConfig(
        data="digits",
        num_tasks=8,
        input_sizes=(16, 64, 256, 784, 3072),
        log10_input_scale=(-0.3, 0.4),
    ),
    "noisy": FamilyConfig(
        num_tasks=3,
        hidden_layers=(0, 2),
        activations=("tanh",),
        noise_probability=0.5,
        log10_init_scale=(-0.5, 0.5),
    ),
}
# Architecture, labels and minibatches as a hash; sums of |θ₀| and of a minibatch's |inputs|.
DRAWS = {
    ("default", ("train", 0, 0)): ("b4c4b9e1db673902", 4603.1541, 415892.47),
    ("default", ("train", 1, 17)): ("9c2a39238cb57361", 1066.3364, 1638.9755),
    ("default", ("train", 0, 1, 899)): ("8b80823ec59129ea", 1446.9516, 58454.419),
    ("default", ("validation", 2)): ("8c58779dbd42a32f", 2237.9721, 13127.398),
    ("shipped", ("train", 0, 0)): ("f04ac1dece226e3f", 4380.1038, 730119.75),
    ("shipped", ("train", 1, 17)): ("c2cc8ccc28478497", 5638.2382, 383234.15),
    ("shipped", ("train", 0, 1, 899)): ("8b80823ec59129ea", 1446.9516, 64749.017),
    ("shipped", ("validation", 2)): ("5c1ba324b3142cf5", 5951.3622, 98923.204),
    ("noisy", ("train", 0, 0)): ("4d3a7e0f963e90a2", 477.59178, 2749.2745),
    ("noisy", ("train", 1, 17)): ("93c37bf0b24a4acf", 329.15897, 621.81355),
    ("noisy", ("train", 0, 1, 899)): ("05cf57b3cc60d3a5", 86.333524, 10949.549),
    ("noisy", ("validation", 2)): ("371af3cd671ed1d6", 687.36398, 3055.6973),
}


@pytest.mark.parametrize(("name", "key"), DRAWS)
def test_draws_of_mlps_are_those_that_the_shipped_weights_were_trained_on(name, key) -> None:
    task = sample_tasks(FAMILIES[name], key)
    theta, (_, fixed_y), (x, y) = task.init(5), task.fixed_batch(20), task.batch(3, 4)
    c = task.config
    facts = c.hidden, c.activation, c.batch_size, task.shapes, task.name
    digest = hashlib.sha256(repr((*facts, fixed_y.tolist(), y.tolist())).encode()).hexdigest()
    sums = (float(part.abs().sum(dtype=torch.double)) for part in (theta, x))
    assert (digest[:16], *sums) == (DRAWS[name, key][0], *map(near, DRAWS[name, key][1:]))


near = partial(pytest.approx, rel=1e-5)


def test_a_mixture_draws_each_kind_as_often_as_it_says_and_again_the_same() -> None:
    family = replace(MIXED, kinds={"mlp": 3, "quadratic": 1, "logistic": 0})
    drawn = Counter(sample_tasks(family, ("train", i)).config.kind for i in range(200))
    assert set(drawn) == {"mlp", "quadratic"} and 120 < drawn["mlp"] < 180
    drawn = set()
    for i in range(60):
        task, again = (sample_tasks(MIXED, ("train", i)) for _ in range(2))
        drawn.add(task.config.kind)
        assert task.config == again.config and torch.equal(task.init(0), again.init(0))
        for first, second in zip(task.batch(0, 1), again.batch(0, 1), strict=True):
            assert torch.equal(first, second)
        loss, grad = task.loss_and_grad(task.init(0), task.batch(0, 0))
        assert loss.shape == (2,) and loss.isfinite().all() and grad.isfinite().all()
    assert drawn == set(KINDS)


def test_mlps_of_a_mixture_are_those_of_their_own_family() -> None:
    for i in range(20):
        task, alone = (sample_tasks(family, ("train", i)) for family in (MIXED, SMALL))
        if task.config.kind == "mlp":
            assert task.config == alone.config and torch.equal(task.init(0), alone.init(0))


@pytest.mark.parametrize("kind", KINDS)
def test_training_validation_and_reporting_tasks_are_others(kind: str) -> None:
    family = replace(SMALL, kinds={kind: 1}, num_tasks=4)
    train, validation = (
        sample_tasks(family, key) for key in (("train", 0, 0, 0), ("validation", 0))
    )
    text = kind in ("gru", "lstm", "transformer")
    reported = make_task(replace(train.config, data="markov") if text else train.config)

    def targets(task: Task) -> set[tuple]:
        parts = task.fixed_batch(20)[-1]
        parts = parts if task.num_tasks else parts[None]
        return {tuple(part.flatten().tolist()[:40]) for part in parts}

    drawn = targets(train) | targets(validation)
    assert len(drawn) == 8 and not targets(reported) & drawn
    assert not text or len({train.config.data, validation.config.data, "markov"}) == 3


@pytest.mark.parametrize("kind", ["conv", "logistic"])
def test_tasks_of_a_draw_have_their_own_names_for_the_classes(kind: str) -> None:
    task = sample_tasks(replace(SMALL, kinds={kind: 1}, num_tasks=3), ("train", 0))
    x, y = task.fixed_batch()
    assert torch.equal(x[0], x[1])
    for i in (1, 2):  # a name for each class, and another in each task
        names = dict(zip(y[0].tolist(), y[i].tolist(), strict=True))
        assert len(set(names.values())) == 10 and any(a != b for a, b in names.items())
        assert [names[label] for label in y[0].tolist()] == y[i].tolist()


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"quadratic"}))
def test_train_sizes_limit_the_training_data(kind: str) -> None:
    family = replace(SMALL, kinds={kind: 1}, train_sizes=(7,))
    assert len(sample_tasks(family, ("train", 0)).fixed_batch()[-1][0]) == 7


def test_a_rescaled_task_is_the_task_in_other_units() -> None:
    task = make_task(TaskConfig(hidden=(5,), batch_size=8), draw=Draw(2))
    scales, weights = torch.tensor([[0.1, 1, 10, 2], [3, 0.5, 1, 1]]), torch.tensor([2.0, 0.5])
    other = RescaledTask(task, scales, weights)
    repeats = torch.tensor([320, 5, 50, 10])
    s = scales.repeat_interleave(repeats, 1)
    theta = task.init(0)
    torch.testing.assert_close(other.init(0) * s, theta)
    loss, grad = task.loss_and_grad(theta, task.batch(0, 0))
    other_loss, other_grad = other.loss_and_grad(theta / s, other.batch(0, 0))
    torch.testing.assert_close(other_loss, weights * loss)
    torch.testing.assert_close(other_grad, weights[:, None] * s * grad)
    torch.testing.assert_close(other.chance, weights * task.chance)
    found, expected = other.evaluate(theta / s), task.evaluate(theta)
    torch.testing.assert_close(found["test_loss"], weights * expected["test_loss"])
    torch.testing.assert_close(found["test_accuracy"], expected["test_accuracy"])


@pytest.mark.parametrize("reparametrize", ["tensor", "task"])
def test_reparametrisation_of_a_family(reparametrize: str) -> None:
    plain = replace(SMALL, hidden_layers=(1, 1), log10_init_scale=(0, 0))
    family = replace(plain, log10_reparametrization=(-3, 3), reparametrize=reparametrize)
    task, other = (sample_tasks(f, ("train", 0)) for f in (plain, family))
    starts = (t.unflatten(t.init(0)) for t in (task, other))
    scales = torch.stack([(a / b).flatten(1)[:, 0] for a, b in zip(*starts, strict=True)])
    assert (scales.log10().abs() <= 3).all() and scales[0].unique().numel() == 2
    assert len(scales[:, 0].log().round(decimals=4).unique()) == (
        4 if reparametrize == "tensor" else 1
    )
    torch.testing.assert_close(
        other.loss(other.init(0), other.batch(0, 0)), task.loss(task.init(0), task.batch(0, 0))
    )


def test_equal_gradients_at_the_start() -> None:
    for kind in ("mlp", "gru", "quadratic"):
        family = replace(SMALL, num_tasks=4, kinds={kind: 1}, log10_init_scale=(-1, 1))
        task = sample_tasks(family, ("train", 0))
        equal = sample_tasks(replace(family, equalize_gradients=True), ("train", 0))
        norms = [
            t.loss_and_grad(t.init(seed_of("equal")), t.fixed_batch(256))[1].norm(dim=-1)
            for t in (task, equal)
        ]
        expected = norms[0].log().mean().exp().expand(4)
        torch.testing.assert_close(norms[1], expected, rtol=1e-4, atol=0)
        torch.testing.assert_close(equal_gradients(task) * norms[0], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["conv", "quadratic", "matrix_factorization"])
def test_geodesics_of_other_kinds(kind: str, tmp_path: Path) -> None:
    family = replace(SMALL, kinds={kind: 1}, log10_reparametrization=(-0.1, 0.1))
    config = replace(GeodesicsConfig(family=family).smoke(), num_shards=1, evaluation_size=8)
    config = replace(config, targets=replace(config.targets, pairs_per_run=1))
    assert write_geodesics(config, tmp_path).facts(0)["runs"] == 2


def test_data_sets_made_before_there_were_kinds_are_still_of_their_family(tmp_path: Path) -> None:
    config = replace(GeodesicsConfig().smoke(), num_shards=1)
    for name, family in (("old", SMALL), ("new", replace(SMALL, equalize_gradients=True))):
        dataset = write_geodesics(replace(config, family=family), tmp_path / name)
        assert ("equalize_gradients" in dataset.header["family"]) == (name == "new")
        assert {"kinds", "text"}.isdisjoint(dataset.header["family"])


def test_a_family_of_one_task_draws_what_is_random_in_it() -> None:
    quadratic = replace(SMALL, task=TaskConfig(kind="quadratic", options={"entries": "uniform"}))
    draws = [sample_tasks(quadratic, ("train", i)) for i in (0, 1, 0)]
    (w, y), (other, _), (again, _) = (task.batch(0, 0) for task in draws)
    assert w.shape == (2, 10, 10) and w.min() >= 0 and y.shape == (2, 10)
    assert (w[0] != w[1]).any() and (w != other).any() and torch.equal(w, again)

    mlp = replace(SMALL, task=TaskConfig(hidden=(3,), activation="tanh", init="normal"))
    task = sample_tasks(mlp, ("train", 0))
    assert task.name == "digits 64-3-10 tanh" and task.init(0).abs().max() < 0.1
    assert task.init(0).shape == (2, task.dim)
    rescaled = sample_tasks(replace(mlp, log10_reparametrization=(1.0, 1.0)), ("train", 0))
    torch.testing.assert_close(rescaled.init(0), task.init(0) / 10)


def test_the_task_in_contributing_md(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "sine", None)  # and out again afterwards
    text = (ROOT / "CONTRIBUTING.md").read_text()
    source = re.search(r'```python\n(@register\("sine"\).*?)```', text, re.DOTALL)[1]
    names = vars(base) | vars(kinds) | vars(module) | {"torch": torch, "nn": torch.nn}
    exec(source, dict(names))
    task = make_task(TaskConfig(kind="sine"))
    run = run_optimizer(task, partial(torch.optim.Adam, lr=0.03), 0, 200)
    assert run.evaluation["train_loss"] < 0.1 * task.chance
    drawn = sample_tasks(replace(SMALL, kinds={"sine": 1}), ("train", 0))
    assert drawn.loss_and_grad(drawn.init(0), drawn.batch(0, 0))[1].shape == (2, task.dim)


def test_the_mixed_benchmark_runs_on_all_its_tasks() -> None:
    path = str(ROOT / "configs/benchmark/mixed.yaml")
    _, config, _ = parse(["benchmark", "--config", path, "--output", "unused"])
    assert isinstance(config, BenchmarkConfig)
    for entry in config.tasks:
        run = run_optimizer(make_task(entry.task), partial(torch.optim.Adam, lr=1e-3), 0, 2)
        assert not run.diverged
    assert config.tasks[-1].task.own.condition == 1e4


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"kinds": {"cnn": 1}}, "kinds has 'cnn', .*'conv'"),
        ({"kinds": {"mlp": 0}}, "kinds="),
        ({"kinds": {}}, "kinds="),
        ({"kinds": {"mlp": -1, "conv": 2}}, "kinds="),
        ({"train_sizes": (0,)}, "train_sizes"),
        ({"log10_reparametrization": (1, -1)}, "log10_reparametrization"),
        ({"reparametrize": "layer"}, "reparametrize is 'layer'"),
    ],
)
def test_a_bad_family_is_refused_by_name(wrong: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FamilyConfig(**wrong)


def test_a_bad_family_in_a_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("family: {kinds: {mlp: 3, cnn: 1}}")
    for command in ("geodesics", "train"):
        with pytest.raises(ConfigError, match="kinds has 'cnn'"):
            parse([command, "--config", str(path), "--output", "unused"])
