"""Measures the cost of a step of the learned rules beside torch's Adam.

    python -m experiments.speed.throughput --output experiments/results

This writes throughput.csv, with a row for each optimizer and set of parameters, and throughput.json
with its provenance. It uses one process and one thread. All optimizers take turns, so that changes
of the machine's speed affect them equally.

    python -m experiments.speed.throughput --what training memory

This writes throughput_training.csv, for whole training steps beside Adam's, and
throughput_memory.csv; see step_overhead.py.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import timeit
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from experiments.result_files import RESULTS, save
from experiments.speed import step_overhead
from experiments.speed.step_overhead import COLUMNS, WARM_UP, sample_steps
from learned_opt import LearnedOptimizer, make_rule
from learned_opt.rules import GeodesicRNN
from learned_opt.rules.basis import SIDES, matrices
from learned_opt.rules.cell import LSTMCell
from learned_opt.rules.layout import Layout

BASELINE, FUSED = "Adam foreach", "Adam fused"
OPTIMIZERS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    BASELINE: lambda params: Adam(params, foreach=True),
    FUSED: lambda params: Adam(params, fused=True),
    "geodesic_rnn": lambda params: LearnedOptimizer(params, weights=make_rule("geodesic_rnn")),
    "geodesic_rnn in eigenbases": lambda params: LearnedOptimizer(
        params, weights=make_rule("geodesic_rnn", basis=256)
    ),
    "geodesic_rnn as shipped": LearnedOptimizer,
    "coordinatewise_lstm": lambda params: LearnedOptimizer(
        params, weights=make_rule("coordinatewise_lstm")
    ),
}
SAMPLE = 0.02  # the least seconds of a sample, thousands of times the clock's resolution
# Optimizers that need more than SLOW ms at up to LARGE parameters are not run on larger sets.
SLOW, LARGE = 100.0, 1_000_000


def make_params(parameters: int, tensors: str) -> list[Tensor]:
    """Returns `tensors` equal matrices, or the tensors of a "transformer", of about this size."""
    if tensors == "transformer":
        shapes = [p.shape for p in transformer(parameters).parameters()]
    else:
        shapes = [(parameters // int(tensors) // COLUMNS, COLUMNS)] * int(tensors)
    params = [torch.randn(shape) * COLUMNS**-0.5 for shape in shapes]
    for p in params:
        p.grad = 0.01 * torch.randn_like(p)
    return params


def transformer(parameters: int) -> nn.Module:
    """Returns a transformer with at least one layer, at least ten times as wide as deep."""
    width = 16 * max(1, round((parameters / 5 / 12) ** 0.5 / 16))
    layers = max(1, round(parameters / (12 * width**2)))
    return step_overhead.CharTransformer(width, layers)


@dataclass(frozen=True)
class Work:
    """The work that a step needs for each parameter.

    It is operations of matrix products (2 for each multiply-add), exponential and similar
    functions, and bytes read from and written to memory. Work for whole tensors does not count, nor
    do other element-wise operations, which cost less than the memory that they read.
    """

    flops: float
    transcendentals: float
    bytes: float

    def floor(self, rates: Work) -> float:
        """Returns the seconds per parameter on a machine that does `rates` in a second.

        Memory traffic overlaps with computation, while products and exponentials do not overlap.
        """
        computing = self.flops / rates.flops + self.transcendentals / rates.transcendentals
        return max(computing, self.bytes / rates.bytes)


FLOAT = 4  # bytes
ADAM = Work(0, 1, 7 * FLOAT)  # a square root; reads θ, g, m and v, and writes θ, m and v


def work(optimizer: Optimizer) -> Work:
    if not isinstance(optimizer, LearnedOptimizer):
        return ADAM
    rule = optimizer.rule
    cells = [cell for cell in rule.modules() if isinstance(cell, LSTMCell)]
    state = rule.init_state(torch.zeros(1), ((1,),)).coordinate
    moved = 3 + 2 * sum(x.numel() for x in state.values())  # reads θ and g, writes θ; the state
    flops = transcendentals = 0
    if rule.hidden_per == "coordinate":
        products = sum(c.weight.numel() for c in cells)
        flops = 2 * (products + rule.head.weight.numel())
        transcendentals = 5 * sum(c.hidden for c in cells) + 2  # 2 for the input and the output
    if isinstance(rule, GeodesicRNN):  # reads the averages again once their sums are known,
        moved += state["averages"].numel() + 1  # and g once more, for its norm
        transcendentals += 1
        flops += eigenbasis_flops(rule, optimizer.param_groups[0]["params"])
    return Work(flops, transcendentals, FLOAT * moved)


def eigenbasis_flops(rule: GeodesicRNN, params: list[Tensor]) -> float:
    """Returns the operations per parameter of covariances and of rotations.

    The gradient is rotated, and the update is rotated back. New bases are rare and do not count.
    """
    layout = Layout(tuple(tuple(p.shape) for p in params))
    products = sum(
        m.count * math.prod(m.shape) * m.shape[SIDES.index(side)]
        for m in matrices(layout, rule.basis)
        for side in m.sides
    )
    return 3 * 2 * products / sum(layout.sizes)


def machine() -> Work:
    """Measures the work of this machine in a second.

    Products and exponentials are of numbers in the cache, and memory is read and written.
    """
    weight, units = torch.randn(80, 40), torch.randn(40, 4096)
    gates, memory = torch.empty(80, 4096), torch.zeros(1 << 26)

    def rate(amount: float, call: Callable[[], object]) -> float:
        return amount / min(timeit.repeat(call, number=1, repeat=30))

    return Work(
        rate(2 * weight.numel() * units.shape[1], lambda: torch.mm(weight, units, out=gates)),
        rate(gates.numel(), lambda: gates.tanh_()),
        rate(2 * FLOAT * memory.numel(), lambda: memory.add_(1.0)),
    )


def step_seconds(optimizer: Optimizer, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    return (time.perf_counter() - start) / steps


def state_bytes(optimizer: Optimizer) -> int:
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
    )


def measure(
    names: list[str], parameters: int, tensors: str, repeats: int, rates: Work
) -> list[dict]:
    """Returns a row for each optimizer, with medians of `repeats` samples taken in turn."""
    optimizers = {name: OPTIMIZERS[name](make_params(parameters, tensors)) for name in names}
    parameters = sum(p.numel() for p in optimizers[BASELINE].param_groups[0]["params"])
    for optimizer in optimizers.values():
        step_seconds(optimizer, WARM_UP)
    steps = {n: sample_steps(o, step_seconds(o, 1), SAMPLE) for n, o in optimizers.items()}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, optimizer in optimizers.items():
            samples[name].append(step_seconds(optimizer, steps[name]))

    def ratio(name: str, base: str) -> float:
        pairs = zip(samples[name], samples[base], strict=True)
        return statistics.median(x / y for x, y in pairs)

    def beside_floor(name: str) -> dict[str, float]:
        needed = work(optimizers[name])
        floor = parameters * needed.floor(rates)
        return {
            "flops_per_parameter": needed.flops,
            "transcendentals_per_parameter": needed.transcendentals,
            "bytes_per_parameter": needed.bytes,
            "floor_ms": 1e3 * floor,
            "ratio_to_floor": statistics.median(samples[name]) / floor,
        }

    return [
        {
            "optimizer": name,
            "parameters": parameters,
            "tensors": tensors,
            "ms": 1e3 * statistics.median(samples[name]),
            "ratio_to_adam_foreach": ratio(name, BASELINE),
            "ratio_to_adam_fused": ratio(name, FUSED),
            "state_bytes_per_parameter": state_bytes(optimizers[name]) / parameters,
        }
        | beside_floor(name)
        for name in names
    ]


def optimizer_steps(args: argparse.Namespace) -> None:
    rows, rates = [], machine()
    for parameters in args.parameters:
        slow = {row["optimizer"] for row in rows if row["ms"] > SLOW}
        names = [name for name in OPTIMIZERS if parameters <= LARGE or name not in slow]
        for tensors in args.tensors:
            for row in measure(names, parameters, tensors, args.repeats, rates):
                rows.append(row)
                print("{optimizer:50}{parameters:>10}{tensors:>12}{ms:10.3f} ms"
                      "{ratio_to_adam_foreach:8.1f} x Adam{ratio_to_floor:8.1f} x floor"
                      .format(**row), flush=True)  # fmt: skip
    arguments = {k: v for k, v in vars(args).items() if k not in ("output", "what")}
    save(args.output, "throughput", rows, arguments=arguments, rates_per_second=asdict(rates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = [10_000, 100_000, 1_000_000, 10_000_000]
    parser.add_argument(
        "--what",
        nargs="+",
        choices=["steps", *step_overhead.PARTS],
        default=["steps"],
    )
    parser.add_argument("--parameters", type=int, nargs="+", default=sizes, help="ascending")
    sets = ["1", "100", "transformer"]
    parser.add_argument("--tensors", nargs="+", default=sets, help="sets of tensors")
    parser.add_argument("--repeats", type=int, default=15, help="samples of steps")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for what in args.what:
        if what == "steps":
            optimizer_steps(args)
        else:
            print(step_overhead.PARTS[what](args.output), flush=True)


if __name__ == "__main__":
    main()
