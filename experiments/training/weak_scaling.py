"""Measures weak scaling of meta-training: inner steps per second of two processes against one.

    python -m experiments.training.throughput --what weak

It uses the real Lightning Trainer, with DDP and gloo for two processes and one thread each. Times
are wall-clock times, so the machine must be otherwise idle. In the family "equal", all tasks are
the digits MLP 64-32-10 with batches of 64. "default" is the default family, whose draws cost
different amounts, so that one rank waits for the other. Two processes run joined by DDP, and apart
as two independent trainings. The loss of the latter is due to the machine, and only the remaining
loss to DDP. Runs of the three sorts take turns.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import lightning as L
import torch

from learned_opt.config import TrainConfig
from learned_opt.tasks.families import FamilyConfig
from learned_opt.training.data import UpdatesModule
from learned_opt.training.module import MetaTraining

FAMILIES = {
    "equal": FamilyConfig(
        hidden_layers=(1, 1), width=(32, 32), batch_sizes=(64,), activations=("relu",),
        projection_probability=0.0,
    ),
    "default": FamilyConfig(),
}  # fmt: skip
CELLS = [("meta_loss", "equal"), ("pes", "equal"), ("meta_loss", "default")]
UPDATES, WARM_UP, REPEATS = 80, 16, 3


class Stopwatch(L.Callback):
    """Measures the wall-clock seconds of the updates after the warm-up."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == WARM_UP:
            self.start = time.perf_counter()
        self.seconds = time.perf_counter() - getattr(self, "start", 0.0)


def train(objective: str, family: str, processes: int) -> None:
    """Trains, and prints the inner steps per second of all processes."""
    config = TrainConfig(
        objectives=(objective,), family=FAMILIES[family], updates=UPDATES, epoch_length=UPDATES
    )
    watch = Stopwatch()
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=processes, gradient_clip_val=config.clip,
        strategy="ddp" if processes > 1 else "auto", callbacks=[watch], logger=False,
        limit_val_batches=0, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(MetaTraining(config), UpdatesModule(config, None))
    particles = 2 if objective == "pes" else 1
    steps = config.unroll * config.family.num_tasks * particles * processes
    if trainer.is_global_zero:  # because two ranks would mix their lines
        print((UPDATES - WARM_UP) * steps / watch.seconds)


def run(objective: str, family: str, processes: int, apart: bool) -> float:
    """Starts new processes, and returns the inner steps per second of all of them."""
    joined = 1 if apart else processes
    command = [sys.executable, __file__, objective, family, str(joined)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(processes // joined)
    ]
    ended = [(process.communicate()[0], process.returncode) for process in started]
    if any(code for _, code in ended):
        raise RuntimeError(f"{command} failed with exit codes {[code for _, code in ended]}")
    return sum(float(out.split()[-1]) for out, _ in ended)


def measure() -> list[dict]:
    """Measures a row for each objective, family and sort of processes."""
    cells = [(*cell, *sort) for cell in CELLS for sort in ((1, False), (2, True), (2, False))]
    rates: dict = {cell: [] for cell in cells}
    for _ in range(REPEATS):
        for cell in cells:
            rates[cell].append(run(*cell))
    return [
        {
            "objective": objective,
            "family": family,
            "processes": n,
            "joined": n > 1 and not apart,
            "inner_steps_per_second": statistics.median(rates[objective, family, n, apart]),
            "ratio_to_one": statistics.median(
                a / b
                for a, b in zip(
                    rates[objective, family, n, apart],
                    rates[objective, family, 1, False],
                    strict=True,
                )
            ),
        }
        for objective, family, n, apart in cells
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(sys.argv[1], sys.argv[2], int(sys.argv[3]))
