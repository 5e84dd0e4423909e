"""A cell is one run of a benchmark: one entrant on one task with one setting and one seed.

Each cell has a file, which is written atomically and named by a hash of everything that determines
the run, including the content of the weights. An interrupted benchmark therefore resumes where it
stopped, and a cell with another setting is never mistaken for this one. A cell that failed is
recorded, and tried again the next time.
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
from learned_opt.output_folder import provenance
from learned_opt.run import run_optimizer
from learned_opt.tasks.data import DAMAGED
from learned_opt.tasks.kinds import Draw, make_task
from learned_opt.tasks.trainee import Parameters

Record = dict[str, Any]
FORMAT = 2  # of an output folder; 1 had only learning rates, and no memory


@dataclass(frozen=True)
class Cell:
    """Describes one run of an entrant on a task.

    Attributes:
        chosen: the tuned arguments by name; empty if the entrant is not tuned.
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
        """The name of its file: a part for people, and a hash for the program."""
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
        """Returns what else determines a run; for subclasses."""
        return {}

    def run(self) -> Record:
        """Trains, and returns the record, see `blank`."""
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
        """Returns the record of a run without a result, updated with `facts`.

        `final_train_loss`, `mean_loss`, `best_loss` and `test_loss` are infinite, and
        `test_accuracy`, `seconds` and `peak_memory` (bytes) are NaN. `diverged` is false, `error`
        (a traceback) is None, `losses` (steps,) is empty, and `environment` describes this process.
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
    """A job of a worker process: it runs a cell, and writes its file into `folder`, if given."""

    cell: Cell
    folder: Path | None = field(repr=False)

    def __call__(self) -> Record:
        torch.set_num_threads(self.cell.threads)
        try:
            record = self.cell.run()
        except BaseException:  # whatever an entrant raises is recorded, and other runs go on
            record = self.cell.blank(error=without_folders(traceback.format_exc()))
        return record if self.folder is None else save(self.cell, record, self.folder)


def save(cell: Cell, record: Record, folder: Path) -> Record:
    facts = {key: value for key, value in record.items() if key != "losses"}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, losses=record["losses"], record=json.dumps(facts, default=repr))
    write_atomic(folder / f"{cell.name}.npz", buffer.getvalue())
    return record


def load(cell: Cell, folder: Path) -> Record | None:
    """Returns the record that an earlier run has left of `cell`; None if it has to be run."""
    record = read(folder / f"{cell.name}.npz")
    return record if whole(record, cell) and record["error"] is None else None


def read(path: Path) -> Record | None:
    """Returns the record in a cell's file; None if the file is absent or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return json.loads(str(file["record"])) | {"losses": file["losses"]}
    except DAMAGED:
        return None


def whole(record: Any, cell: Cell) -> bool:
    """Returns whether `record` has all entries of a record of `cell`, with the same types."""
    return isinstance(record, dict) and all(
        key in record and _alike(record[key], value) for key, value in cell.blank().items()
    )


def _alike(found: Any, usual: Any) -> bool:
    if usual is None or isinstance(usual, str):  # the error and the commit may be either
        return found is None or isinstance(found, str)
    if isinstance(usual, (int, float)) and not isinstance(usual, bool):
        return isinstance(found, (int, float)) and not isinstance(found, bool)
    same = isinstance(found, type(usual))
    return same and (not isinstance(usual, np.ndarray) or found.ndim == usual.ndim)


def without_folders(text: str) -> str:
    """Returns a traceback or message without the folders of files, so that it can be published."""
    text = re.sub(r'File "[^"\n]*[\\/]([^"\\/\n]+)"', r'File "\1"', text)
    return re.sub(r"(?<![\w:./\\])(?:[A-Za-z]:)?[\\/](?:[^\s\"'<>\\/:]+[\\/])+", "", text)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
