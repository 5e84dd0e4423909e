"""Tasks: F and its gradient against plain torch modules, keyed randomness, families."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from learned_opt.errors import ConfigError
from learned_opt.tasks.base import Task, generator
from learned_opt.tasks.data import load_images
from learned_opt.tasks.families import FamilyConfig, sample_tasks
from learned_opt.tasks.kinds import TaskConfig, make_task
from learned_opt.tasks.mlp import MLPTask

CONFIG = TaskConfig(hidden=(9, 7), activation="gelu", batch_size=16)
MODULES = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU}


def module_with(config: TaskConfig, tensors: list[torch.Tensor]) -> nn.Sequential:
    """The same network from torch's own layers, with these weights."""
    sizes = [tensors[0].shape[1], *(b.numel() for b in tensors[1::2])]
    layers = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), MODULES[config.activation]()]
    module = nn.Sequential(*layers[:-1])
    for p, tensor in zip(module.parameters(), tensors, strict=True):
        p.data.copy_(tensor)
    return module


@pytest.mark.parametrize("activation", MODULES)
def test_loss_and_gradient_are_those_of_torch_layers(activation: str) -> None:
    task = make_task(replace(CONFIG, activation=activation))
    theta, (x, y) = task.init(0), task.batch(0, 0)
    module = module_with(task.config, task.unflatten(theta))
    expected = nn.functional.cross_entropy(module(x), y)
    expected.backward()
    loss, grad = task.loss_and_grad(theta, (x, y))
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, torch.cat([p.grad.flatten() for p in module.parameters()]))


@pytest.mark.parametrize("hidden", [(), (9,), (5, 6, 7)])
@pytest.mark.parametrize("activation", MODULES)
def test_the_gradient_written_out_is_autograd_s(activation: str, hidden: tuple[int, ...]) -> None:
    config = replace(CONFIG, activation=activation, hidden=hidden)
    for tasks in (None, 3):
        task = MLPTask(config, load_images("digits"), tasks)
        theta, (x, y) = task.init(0).double(), task.batch(0, 0)
        found = task.loss_and_grad(theta, (x.double(), y))
        expected = Task.loss_and_grad(task, theta, (x.double(), y))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_evaluate_is_loss_and_accuracy_over_all_data() -> None:
    task, data = make_task(CONFIG), load_images("digits")
    theta = task.init(0)
    module = module_with(CONFIG, task.unflatten(theta))
    with torch.no_grad():
        train = nn.functional.cross_entropy(module(data.train_x), data.train_y)
        logits = module(data.test_x)
    found = task.evaluate(theta)
    torch.testing.assert_close(found["train_loss"], train)
    torch.testing.assert_close(found["test_loss"], nn.functional.cross_entropy(logits, data.test_y))
    torch.testing.assert_close(
        found["test_accuracy"], (logits.argmax(-1) == data.test_y).float().mean()
    )


def test_tasks_of_a_batch_do_not_mix() -> None:
    single, many = make_task(CONFIG), MLPTask(CONFIG, load_images("digits"), num_tasks=3)
    theta, (x, y) = many.init(0), many.batch(0, 0)
    losses, grads = many.loss_and_grad(theta, (x, y))
    for i in range(3):
        loss, grad = single.loss_and_grad(theta[i], (x[i], y[i]))
        torch.testing.assert_close(losses[i], loss)
        torch.testing.assert_close(grads[i], grad)


def test_labels_and_projections_are_applied_to_every_view_of_the_data() -> None:
    data, rng = load_images("digits"), generator("test")
    projections = torch.randn(2, 64, 5, generator=rng) / 8
    labels = torch.stack([torch.randperm(10, generator=rng) for _ in range(2)])
    many = MLPTask(CONFIG, data, 2, projections, labels)
    theta = many.init(0)
    x, y = many.fixed_batch(50)
    scores = many.evaluate(theta)
    examples = {tuple(row.tolist()) for row in many.fixed_batch()[0][0]}
    assert {tuple(row.tolist()) for row in many.batch(0, 0)[0][0]} <= examples
    for i in range(2):
        seen = replace(
            data,
            train_x=data.train_x @ projections[i],
            train_y=labels[i][data.train_y],
            test_x=data.test_x @ projections[i],
            test_y=labels[i][data.test_y],
        )
        single = MLPTask(CONFIG, seen)
        torch.testing.assert_close((x[i], y[i]), single.fixed_batch(50))
        for name, value in single.evaluate(theta[i]).items():
            torch.testing.assert_close(scores[name][i], value)


def test_batches_are_keyed_by_seed_and_step() -> None:
    task, again = make_task(CONFIG), make_task(CONFIG)
    x, y = task.batch(3, 7)
    task.batch(3, 8)
    assert torch.equal(x, again.batch(3, 7)[0]) and torch.equal(y, again.batch(3, 7)[1])
    assert not torch.equal(x, task.batch(3, 8)[0])
    assert not torch.equal(x, task.batch(4, 7)[0])


def test_train_size_limits_training_and_not_the_test_set() -> None:
    task, data = make_task(replace(CONFIG, train_size=5)), load_images("digits")
    distance = torch.cdist(task.batch(0, 0)[0], data.train_x[:5]).amin(1)
    assert distance.max() < 1e-3 and len(task.fixed_batch()[1]) == 5
    theta = task.init(0)
    scores, full = task.evaluate(theta), make_task(CONFIG).evaluate(theta)
    torch.testing.assert_close(scores["test_loss"], full["test_loss"])
    expected = task.loss(theta, (data.train_x[:5], data.train_y[:5]))
    torch.testing.assert_close(scores["train_loss"], expected)


def test_input_noise_is_on_minibatches_only_and_of_each_task_s_size() -> None:
    data, size = load_images("digits"), torch.tensor([0.1, 2.0])
    clean = MLPTask(CONFIG, data, 2)
    noisy = MLPTask(CONFIG, data, 2, noise=size)
    (x, y), (noisy_x, noisy_y) = clean.batch(0, 0), noisy.batch(0, 0)
    assert torch.equal(y, noisy_y)
    torch.testing.assert_close((noisy_x - x).std(dim=(1, 2)), size, rtol=0.1, atol=0)
    assert torch.equal(noisy.batch(0, 0)[0], noisy_x)
    assert torch.equal(noisy.fixed_batch()[0], clean.fixed_batch()[0])


def test_vmap_over_theta_equals_a_loop() -> None:
    task = make_task(CONFIG)
    batch, thetas = task.fixed_batch(20), torch.stack([task.init(s) for s in range(3)])
    losses = torch.func.vmap(lambda theta: task.loss(theta, batch))(thetas)
    grads = torch.func.vmap(torch.func.grad(lambda theta: task.loss(theta, batch)))(thetas)
    for i, theta in enumerate(thetas):
        loss, grad = task.loss_and_grad(theta, batch)
        torch.testing.assert_close(losses[i], loss)
        torch.testing.assert_close(grads[i], grad)


def test_normal_init_has_the_paper_s_standard_deviation() -> None:
    theta = make_task(replace(CONFIG, hidden=(64,), init="normal")).init(0)
    assert theta.std() == pytest.approx(0.01, rel=0.05)


@st.composite
def families(draw: st.DrawFn) -> FamilyConfig:
    def interval(low: int, high: int) -> tuple[int, int]:
        first = draw(st.integers(low, high))
        return first, draw(st.integers(first, high))

    low = draw(st.floats(-1, 1))
    return FamilyConfig(
        num_tasks=draw(st.integers(1, 3)),
        hidden_layers=interval(0, 3),
        width=interval(1, 20),
        activations=tuple(draw(st.sets(st.sampled_from(sorted(MODULES)), min_size=1))),
        batch_sizes=tuple(draw(st.sets(st.integers(1, 40), min_size=1))),
        input_sizes=tuple(draw(st.sets(st.integers(1, 30), min_size=1))),
        projection_probability=draw(st.sampled_from([0.0, 0.5, 1.0])),
        log10_init_scale=(low, draw(st.floats(low, 1))),
    )


@settings(max_examples=30, deadline=None)
@given(families(), st.integers(0, 1000))
def test_family_draws_repeat_and_stay_within_the_family(family: FamilyConfig, seed: int) -> None:
    task, again = (sample_tasks(family, ("train", seed)) for _ in range(2))
    theta = task.init(0)
    assert task.config == again.config and torch.equal(theta, again.init(0))
    for mine, other in zip(task.fixed_batch(9), again.fixed_batch(9), strict=True):
        assert torch.equal(mine, other)
    hidden, inputs = task.config.hidden, task.shapes[0][1]
    assert family.hidden_layers[0] <= len(hidden) <= family.hidden_layers[1]
    assert all(family.width[0] <= width <= family.width[1] for width in hidden)
    assert task.config.activation in family.activations
    assert task.batch(0, 0)[0].shape == (family.num_tasks, task.config.batch_size, inputs)
    assert task.config.batch_size in family.batch_sizes
    if family.projection_probability in (0.0, 1.0):
        assert inputs in (family.input_sizes if family.projection_probability else (64,))
    limit = 10 ** family.log10_init_scale[1] * inputs**-0.5
    assert task.unflatten(theta)[0].abs().max() <= limit * (1 + 1e-6)


def test_another_key_draws_other_tasks() -> None:
    family = FamilyConfig(num_tasks=2, hidden_layers=(1, 1), width=(8, 8), activations=("relu",))
    first, second = (sample_tasks(family, ("train", key)) for key in (0, 1))
    assert not torch.equal(first.fixed_batch()[1], second.fixed_batch()[1])


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (TaskConfig, {"activation": "swish"}),
        (TaskConfig, {"init": "zeros"}),
        (TaskConfig, {"batch_size": 0}),
        (TaskConfig, {"init_scale": 0.0}),
        (TaskConfig, {"hidden": (8, 0)}),
        (TaskConfig, {"train_size": 0}),
        (FamilyConfig, {"hidden_layers": (3, 1)}),
        (FamilyConfig, {"width": (9, 8)}),
        (FamilyConfig, {"log10_init_scale": (0.2, -0.2)}),
        (FamilyConfig, {"activations": ("relu", "swish")}),
        (FamilyConfig, {"num_tasks": 0}),
        (FamilyConfig, {"projection_probability": 1.5}),
        (FamilyConfig, {"noise_probability": -0.5}),
        (FamilyConfig, {"input_noise": (1.0, 0.5)}),
    ],
)
def test_a_bad_config_is_refused_by_name(config: type, wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        config(**wrong)
