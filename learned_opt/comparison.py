"""Compares optimizers on a user's own model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geodesic.files import write_atomic
from learned_opt.errors import ConfigError
from learned_opt.progress import tracked
from learned_opt.tasks.base import seed_of
from learned_opt.tasks.trainee import Parameters, Trainee

DEFAULT = ("learned", "AdamW warm-up cosine")
EVALUATIONS = 20  # the number of equally spaced evaluations in a run
ABOVE_TABLE = (
    "Each row is an optimizer with the best of the settings that were tried, the lowest final loss "
    "on the validation data first. *Steps to match* are the steps in which the loss reaches the "
    "final loss of the optimizer in the heading. The table is from one seed: with another seed, "
    "optimizers that are close may change places."
)
Batch = Any


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`, which prints as a table.

    Attributes:
        rows: a dict for each optimizer, sorted by final validation loss. The keys are `optimizer`,
            `setting` (the tuned values), `final_loss` and `lowest_loss` (on the validation data),
            `steps_to_match` (the number of steps to the baseline's final loss) and `ms_per_step`.
            The final loss is ∞ if the run diverged, and `steps_to_match` is ∞ if the run did not
            reach that loss.
        curves: for each optimizer, the steps and validation losses, (evaluations, 2), of its best
            run.
        baseline: the last of the optimizers that were compared.
    """

    rows: list[dict[str, Any]]
    curves: dict[str, np.ndarray]
    baseline: str

    def table(self) -> Any:
        """Returns the rows as a `learned_opt.benchmarking.summary.Table`."""
        from learned_opt.benchmarking.summary import Entry, Table, number

        headings = ["optimizer", "setting", "final validation loss", "lowest",
                    f"steps to match {self.baseline}", "ms a step"]  # fmt: skip
        lowest = self.rows[0]["final_loss"]
        lines = []
        for row in self.rows:
            setting = ", ".join(f"{k} {number(v)}" for k, v in row["setting"].items()) or "–"
            numbers = [
                row[k] for k in ("final_loss", "lowest_loss", "steps_to_match", "ms_per_step")
            ]
            entries = [Entry(f"{x:.4g}" if math.isfinite(x) else "–", x) for x in numbers]
            entries[0] = entries[0]._replace(best=row["final_loss"] == lowest)
            lines.append([Entry(t, t) for t in (row["optimizer"], setting)] + entries)
        return Table(headings, lines)

    def __str__(self) -> str:
        from learned_opt.benchmarking.summary import markdown

        return markdown(self.table())

    def save(self, folder: str | Path) -> Path:
        """Writes results.csv, curves.csv and report.html, and returns the report's path.

        Args:
            folder: the folder for the files; created if it does not exist.

        Raises:
            OutputError: `folder` has a report already.
        """
        from learned_opt.benchmarking.curves import evaluation_curves
        from learned_opt.benchmarking.html import (
            Section,
            curves_section,
            document,
            figure,
            html_table,
        )
        from learned_opt.benchmarking.tables import to_csv
        from learned_opt.benchmarking.verdict import counted
        from learned_opt.errors import OutputError

        folder = Path(folder).expanduser()
        if (folder / "report.html").exists():
            raise OutputError(f"folder={str(folder)!r} has a report already; use another folder")
        folder.mkdir(parents=True, exist_ok=True)
        points = [
            {"optimizer": name, "step": int(step), "validation_loss": loss}
            for name, curve in self.curves.items()
            for step, loss in curve
        ]
        curves = {row["optimizer"]: [self.curves[row["optimizer"]]] for row in self.rows}
        target = next(r["final_loss"] for r in self.rows if r["optimizer"] == self.baseline)
        svg = evaluation_curves(curves, "Validation loss", target=target)
        more = f"The dotted line is the final loss of {self.baseline}."
        sections = [
            Section("summary", "Summary", ABOVE_TABLE, html_table(self.table(), sortable=True)),
            curves_section("Validation loss", list(curves), [figure(svg, "Your model")], more),
        ]
        size = f"{counted(len(self.rows), 'optimizer')}, {counted(self._steps, 'step')}, 1 seed"
        page = document("Optimizers on your model", self.sentence(), size, sections)
        write_atomic(folder / "results.csv", to_csv(self.rows))
        write_atomic(folder / "curves.csv", to_csv(points))
        write_atomic(folder / "report.html", page.encode())
        return folder / "report.html"

    def sentence(self) -> str:
        """Returns a sentence that says which optimizer ended lowest, by how much, and which ones
        diverged."""
        ended = [row for row in self.rows if math.isfinite(row["final_loss"])]
        if not ended:
            return "Every run diverged."
        first, *others = ended
        text = f"{first['optimizer']} ended at a validation loss of {first['final_loss']:.4g}"
        if others:
            text = (
                f"{first['optimizer']} ended lowest, at a validation loss of "
                f"{first['final_loss']:.4g}; {others[0]['optimizer']} ended at "
                f"{others[0]['final_loss']:.4g}"
            )
        if first["optimizer"] != self.baseline and math.isfinite(first["steps_to_match"]):
            text += (
                f". {first['optimizer']} was down to the final loss of {self.baseline} after "
                f"{first['steps_to_match']:.0f} of {self._steps} steps"
            )
        diverged = [row["optimizer"] for row in self.rows if row not in ended]
        return f"{text}." + (f" Diverged: {', '.join(diverged)}." if diverged else "")

    @property
    def _steps(self) -> int:
        """The steps of the longest run; a run that diverged has fewer."""
        return int(max(curve[-1, 0] for curve in self.curves.values()))


def compare(
    make_model: Callable[[], nn.Module],
    loss: Callable[[nn.Module, Batch], Tensor],
    train_loader: Iterable[Batch],
    validation_loader: Iterable[Batch],
    steps: int,
    optimizers: Sequence[Any] = DEFAULT,
    tuning_runs: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Trains a model with several optimizers and compares their validation losses.

    All runs start from the same initial weights and see the same minibatches if `make_model` and
    `train_loader` draw from torch's global random numbers, as a DataLoader with shuffle=True does.
    An optimizer with a learning rate to tune is run `tuning_runs` times, and the rate with the
    lowest final validation loss is reported. This selection makes the result of a tuned optimizer
    look slightly better than it is; the result of an optimizer with nothing to tune has no such
    bias.

    Args:
        make_model: returns the model with fresh weights, on the device of training.
        loss: returns the mean loss, a scalar, of the model and a batch.
        train_loader: the training batches, which are repeated as often as needed.
        validation_loader: the batches of evaluations, in evaluation mode and without gradients.
        steps: the number of steps of each run.
        optimizers: names of optimizers (docs/benchmarks.md) or `Entrant`s. The last one is the
            baseline, to which the speed of the others is relative.
        tuning_runs: the number of learning rates to try. They are half decades around the middle of
            the range that the benchmark searches for this optimizer.
        seed: the seed of initial weights, minibatches and dropout.
        progress: prints the number of steps in all, and then shows a progress bar.

    Raises:
        ConfigError: an optimizer is unknown, its package is missing, or a number is below 1.
    """
    from learned_opt.benchmarking.entrants import named
    from learned_opt.run import run_optimizer

    if steps < 1 or tuning_runs < 1 or not optimizers:
        raise ConfigError(
            f"steps={steps} and tuning_runs={tuning_runs} must be at least 1, and "
            f"optimizers={list(optimizers)} must not be empty"
        )
    entrants = [named(e) if isinstance(e, str) else e for e in optimizers]
    for entrant in entrants:
        entrant.check()
    plan = [(entrant, chosen) for entrant in entrants for chosen in _settings(entrant, tuning_runs)]
    if progress:
        print(f"{len(plan)} runs of {steps} steps, {len(plan) * steps} in all")
    task = _Own(make_model, loss, train_loader, validation_loader)
    points = sorted({*np.linspace(0, steps, EVALUATIONS + 1).round().astype(int).tolist()})
    best: dict[str, tuple[float, dict[str, Any], Any]] = {}
    with torch.random.fork_rng():  # so that the caller's random numbers do not change
        for entrant, chosen in tracked(plan, "compare", "runs", shown=progress):
            run = run_optimizer(
                task,
                partial(entrant.make_optimizer, chosen=chosen, steps=steps),
                seed,
                steps,
                points,
            )
            final = math.inf if run.diverged else run.evaluation["validation_loss"]
            if entrant.name not in best or final < best[entrant.name][0]:
                best[entrant.name] = final, chosen, run
    baseline = entrants[-1].name
    goal = best[baseline][0]
    rows = []
    for name, (final, chosen, run) in best.items():
        reached = run.validation[run.validation[:, 1] <= goal, 0]
        rows.append({
            "optimizer": name,
            "setting": chosen,
            "final_loss": final,
            "lowest_loss": float(np.nanmin(run.validation[:, 1])),
            "steps_to_match": float(reached[0]) if len(reached) and final < math.inf else math.inf,
            "ms_per_step": 1e3 * run.seconds / steps,
        })  # fmt: skip
    rows.sort(key=lambda row: row["final_loss"])
    return Comparison(rows, {name: run.validation for name, (*_, run) in best.items()}, baseline)


def _settings(entrant: Any, count: int) -> list[dict[str, Any]]:
    """Returns `count` settings from the middle of the grid of tuned values."""
    from learned_opt.benchmarking.tune import grid_of

    if not entrant.search:
        return [{}]
    grid = grid_of(entrant)
    count = min(count, len(grid))
    first = (len(grid) - count) // 2
    return [dict(setting) for setting in grid[first : first + count]]


class _Own:
    """A task made of a user's model and data."""

    def __init__(
        self, make_model: Callable, loss: Callable, train: Iterable, validation: Iterable
    ) -> None:
        self._make, self._loss, self._train, self._validation = make_model, loss, train, validation

    def trainee(self, seed: int) -> Trainee:
        torch.manual_seed(seed_of("init", seed))
        model = self._make()
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"make_model returned a {type(model).__name__}; make it return a torch.nn.Module"
            )
        batches = self._batches(seed)
        model.train()

        def loss(step: int) -> Tensor:
            batch = next(batches)
            torch.manual_seed(seed_of("noise", seed, step))  # for dropout
            return self._loss(model, batch)

        @torch.no_grad()
        def validate(_: bool = False) -> float:
            model.eval()
            total = count = 0.0
            for batch in self._validation:
                size = _size(batch)
                total, count = total + size * float(self._loss(model, batch)), count + size
            model.train()
            if not count:
                raise ConfigError(
                    "validation_loader has no batch; use a list or a DataLoader, not a generator, "
                    "which can be iterated over only once"
                )
            return total / count

        trainee = Trainee(Parameters.of(model), loss, lambda _: {}, validate)
        return replace(trainee, evaluate=lambda averages: {"validation_loss": validate(averages)})

    def _batches(self, seed: int) -> Iterator[Batch]:
        epoch = 0
        while True:
            torch.manual_seed(seed_of("epoch", seed, epoch))
            empty = True
            for batch in self._train:
                empty = False
                yield batch
            if empty:
                raise ConfigError(
                    "train_loader has no batch; use a list or a DataLoader, not a generator, which "
                    "can be iterated over only once"
                )
            epoch += 1


def _size(batch: Batch) -> int:
    """Returns the number of examples in a batch, which is the first size of its first tensor."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    values = batch.values() if hasattr(batch, "values") else batch
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        return 1
    return next((_size(v) for v in values if isinstance(v, (Tensor, Sequence, dict))), 1)
