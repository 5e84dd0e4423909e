"""A cell is one run: one entrant on one task with one learning rate and seed; one file each.

A cell's file is written whole and named by a hash of all that determines the run (the weights'
content included), so a benchmark that was interrupted goes on where it was, and a cell of another
setting is never taken for this one. A cell that raised is recorded, and tried again next time.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import math
import multiprocessing
import re
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from learned_opt.benchmark.config import LEARNED, BenchmarkTask, Entrant
from learned_opt.errors import ConfigError, LearnedOptError
from learned_opt.optimizer import LearnedOptimizer
from learned_opt.outputs import provenance, write_atomic
from learned_opt.run import run_optimizer
from learned_opt.tasks.kinds import make_task
from learned_opt.weights import DEFAULT


@dataclass(frozen=True)
class Cell:
    """One run; `lr` is None where the entrant is not tuned."""

    task: BenchmarkTask
    entrant: Entrant
    lr: float | None
    seed: int
    data_root: str | None = None
    threads: int = 1

    @cached_property
    def name(self) -> str:
        """Of its file: for people, then a hash for the program."""
        identity = {
            "task": asdict(self.task.task),
            "steps": self.task.steps,
            "optimizer": self.entrant.optimizer,
            "kwargs": self.entrant.kwargs,
            "schedule": self.entrant.schedule,
            "weights": _weights_hash(self.entrant),
            "lr": self.lr,
            "seed": self.seed,
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=repr).encode())
        lr = "default" if self.lr is None else f"{self.lr:.3g}"
        text = f"{self.task.label}_{self.entrant.name}_lr-{lr}_seed-{self.seed}"
        return re.sub(r"[^\w.+-]+", "-", text) + "_" + digest.hexdigest()[:12]

    def make_optimizer(self, params: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The entrant's optimizer of `params`, with its learning-rate schedule hooked in."""
        entrant = self.entrant
        kwargs = dict(entrant.kwargs) | ({} if self.lr is None else {"lr": self.lr})
        if entrant.optimizer == LEARNED:
            optimizer = LearnedOptimizer(params, weights=entrant.weights, **kwargs)
        else:
            optimizer = optimizer_class(entrant.optimizer)(params, **kwargs)
        if entrant.schedule == "cosine":
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.task.steps)
            optimizer.register_step_post_hook(lambda *_: schedule.step())
        return optimizer


def run_cells(
    cells: Sequence[Cell], folder: Path, processes: int = 1, title: str = ""
) -> list[dict[str, Any]]:
    """The records of `cells`, in their order; runs those that `folder` lacks.

    A record has `final_train_loss`, `mean_loss`, `best_loss`, `test_loss`, `test_accuracy`,
    `seconds`, `diverged`, `losses` (steps,), `error` (a traceback, or None) and `environment`.
    A run that diverged or raised has infinite losses, and no accuracy (NaN).
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = {cell.name: record for cell in cells if (record := _load(folder, cell)) is not None}
    missing = [cell for cell in cells if cell.name not in records]
    with tqdm(total=len(cells), initial=len(cells) - len(missing), desc=title, disable=None) as bar:
        if processes == 1 or len(missing) < 2:
            for cell in missing:
                records[cell.name] = _run_and_save(cell, folder)
                bar.update()
        else:
            spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
            with ProcessPoolExecutor(min(processes, len(missing)), mp_context=spawn) as pool:
                futures = {pool.submit(_run_and_save, c, folder): c for c in missing}
                try:
                    for future in as_completed(futures):
                        records[futures[future].name] = future.result()
                        bar.update()
                except BaseException as error:
                    pool.shutdown(wait=False, cancel_futures=True)
                    if not isinstance(error, BrokenProcessPool):
                        raise
                    raise LearnedOptError(
                        f"a worker process died with processes={processes}, most often for want of "
                        f"memory; {len(records)} of {len(cells)} runs are saved: use fewer "
                        "processes and run the same command again"
                    ) from error
    return [records[cell.name] for cell in cells]


def _run_and_save(cell: Cell, folder: Path) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(cell.threads)
    try:
        record = _run(cell)
    except Exception:  # one entrant's failure is a result; the others go on
        record = _record(error=traceback.format_exc())
    finally:
        torch.set_num_threads(threads)
    facts = {k: v for k, v in record.items() if k != "losses"}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, losses=record["losses"], record=json.dumps(facts))
    write_atomic(folder / f"{cell.name}.npz", buffer.getvalue())
    return record


def _run(cell: Cell) -> dict[str, Any]:
    task = make_task(cell.task.task, cell.data_root)
    run = run_optimizer(task, cell.make_optimizer, cell.seed, cell.task.steps)
    losses = np.asarray(run.losses, dtype=np.float32)
    ending = {key: float(value) for key, value in run.evaluation.items()}
    if run.diverged or not math.isfinite(ending["train_loss"]):
        return _record(losses=losses, seconds=float(run.seconds), diverged=True)
    return _record(
        final_train_loss=ending["train_loss"],
        mean_loss=float(losses.mean()),
        best_loss=float(losses.min()),
        test_loss=ending["test_loss"],
        test_accuracy=ending["test_accuracy"],
        seconds=float(run.seconds),
        losses=losses,
    )


def _record(**facts: Any) -> dict[str, Any]:
    """A record of a run that came to nothing, but for `facts`."""
    losses = dict.fromkeys(("final_train_loss", "mean_loss", "best_loss", "test_loss"), math.inf)
    rest = {"test_accuracy": math.nan, "seconds": math.nan, "diverged": False, "error": None}
    environment = provenance()
    return losses | rest | {"losses": np.zeros(0, np.float32), "environment": environment} | facts


def _load(folder: Path, cell: Cell) -> dict[str, Any] | None:
    path = folder / f"{cell.name}.npz"
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        record = json.loads(str(file["record"])) | {"losses": file["losses"]}
    return record if record["error"] is None else None


def optimizer_class(path: str) -> type[torch.optim.Optimizer]:
    """The class at a dotted path; ConfigError where there is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"optimizer is {path!r}, which cannot be imported ({error}); use a dotted path such "
            f"as torch.optim.Adam, or {LEARNED!r}"
        ) from error


def _weights_hash(entrant: Entrant) -> str | None:
    """Of a learned entrant's weights; a missing file is for the run to complain about."""
    if entrant.optimizer != LEARNED:
        return None
    path = DEFAULT if entrant.weights is None else Path(entrant.weights)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
