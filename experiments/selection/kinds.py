"""How good is a rule on each kind of task? Compares it with Adam on validation draws.

    python -m experiments.selection.kinds shipped runs/mine/weights.safetensors

The draws are of a family of many kinds. No training uses them, so they may be used to make choices.
The script prints log10 of the rule's loss over Adam's, where Adam has the best of six learning
rates for each task. The losses are the smoothed loss at 200 steps, the mean loss up to there, and
the same at 800 steps. Below 0, the rule is better.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from torch import Tensor

from experiments.training.generalization import Adam
from learned_opt.run import run_rule
from learned_opt.tasks.base import Task
from learned_opt.tasks.families import FamilyConfig, sample_tasks
from learned_opt.weights import load_rule

KINDS = {"mlp": 3, "conv": 2, "gru": 1, "lstm": 1, "transformer": 1, "logistic": 1,
         "autoencoder": 1, "quadratic": 1, "matrix_factorization": 1}  # fmt: skip
FAMILY = FamilyConfig(
    num_tasks=4, input_sizes=(16, 64, 256, 784, 3072), log10_input_scale=(-0.3, 0.4), kinds=KINDS
)
STEPS = (200, 800)
RATES = (1e-3, 3.2e-3, 1e-2, 3.2e-2, 1e-1, 3.2e-1)


def scores(rule, task: Task, seed: int) -> Tensor:
    """Returns log10 of the smoothed and the mean loss at each of STEPS, (4, tasks)."""
    losses, _ = run_rule(task, rule, seed, max(STEPS))
    parts = [part for s in STEPS for part in (losses[s - s // 20 : s].mean(0), losses[:s].mean(0))]
    return torch.stack(parts).nan_to_num(nan=1e6, posinf=1e6).clamp(1e-6, 1e6).log10()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", nargs="+", help="weights files, or 'shipped'")
    parser.add_argument("--draws", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rules = {name: load_rule(None if name == "shipped" else name) for name in args.weights}
    found: dict = {name: defaultdict(list) for name in rules}
    for draw in range(args.draws):
        task = sample_tasks(FAMILY, ("validation-rc", draw))
        adam = torch.stack([scores(Adam(lr), task, draw) for lr in RATES]).amin(0)
        for name, rule in rules.items():
            found[name][task.config.kind].append((scores(rule, task, draw) - adam).mean(1))
    for name, kinds in found.items():
        means = {kind: torch.stack(values).mean(0) for kind, values in sorted(kinds.items())}
        means["mean over kinds"] = torch.stack(list(means.values())).mean(0)
        print(name)
        for kind, mean in means.items():
            print(f"  {kind:22s}", *(f"{x:+.2f}" for x in mean.tolist()))


if __name__ == "__main__":
    main()
