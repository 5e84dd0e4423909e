"""The contract of tasks, for a single task of each kind and for several at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from learned_opt.tasks.augment import RescaledTask
from learned_opt.tasks.base import Batch, Task
from learned_opt.tasks.kinds import KINDS, Draw, TaskConfig, make_task

TEXT = {"data": "markov", "hidden": (6, 6), "batch_size": 5}
SMALL = {"hidden": (4, 6), "activation": "gelu", "batch_size": 6}
CONFIGS = {
    "mlp": TaskConfig(**SMALL),
    "conv": TaskConfig(kind="conv", **SMALL),
    "conv batch norm": TaskConfig(kind="conv", **SMALL, options={"norm": "batch"}),
    "conv group norm": TaskConfig(kind="conv", **SMALL, options={"norm": "group"}),
    "resnet": TaskConfig(kind="resnet", **SMALL, options={"norm": "layer"}),
    "autoencoder": TaskConfig(kind="autoencoder", **SMALL),
    "logistic": TaskConfig(kind="logistic", batch_size=6),
    "diabetes": TaskConfig(kind="diabetes", **SMALL),
    "gru": TaskConfig(kind="gru", **TEXT, options={"context": 7}),
    "lstm": TaskConfig(kind="lstm", **TEXT, options={"context": 7}),
    "transformer": TaskConfig(kind="transformer", **TEXT, options={"context": 7}),
    "quadratic": TaskConfig(kind="quadratic", options={"condition": 100.0}),
    "l2l quadratic": TaskConfig(kind="quadratic"),
    "matrix": TaskConfig(kind="matrix_factorization", batch_size=6),
}


def rescaled(task: Task) -> Task:
    """`task` in other units, of θ and of the loss."""
    rng = torch.Generator().manual_seed(0)
    scales = 10 ** torch.randn(*task.lead, len(task.shapes), generator=rng)
    return RescaledTask(task, scales, 0.5 + torch.rand(task.lead, generator=rng))


@pytest.fixture(params=[*CONFIGS, "rescaled"])
def pair(request: pytest.FixtureRequest) -> tuple[Task, Task]:
    """One task alone, and three of its kind."""
    config = CONFIGS.get(request.param, CONFIGS["gru"])
    rng = torch.Generator().manual_seed(0)
    pair = make_task(config), make_task(config, draw=Draw(3, rng))
    return pair if request.param in CONFIGS else tuple(map(rescaled, pair))


def moved(task: Task, seed: int = 0) -> Tensor:
    """θ away from the init, where gradients may vanish."""
    theta = task.init(seed)
    return theta + 0.1 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(1))


def of_task(batch: Batch, i: int) -> Batch:
    return tuple(part[i] for part in batch)


def double(batch: Batch) -> Batch:
    return tuple(part.double() if part.is_floating_point() else part for part in batch)


def test_every_kind_is_tested_here() -> None:
    assert {config.kind for config in CONFIGS.values()} == set(KINDS)


def test_shapes(pair: tuple[Task, Task]) -> None:
    for task, lead in zip(pair, [(), (3,)], strict=True):
        theta = task.init(0)
        loss, grad = task.loss_and_grad(theta, task.batch(0, 0))
        assert theta.shape == grad.shape == (*lead, task.dim) and theta.dtype == torch.float32
        assert loss.shape == lead and grad.isfinite().all()
        assert [t.shape for t in task.unflatten(theta)] == [(*lead, *s) for s in task.shapes]
        assert torch.as_tensor(task.chance).shape in {(), lead} and task.name
        for batch in (task.batch(0, 0), task.fixed_batch(4)):
            assert all(part.shape[: len(lead)] == lead for part in batch)
        found = task.evaluate(theta)
        assert set(found) == {"train_loss", "test_loss", "test_accuracy"}
        assert all(value.shape == lead for value in found.values())


def test_tasks_together_are_each_alone(pair: tuple[Task, Task]) -> None:
    single, many = pair
    theta, batch = moved(many), many.batch(0, 0)
    losses, grads = many.loss_and_grad(theta, batch)
    for i in range(3):
        loss, grad = single.loss_and_grad(theta[i], of_task(batch, i))
        torch.testing.assert_close(losses[i], loss)
        torch.testing.assert_close(grads[i], grad, rtol=1e-4, atol=1e-5)


def test_particles_are_runs_of_the_same_tasks_on_the_same_batch(pair: tuple[Task, Task]) -> None:
    for task in pair:
        thetas, batch = torch.stack([moved(task, seed) for seed in (0, 1)]), task.batch(0, 0)
        losses, grads = task.loss_and_grad(thetas, batch)
        for i in range(2):
            loss, grad = task.loss_and_grad(thetas[i], batch)
            torch.testing.assert_close(losses[i], loss)
            torch.testing.assert_close(grads[i], grad, rtol=1e-4, atol=1e-5)


def test_no_parameter_of_a_task_is_seen_by_another(pair: tuple[Task, Task]) -> None:
    task = pair[1]
    theta, batch = moved(task).requires_grad_(), task.batch(0, 0)
    (grad,) = torch.autograd.grad(task.loss(theta, batch)[1], theta)
    assert grad[1].any() and not grad[0].any() and not grad[2].any()


def test_tasks_differ(pair: tuple[Task, Task]) -> None:
    task = pair[1]
    theta, batch = moved(task), task.batch(0, 0)
    assert task.loss(theta[:1].expand(3, -1), batch).unique().numel() == 3


def test_gradients_are_those_of_finite_differences(pair: tuple[Task, Task]) -> None:
    for task in pair:
        theta, batch = moved(task).double(), double(task.batch(0, 0))
        rng = torch.Generator().manual_seed(2)
        direction = torch.randn(theta.shape, generator=rng, dtype=torch.double)

        def along(step: Tensor, task=task, theta=theta, batch=batch, direction=direction) -> Tensor:
            return task.loss(theta + step * direction, batch)

        step = torch.zeros((), dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(along, step, eps=1e-6, atol=1e-6, rtol=1e-4)


def test_tensors_and_flat_theta_are_one(pair: tuple[Task, Task]) -> None:
    for task in pair:
        theta, batch = moved(task), task.batch(0, 0)
        assert torch.equal(task.loss(task.unflatten(theta), batch), task.loss(theta, batch))


def test_randomness_is_keyed_and_leaves_torch_s_own_alone(pair: tuple[Task, Task]) -> None:
    for task in pair:
        state = torch.get_rng_state()
        theta, batch, fixed = task.init(3), task.batch(3, 7), task.fixed_batch(5)
        torch.rand(1)
        assert torch.equal(theta, task.init(3))
        for first, again in zip(batch + fixed, task.batch(3, 7) + task.fixed_batch(5), strict=True):
            assert torch.equal(first, again)
        torch.set_rng_state(state)
        task.init(3), task.batch(3, 7)
        assert torch.equal(torch.get_rng_state(), state)
        kind = task.config.kind
        assert kind == "logistic" or not torch.equal(theta, task.init(4))
        for other in (task.batch(3, 8), task.batch(4, 7)):
            same = [torch.equal(*parts) for parts in zip(batch, other, strict=True)]
            assert all(same) == (kind == "quadratic")


def test_evaluate_is_the_loss_on_all_data(pair: tuple[Task, Task]) -> None:
    for task in pair:
        theta = moved(task)
        expected = task.loss(theta, task.fixed_batch())
        found = task.evaluate(theta)
        torch.testing.assert_close(found["train_loss"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["conv", "conv group norm", "autoencoder", "gru", "matrix"])
def test_chunks_of_an_evaluation_do_not_matter(name: str) -> None:
    task = make_task(CONFIGS[name], draw=Draw(3, torch.Generator().manual_seed(0)))
    whole, pieces = task.evaluate(moved(task)), task.evaluate(moved(task), chunk=100)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_vmap_over_theta_is_a_loop(pair: tuple[Task, Task]) -> None:
    """As the search for geodesics calls F."""
    task = pair[0]
    batch, thetas = task.fixed_batch(6), torch.stack([moved(task, seed) for seed in range(3)])
    grads = torch.func.vmap(torch.func.grad(lambda theta: task.loss(theta, batch)))(thetas)
    for theta, grad in zip(thetas, grads, strict=True):
        torch.testing.assert_close(grad, task.loss_and_grad(theta, batch)[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_adam_learns_it(name: str) -> None:
    config = CONFIGS[name]
    if config.kind != "quadratic":
        config = replace(config, batch_size=32)
    task = make_task(config, draw=Draw(2, torch.Generator().manual_seed(0)))
    theta = task.init(0).requires_grad_()
    optimizer = torch.optim.Adam([theta], 0.05)
    before = task.evaluate(theta.detach())["train_loss"]
    for step in range(60):
        optimizer.zero_grad()
        task.loss(theta, task.batch(0, step)).sum().backward()
        optimizer.step()
    after = task.evaluate(theta.detach())["train_loss"]
    assert (after < 0.95 * before).all() and (after < task.chance).all()
