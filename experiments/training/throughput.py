"""Measures the speed, the time in each part, the memory and the scaling of meta-training.

    python -m experiments.training.throughput

This writes files to experiments/results, each with a .json that says how it was made:

    training_throughput.csv  inner steps per second, the share of time of each part, and the floor
    training_memory.csv      peak memory against unroll and tasks
    training_scaling.csv     cost against tasks and coordinates
    weak_scaling.csv         two processes against one (weak_scaling.py)

`--what` selects some of them. Seconds are CPU time of one thread, so other processes matter little.
All rows take turns, so that changes of the machine's speed affect them equally. Only weak scaling
uses wall-clock time, and needs an otherwise idle machine.

An inner step is one update of one task, and each antithetic particle counts. The task is the digits
MLP 64-32-10 with batches of 64. "naive" is L2L in its simplest form: `nn.LSTMCell` 2 × 20, a single
task at a time, and back-propagation through the rule. The floor is the time of the task's
minibatches and gradients alone, for as many tasks (particles) at once, computed by autograd or by
the task's own formulas.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from experiments.result_files import RESULTS, markdown, save
from experiments.training import weak_scaling
from learned_opt.config import TrainConfig
from learned_opt.rules import make_rule
from learned_opt.tasks.base import Task
from learned_opt.tasks.data import load_images
from learned_opt.tasks.mlp import MLPTask, TaskConfig
from learned_opt.training.objectives import OBJECTIVES, meta_loss

RULES = ("geodesic_rnn", "coordinatewise_lstm")
OBJECTIVE = {"replay": "meta_loss", "backprop": "backprop", "pes": "pes"}
ENDLESS = 10**9  # the number of steps of a run
PARTS = ("minibatch", "task gradient", "features", "network", "statistics", "backward")
NAIVE = "LSTMCell 2 x 20"
WIDTHS = (8, 32, 128, 512)  # of the hidden layer, which give 610 to 38,410 coordinates
MEMORY_UNROLLS, MEMORY_TASKS = (20, 50, 100, 200), (1, 8, 32, 128)
SCALING_TASKS = (1, 2, 4, 8, 16, 32, 64)

Sample = Callable[[], int]  # computes a meta-gradient, and returns its inner steps


class Clock:
    """Measures the CPU seconds of each part of a sample, without those of parts within it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner = 0.0

    def wrap(self, part: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            outer, self._inner, start = self._inner, 0.0, time.process_time()
            result = function(*args, **kwargs)
            spent = time.process_time() - start
            self.seconds[part] += spent - self._inner
            self._inner = outer + spent
            return result

        return timed

    def wrap_methods(self, owner: object, **parts: str) -> None:
        for name, part in parts.items():
            setattr(owner, name, self.wrap(part.replace("_", " "), getattr(owner, name)))


def make_task(tasks: int | None, width: int = 32) -> MLPTask:
    return MLPTask(TaskConfig(hidden=(width,), batch_size=64), load_images("digits"), tasks)


def make_sample(
    rule_name: str, way: str, tasks: int, unroll: int, clock: Clock, width: int = 32
) -> Sample:
    """Returns a function that computes the next window of one endless run."""
    if way == "naive":
        return naive_sample(unroll, clock)
    task, rule = make_task(tasks, width), make_rule(rule_name)
    config = TrainConfig(window=unroll, horizon=(unroll, ENDLESS))
    objective = OBJECTIVES[OBJECTIVE[way]](config, rule)
    run = objective.open(("throughput",), ENDLESS, task, rule)
    if way != "backprop":  # whose parts are connected by a graph
        clock.wrap_methods(task, batch="minibatch", loss_and_grad="task_gradient")
        clock.wrap_methods(rule, observe="features", respond="network")
    if rule.gains_per_tensor:
        clock.wrap_methods(rule, gains="network")

    def start_replay(*args):
        replay = original(*args)
        clock.wrap_methods(replay, see="statistics", inner="statistics")
        return replay

    original = meta_loss.start_replay

    def sample() -> int:
        meta_loss.start_replay = start_replay
        loss, _ = objective.window(rule, task, run, unroll)
        meta_loss.start_replay = original
        clock.wrap("backward", loss.backward)()
        return len(run.theta) * unroll

    return sample


def naive_sample(unroll: int, clock: Clock) -> Sample:
    task = make_task(None)
    cells = nn.ModuleList([nn.LSTMCell(2, 20), nn.LSTMCell(20, 20)])
    head = nn.Linear(20, 1)

    def sample() -> int:
        theta, states, total = task.init(0).requires_grad_(), [None, None], 0
        for step in range(unroll):
            loss = task.loss(theta, task.batch(0, step))
            (grad,) = torch.autograd.grad(loss, theta, retain_graph=True)
            total = total + loss
            x = torch.stack([(grad.abs() + 1e-8).log() / 5, (grad * 150).clamp(-1, 1)], -1)
            for i, cell in enumerate(cells):
                states[i] = cell(x, states[i])
                x = states[i][0]
            theta = theta + 0.01 * head(x).squeeze(-1)
        clock.wrap("backward", total.backward)()
        return unroll

    return sample


def floor_sample(tasks: int, unroll: int, particles: int, autograd: bool) -> Sample:
    """Returns a function that computes only the task's gradients, which any rule needs."""
    task = make_task(tasks)
    theta = task.init(0).expand(particles, -1, -1)
    loss_and_grad = Task.loss_and_grad if autograd else MLPTask.loss_and_grad

    def sample() -> int:
        for step in range(unroll):
            loss_and_grad(task, theta, task.batch(0, step))
        return particles * tasks * unroll

    return sample


def peak_memory(*cell: object) -> float:
    """Returns the MB that a sample adds to a process of its own."""

    def child(pipe) -> None:
        sample = make_sample(*cell, Clock())
        with open("/proc/self/statm") as file:
            before = int(file.read().split()[1]) * resource.getpagesize()
        sample()
        sample()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send(max(0, after - before) / 2**20)

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    theirs.close()  # so that a child that dies raises EOFError here
    found = ours.recv()
    process.join()
    return found


def rate(sample: Sample) -> float:
    start = time.process_time()
    steps = sample()
    return steps / (time.process_time() - start)


def in_turn(samples: list[Sample], clocks: list[Clock], repeats: int) -> list[list[float]]:
    """Returns the inner steps per second of each sample, `repeats` times after a warm-up."""
    rates: list[list[float]] = [[] for _ in samples]
    for repeat in range(repeats + 1):
        for found, sample in zip(rates, samples, strict=True):
            found.append(rate(sample))
        if repeat == 0:
            for clock in clocks:
                clock.seconds.clear()
    return [found[1:] for found in rates]


def throughput(rules: list[str], ways: list[str], repeats: int) -> list[dict]:
    """Measures speed, and returns a row for each rule, way, number of tasks and unroll."""
    cells = [(NAIVE, "naive", 1, unroll) for unroll in (20, 50)]
    cells += [(r, w, t, u) for r in rules for w in ways for t in (1, 8, 32) for u in (20, 50)]
    particles = [2 if way == "pes" else 1 for _, way, _, _ in cells]
    clocks = [Clock() for _ in cells]
    samples = [make_sample(*cell, clock) for cell, clock in zip(cells, clocks, strict=True)]
    floors = {}
    for (_, _, tasks, unroll), n in zip(cells, particles, strict=True):
        for autograd in (True, False):
            floors[tasks, unroll, n, autograd] = floor_sample(tasks, unroll, n, autograd)
    rates = in_turn([*samples, *floors.values()], clocks, repeats)
    floor_rates = dict(zip(floors, rates[len(cells) :], strict=True))
    naive = {cell[3]: own for cell, own in zip(cells, rates, strict=False) if cell[1] == "naive"}
    rows = []
    for (rule, way, tasks, unroll), own, n, clock in zip(
        cells, rates, particles, clocks, strict=False
    ):
        whole = sum(tasks * n * unroll / r for r in own)
        shares = {part: clock.seconds[part] / whole for part in PARTS}
        by_autograd, written_out = (floor_rates[tasks, unroll, n, a] for a in (True, False))
        rows.append({
            "rule": rule,
            "way": way,
            "tasks": tasks,
            "unroll": unroll,
            "inner_steps_per_second": statistics.median(own),
            "best": max(own),
            "ratio_to_naive": paired(own, naive[unroll]),
            "floor_autograd": statistics.median(by_autograd),
            "floor": statistics.median(written_out),
            "of_floor_autograd": paired(own, by_autograd),
            "of_floor": paired(own, written_out),
            **{f"share_{part.replace(' ', '_')}": share for part, share in shares.items()},
            "share_rest": 1 - sum(shares.values()),
        })  # fmt: skip
    return rows


def paired(own: list[float], other: list[float]) -> float:
    """Returns the median ratio of values that were measured in the same turn."""
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


def memory(rules: list[str]) -> list[dict]:
    """Measures memory along tasks and along unroll, starting from 8 tasks and unroll 20."""
    sizes = [(8, u) for u in MEMORY_UNROLLS] + [(t, 20) for t in MEMORY_TASKS if t != 8]
    rows = []
    for rule in rules:
        for way in OBJECTIVE:
            for tasks, unroll in sizes:
                found = peak_memory(rule, way, tasks, unroll)
                rows.append({"rule": rule, "way": way, "tasks": tasks, "unroll": unroll,
                             "peak_memory_mb": found})  # fmt: skip
    return rows


def scaling(rules: list[str], ways: list[str], repeats: int) -> list[dict]:
    """Measures the cost along tasks and along coordinates, starting from 8 tasks of width 32."""
    sizes = [(t, 32) for t in SCALING_TASKS] + [(8, w) for w in WIDTHS if w != 32]
    cells = [(rule, way, *size) for rule in rules for way in ways for size in sizes]
    samples = [make_sample(r, way, tasks, 20, Clock(), w) for r, way, tasks, w in cells]
    rates = in_turn(samples, [], repeats)
    return [
        {"rule": rule, "way": way, "tasks": tasks, "coordinates": make_task(None, width).dim,
         "ms_per_step": 1e3 * tasks * (2 if way == "pes" else 1) / statistics.median(own)}
        for (rule, way, tasks, width), own in zip(cells, rates, strict=True)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = ("throughput", "memory", "scaling", "weak")
    parser.add_argument("--what", nargs="+", default=what, choices=what)
    parser.add_argument("--rules", nargs="+", default=RULES)
    parser.add_argument("--ways", nargs="+", default=["replay", "pes"], choices=OBJECTIVE)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measured = {  # memory first, because its forks need a process without allocations
        "memory": lambda: ("training_memory", memory(args.rules)),
        "throughput": lambda: (
            "training_throughput", throughput(args.rules, args.ways, args.repeats)
        ),
        "scaling": lambda: (
            "training_scaling", scaling(args.rules, args.ways, max(1, args.repeats // 2))
        ),
        "weak": lambda: ("weak_scaling", weak_scaling.measure()),
    }  # fmt: skip
    arguments = {k: v for k, v in vars(args).items() if k != "output"}
    for part, measure in measured.items():
        if part in args.what:
            name, rows = measure()
            save(args.output, name, rows, arguments=arguments)
            print(markdown(rows))


if __name__ == "__main__":
    main()
