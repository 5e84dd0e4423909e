"""How good is a rule on tasks like those of the reporting suites, but with other data?

    python -m experiments.selection.development shipped runs/mine/weights.safetensors

There are three tasks of each kind: language models on the docstrings of Python's standard library,
and convolutional networks and a small ResNet on digits with new noise on every minibatch, which no
network can memorize. They may be used to make choices. The script prints Adam's loss divided by the
rule's, as a mean over the last tenth of the run and over the whole run. Above 1, the rule is
better. Adam has the learning rate of five that ends lowest.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from experiments.result_files import ROOT
from experiments.training.generalization import Adam
from learned_opt.run import run_rule
from learned_opt.tasks.base import Batch, Task, generator
from learned_opt.tasks.kinds import Draw, TaskConfig, make_task
from learned_opt.weights import load_rule

CHARACTERS = 400_000
NOISE = 2.5  # the standard deviation of the noise; that of the pixels is 1
RATES = (1e-3, 3.2e-3, 1e-2, 3.2e-2, 1e-1)
TASKS, LOST = 3, 1e3


class Noisy:
    """A task with Gaussian noise on the inputs of every minibatch."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __getattr__(self, name: str):
        return getattr(self.task, name)

    def batch(self, seed: int, step: int) -> Batch:
        x, y = self.task.batch(seed, step)
        noise = torch.randn(x.shape, generator=generator("noise", seed, step))
        return x + NOISE * noise, y


def docstrings() -> str:
    """Returns the first CHARACTERS of the docstrings, in lower case."""
    found, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for node in (n for n in ast.walk(tree) if isinstance(n, kinds)):
            if text := ast.get_docstring(node):
                found.append(" ".join(text.lower().split()))
                size += len(found[-1]) + 1
        if size > CHARACTERS:
            break
    return "\n".join(found)[:CHARACTERS]


def development_tasks(work: Path) -> dict[str, tuple[Task, int]]:
    """Returns a dict from a name to TASKS tasks of a kind and the number of steps of a run."""
    text = work / "docstrings.txt"
    work.mkdir(parents=True, exist_ok=True)
    text.write_text(docstrings(), encoding="utf-8")
    found: dict[str, tuple[Task, int]] = {}

    def add(kind: str, steps: int, noisy: bool, **config) -> None:
        task = make_task(TaskConfig(kind=kind, **config), None, Draw(TASKS))
        name = " ".join([kind, *map(str, config["options"].values())])
        found[name] = (Noisy(task) if noisy else task, steps)

    for kind in ("gru", "lstm", "transformer"):
        config = {"data": str(text), "hidden": (48,), "batch_size": 16, "options": {"context": 32}}
        add(kind, 350, False, **config)
    for norm in ("none", "batch", "layer"):
        add("conv", 300, True, hidden=(12, 24), batch_size=64, options={"norm": norm})
    add("resnet", 200, True, hidden=(8, 16), batch_size=32, options={"norm": "batch"})
    return found


def score(rule, task: Task, steps: int) -> Tensor:
    """Returns the mean losses at the end and over the whole run, (2,)."""
    losses, _ = run_rule(task, rule, 0, steps)
    parts = torch.stack([losses[-steps // 10 :].mean(0), losses.mean(0)])
    return parts.nan_to_num(LOST).clamp(max=LOST).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", nargs="+", help="weights files, or 'shipped'")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "development")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rules = {name: load_rule(None if name == "shipped" else name) for name in args.weights}
    found: dict[str, list[Tensor]] = {name: [] for name in rules}
    for label, (task, steps) in development_tasks(args.work).items():
        adam = min((score(Adam(lr), task, steps) for lr in RATES), key=lambda x: float(x[0]))
        for name, rule in rules.items():
            found[name].append(adam / score(rule, task, steps))
            print(f"{label:16s}", *(f"{x:.3f}" for x in found[name][-1].tolist()), name, flush=True)
    for name, ratios in found.items():
        mean = torch.stack(ratios).log().mean(0).exp()
        print(f"{'geometric mean':16s}", *(f"{x:.3f}" for x in mean.tolist()), name)


if __name__ == "__main__":
    main()
