"""Do rules trained on digits work elsewhere?

Trains the arms below and runs them untuned on the validation tasks. The arms are the recipe of the
first generation of weights, its first stage, and L2L's rule with the same number of inner steps.
ablation.py compares what each objective contributes. Tuned baselines on the same tasks come from
`learned-opt benchmark --config configs/benchmark/validation.yaml`.

    python -m experiments.training.generalization train --arm shipped --seed 0
    python -m experiments.training.generalization evaluate --arm shipped --seed 0
    python -m experiments.training.generalization long
    python -m experiments.training.generalization long_adam

`train` stores weights under --work, with the data set that all arms share. `evaluate` writes
results/generalization/<arm>-<seed>.csv, with a row for each task and run. `long` runs the shipped
weights for 10,000 steps, and `long_adam` runs Adam. experiments/pages/readme.py makes the table and
the figure of them.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser

from experiments.result_files import RESULTS, ROOT, read, save
from learned_opt.benchmarking import BenchmarkConfig
from learned_opt.config import TeacherConfig, TrainConfig
from learned_opt.rules import UpdateRule, make_rule
from learned_opt.tasks.data import load_images
from learned_opt.tasks.mlp import MLPTask
from learned_opt.training.objectives.torch_imitation import Teacher
from learned_opt.training.stages import first_stage
from learned_opt.training.stages import train as fit
from learned_opt.weights import digest, load_rule

FOLDER = RESULTS / "generalization"

FLOOR = 1e-3  # added to losses before their rise is computed, because a rise below it means nothing
EVERY = 100  # steps between losses on all training data, and in each mean of minibatch losses
LONG_RUNS, LONG = 3, [1000, 5000, 10000]
SHARES = (1, 0.3, 0.1)  # Adam's rates in long runs, as shares of the best rate in short runs
RUNS = 5  # parallel runs of every task, with different initial points and minibatches
SCALES = (0.2, 0.35, 0.6, 1.0, 1.7)  # factors of the untrained rule's step


@dataclass(frozen=True)
class Arm:
    """The changes of an arm to a config of configs/train/."""

    text: str
    config: str = "mlps"
    objectives: tuple[str, ...] = ()
    rule: str = "geodesic_rnn"
    family: dict = field(default_factory=dict)
    updates: int | None = None  # None for as many inner steps as in the config
    first: bool = True  # with the config's first stage, if it has one


# For rules whose step costs about ten times more: fewer tasks at a time, and no inputs of 3,072.
SMALL = {"num_tasks": 2, "input_sizes": (16, 64, 256, 784)}
ARMS = {
    "shipped": Arm("the recipe of the first generation", "first_generation"),
    "second": Arm("its second stage by itself", "first_generation", updates=900, first=False),
    "mlps": Arm("geodesic_rnn, imitation and meta-loss, MLPs"),
    "l2l": Arm(
        "coordinatewise_lstm, meta-loss (L2L), MLPs",
        objectives=("meta_loss",),
        rule="coordinatewise_lstm",
        family=SMALL,
    ),
}
UNTRAINED = {
    "initial": "geodesic_rnn, untrained",
    "scaled": "geodesic_rnn, untrained, step tuned on these tasks",
}


def parse(config_class: type, path: str):
    parser = ArgumentParser()
    parser.add_class_arguments(config_class, "config")
    values = yaml.safe_load((ROOT / path).read_text())
    return parser.instantiate(parser.parse_object({"config": values})).config


class Adam:
    """torch.optim.Adam with the interface of rules."""

    def __init__(self, lr: float) -> None:
        self.config = TeacherConfig("Adam", lr)

    def init_state(self, theta: torch.Tensor, shapes: object) -> Teacher:
        return Teacher(self.config, theta)

    def update(self, grad, theta, state, in_place=False):
        return state.step(theta, grad) - theta, state


def tuned_rates() -> dict[tuple[str, int], float]:
    """Returns a dict from (task, steps) to the learning rate of the tuned Adam."""
    chosen = {
        row["task"]: float(row["lr"])
        for row in read(RESULTS / "validation" / "tuning.csv")
        if row["entrant"] == "Adam (tuned)" and row["chosen"] == "True"
    }
    names = (label.rsplit(" ", 1) for label in chosen)
    return {(task, int(steps)): chosen[f"{task} {steps}"] for task, steps in names}


def inner_steps(config: TrainConfig) -> int:
    """Returns the number of inner steps of all updates, including the first stage."""
    targets, window = config.geodesics.targets, config.window
    cost = {
        "imitation": targets.updates * targets.pairs_per_run,
        "torch_imitation": config.teacher.length,
        "meta_loss": window,
        "pes": 2 * config.pes.pairs * window,
        "step_size": 2 * window,
    }
    cycle = len(config.objectives)
    before = inner_steps(first_stage(config)) if config.first else 0
    return before + sum(cost[config.objectives[i % cycle]] for i in range(config.updates))


def arm_config(name: str, seed: int, dataset: Path) -> TrainConfig:
    arm = ARMS[name]
    config = parse(TrainConfig, f"configs/train/{arm.config}.yaml")
    config = replace(config, seed=seed, dataset=str(dataset))
    changed = replace(
        config,
        objectives=arm.objectives or config.objectives,
        family=replace(config.family or config.geodesics.family, **arm.family),
        first=config.first if arm.first else None,
        rule=arm.rule,
        rule_config=config.rule_config if arm.rule == config.rule else {},
    )
    updates = arm.updates or config.updates * inner_steps(config) / inner_steps(changed)
    return replace(changed, updates=math.ceil(updates / config.epoch_length) * config.epoch_length)


def train(name: str, seed: int, work: Path) -> None:
    fit(arm_config(name, seed, work / "geodesics"), work / f"{name}-{seed}")


def rollout(
    task: MLPTask, rule: UpdateRule, marks: list[int], scale: float = 1.0
) -> tuple[list[dict], np.ndarray]:
    """Runs a rule up to the last of `marks`.

    Returns a row for each run and each number of steps in `marks`, and the minibatch losses, (runs,
    steps). `largest_rise` is of the loss on all training data. Means of minibatch losses rise even
    if nothing moves, because a small loss comes from a few hard examples.
    """
    theta = task.init(0)
    state = rule.init_state(theta, task.shapes)
    losses, whole, rows = [], [], []
    for step in range(1, max(marks) + 1):
        loss, grad = task.loss_and_grad(theta, task.batch(0, step))
        losses.append(loss)
        update, state = rule.update(grad, theta, state, in_place=True)
        theta = theta + scale * update
        if step % EVERY == 0 or step in marks:
            found = task.evaluate(theta)
            whole.append(found["train_loss"])
        if step in marks:
            curve, window = torch.stack(losses), min(EVERY, step)
            mean, smooth = curve.mean(0), curve.unfold(0, window, window).mean(-1)
            rise, rise_smooth = largest_rise(torch.stack(whole)), largest_rise(smooth)
            for run in range(len(theta)):
                rows.append({
                    "steps": step,
                    "run": run,
                    "final_train_loss": float(found["train_loss"][run]),
                    "mean_loss": float(mean[run]),
                    "test_accuracy": float(found["test_accuracy"][run]),
                    "largest_rise": float(rise[run]),
                    "largest_rise_minibatches": float(rise_smooth[run]),
                })  # fmt: skip
    return rows, torch.stack(losses, 1).double().numpy()


def largest_rise(losses: torch.Tensor) -> torch.Tensor:
    """Returns the largest factor by which losses (times, runs) rise above their running minimum."""
    losses = losses + FLOOR
    return (losses / losses.cummin(0).values).max(0).values


def validation_tasks(runs: int = RUNS) -> dict[str, tuple[MLPTask, list[int]]]:
    """Returns the tasks of configs/benchmark/validation.yaml, `runs` at once, and their steps."""
    config = parse(BenchmarkConfig, "configs/benchmark/validation.yaml")
    marks = defaultdict(list)
    tasks = {}
    for entry in config.tasks:
        label = entry.label.rsplit(" ", 1)[0]
        marks[label].append(entry.steps)
        tasks[label] = MLPTask(entry.task, load_images(entry.task.data), runs)
    return {label: (task, marks[label]) for label, task in tasks.items()}


def evaluate(name: str, seed: int, work: Path) -> None:
    if name == "initial":
        return save(FOLDER, "initial-0", measure(untrained()))
    if name == "scaled":
        rows, choice = tuned_step()
        return save(FOLDER, "scaled-0", rows, **choice)
    rule = load_rule(work / f"{name}-{seed}" / "weights.safetensors")
    # On the larger networks they cost too much, so there is only a single short run there.
    large = {("mnist relu", 1000), ("cifar10 relu", 200), ("cifar10 relu", 1000)}
    rows = measure(rule, skip=large if name in ("l2l", "full") else set())
    facts = {
        "inner_steps": inner_steps(arm_config(name, seed, work)),
        "weights": digest(rule.name, rule.config, rule.state_dict()),
    }
    return save(FOLDER, f"{name}-{seed}", rows, **facts)


def untrained(**changes: object) -> UpdateRule:
    """Returns the rule of the arms with its initial weights and with `changes` of its config."""
    config = parse(TrainConfig, "configs/train/mlps.yaml")
    return make_rule(config.rule, **config.rule_config | changes)


def tuned_step() -> tuple[list[dict], dict]:
    """Returns the rows of the untrained rule with the best of SCALES by mean loss, and facts."""
    tried = {s: measure(untrained(), s) for s in SCALES}
    score = {s: np.mean([np.log(r["mean_loss"]) for r in rows]) for s, rows in tried.items()}
    best = min(score, key=score.get)
    return tried[best], {"scale": best, "mean_log_mean_loss": score}


def measure(rule: UpdateRule, scale: float = 1.0, skip: Collection = ()) -> list[dict]:
    rows = []
    for label, (task, marks) in validation_tasks().items():
        kept = [m for m in marks if (label, m) not in skip]
        if kept:
            rows += [{"task": label} | row for row in rollout(task, rule, kept, scale)[0]]
    return rows


def long(weights: Path | None) -> None:
    rule, rows = load_rule(weights), []
    for label, (task, _) in validation_tasks(LONG_RUNS).items():
        rows += [{"task": label} | row for row in rollout(task, rule, LONG)[0]]
        save(FOLDER, "long", rows, weights=digest(rule.name, rule.config, rule.state_dict()))


def long_adam() -> None:
    tuned, rows = tuned_rates(), []
    for label, (task, marks) in validation_tasks(LONG_RUNS).items():
        for lr in (share * tuned[label, max(marks)] for share in SHARES):
            rows += [{"task": label, "lr": lr} | row for row in rollout(task, Adam(lr), LONG)[0]]
        save(FOLDER, "long_adam", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["train", "evaluate", "long", "long_adam"])
    parser.add_argument("--arm", choices=[*ARMS, *UNTRAINED], default="shipped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "generalization")
    parser.add_argument("--weights", type=Path, help="for `long`; by default the shipped ones")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command in ("train", "evaluate"):
        {"train": train, "evaluate": evaluate}[args.command](args.arm, args.seed, args.work)
    elif args.command == "long":
        long(args.weights)
    else:
        long_adam()


if __name__ == "__main__":
    main()
