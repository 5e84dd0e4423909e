"""What do geodesics contribute? Compares the parts of the recipe on equal terms.

All arms share the rule, its initialization, the SGD runs and the families of tasks. Each arm has
about ten minutes of one core and three training seeds. The step sizes of the outer loop are those
of configs/train/mlps.yaml and are tuned for no arm. Paths join pairs T = 320 SGD steps apart with
K = 20 updates, under `sgd_profile`, where most chords of early pairs are infeasible. Rules run
untuned on the validation tasks and are compared with Adam, whose learning rate is tuned for each
task (results/validation).

    python -m experiments.training.ablation adam  # the baseline
    python -m experiments.training.ablation paths --arm geodesic  # its data, for all seeds
    python -m experiments.training.ablation run --arm geodesic --seed 0  # trains and evaluates
    python -m experiments.training.ablation run --arm initial
    python -m experiments.training.ablation held_out --arm geodesic --seed 0 \
        --data '{"cifar10": "cifar10_jpeg"}'  # once, with the suites' data
    python -m experiments.training.ablation table  # prints the table of all runs

`run` writes results/ablation/<arm>-<seed>.csv, with a row for each task and run. `held_out` writes
the same for the held-out tasks of the benchmark's suites into results/ablation/held_out, and
compares with the tuned Adam of results/benchmark. Weights and data sets are stored under --work.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from experiments.pages.benchmark_tables import folders
from experiments.result_files import RESULTS, ROOT, markdown, read, save
from experiments.training.generalization import (
    Adam,
    inner_steps,
    parse,
    rollout,
    tuned_rates,
    untrained,
    validation_tasks,
)
from geodesic.dataset import PathDataset
from learned_opt.benchmarking import BenchmarkConfig
from learned_opt.benchmarking.config import BenchmarkTask
from learned_opt.benchmarking.stats import (
    iqm,
    probability_of_improvement,
    smooth,
    steps_to_target,
    times_less,
)
from learned_opt.config import TeacherConfig, TrainConfig
from learned_opt.optimizer import LearnedOptimizer
from learned_opt.rules import UpdateRule
from learned_opt.run import run_optimizer
from learned_opt.target_paths import write_geodesics
from learned_opt.tasks.kinds import make_task
from learned_opt.weights import digest, load_rule

SHARDS = 24  # of 8 SGD runs each; geodesics under sgd_profile take minutes
LOOKS = {"every": 1}  # in all arms the network runs at each step, not at every tenth
# A step of coordinate-wise LSTMs costs about ten times more, so they have fewer tasks and only
# short runs of the small networks, as in generalization.py.
LSTM = {"rule": "coordinatewise_lstm", "rule_config": {}}
LARGE = {("mnist relu", 1000), ("cifar10 relu", 200), ("cifar10 relu", 1000)}
RESAMPLES = 2000
WEIGHTS = "weights.safetensors"
HELD_OUT_RUNS = 2  # the number of runs of each held-out task
PATHS = ("run", "time", "chord_feasible", "certified", "normalized_length")


@dataclass(frozen=True)
class Arm:
    """An arm of the comparison.

    Attributes:
        text: its name in tables.
        updates: the number of updates, which take about ten minutes of one core (EPYC).
        path: the kind of target paths; None for arms that do not imitate paths.
        change: changed settings of TrainConfig.
    """

    text: str
    updates: int
    path: str | None = None
    change: dict = field(default_factory=dict)


IMITATION, META = ("imitation",), ("meta_loss",)
BOTH = ("imitation", "meta_loss", "meta_loss")
ADAM = TeacherConfig("Adam", lr=0.01, steps=4, length=100)
ARMS = {
    "adam_teacher": Arm("imitation of Adam, four steps an update", 480, None, {
        "objectives": ("torch_imitation",), "teacher": ADAM}),
    "adam_meta": Arm("Adam's steps and meta-loss", 1020, None, {
        "objectives": ("torch_imitation", "meta_loss", "meta_loss"), "teacher": ADAM}),
    "trajectory": Arm("imitation of SGD's own path", 780, "trajectory", {"objectives": IMITATION}),
    "chord": Arm("imitation of chords", 780, "chord", {"objectives": IMITATION}),
    "geodesic_off": Arm("imitation of geodesics, off policy", 840, "geodesic", {
        "objectives": IMITATION, "teacher_share": (1.0, 1.0)}),
    "geodesic": Arm("imitation of geodesics", 780, "geodesic", {"objectives": IMITATION}),
    "trajectory_meta": Arm("SGD's own path and meta-loss", 1260, "trajectory", {
        "objectives": BOTH}),
    "chord_meta": Arm("chords and meta-loss", 1260, "chord", {"objectives": BOTH}),
    "geodesic_meta": Arm("geodesics and meta-loss", 1260, "geodesic", {"objectives": BOTH}),
    "meta": Arm("meta-loss", 1560, None, {"objectives": META}),
    "pes": Arm("meta-loss by PES", 1560, None, {"objectives": ("pes",)}),
    "lstm_geodesic": Arm("L2L's LSTM, imitation of geodesics", 360, "geodesic", {
        "objectives": IMITATION} | LSTM),
    "lstm_meta": Arm("L2L's LSTM, meta-loss", 2280, None, {"objectives": META} | LSTM),
}  # fmt: skip
INITIAL = "initial"  # the arm without training


def config_of(name: str, seed: int, work: Path) -> TrainConfig:
    arm, config = ARMS[name], parse(TrainConfig, "configs/train/mlps.yaml")
    targets = replace(config.geodesics.targets, level="sgd_profile", path=arm.path or "geodesic")
    change = {"rule_config": config.rule_config | LOOKS} | arm.change
    if "rule" in arm.change:
        change["family"] = replace(config.family, num_tasks=2, input_sizes=(16, 64, 256, 784))
    return replace(
        config,
        geodesics=replace(config.geodesics, targets=targets, num_shards=SHARDS),
        dataset=str(work / f"paths-{arm.path}"),
        updates=arm.updates,
        seed=seed,
        **change,
    )


def adam() -> None:
    """Runs tuned Adam with the same initial points and minibatches as the rules."""
    tuned, rows = tuned_rates(), []
    for label, (task, marks) in validation_tasks().items():
        for mark in marks:
            lr = tuned[label, mark]
            found, losses = rollout(task, Adam(lr), [mark])
            targets = smooth(losses)[:, -1]
            steps = steps_to_target(losses, targets)
            rows += [
                {"task": label} | row | {"lr": lr, "target_loss": t, "steps_to_target": s}
                for row, t, s in zip(found, targets, steps, strict=True)
            ]
    save(RESULTS / "ablation", "adam", rows)


def paths(data: PathDataset, path: str) -> None:
    """Writes a row for each pair of a data set, with facts of its target path."""
    rows = []
    for index in range(len(data)):
        shard = data.shard(index)
        for pair in range(len(shard["run"])):
            rows.append({"shard": index} | {name: shard[name][pair].item() for name in PATHS})
    save(RESULTS / "ablation", f"paths-{path}", rows)


def measure(rule: UpdateRule, skip: set = frozenset()) -> list[dict]:
    """Returns the rows of all validation tasks, with the steps and speed-up to Adam's loss."""
    base = defaultdict(list)
    for row in read(RESULTS / "ablation" / "adam.csv"):
        base[row["task"], int(row["steps"])].append(row)
    rows = []
    for label, (task, marks) in validation_tasks().items():
        if not (kept := [m for m in marks if (label, m) not in skip]):
            continue
        found, losses = rollout(task, rule, kept)
        for mark in kept:
            targets, reference = (
                np.array([float(row[name]) for row in base[label, mark]])
                for name in ("target_loss", "steps_to_target")
            )
            steps = steps_to_target(losses[:, :mark], targets)
            speed_up = times_less(reference, steps)
            own = [row for row in found if row["steps"] == mark]
            rows += [
                {"task": label} | row | {"steps_to_target": s, "speed_up": x}
                for row, s, x in zip(own, steps, speed_up, strict=True)
            ]
    return rows


def run(name: str, seed: int, work: Path) -> None:
    if name == INITIAL:
        return save(RESULTS / "ablation", "initial-0", measure(untrained(**LOOKS)))
    from learned_opt.training.stages import train

    config, folder = config_of(name, seed, work), work / f"{name}-{seed}"
    fresh, start = not folder.exists(), time.process_time()
    train(config, folder)
    seconds = time.process_time() - start if fresh else None  # unknown where it was resumed
    rule = load_rule(folder / WEIGHTS)
    rows = measure(rule, skip=LARGE if "rule" in ARMS[name].change else frozenset())
    facts = {
        "training_core_seconds": seconds,
        "inner_steps": inner_steps(config),
        "updates": config.updates,
        "weights": digest(rule.name, rule.config, rule.state_dict()),
    }
    return save(RESULTS / "ablation", f"{name}-{seed}", rows, **facts)


def held_out(name: str, seed: int, work: Path, data: dict[str, str]) -> None:
    """Writes the speed-ups to tuned Adam's final loss on the held-out tasks of the suites."""
    rule = untrained(**LOOKS) if name == INITIAL else load_rule(work / f"{name}-{seed}" / WEIGHTS)
    rows = []
    wanted = [
        (entry, theirs)
        for folder in folders(RESULTS)
        for entry, theirs in held_out_tasks(folder, data)
    ]
    for entry, theirs in wanted:
        task = make_task(entry.task)
        for adam in theirs[:HELD_OUT_RUNS]:
            trained = run_optimizer(
                task,
                lambda p: LearnedOptimizer(p, weights=rule),
                int(adam["seed"]),
                entry.steps,
            )
            steps = steps_to_target(trained.losses, float(adam["target_loss"]))
            rows.append({
                "task": entry.label,
                "steps": entry.steps,
                "run": adam["seed"],
                "final_train_loss": trained.evaluation["train_loss"],
                "steps_to_target": float(steps),
                "speed_up": float(times_less(float(adam["steps_to_target"]), steps)),
            })  # fmt: skip
    weights = digest(rule.name, rule.config, rule.state_dict())
    save(RESULTS / "ablation" / "held_out", f"{name}-{seed}", rows, weights=weights)


def held_out_tasks(
    folder: Path, data: dict[str, str]
) -> list[tuple[BenchmarkTask, list[dict[str, str]]]]:
    """Returns the held-out entries of a suite, and the rows of its tuned Adam for each."""
    adams = [row for row in read(folder / "scores.csv") if row["entrant"] == "Adam"]
    config = parse(BenchmarkConfig, f"configs/benchmark/{folder.name}.yaml")
    named = {entry.task.data for entry in config.tasks}
    config = replace(config, data={k: v for k, v in data.items() if k in named})
    entries = [entry for entry in config.tasks if entry.family.startswith("held-out")]
    found = [(e, [row for row in adams if row["task"] == e.label]) for e in entries]
    if missing := [entry.label for entry, rows in found if not rows]:
        raise SystemExit(f"{folder} has no {missing}; use the --data with which it was made")
    return found


def interval(statistic: Callable[..., np.ndarray], *scores: np.ndarray) -> str:
    """Returns statistic(scores) and its 95 % bootstrap interval, for scores (seeds, tasks, runs).

    The bootstrap resamples training seeds, and then the runs of each.
    """
    rng, drawn = np.random.default_rng(0), []
    for values in scores:
        seeds, tasks, runs = values.shape
        which = rng.integers(seeds, size=(RESAMPLES, seeds))[:, None, :, None]
        run = rng.integers(runs, size=(RESAMPLES, tasks, seeds, runs))
        resampled = values[which, np.arange(tasks)[:, None, None], run]
        drawn.append(resampled.reshape(RESAMPLES, tasks, -1))
    # nearest: of two runs that diverged there is no mean
    low, high = np.percentile(statistic(*drawn), [2.5, 97.5], method="nearest")
    value = statistic(*(v.swapaxes(0, 1).reshape(v.shape[1], -1) for v in scores))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def geometric_mean(x: np.ndarray) -> np.ndarray:
    return np.exp(np.log(x).mean((-2, -1)))


def load(folder: Path) -> dict[str, list[list[dict[str, str]]]]:
    """Returns a dict from the arm to the rows of each training seed."""
    names = {name: sorted(folder.glob(f"{name}-[0-9].csv")) for name in (INITIAL, *ARMS)}
    return {name: [read(path) for path in paths] for name, paths in names.items() if paths}


def column(seeds: list[list[dict[str, str]]], name: str, tasks: list[tuple]) -> np.ndarray:
    """Returns a column as (training seeds, tasks, runs)."""
    values = np.array([
        [[float(r[name]) for r in rows if (r["task"], r["steps"]) == task] for task in tasks]
        for rows in seeds
    ])  # fmt: skip
    return np.where(np.isnan(values), np.inf, values)  # for runs that diverged


def tasks_of(seeds: list[list[dict[str, str]]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((r["task"], r["steps"]) for r in seeds[0]))


def speed_up(seeds: list[list[dict[str, str]]]) -> str:
    return interval(iqm, column(seeds, "speed_up", tasks_of(seeds)))


def table() -> str:
    """Returns a table with a row for each arm; LSTMs have only the tasks that they ran on."""
    folder = RESULTS / "ablation"
    base, away, lines = read(folder / "adam.csv"), load(folder / "held_out"), []
    for name, seeds in load(folder).items():
        tasks = tasks_of(seeds)
        mean, final, rise = (
            column(seeds, key, tasks) for key in ("mean_loss", "final_train_loss", "largest_rise")
        )
        adams = [column([base], key, tasks) for key in ("mean_loss", "final_train_loss")]
        chances = [
            interval(probability_of_improvement, -own, -other)
            for own, other in zip((mean, final), adams, strict=True)
        ]
        times = [
            interval(geometric_mean, own / other)
            for own, other in zip((mean, final), adams, strict=True)
        ]
        facts = [json.loads(f.read_text()) for f in sorted(folder.glob(f"{name}-[0-9].json"))]
        minutes = [s / 60 for f in facts if (s := f.get("training_core_seconds"))]
        held_out_speed_up = speed_up(away[name]) if name in away else "–"
        lines.append({
            "arm": "no training" if name == INITIAL else ARMS[name].text,
            "training seeds": len(seeds),
            "core-minutes": f"{np.mean(minutes):.1f}" if minutes else "–",
            "speed-up, steps": speed_up(seeds),
            **({"speed-up, held-out tasks": held_out_speed_up} if away else {}),
            "mean loss / Adam's": times[0],
            "final loss / Adam's": times[1],
            "P(lower mean loss)": chances[0],
            "P(lower final loss)": chances[1],
            "largest rise": f"{rise.max():.2g}",
            "diverged": f"{(~np.isfinite(final)).sum()} of {final.size}",
        })  # fmt: skip
    return markdown(lines)


def paths_table() -> str:
    """Returns a table of the geodesic targets beside chords, by the step at which pairs begin."""
    groups = defaultdict(list)
    for row in read(RESULTS / "ablation" / "paths-geodesic.csv"):
        groups[int(row["time"])].append(row)
    return markdown([
        {
            "pairs from step": time,
            "pairs": len(rows),
            "chord infeasible": f"{np.mean([r['chord_feasible'] == 'False' for r in rows]):.0%}",
            "certified": f"{np.mean([r['certified'] == 'True' for r in rows]):.0%}",
            "length / chord, mean": f"{np.mean([float(r['normalized_length']) for r in rows]):.3f}",
        }
        for time, rows in sorted(groups.items())
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["adam", "paths", "run", "held_out", "table"])
    parser.add_argument("--arm", choices=[*ARMS, INITIAL], default="geodesic")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "ablation")
    parser.add_argument("--data", type=json.loads, default={}, help="as in learned-opt benchmark")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "adam":
        adam()
    elif args.command == "paths":
        config = config_of(args.arm, args.seed, args.work)
        write_geodesics(config.geodesics, config.dataset)
        paths(PathDataset.open(config.dataset), ARMS[args.arm].path)
    elif args.command == "table":
        print(table())
    elif args.command == "held_out":
        held_out(args.arm, args.seed, args.work, args.data)
    else:
        run(args.arm, args.seed, args.work)


if __name__ == "__main__":
    main()
