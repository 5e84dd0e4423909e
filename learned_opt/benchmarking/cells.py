"""A cell is one run: one entrant on one task with one setting and seed; one file each.

A cell's file is written whole and named by a hash of all that determines the run (the weights'
content included), so a benchmark that was interrupted goes on where it was, and a cell of another
setting is never taken for this one. A cell that failed is recorded, and tried again next time.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import traceback
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geodesic.files import write_atomic
from learned_opt.benchmarking.config import BenchmarkTask
from learned_opt.benchmarking.entrants import Entrant
from learned_opt.benchmarking.together import Together
from learned_opt.outputs import provenance
from learned_opt.run import run_optimizer
from learned_opt.tasks.data import DAMAGED
from learned_opt.tasks.kinds import Draw, make_task
from learned_opt.tasks.trainee import Parameters

Record = dict[str, Any]
FORMAT = 2  # of an output folder: 1 knew learning rates only, and no memory


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        chosen: what tuning has set, by name of the argument; empty where the entrant is not tuned.
    """

    task: BenchmarkTask
    entrant: Entrant
    chosen: dict[str, Any]
    seed: int
    data_root: str | None = None
    threads: int = 1
    device: str = "cpu"

    @cached_property
    def name(self) -> str:
        """Of its file: for people, then a hash for the program."""
        identity = {
            "task": asdict(self.task.task),
            "steps": self.task.steps,
            "optimizer": self.entrant.optimizer,
            "kwargs": self.entrant.kwargs,
            "schedule": self.entrant.schedule,
            "warmup": self.entrant.warmup,
            "groups": [asdict(group) for group in self.entrant.groups],
            "weights": self.entrant.weights_hash,
            "chosen": self.chosen,
            "seed": self.seed,
        } | self._more_identity()
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=repr).encode())
        chosen = [f"{key}-{_short(value)}" for key, value in self.chosen.items()] or ["untuned"]
        parts = [self.task.label, self.entrant.name, *chosen, f"seed-{self.seed}"]
        return re.sub(r"[^\w.+-]+", "-", "_".join(parts))[:160] + "_" + digest.hexdigest()[:12]

    def _more_identity(self) -> dict[str, Any]:
        """What else determines a run of a subclass."""
        return {}

    def run(self) -> Record:
        """Trains; a record, see `blank`."""
        task = make_task(self.task.task, self.data_root, Draw(device=self.device))
        steps = self.task.steps

        def make(params: Parameters) -> Together:
            return self.entrant.make_optimizer(params, self.chosen, steps)

        run = run_optimizer(task, make, self.seed, steps)
        losses, ending = np.asarray(run.losses, dtype=np.float32), run.evaluation
        facts = {"seconds": run.seconds, "peak_memory": run.peak_memory, "losses": losses}
        if run.diverged:
            return self.blank(**facts, diverged=True)
        return self.blank(
            **facts,
            final_train_loss=ending["train_loss"],
            mean_loss=float(losses.mean()),
            best_loss=float(losses.min()),
            test_loss=ending["test_loss"],
            test_accuracy=ending["test_accuracy"],
        )

    def blank(self, **facts: Any) -> Record:
        """The record of a run that came to nothing, but for `facts`.

        Infinite are `final_train_loss`, `mean_loss`, `best_loss` and `test_loss`, NaN
        `test_accuracy`, `seconds` and `peak_memory` (bytes); `diverged` is false, `error` (a
        traceback) None, `losses` (steps,) empty; and `environment`, of this process.
        """
        losses = ("final_train_loss", "mean_loss", "best_loss", "test_loss")
        return {
            "format": FORMAT,
            "task": self.task.label,
            "entrant": self.entrant.name,
            "seed": self.seed,
            "hyperparameters": self.chosen,
            **dict.fromkeys(losses, math.inf),
            **dict.fromkeys(("test_accuracy", "seconds", "peak_memory"), math.nan),
            "diverged": False,
            "error": None,
            "environment": provenance(),
            "losses": np.zeros(0, np.float32),
        } | facts


@dataclass(frozen=True)
class Job:
    """What a worker process does for a cell: runs it, and leaves its file in `folder`, if any."""

    cell: Cell
    folder: Path | None = field(repr=False)

    def __call__(self) -> Record:
        torch.set_num_threads(self.cell.threads)
        try:
            record = self.cell.run()
        except BaseException:  # whatever an entrant does is a result; the others go on
            record = self.cell.blank(error=without_folders(traceback.format_exc()))
        return record if self.folder is None else save(self.cell, record, self.folder)


def save(cell: Cell, record: Record, folder: Path) -> Record:
    facts = {key: value for key, value in record.items() if key != "losses"}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, losses=record["losses"], record=json.dumps(facts, default=repr))
    write_atomic(folder / f"{cell.name}.npz", buffer.getvalue())
    return record


def load(cell: Cell, folder: Path) -> Record | None:
    """What an earlier run left of `cell`; None if it is to be run."""
    record = read(folder / f"{cell.name}.npz")
    return record if whole(record, cell) and record["error"] is None else None


def read(path: Path) -> Record | None:
    """The record in a cell's file; None if it is absent or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return json.loads(str(file["record"])) | {"losses": file["losses"]}
    except DAMAGED:
        return None


def whole(record: Any, cell: Cell) -> bool:
    """Whether `record` has all that one of `cell` has, of the same types."""
    return isinstance(record, dict) and all(
        key in record and _alike(record[key], value) for key, value in cell.blank().items()
    )


def _alike(found: Any, usual: Any) -> bool:
    if usual is None or isinstance(usual, str):  # the error and the commit are the one or the other
        return found is None or isinstance(found, str)
    if isinstance(usual, (int, float)) and not isinstance(usual, bool):
        return isinstance(found, (int, float)) and not isinstance(found, bool)
    same = isinstance(found, type(usual))
    return same and (not isinstance(usual, np.ndarray) or found.ndim == usual.ndim)


def without_folders(text: str) -> str:
    """`text`, a traceback or a message, with files by their names only: it may be published."""
    text = re.sub(r'File "[^"\n]*[\\/]([^"\\/\n]+)"', r'File "\1"', text)
    return re.sub(r"(?<![\w:./\\])(?:[A-Za-z]:)?[\\/](?:[^\s\"'<>\\/:]+[\\/])+", "", text)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
