"""Checks and measures on one GPU whatever a GPU may change. It has not run on one yet.

    python -m experiments.speed.gpu     # writes results/gpu
    python -m experiments.speed.gpu --device cpu --smoke --output runs/gpu

Each part writes a file of its own as soon as it is done, and a part that fails does not stop the
others:

- `steps`: milliseconds of whole training steps of a transformer at three widths, and of the
  optimizer's step alone, in eager mode and with the training step compiled, beside torch's fused
  AdamW. All take turns.
- `meta_training`: trains a rule with evolution strategies, and counts inner steps a
  second; then trains a network on the CPU with it.
- `tests`: the outcomes of the tests marked `gpu`, and of PyTorch's own tests of optimizers there.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from experiments.optimizer.contract import SUITE, outcome
from experiments.result_files import RESULTS, ROOT, markdown, save
from experiments.speed.step_overhead import CONTEXT, VOCABULARY, CharTransformer
from learned_opt import LearnedOptimizer, TrainConfig, train
from learned_opt.tasks.families import FamilyConfig

WIDTHS, BATCH = (128, 512, 1024), 32
WARM_UP, TURNS, TURN = 16, 5, 20  # steps before the first turn, turns, and steps in a turn
SECONDS = 150  # that all tests may take
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW fused": lambda params: torch.optim.AdamW(params, fused=True),
    "learned": LearnedOptimizer,
}


def wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


class Training:
    """Training steps of one model with one optimizer, in eager mode or compiled."""

    def __init__(self, model: nn.Module, optimizer: str, compiled: bool, device: str) -> None:
        self.model, self.device = copy.deepcopy(model).to(device), device
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.tokens = torch.randint(VOCABULARY, (2, BATCH, CONTEXT), device=device)
        self._backward = (
            torch.compile(self._forward_backward) if compiled else self._forward_backward
        )
        self._step = torch.compile(self.optimizer.step) if compiled else self.optimizer.step

    def _forward_backward(self) -> None:
        cross_entropy(self.model(self.tokens[0]), self.tokens[1]).backward()

    def seconds(self, steps: int) -> tuple[float, float]:
        """Returns the mean seconds of a whole step and of the optimizer's step alone."""
        own = 0.0
        wait(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.optimizer.zero_grad()
            self._backward()
            wait(self.device)
            before = time.perf_counter()
            self._step()
            wait(self.device)
            own += time.perf_counter() - before
        return (time.perf_counter() - start) / steps, own / steps


def steps(device: str, smoke: bool) -> list[dict]:
    rows = []
    for width in (16,) if smoke else WIDTHS:
        model = CharTransformer(width, 1 if smoke else 4)
        runs = {
            (name, mode): Training(model, name, mode == "compiled", device)
            for name in OPTIMIZERS
            for mode in (("eager",) if smoke else ("eager", "compiled"))
        }
        for run in runs.values():
            run.seconds(2 if smoke else WARM_UP)
        turns, turn = (1, 2) if smoke else (TURNS, TURN)
        samples = [{key: run.seconds(turn) for key, run in runs.items()} for _ in range(turns)]
        base = next(iter(runs))
        for name, mode in runs:
            whole, own = zip(*(sample[name, mode] for sample in samples), strict=True)
            ratios = [sample[name, mode][0] / sample[base][0] for sample in samples]
            rows.append(
                {
                    "width": width,
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "optimizer": name,
                    "mode": mode,
                    "ms": 1e3 * statistics.median(whole),
                    "optimizer_ms": 1e3 * statistics.median(own),
                    "ratio_to_adamw_fused": statistics.median(ratios),
                }
            )
    return rows


def meta_training(device: str, smoke: bool) -> list[dict]:
    config = TrainConfig(
        objectives=("step_size",), family=FamilyConfig(), updates=200, epoch_length=50,
        rule_config={"decay_after": 300, "basis": 256, "every": 10}, select="last",
        accelerator="cpu" if device == "cpu" else "gpu",
    )  # fmt: skip
    config = config.smoke() if smoke else config
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        weights = train(config, Path(folder) / "run")
        seconds = time.perf_counter() - start
        first, last = losses_on_the_cpu(weights)
    inner = 2 * config.updates * config.unroll * config.family.num_tasks  # two particles a task
    rate = inner / seconds
    return [{"updates": config.updates, "inner_steps": inner, "seconds": seconds,
             "inner_steps_per_second": rate, "first_loss": first, "last_loss": last}]  # fmt: skip


def losses_on_the_cpu(weights: Path) -> tuple[float, float]:
    """Returns the loss of a network before and after 200 steps with these weights."""
    rng = torch.Generator().manual_seed(0)
    x, labels = torch.randn(256, 20, generator=rng), torch.randint(4, (256,), generator=rng)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer, losses = LearnedOptimizer(model.parameters(), weights=weights), []
    for _ in range(201):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def tests(device: str, smoke: bool) -> list[dict]:
    """Returns the number of tests by file and outcome, and why they were skipped or failed."""
    here = "cpu" if device == "cpu" else "cuda"
    chosen = {"marked gpu": ["-m", "gpu", "tests"], "suite": [SUITE, "-k", here]}
    if smoke:
        chosen["suite"][-1] += " and test_errors"
    rows = []
    for name, arguments in chosen.items():
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
            subprocess.run(
                command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False, timeout=SECONDS
            )
            cases = list(ElementTree.parse(report).iter("testcase"))
        counts = Counter(outcome(case)[1:] for case in cases)
        rows += [
            {"tests": name, "outcome": result, "count": count, "reason": reason}
            for (result, reason), count in sorted(counts.items())
        ]
    return rows


PARTS = {"steps": steps, "meta_training": meta_training, "tests": tests}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--smoke", action="store_true", help="try the script in seconds")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu")
    args = parser.parse_args()
    failed = []
    for part in args.parts:
        start = time.perf_counter()
        try:
            rows = PARTS[part](args.device, args.smoke)
        except Exception:
            traceback.print_exc()
            failed.append(part)
            continue
        save(args.output, part, rows, device=args.device, smoke=args.smoke)
        print(f"{part}, {time.perf_counter() - start:.0f} s\n\n{markdown(rows)}\n", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
