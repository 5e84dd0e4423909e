"""Callbacks of meta-training: its speed, the selection of the best weights, and plots of runs."""

from __future__ import annotations

import math
import time
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from geodesic.files import write_atomic
from learned_opt.config import TeacherConfig, TrainConfig
from learned_opt.progress import Progress
from learned_opt.run import run_rule
from learned_opt.tasks.base import Task, seed_of
from learned_opt.training.objectives.torch_imitation import Teacher

if TYPE_CHECKING:
    from learned_opt.training.module import MetaTraining

LONG = 10  # the longest test in units of the longest training run; stability then mostly persists
ADAM_GRID = (1e-3, 1e-1)  # the range of learning rates of Adam in the plots, in half-decades


class Speed(L.Callback):
    """Logs the inner steps per second in the epoch so far, summed over all processes.

    An inner step is one update of one task; each particle of PES counts separately.
    """

    def on_train_epoch_start(self, trainer: L.Trainer, module: MetaTraining) -> None:
        self.start, module.inner_steps = time.perf_counter(), 0

    def on_train_batch_end(self, trainer: L.Trainer, module: MetaTraining, *_: object) -> None:
        rate = module.inner_steps / (time.perf_counter() - self.start)
        module.log(
            "train/inner_steps/s",
            float(rate),
            prog_bar=True,
            batch_size=1,
            sync_dist=True,
            reduce_fx="sum",
        )


class Waiting(L.Callback):
    """Shows how many updates are done where Lightning's bar cannot be shown."""

    def on_train_start(self, trainer: L.Trainer, module: MetaTraining) -> None:
        self.progress = Progress(
            "train",
            "updates",
            module.config.updates,
            done=trainer.global_step,
            shown=trainer.is_global_zero,
        )

    def on_train_batch_end(self, *_: object) -> None:
        self.progress.add()

    def on_train_end(self, *_: object) -> None:
        self.progress.close()

    def on_exception(self, *_: object) -> None:
        if hasattr(self, "progress"):
            self.progress.close()


class Selection(L.Callback):
    """Keeps the weights with the lowest score, tested every `selection_interval` epochs and last.

        score = ½ mean log10(F(θ_H) + ε) + ½ mean' log10(F(θ_10H) + ε)

    F is the loss on all training data, H the length of the longest training run, and ε the
    loss_floor of the config. The first mean is over the tasks of all validation draws. The second
    is over the tasks of the draw with the fewest parameters, run for ten times as long. A run that
    diverged counts as F = 10^6.

    Every process computes the same score, so none has to wait. The state is part of each
    checkpoint, so a resumed run selects the same weights as an uninterrupted one.

    Attributes:
        score: the lowest score.
        update: the number of meta-updates at which it was found.
        weights: the weights of the rule at that time.
        losses: the minibatch losses (steps, tasks) of the last candidate in the longest run of each
            draw.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.score, self.update = config, math.inf, 0
        self.weights: dict[str, Tensor] = {}
        self.losses: dict[int, Tensor] = {}

    # This hook runs before the module's, so the weights are those that were validated, even if a
    # curriculum then continues from others.
    def on_validation_epoch_end(self, trainer: L.Trainer, module: MetaTraining) -> None:
        epoch, last = trainer.current_epoch + 1, trainer.max_epochs
        if epoch % self.config.selection_interval and epoch != last:
            return
        horizon = self.config.longest_run
        tasks = {i: module.validation_tasks(i) for i in range(self.config.validation_draws)}
        cheapest = min(tasks, key=lambda draw: tasks[draw].dim)
        ends = []
        for draw, task in tasks.items():
            self.losses[draw], theta = run_rule(task, module.rule, *validation_run(draw, horizon))
            ends.append(log10_loss(task, theta, self.config.loss_floor))
        self.losses[cheapest], theta = run_rule(
            tasks[cheapest], module.rule, *validation_run(cheapest, LONG * horizon)
        )
        far = float(log10_loss(tasks[cheapest], theta, self.config.loss_floor))
        end = float(torch.stack(ends).mean())
        score = (end + far) / 2
        for name, value in (("score", score), ("log10_loss", end), ("log10_loss_10x", far)):
            module.log(f"select/{name}", value, batch_size=1, rank_zero_only=True)
        if score < self.score:
            self.score, self.update = score, trainer.global_step
            self.weights = {k: v.cpu().clone() for k, v in module.rule.state_dict().items()}

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("score", "update", "weights")}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def validation_run(draw: int, steps: int) -> tuple[int, int]:
    """Returns the seed and the length of a validation run."""
    return seed_of("validation", draw), steps


def log10_loss(task: Task, theta: Tensor, floor: float) -> Tensor:
    """Returns the mean over tasks of log10(F + floor); F is on all training data, at most 10^6."""
    loss = task.evaluate(theta)["train_loss"].nan_to_num(nan=1e6, posinf=1e6)
    return (loss.clamp(0, 1e6) + floor).log10().mean()


class Pictures(L.Callback):
    """Plots the runs of each candidate of `selection` with those of Adam, and logs the plot.

    There is one panel for each draw, up to the end of its longest run. Adam's learning rate is the
    best one of a half-decade grid after H steps, with other initial parameters and minibatches of
    the same tasks. Plots are saved in `curves/` next to the CSV log, or sent to wandb.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection, self.adam = selection, {}

    def on_validation_end(self, trainer: L.Trainer, module: MetaTraining) -> None:
        losses, self.selection.losses = self.selection.losses, {}
        if not losses or not trainer.is_global_zero:
            return
        for draw in losses.keys() - self.adam.keys():
            self.adam[draw] = tuned_adam(module, draw, len(losses[draw]))
        name = f"update-{trainer.global_step}"
        picture = draw_runs(losses, self.adam, self.selection.config.longest_run)
        if isinstance(trainer.logger, CSVLogger):
            folder = Path(trainer.logger.log_dir) / "curves"
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / f"{name}.png", picture)
        else:
            from PIL import Image  # matplotlib depends on it

            image = Image.open(BytesIO(picture))
            trainer.logger.log_image("select/curves", [image], caption=[name])


def tuned_adam(module: MetaTraining, draw: int, steps: int) -> tuple[float, Tensor]:
    """Returns Adam's learning rate, and its minibatch losses (steps, tasks) on the rule's runs."""
    from learned_opt.benchmarking.tune import half_decades

    task, config = module.validation_tasks(draw), module.config

    def run(lr: float, seed: int, steps: int) -> tuple[Tensor, Tensor]:
        theta, losses = task.init(seed), []
        adam = Teacher(TeacherConfig("Adam", lr), theta)
        for step in range(steps):
            loss, grad = task.loss_and_grad(theta, task.batch(seed, step))
            theta = adam.step(theta, grad)
            losses.append(loss)
        return torch.stack(losses), theta

    def score(lr: float) -> float:
        _, theta = run(lr, seed_of("adam", draw), config.longest_run)
        return float(log10_loss(task, theta, config.loss_floor))

    lr = min(half_decades(*ADAM_GRID), key=score)
    return lr, run(lr, *validation_run(draw, steps))[0]


def draw_runs(
    rule: dict[int, Tensor], adam: dict[int, tuple[float, Tensor]], horizon: int
) -> bytes:
    """Returns a PNG of losses (steps, tasks) by draw, with the training horizon; see `Pictures`."""
    from matplotlib.figure import Figure

    from learned_opt.benchmarking.curves import draw_losses

    width = 5 * len(rule)
    figure = Figure(figsize=(width, 3.3))
    # Margins are set in inches, because matplotlib's automatic layouts draw everything twice.
    figure.subplots_adjust(0.7 / width, 0.15, 1 - 0.1 / width, 0.9, wspace=0.2)
    for axes, draw in zip(figure.subplots(1, len(rule), squeeze=False)[0], rule, strict=True):
        lr, baseline = adam[draw]
        runs = {"learned": rule[draw], f"Adam, lr {lr:.3g}": baseline}
        draw_losses(axes, {name: losses.T.cpu().numpy() for name, losses in runs.items()})
        axes.grid(alpha=0.2)
        axes.legend(frameon=False, fontsize=8)
        axes.axvline(horizon, color="0.5", lw=0.8, ls=":")
        axes.set_title(f"validation draw {draw}, {len(rule[draw].T)} tasks", fontsize=9)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
