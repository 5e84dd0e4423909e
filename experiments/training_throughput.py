"""Inner steps per second of meta-training, where the time goes, and peak memory.

    python experiments/training_throughput.py --output experiments/results

writes training_throughput.csv, a row per rule, way to learn, number of tasks and unroll, and
training_throughput.json, how it was made. One thread, seconds of its CPU time, so that other
processes count for little; all rows take turns, so that they share the machine's moods.

An inner step is one update of one task; each antithetic particle counts. The task is the digits
MLP 64-32-10, batch 64. "naive" is L2L as one would first write it: `nn.LSTMCell` 2 × 20, a task at
a time, back-propagation through the rule.
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
from rows import save
from torch import nn

from learned_opt.config import TrainConfig
from learned_opt.rules import make_rule
from learned_opt.tasks.data import load_images
from learned_opt.tasks.mlp import MLPTask, TaskConfig
from learned_opt.training import pes
from learned_opt.training.objectives import OBJECTIVES

RULES = ("geodesic_rnn", "coordinatewise_lstm")
OBJECTIVE = {"replay": "meta_loss", "backprop": "backprop", "pes": "pes"}
ENDLESS = 10**9  # steps of a run
PARTS = ("task gradient", "minibatch", "features", "network", "backward")

Sample = Callable[[], int]  # one meta-gradient; the inner steps it took


class Clock:
    """CPU seconds by part of what is done in a sample."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def wrap(self, part: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            start = time.process_time()
            result = function(*args, **kwargs)
            self.seconds[part] += time.process_time() - start
            return result

        return timed


def make_task(tasks: int | None) -> MLPTask:
    return MLPTask(TaskConfig(hidden=(32,), batch_size=64), load_images("digits"), tasks)


def make_sample(rule_name: str, way: str, tasks: int, unroll: int, clock: Clock) -> Sample:
    """Windows of one endless run."""
    if way == "naive":
        return naive_sample(unroll, clock)
    task, rule = make_task(tasks), make_rule(rule_name)
    config = TrainConfig(window=unroll, horizon=(unroll, ENDLESS))
    objective = OBJECTIVES[OBJECTIVE[way]](config, rule)
    run = objective.open(("throughput",), ENDLESS, task, rule)
    task.batch = clock.wrap("minibatch", task.batch)
    rule.observe = clock.wrap("features", rule.observe)
    task.loss_and_grad = clock.wrap("task gradient", task.loss_and_grad)
    if way == "replay":  # else there is a graph between the parts, or one call in another
        rule.respond = clock.wrap("network", rule.respond)

    def sample() -> int:
        before = pes.perturbed
        if way == "pes":
            pes.perturbed = lambda *args: clock.wrap("network", before(*args))
        loss, _ = objective.window(rule, task, run, unroll)
        pes.perturbed = before
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


def floor_sample(tasks: int, unroll: int) -> Sample:
    """The task's gradients alone: what any rule has to pay."""
    task = make_task(tasks)
    theta = task.init(0)

    def sample() -> int:
        for step in range(unroll):
            task.loss_and_grad(theta, task.batch(0, step))
        return tasks * unroll

    return sample


def peak_memory(*cell: object) -> float:
    """MB that a sample adds to a process of its own."""

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
    theirs.close()  # so that the death of the child is an EOFError here
    found = ours.recv()
    process.join()
    return found


def rate(sample: Sample) -> float:
    start = time.process_time()
    steps = sample()
    return steps / (time.process_time() - start)


def measure(cells: list[tuple], repeats: int) -> list[dict]:
    """A row per cell (rule, way, tasks, unroll): medians of samples taken in turn."""
    memory = [peak_memory(*cell) for cell in cells]
    clocks = [Clock() for _ in cells]
    samples = [make_sample(*cell, clock) for cell, clock in zip(cells, clocks, strict=True)]
    floors = [floor_sample(cell[2], cell[3]) for cell in cells]
    rates: list[list[tuple[float, float]]] = [[] for _ in cells]
    for repeat in range(repeats + 1):
        for i, (sample, floor) in enumerate(zip(samples, floors, strict=True)):
            found = rate(sample), rate(floor)
            if repeat:
                rates[i].append(found)
            else:
                clocks[i].seconds.clear()  # of the warm-up
    rows = []
    for i, (rule, way, tasks, unroll) in enumerate(cells):
        per_second = statistics.median(own for own, _ in rates[i])
        steps = tasks * unroll * (2 if way == "pes" else 1)
        whole = sum(steps / own for own, _ in rates[i])
        shares = {part: clocks[i].seconds[part] / whole for part in PARTS}
        rows.append({
            "rule": rule,
            "way": way,
            "tasks": tasks,
            "unroll": unroll,
            "inner_steps_per_second": per_second,
            "best": max(own for own, _ in rates[i]),
            "of_floor": statistics.median(own / floor for own, floor in rates[i]),
            **{f"share_{part.replace(' ', '_')}": share for part, share in shares.items()},
            "share_rest": 1 - sum(shares.values()),
            "peak_memory_mb": memory[i],
        })  # fmt: skip
    naive = {row["unroll"]: row["inner_steps_per_second"] for row in rows if row["way"] == "naive"}
    for row in rows:
        row["ratio_to_naive"] = row["inner_steps_per_second"] / naive[row["unroll"]]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rules", nargs="+", default=RULES)
    parser.add_argument("--ways", nargs="+", default=["replay", "pes"], choices=OBJECTIVE)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--unrolls", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("experiments/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cells = [("LSTMCell 2 x 20", "naive", 1, unroll) for unroll in args.unrolls]
    cells += [
        (rule, way, tasks, unroll)
        for rule in args.rules
        for way in args.ways
        for tasks in args.tasks
        for unroll in args.unrolls
    ]
    rows = measure(cells, args.repeats)
    for row in rows:
        print(
            "{rule:20} {way:9}{tasks:4}{unroll:4}{inner_steps_per_second:8.0f} /s"
            "{ratio_to_naive:7.1f} x{of_floor:6.2f}{peak_memory_mb:8.0f} MB".format(**row)
        )
    arguments = {k: v for k, v in vars(args).items() if k != "output"}
    save(args.output, "training_throughput", rows, arguments=arguments)


if __name__ == "__main__":
    main()
