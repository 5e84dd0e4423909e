"""Does training ever get lost? Trains small random networks with unusual losses.

    python -m experiments.optimizer.odd_nets --output experiments/results/odd_nets

Each of 50 seeds draws a network of one to three layers, its activation, the scales of its weights
and inputs, a loss and a minibatch size. `LearnedOptimizer` with the shipped weights and Adam with
lr = 1e-3 train it for 300 steps, from the same initial weights and on the same minibatches. The
loss on all data is measured before the first step and after every step. runs.csv has a row for each
run, with the first, the largest and the last loss; non-finite losses are inf. This takes a few
minutes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from experiments.result_files import RESULTS, markdown_table, read, save
from learned_opt import LearnedOptimizer

FOLDER = RESULTS / "odd_nets"

SEEDS, STEPS, EXAMPLES = 50, 300, 128
LOST = 10.0  # a run is lost above this multiple of its first loss

OPTIMIZERS = {
    "learned": LearnedOptimizer,
    "Adam 1e-3": lambda params: torch.optim.Adam(params, lr=1e-3),
}


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


ACTIVATIONS = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "hard tanh": nn.Hardtanh,  # flat outside [-1, 1]
    "softsign": nn.Softsign,
    "sine": Sine,
}
# Losses of errors (n, k). None is ever negative, so ten times a loss is meaningful.
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "squared": lambda e: e.square(),
    "absolute": lambda e: e.abs(),
    "root": lambda e: (e.abs() + 1e-8).sqrt(),  # steep at its minimum, flat far from it
    "quartic": lambda e: e**4,
    "linex": lambda e: e.clamp_max(30).exp() - e.clamp_max(30) - 1,  # exponential on one side
    "saturating": lambda e: e.square() / (1 + e.square()),
    "dead zone": lambda e: (e.abs() - 0.5).clamp_min(0),
    "staircase": lambda e: e.abs().floor() + 0.1 * e.abs(),  # with jumps
    "worst output": lambda e: e.abs().amax(1),
    "squared, times 1e4": lambda e: 1e4 * e.square(),
    "squared, times 1e-4": lambda e: 1e-4 * e.square(),
}


@dataclass
class Problem:
    """The problem that a seed draws."""

    model: nn.Module
    loss: str
    x: Tensor
    y: Tensor
    batches: list[Tensor]  # the indices of examples, a tensor for each step
    facts: dict

    def value(self, rows: Tensor | slice = slice(None)) -> Tensor:
        return LOSSES[self.loss](self.model(self.x[rows]) - self.y[rows]).mean()


def make_problem(seed: int, steps: int = STEPS) -> Problem:
    """Returns the problem of a seed with a new network, regardless of earlier draws."""
    rng = np.random.default_rng([seed, 2025])
    torch.manual_seed(seed)
    inputs, outputs, depth = (int(rng.integers(*bounds)) for bounds in ((1, 17), (1, 6), (1, 4)))
    widths = [inputs, *(int(rng.integers(2, 25)) for _ in range(depth - 1)), outputs]
    activation = str(rng.choice(list(ACTIVATIONS)))
    normalized = depth > 1 and rng.random() < 0.25
    weight_scale, input_scale = 10 ** rng.uniform(-1, 0.7), 10 ** rng.uniform(-1, 1)
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        if i:
            layers += [nn.LayerNorm(fan_in)] * normalized + [ACTIVATIONS[activation]()]
        layers.append(nn.Linear(fan_in, fan_out))
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight *= weight_scale
    x = input_scale * torch.randn(EXAMPLES, inputs)
    y = torch.randn(EXAMPLES, outputs)  # noise, which the inputs do not predict
    y += torch.sin(x @ torch.randn(inputs, outputs) / math.sqrt(inputs) / input_scale * 2)
    batch_size = int(rng.choice([1, 4, 16, EXAMPLES]))
    batches = [torch.randperm(EXAMPLES)[:batch_size] for _ in range(steps)]
    loss = str(rng.choice(list(LOSSES)))
    facts = {
        "loss": loss,
        "widths": "-".join(map(str, widths)),
        "activation": activation if depth > 1 else "",
        "layer_norm": int(normalized),
        "weight_scale": f"{weight_scale:.3g}",
        "input_scale": f"{input_scale:.3g}",
        "batch_size": batch_size,
    }
    return Problem(model, loss, x, y, batches, facts)


def losses(problem: Problem, optimizer: torch.optim.Optimizer) -> Iterator[float]:
    """Yields the loss on all data before the first step and after every step."""
    with torch.no_grad():
        yield problem.value().item()
    for batch in problem.batches:
        optimizer.zero_grad()
        problem.value(batch).backward()
        optimizer.step()
        with torch.no_grad():
            yield problem.value().item()


def run(seed: int, name: str, steps: int = STEPS) -> dict:
    """Runs an optimizer on the problem of a seed, and returns a row of runs.csv."""
    problem = make_problem(seed, steps)
    curve = np.array(list(losses(problem, OPTIMIZERS[name](problem.model.parameters()))))
    curve = np.where(np.isfinite(curve), curve, np.inf)
    ends = {"start": curve[0], "largest": curve.max(), "final": curve[-1]}
    return {"seed": seed, "optimizer": name, **problem.facts} | {
        k: float(v) for k, v in ends.items()
    }


def table(folder: Path = FOLDER) -> str:
    """Returns a table with the counts of runs that were ever lost, and that ended so."""
    runs = read(folder / "runs.csv")
    final = {
        name: np.array(
            [float(r["final"]) / float(r["start"]) for r in runs if r["optimizer"] == name]
        )
        for name in OPTIMIZERS
    }
    lines = []
    for name in OPTIMIZERS:
        mine = [r for r in runs if r["optimizer"] == name]
        largest = np.array([float(r["largest"]) / float(r["start"]) for r in mine])
        others = np.stack([final[other] for other in OPTIMIZERS if other != name])
        lines.append(
            [
                name,
                str(len(mine)),
                str((~(final[name] <= LOST)).sum()),
                str((~(largest <= LOST)).sum()),
                str((~np.isfinite(largest)).sum()),
                f"{largest.max():.3g}",
                f"{np.median(final[name]):.3g}",
                f"{(final[name] < others).all(0).sum()}",
            ]
        )
    header = ["optimizer", "runs", f"end above {LOST:g} × start", "ever above it", "not finite",
              "largest rise, ×", "median final loss / start", "ends lower"]  # fmt: skip
    return markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [run(s, name, args.steps) for s in tqdm(range(args.seeds)) for name in OPTIMIZERS]
    save(args.output, "runs", rows, seeds=list(range(args.seeds)), steps=args.steps)
    print(table(args.output))


if __name__ == "__main__":
    main()
