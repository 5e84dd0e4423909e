"""Reproduces experiments of "Learning to learn by gradient descent by gradient descent".

The tasks are random quadratics of 10 dimensions and the MNIST network 784-20-10. The rules have the
presets of the authors' code and of their paper. They are trained on runs of 100 steps and evaluated
up to 200 steps. The other optimizers' learning rates are tuned for the error after 100 steps, on
other draws than those reported.

    python -m experiments.training.l2l  # everything
    python -m experiments.training.l2l train --rule mnist-paper  # one rule; several may run at once

MNIST is read from --data_root or $LEARNED_OPT_DATA. Weights are stored under --work and reused.
This writes l2l.csv, with a row for each draw, and l2l_curves.csv into results/, and docs/l2l.png.
experiments/pages/readme.py makes the table.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.result_files import RESULTS, ROOT, markdown, read, save
from experiments.training.generalization import parse
from learned_opt.benchmarking.tune import half_decades
from learned_opt.config import TrainConfig
from learned_opt.errors import ConfigError
from learned_opt.rules import UpdateRule
from learned_opt.run import MakeOptimizer, run_optimizer, run_rule
from learned_opt.tasks.base import Batch, Task
from learned_opt.tasks.families import sample_tasks
from learned_opt.weights import load_rule

PICTURE = ROOT / "docs" / "l2l.png"
STEPS = (100, 200)  # the numbers of steps in training and in the evaluation
GRID = half_decades(1e-4, 10.0)
OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "RMSprop": torch.optim.RMSprop,
    "SGD": torch.optim.SGD,
    "NAG": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
}
DEFAULT = "Adam 1e-3"


@dataclass(frozen=True)
class Problem:
    """One experiment.

    Attributes:
        title: its name in tables.
        config: its config in configs/train/.
        presets: the presets of the rules trained for it, by the rules' names here.
        runs: the number of runs in a draw; a row of the results is their mean.
        options: the options of the task, if they differ from the config's.
        printed: log10 of the mean error after 100 steps that a user of the authors' code reported
            (google-deepmind/learning-to-learn, issue 31).
    """

    title: str
    config: str
    presets: dict[str, str]
    runs: int
    options: dict = field(default_factory=dict)
    printed: dict[str, float] = field(default_factory=dict)

    def train_config(self, name: str, data_root: str | None = None) -> TrainConfig:
        """Returns the config that trains the rule `name`."""
        config = parse(TrainConfig, f"configs/train/{self.config}.yaml")
        task = config.family.task
        task = replace(task, options=task.options | self.options)
        return replace(
            config,
            rule_config={"preset": self.presets[name]},
            family=replace(config.family, task=task),
            geodesics=replace(config.geodesics, data_root=data_root),
        )


PROBLEMS = {
    "uniform": Problem(
        "quadratic, W and y uniform (code)",
        "l2l_quadratic",
        {"L2L": "quadratic"},
        128,
        {"entries": "uniform"},
        {"L2L": -0.70, DEFAULT: -0.06},
    ),
    "normal": Problem(
        "quadratic, W and y normal (paper)",
        "l2l_quadratic",
        {"L2L": "quadratic"},
        128,
        {"entries": "normal"},
    ),
    "mnist": Problem(
        "MNIST 784-20-10 sigmoid",
        "l2l_mnist",
        {"L2L code": "deepmind-code", "L2L paper": "paper"},
        1,
        printed={"L2L code": 0.18, "Adam": -0.31},
    ),
}
RULES = {
    f"{key}-{preset}": (key, name)
    for key, problem in PROBLEMS.items()
    for name, preset in problem.presets.items()
}


class Together(Task):
    """The tasks of a draw as a single task, whose loss is the sum of theirs.

    They are independent for an optimizer that treats each coordinate by itself.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.name, self.num_tasks = task, task.name, None
        self.shapes = tuple((*task.lead, *shape) for shape in task.shapes)
        self.chance = task.chance

    def init(self, seed: int) -> Tensor:
        return torch.cat([p.flatten() for p in self.task.unflatten(self.task.init(seed))])

    def batch(self, seed: int, step: int) -> Batch:
        return self.task.batch(seed, step)

    def fixed_batch(self, size: int | None = None) -> Batch:
        return self.task.fixed_batch(size)

    def loss(self, theta: Tensor | Sequence[Tensor], batch: Batch) -> Tensor:
        tensors = self.unflatten(theta) if isinstance(theta, Tensor) else theta
        return self.task.loss(tensors, batch).sum()

    def evaluate(self, theta: Tensor) -> dict[str, Tensor]:
        parts = [p.flatten(len(self.task.lead)) for p in self.unflatten(theta)]
        return {k: v.mean() for k, v in self.task.evaluate(torch.cat(parts, -1)).items()}


@dataclass(frozen=True)
class Draw:
    """The mean losses of the runs of one draw.

    They are the minibatch losses before each step, and the errors on all data after each of STEPS.
    """

    losses: np.ndarray
    errors: list[float]


def with_rule(task: Task, rule: UpdateRule, seed: int) -> Draw:
    found = [run_rule(task, rule, seed, steps) for steps in STEPS]
    errors = [float(task.evaluate(theta)["train_loss"].mean()) for _, theta in found]
    return Draw(found[-1][0].mean(-1).numpy(), errors)


def with_optimizer(
    task: Task, make: MakeOptimizer, seed: int, steps: Sequence[int] = STEPS
) -> Draw:
    runs = [run_optimizer(Together(task), make, seed, n) for n in steps]
    errors = [math.inf if r.diverged else r.evaluation["train_loss"] for r in runs]
    return Draw(runs[-1].losses / task.num_tasks, errors)


def draws(config: TrainConfig, purpose: str, count: int, runs: int) -> list[Task]:
    family = replace(config.family, num_tasks=runs)
    return [sample_tasks(family, (purpose, i), config.geodesics.data_root) for i in range(count)]


def tune(tasks: list[Task], optimizer: Callable[..., torch.optim.Optimizer]) -> float:
    """Returns the learning rate with the lowest mean error after as many steps as in training.

    Raises:
        ConfigError: it is the smallest or the largest of GRID.
    """
    scores = {}
    for lr in GRID:
        make = partial(optimizer, lr=lr)
        found = [with_optimizer(task, make, i, STEPS[:1]) for i, task in enumerate(tasks)]
        scores[lr] = float(np.mean([draw.errors[0] for draw in found]))
    best = min(scores, key=scores.get)
    if best in (GRID[0], GRID[-1]):
        raise ConfigError(f"the best rate of GRID is {best}, which is at its edge; widen GRID")
    return best


def train(rule: str, work: Path, data_root: str | None = None) -> None:
    from learned_opt.training.stages import train  # local: Lightning is slow to import

    key, name = RULES[rule]
    train(PROBLEMS[key].train_config(name, data_root), work / rule)


def weights_of(rule: str, work: Path) -> Path:
    return work / rule / "weights.safetensors"


def compare(
    key: str, work: Path, data_root: str | None, count: int
) -> dict[str, tuple[float | None, list[Draw]]]:
    """Returns the learning rates and the draws of every optimizer on a problem."""
    problem = PROBLEMS[key]
    config = problem.train_config(next(iter(problem.presets)), data_root)
    reported = draws(config, "report", count, problem.runs)
    held_out = draws(config, "tune", max(1, count // 2), problem.runs)
    found = {}
    for name, preset in problem.presets.items():
        rule = load_rule(weights_of(f"{key}-{preset}", work))
        found[name] = None, [with_rule(task, rule, i) for i, task in enumerate(reported)]
    settings = {DEFAULT: (torch.optim.Adam, 1e-3)}
    settings |= {
        name: (optimizer, tune(held_out, optimizer)) for name, optimizer in OPTIMIZERS.items()
    }
    for name, (optimizer, lr) in settings.items():
        make = partial(optimizer, lr=lr)
        found[name] = lr, [with_optimizer(task, make, i) for i, task in enumerate(reported)]
    return found


def run(output: Path, work: Path, data_root: str | None = None, count: int = 8) -> None:
    """Writes l2l.csv and l2l_curves.csv for the problems whose rules are trained.

    There are `count` draws to report, and half as many to tune on.
    """
    rows, curves = [], []
    trained = [rule for rule in RULES if weights_of(rule, work).exists()]
    for key in PROBLEMS:
        if not all(rule in trained for rule, (own, _) in RULES.items() if own == key):
            print(f"{key}: its rules are not trained yet")
            continue
        for name, (lr, found) in compare(key, work, data_root, count).items():
            own = {"problem": key, "optimizer": name}
            for i, draw in enumerate(found):
                errors = {f"error_{n}": e for n, e in zip(STEPS, draw.errors, strict=True)}
                rows.append(own | {"lr": lr, "draw": i} | errors)
            mean = np.mean([draw.losses for draw in found], 0)
            curves += [own | {"step": i, "loss": f"{loss:.5g}"} for i, loss in enumerate(mean)]
            print(own, lr, np.mean([draw.errors for draw in found], 0), flush=True)
    training = {
        rule: asdict(PROBLEMS[RULES[rule][0]].train_config(RULES[rule][1])) for rule in trained
    }
    save(output, "l2l", rows, training=training)
    save(output, "l2l_curves", curves)


def table(folder: Path = RESULTS) -> str:
    """Returns a table of log10 of the mean error over draws, by problem and optimizer."""
    groups: dict = defaultdict(list)
    for row in read(folder / "l2l.csv"):
        groups[row["problem"], row["optimizer"], row["lr"]].append(row)
    lines = []
    for (key, name, lr), group in groups.items():
        problem = PROBLEMS[key]
        printed = problem.printed.get(name)
        lines.append({
            "problem": problem.title,
            "optimizer": f"**{name}**" if name in problem.presets else name,
            "learning rate": lr or "–",
            "100 steps": _log10(group, "error_100"),
            "100 steps, printed": "–" if printed is None else f"{printed:+.2f}",
            "200 steps": _log10(group, "error_200"),
        })  # fmt: skip
    return markdown(lines)


def _log10(group: list[dict[str, str]], column: str) -> str:
    """Returns log10 of the mean, ± its standard error to first order."""
    values = np.array([float(row[column]) for row in group])
    error = values.std(ddof=1) / values.mean() / math.log(10) / len(values) ** 0.5
    return f"{np.log10(values.mean()):+.2f} ± {error:.2f}"


def section(folder: Path = RESULTS) -> str:
    """Returns the section of docs/l2l.md with the results."""
    if not (folder / "l2l.csv").exists():
        return "Not run yet: `python -m experiments.training.l2l`."
    return f"{table(folder)}\n\n![Loss against step, rules and tuned optimizers]({PICTURE.name})"


def plot(folder: Path = RESULTS, path: Path = PICTURE) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # The colors of Okabe and Ito, which color-blind people can distinguish.
    colours = {"L2L": "#D55E00", "L2L code": "#D55E00", "L2L paper": "#CC79A7", "Adam": "#0072B2",
               "RMSprop": "#56B4E9", "SGD": "#009E73", "NAG": "#E69F00"}  # fmt: skip
    curves: dict = defaultdict(list)
    for row in read(folder / "l2l_curves.csv"):
        curves[row["problem"], row["optimizer"]].append(float(row["loss"]))
    figure, axes = plt.subplots(
        1, len(PROBLEMS), figsize=(12, 3.6), layout="constrained", squeeze=False
    )
    for axis, (key, problem) in zip(axes[0], PROBLEMS.items(), strict=True):
        for name, colour in colours.items():
            if (key, name) in curves:
                bold = name in problem.presets
                style = {"lw": 2.2, "zorder": 3} if bold else {"lw": 1.1}
                axis.plot(curves[key, name], color=colour, label=name, **style)
        axis.axvline(STEPS[0], color="0.6", lw=0.8, ls=":")
        axis.set(yscale="log", title=problem.title, xlabel="step")
        axis.title.set_fontsize("medium")
        axis.legend(frameon=False, fontsize="small", ncols=2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("loss, mean over runs")
    figure.savefig(path, dpi=130, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "command", nargs="?", choices=["all", "train", "run", "plot"], default="all"
    )
    parser.add_argument("--rule", choices=RULES, help="rule to train; by default all")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "l2l")
    parser.add_argument("--data_root")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command in ("all", "train"):
        for rule in [args.rule] if args.rule else RULES:
            train(rule, args.work, args.data_root)
    if args.command in ("all", "run"):
        run(RESULTS, args.work, args.data_root)
    if args.command != "train":
        plot()


if __name__ == "__main__":
    main()
