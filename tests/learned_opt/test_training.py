"""Meta-training: gradients against autograd, paths in closed form, and real processes."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from geodesic.dataset import PathDataset
from geodesic.targets import target_paths
from learned_opt.config import TrainConfig
from learned_opt.errors import ConfigError
from learned_opt.geodesics import make_geodesics
from learned_opt.rules import Layout, Observation, State, UpdateRule, make_rule
from learned_opt.tasks.data import ImageData
from learned_opt.tasks.mlp import MLPTask, TaskConfig
from learned_opt.training.data import Updates
from learned_opt.training.fit import fit
from learned_opt.training.objectives import (
    AHEAD,
    HUBER,
    MIN_PROGRESS,
    PULL,
    OpenRun,
    hash_key,
    imitation_loss,
    meta_loss,
    nearest,
)
from learned_opt.weights import load_rule

ROOT = Path(__file__).parents[2]
ALL = 10**6  # coordinates to learn from: more than there are
RULES = {
    "tensor": ("geodesic_rnn", {"hidden": 3}),
    "coordinate": ("geodesic_rnn", {"hidden": 3, "per": "coordinate"}),
    "lstm": ("coordinatewise_lstm", {"hidden": 3, "output_scale": 0.1}),
}


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> UpdateRule:
    torch.manual_seed(0)
    name, config = RULES[request.param]
    rule = make_rule(name, **config).double()
    for p in rule.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return rule


def tiny_task(kind: type[MLPTask] = MLPTask) -> MLPTask:
    """Two networks of 4 inputs and 3 classes, in float64."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=rng, dtype=torch.float64)
    y = torch.randint(3, (60,), generator=rng)
    data = ImageData("tiny", x[:40], y[:40], x[40:], y[40:], 3, (4,))
    return kind(TaskConfig(hidden=(5,), activation="tanh", batch_size=8), data, num_tasks=2)


def open_run(rule: UpdateRule, task: MLPTask) -> OpenRun:
    theta = task.init(0).double()
    return OpenRun(("test", 0), 100, theta, rule.init_state(theta, task.shapes))


def unrolled_loss(
    rule: UpdateRule, task: MLPTask, run: OpenRun, steps: int, floor: float
) -> Tensor:
    """Σ_t F(θ_t) with a graph through θ_{t+1} = θ_t + u_t; what the rule sees is detached."""
    every = torch.arange(run.theta.numel())
    theta, state, hidden = run.theta, run.state, rule.pick_hidden(run.state, every)
    losses = []
    for step in range(steps + 1):
        batch = task.batch(hash_key(run.key), state.step)
        losses.append(task.loss(theta, batch))
        if step < steps:
            _, grad = task.loss_and_grad(theta, batch)
            with torch.no_grad():
                observation, state = rule.observe(grad, theta, state)
            update, hidden = rule.respond(observation.pick(every), hidden)
            theta = theta + update.view_as(theta)
    mean = torch.stack(losses[1:]).mean(0)
    return (mean / (mean.detach() + floor)).mean()


def gradient(loss: Tensor, rule: UpdateRule) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(rule.parameters()))])


def test_the_linear_form_has_the_gradient_of_the_unrolled_loss(rule: UpdateRule) -> None:
    task = tiny_task()
    run = open_run(rule, task)
    meta_loss(rule, task, run, 3, ALL, 0.01)  # states are carried into the next window
    assert run.state.step == 3
    expected = gradient(unrolled_loss(rule, task, deepcopy(run), 6, 0.01), rule)
    linear, losses = meta_loss(rule, task, run, 6, ALL, 0.01)
    torch.testing.assert_close(gradient(linear, rule), expected)
    assert run.state.step == 9 and losses.shape == (2,) and expected.norm() > 0


class FullBatch(MLPTask):
    """Without minibatches a key decides nothing but which coordinates are learned from."""

    def batch(self, seed: int, step: int) -> tuple[Tensor, ...]:
        return self.fixed_batch()


def test_learning_from_some_coordinates_is_unbiased() -> None:
    torch.manual_seed(0)
    rule = make_rule("geodesic_rnn", hidden=3, per="coordinate").double()
    task = tiny_task(FullBatch)

    def estimate(key: int, coordinates: int) -> Tensor:
        run = replace(open_run(rule, task), key=("test", key))
        return gradient(meta_loss(rule, task, run, 3, coordinates, 0.01)[0], rule)

    full = estimate(0, ALL)
    mean = torch.stack([estimate(key, task.dim) for key in range(200)]).mean(0)  # half of them
    torch.testing.assert_close(estimate(1, ALL), full)
    assert (mean - full).norm() < 0.1 * full.norm()


def test_a_lost_task_does_not_spoil_the_gradient(rule: UpdateRule) -> None:
    task = tiny_task()
    run = open_run(rule, task)
    run.theta[1] = float("nan")
    linear, losses = meta_loss(rule, task, run, 3, ALL, 0.01)
    found = gradient(linear, rule)
    assert losses[0].isfinite() and not losses[1].isfinite()
    assert found.isfinite().all() and found.norm() > 0


def paths(task: MLPTask, steps: int) -> Tensor:
    """Random walks from the inits, (2, steps + 1, d)."""
    rng = torch.Generator().manual_seed(1)
    walk = torch.randn(2, steps, task.dim, generator=rng, dtype=torch.float64).cumsum(1)
    theta = task.init(0).double()[:, None]
    return torch.cat([theta, theta + 0.02 * walk], dim=1)


def pseudo_huber(error: Tensor) -> Tensor:
    return HUBER**2 * ((1 + error.square() / HUBER**2).sqrt() - 1)


def test_imitation_off_policy_is_regression_onto_the_path_s_steps(rule: UpdateRule) -> None:
    task, key, lengths = tiny_task(), ("test", 1), torch.tensor([5, 3])
    points = paths(task, 5)
    every, state = torch.arange(points[:, 0].numel()), rule.init_state(points[:, 0], task.shapes)
    hidden, losses, sizes = rule.pick_hidden(state, every), [], []
    for t in range(5):
        _, grad = task.loss_and_grad(points[:, t], task.batch(hash_key(key), t))
        with torch.no_grad():
            observation, state = rule.observe(grad, points[:, t], state)
        update, hidden = rule.respond(observation.pick(every), hidden)
        step = points[:, t + 1] - points[:, t]
        for i in (lengths > t).nonzero().flatten():
            made, wanted = task.unflatten(update.view_as(step)[i]), task.unflatten(step[i])
            for u, target in zip(made, wanted, strict=True):
                losses.append(pseudo_huber((u - target).norm() / target.norm()))
                sizes.append(u.numel())
    found = imitation_loss(rule, task, points, lengths, ALL, False, key)
    expected = sum(n * loss for n, loss in zip(sizes, losses, strict=True)) / sum(sizes)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, rule), gradient(expected, rule))


class Constant(UpdateRule):
    """Always makes the same update, and learns how much of it."""

    name, hidden_per = "constant", "tensor"
    config: ClassVar[dict] = {}

    def __init__(self, updates: Tensor) -> None:
        super().__init__()
        self.updates, self.scale = updates, nn.Parameter(torch.ones((), dtype=updates.dtype))

    def init_state(self, params: Tensor, shapes: tuple) -> State:
        hidden = params.new_zeros(len(params), 0, len(shapes))
        return State(Layout(tuple(shapes)), 0, {}, {"hidden": hidden})

    def observe(self, grads: Tensor, params: Tensor, state: State, in_place: bool = False):
        none = grads.new_zeros(len(grads), 0, len(state.layout.shapes))
        observation = Observation(self.updates[:, None], none, state.layout)
        return observation, replace(state, step=state.step + 1)

    def respond(self, observation: Observation, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale * observation.coordinate[..., 0, :], hidden


def test_imitation_on_policy_has_its_closed_form_on_a_straight_path() -> None:
    """A student that is s times as fast as the path is wrong by s − 1; one that drifts off by w a
    step is told to take back PULL of the way as well: at step t it is wrong by w (1 + PULL t)."""
    task, steps = tiny_task(), 6
    sizes = (0.1, 0.2, 0.3, 0.4)  # of the path's step in each tensor
    step = torch.cat(
        [torch.full(s, v).double().flatten() for s, v in zip(task.shapes, sizes, strict=True)]
    )
    step = step.expand(2, -1)
    start = task.init(0).double()
    points = start[:, None] + torch.arange(steps + 1.0)[:, None] * step[:, None]
    lengths = torch.tensor([steps, steps])

    def loss(updates: Tensor) -> float:
        return imitation_loss(Constant(updates), task, points, lengths, ALL, True, ("test",)).item()

    assert loss(step) == pytest.approx(0, abs=1e-12)
    for speed in (1.5, 2.0):
        expected = pseudo_huber(torch.tensor(speed - 1, dtype=torch.float64)).item()
        assert loss(speed * step) == pytest.approx(expected)
    aside = step * torch.where(torch.arange(task.dim) % 2 == 0, 0.5, -0.5)
    aside -= step * (aside * step).sum(-1, keepdim=True) / step.square().sum(-1, keepdim=True)
    drifts = [
        w.norm() / v.norm()
        for w, v in zip(task.unflatten(aside[0]), task.unflatten(step[0]), strict=True)
    ]
    wrong = torch.stack(drifts) * (1 + PULL * torch.arange(steps))[:, None]
    weights = torch.tensor([math.prod(s) for s in task.shapes]) / task.dim
    expected = (pseudo_huber(wrong) * weights).sum(-1).mean()
    assert loss(step + aside) == pytest.approx(expected.item())


def test_nearest_on_a_straight_path() -> None:
    direction, aside = torch.tensor([3.0, 4.0]), torch.tensor([-0.8, 0.6])
    points = (torch.arange(11.0)[:, None] * direction)[None]

    def found(along: float, progress: float) -> float:
        theta = along * direction + 0.3 * aside
        return nearest(theta[None], points, torch.tensor([progress])).item()

    assert found(2.3, 1.0) == pytest.approx(2.3)
    assert found(1.5, 3.0) == pytest.approx(3.0 + MIN_PROGRESS)  # never back
    assert found(9.0, 1.0) == pytest.approx(1.0 + AHEAD)  # no further than it looks
    assert found(12.0, 8.0) == pytest.approx(10.0)  # the end of the path


def test_target_paths_join_up_in_equal_steps_until_one_is_not_certified() -> None:
    straight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [4.0, 0.0]])  # uneven beads
    corner = torch.tensor([[4.0, 0.0], [4.0, 2.0], [5.0, 2.0]])
    beads = [straight, corner, straight, corner, straight]
    sizes = torch.tensor([0] + [len(b) for b in beads])
    shard = {
        "beads": torch.cat(beads),
        "bead_offsets": sizes.cumsum(0),
        "run": torch.tensor([0, 0, 1, 1, 1]),
        "certified": torch.tensor([True, True, True, False, True]),
    }
    points, lengths = target_paths(shard, updates=3, runs=3)
    assert lengths.tolist() == [6, 3, 0]
    first = [[0, 0], [4 / 3, 0], [8 / 3, 0], [4, 0]]
    second = [[4, 1], [4, 2], [5, 2]]
    torch.testing.assert_close(points[0], torch.tensor(first + second))
    torch.testing.assert_close(points[1], torch.tensor(first + [[4, 0]] * 3))
    assert points.shape == (3, 7, 2) and (points[2] == 0).all()


CHANGES = {"updates": 40, "epoch_length": 5, "open_runs": 3}
CONFIG = replace(TrainConfig(rule_config={"hidden": 3}).smoke(), **CHANGES)
FIT = """
import json, sys, torch
from dataclasses import replace
from pathlib import Path
import learned_opt.training.fit
from geodesic.dataset import PathDataset
from learned_opt.config import TrainConfig
from learned_opt.training.module import MetaTraining

class Watched(MetaTraining):  # keeps what each rank saw and ended with
    def on_fit_start(self):
        self.seen = []

    def tasks(self, family, *key):
        self.seen.append(list(key))
        return super().tasks(family, *key)

    def on_train_end(self):
        kept = {"rule": self.rule.state_dict(), "seen": self.seen}
        torch.save(kept, folder / f"rank{self.global_rank}.pt")

torch.set_num_threads(1)
folder, paths, changes = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
config = TrainConfig(rule_config={"hidden": 3}).smoke()
learned_opt.training.fit.MetaTraining = Watched
learned_opt.training.fit.fit(replace(config, **changes), folder, PathDataset.open(paths))
print("wandb" in sys.modules)
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PathDataset:
    return make_geodesics(CONFIG.geodesics, tmp_path_factory.mktemp("paths"))


@pytest.fixture(scope="module")
def trained(dataset: PathDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights file of an uninterrupted run of CONFIG."""
    return fit(CONFIG, tmp_path_factory.mktemp("trained"), dataset)


def start(folder: Path, dataset: PathDataset, **changes) -> subprocess.Popen:
    """`fit` in a process of its own, started as a user would start a script."""
    folder.mkdir(exist_ok=True)
    script = folder / "fit.py"
    script.write_text(FIT)
    return subprocess.Popen(
        [sys.executable, script, folder, dataset.folder, json.dumps(CHANGES | changes)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for_checkpoint(process: subprocess.Popen, folder: Path) -> Path:
    checkpoint = folder / "checkpoints" / "last.ckpt"
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    return checkpoint


def test_the_same_config_gives_the_same_weights(
    trained: Path, dataset: PathDataset, tmp_path: Path
) -> None:
    assert fit(CONFIG, tmp_path, dataset).read_bytes() == trained.read_bytes()
    other = fit(replace(CONFIG, seed=1), tmp_path / "other", dataset)
    assert not torch.equal(load_rule(other).head.weight, load_rule(trained).head.weight)


def test_training_moves_the_rule_and_logs_its_losses(trained: Path) -> None:
    assert load_rule(trained).head.weight.abs().max() > 0  # it starts at zero
    (log,) = trained.parent.glob("log/**/metrics.csv")
    with log.open() as file:
        rows = list(csv.DictReader(file))
    for name in ("train/imitation", "train/meta_loss", "val/log10_final_loss"):
        assert any(row[name] for row in rows), name


def test_a_run_killed_and_resumed_ends_with_the_same_weights(
    trained: Path, dataset: PathDataset, tmp_path: Path
) -> None:
    process = start(tmp_path, dataset)
    checkpoint = wait_for_checkpoint(process, tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < torch.load(checkpoint, weights_only=True)["global_step"] < CONFIG.updates
    assert not (tmp_path / "weights.safetensors").exists()
    output = finish(start(tmp_path, dataset))
    assert output.splitlines()[-1] == "False"  # the csv logger does not import wandb
    assert (tmp_path / "weights.safetensors").read_bytes() == trained.read_bytes()
    assert [p.name for p in checkpoint.parent.iterdir()] == ["last.ckpt"]


def test_two_processes_train_one_rule_on_different_tasks_and_resume(
    trained: Path, dataset: PathDataset, tmp_path: Path
) -> None:
    folder, resumed = tmp_path / "whole", tmp_path / "resumed"
    process = start(folder, dataset, devices=2, strategy="ddp")
    checkpoint = wait_for_checkpoint(process, folder)
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copy(checkpoint, resumed / "checkpoints")
    finish(process)
    ranks = [torch.load(folder / f"rank{i}.pt", weights_only=True) for i in range(2)]
    for key, value in ranks[0]["rule"].items():
        assert torch.equal(value, ranks[1]["rule"][key])
    rule = load_rule(folder / "weights.safetensors")
    assert torch.equal(rule.head.weight, ranks[0]["rule"]["head.weight"])
    assert not torch.equal(rule.head.weight, load_rule(trained).head.weight)
    first, second = ({tuple(k) for k in rank["seen"] if len(k) == 4} for rank in ranks)
    assert first and second and not first & second  # (train, seed, rank, update)

    copied = torch.load(resumed / "checkpoints" / "last.ckpt", weights_only=True)
    assert 0 < copied["global_step"] < CONFIG.updates
    finish(start(resumed, dataset, devices=2, strategy="ddp"))
    weights = [f / "weights.safetensors" for f in (folder, resumed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    with pytest.raises(ConfigError, match="of 2 processes, this run has 1"):
        fit(CONFIG, resumed, dataset)


def test_wandb_logs_offline(dataset: PathDataset, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    output = finish(start(tmp_path, dataset, logger="wandb", updates=5))
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert next(run.glob("*.wandb")).stat().st_size > 0
    assert not (tmp_path / "log").exists() and (tmp_path / "weights.safetensors").exists(), output


def test_without_wandb_the_logger_says_what_to_install() -> None:
    script = """
import sys
sys.modules["wandb"] = None  # what an import finds where it is not installed
from pathlib import Path
from learned_opt.config import TrainConfig
from learned_opt.training.fit import make_logger
make_logger(TrainConfig(logger="wandb"), Path("."))
"""
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "ConfigError: logger is 'wandb', which is not installed; pip install" in found.stderr


def test_items_are_keyed_by_update_and_rank(dataset: PathDataset) -> None:
    first, again = (Updates(CONFIG, dataset, 0, rank=0) for _ in range(2))
    later = Updates(CONFIG, dataset, CONFIG.epoch_length, rank=0)
    n, cycle = CONFIG.epoch_length, CONFIG.objectives
    assert [first[i]["objective"] for i in range(n)] == [cycle[i % len(cycle)] for i in range(n)]
    assert [later[i]["number"] for i in range(n)] == list(range(n, 2 * n))
    assert torch.equal(first[0]["points"], again[0]["points"])
    shards = [
        [Updates(CONFIG, dataset, len(cycle) * i, rank)[0]["shard"] for i in range(12)]
        for rank in (0, 1)
    ]
    assert shards[0] != shards[1] and set(shards[0]) == {0, 1}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"objectives": ("magic",)}, "magic"),
        ({"updates": 7, "epoch_length": 5}, "multiple of epoch_length"),
        ({"logger": "mlflow"}, "mlflow"),
        ({"horizon": (9, 3)}, "horizon"),
    ],
)
def test_a_bad_config_is_refused_by_name(wrong: dict, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        TrainConfig(**wrong)
