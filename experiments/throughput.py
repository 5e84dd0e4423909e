"""What a step of the learned rules costs, beside torch's Adam; and what a geodesic costs.

    python experiments/throughput.py --output experiments/results

writes throughput.csv, a row per optimizer and set of parameters, and throughput.json, how it was
made. One process and one thread; all optimizers take turns, so that they share the machine's moods.

    python experiments/throughput.py --what training memory

writes throughput_training.csv, whole training steps beside Adam's, and throughput_memory.csv, see
step_overhead.py.

    python experiments/throughput.py --what comparison pairs scaling profile

writes geodesics_*.csv and .json, see geodesic_comparison.py and geodesic_throughput.py; comparison
needs `pip install ase`.
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

import geodesic_throughput
import step_overhead
import torch
from rows import save
from step_overhead import COLUMNS, WARM_UP, sample_steps
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from learned_opt import LearnedOptimizer, make_rule
from learned_opt.rules import GeodesicRNN
from learned_opt.rules.base import Layout
from learned_opt.rules.basis import SIDES, matrices
from learned_opt.rules.cell import LSTMCell
from learned_opt.rules.geodesic_rnn import TENSOR_INPUTS

BASELINE, FUSED = "Adam foreach", "Adam fused"
OPTIMIZERS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    BASELINE: lambda params: Adam(params, foreach=True),
    FUSED: lambda params: Adam(params, fused=True),
    "geodesic_rnn": lambda params: LearnedOptimizer(params, weights=make_rule("geodesic_rnn")),
    "geodesic_rnn in eigenbases": lambda params: LearnedOptimizer(
        params, weights=make_rule("geodesic_rnn", basis=256)
    ),
    "geodesic_rnn as shipped": LearnedOptimizer,
    "geodesic_rnn compiled": lambda params: LearnedOptimizer(
        params, weights=make_rule("geodesic_rnn"), compile=True
    ),
    "geodesic_rnn per coordinate, hidden 16": lambda params: LearnedOptimizer(
        params, weights=make_rule("geodesic_rnn", per="coordinate", hidden=16)
    ),
    "geodesic_rnn per coordinate, hidden 16, compiled": lambda params: LearnedOptimizer(
        params, weights=make_rule("geodesic_rnn", per="coordinate", hidden=16), compile=True
    ),
    "coordinatewise_lstm": lambda params: LearnedOptimizer(
        params, weights=make_rule("coordinatewise_lstm")
    ),
}
SAMPLE = 0.02  # seconds that a sample takes at least, thousands of times the clock's resolution
SLOW, LARGE = 100.0, 1_000_000  # ms at up to LARGE parameters above which larger sets are left out


def make_params(parameters: int, tensors: str) -> list[Tensor]:
    """`tensors` equal matrices, or those of a "transformer" of about so many parameters."""
    if tensors == "transformer":
        shapes = [p.shape for p in transformer(parameters).parameters()]
    else:
        shapes = [(parameters // int(tensors) // COLUMNS, COLUMNS)] * int(tensors)
    params = [torch.randn(shape) * COLUMNS**-0.5 for shape in shapes]
    for p in params:
        p.grad = 0.01 * torch.randn_like(p)
    return params


def transformer(parameters: int) -> nn.Module:
    """Of at least one layer, ten times as wide as deep or more."""
    width = 16 * max(1, round((parameters / 5 / 12) ** 0.5 / 16))
    layers = max(1, round(parameters / (12 * width**2)))
    return step_overhead.CharTransformer(width, layers)


@dataclass(frozen=True)
class Work:
    """What a step cannot do without, for each parameter: operations of matrix products (2 for each
    multiply-add), exponential functions and their like, and bytes from and to memory. Work for
    whole tensors does not count, nor do other element-wise operations, which cost less than the
    memory that they read."""

    flops: float
    transcendentals: float
    bytes: float

    def floor(self, rates: Work) -> float:
        """Seconds for each parameter, of a machine with so much of each in a second: memory may
        move while the rest is computed, products and exponentials take turns."""
        computing = self.flops / rates.flops + self.transcendentals / rates.transcendentals
        return max(computing, self.bytes / rates.bytes)


FLOAT = 4  # bytes
ADAM = Work(0, 1, 7 * FLOAT)  # reads θ, g, m, v, writes θ, m, v; a square root


def work(optimizer: Optimizer) -> Work:
    if not isinstance(optimizer, LearnedOptimizer):
        return ADAM
    rule = optimizer.rule
    cells = [cell for cell in rule.modules() if isinstance(cell, LSTMCell)]
    state = rule.init_state(torch.zeros(1), ((1,),)).coordinate
    moved = 3 + 2 * sum(x.numel() for x in state.values())  # reads θ and g, writes θ; the state
    flops = transcendentals = 0
    if rule.hidden_per == "coordinate":
        seen_once = TENSOR_INPUTS * isinstance(rule, GeodesicRNN)  # by all coordinates of a tensor
        products = sum(4 * c.hidden * (c.weight.shape[1] - seen_once) for c in cells)
        flops = 2 * (products + rule.head.weight.numel())
        transcendentals = 5 * sum(c.hidden for c in cells) + 2  # and of the input and the output
    if isinstance(rule, GeodesicRNN):  # the averages again when their sums are known,
        moved += state["averages"].numel() + 1  # and g before, for its norm
        transcendentals += 1
        flops += eigenbasis_flops(rule, optimizer.param_groups[0]["params"])
    return Work(flops, transcendentals, FLOAT * moved)


def eigenbasis_flops(rule: GeodesicRNN, params: list[Tensor]) -> float:
    """For each parameter, of covariances, the gradient turned and the update turned back; new
    bases are rare and don't count."""
    layout = Layout(tuple(tuple(p.shape) for p in params))
    products = sum(
        math.prod(m.shape) * m.shape[SIDES.index(side)]
        for m in matrices(layout, rule.basis)
        for side in m.sides
    )
    return 3 * 2 * products / sum(layout.sizes)


def machine() -> Work:
    """What this machine does in a second: products and exponentials of what is in its cache, and
    memory that is read and written."""
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
    """A row per optimizer: medians of `repeats` samples, taken in turn."""
    torch.compiler.reset()  # its limit of recompilations is that of a program
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
        choices=["steps", *step_overhead.PARTS, *geodesic_throughput.PARTS],
        default=["steps"],
    )
    parser.add_argument("--parameters", type=int, nargs="+", default=sizes, help="rising, of steps")
    sets = ["1", "100", "transformer"]
    parser.add_argument("--tensors", nargs="+", default=sets, help="of steps")
    parser.add_argument("--repeats", type=int, default=15, help="of steps")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for what in args.what:
        if what == "steps":
            optimizer_steps(args)
        else:
            print((step_overhead.PARTS | geodesic_throughput.PARTS)[what](args.output), flush=True)


if __name__ == "__main__":
    main()
