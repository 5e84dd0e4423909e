"""Makes tables and a figure of README.md and docs/ from the suites of `learned-opt benchmark`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.pages.field import finals
from experiments.result_files import markdown_table, read
from learned_opt.benchmarking.report import meaning_of, overview_of
from learned_opt.benchmarking.stats import iqm, probability_of_improvement, stratified_bootstrap
from learned_opt.benchmarking.summary import runs

SUITES = ("digits", "mnist", "cifar", "text", "mixed")  # folders of results/benchmark
OVERVIEW = ("speed-up, steps", "speed-up, seconds", "× lower final loss", "P(lower final loss)",
            "P(lower mean loss)", "P(lower test loss)", "profile", "diverged")  # fmt: skip
SCORES = {
    "steps_speed_up": "speed-up, steps",
    "seconds_speed_up": "speed-up, seconds",
    "final_train_loss_ratio": "Adam's final loss / its",
    "mean_loss_ratio": "Adam's mean loss / its",
    "test_loss_ratio": "Adam's test loss / its",
}

PLAIN = {
    "cifar10_jpeg": "CIFAR-10",
    "ptb/ptb.valid.txt": "Penn Treebank",
    "mnist": "MNIST",
    " context=32": "",
    "norm=batch": "batch norm",
}
KINDS = {
    "logistic": "logistic regression",
    "matrix_factorization": "matrix factorization",
    "quadratic": "least squares",
}
# The entrants in the figure, with a color (of Okabe & Ito) and the name in the legend.
SHOWN = {
    "Adam cosine": ("#E69F00", "Adam, cosine (tuned)"),
    "SGD momentum": ("#999999", "SGD with momentum (tuned)"),
    "learned": ("#0072B2", "learned (nothing tuned)"),
}


def folders(results: Path) -> list[Path]:
    return [path for suite in SUITES if (path := results / "benchmark" / suite).exists()]


def benchmark(results: Path) -> str:
    """Returns tables of all held-out tasks, and of all tasks of each suite with results."""
    found = folders(results)
    held_out, chances = "held-out", [name for name in OVERVIEW if name.startswith("P(")]
    parts = [
        "**All held-out tasks** of all suites, compared with a tuned Adam",
        overview_of(found, OVERVIEW, held_out),
        "The same tasks, compared with Adam whose tuned learning rate follows a cosine to zero",
        overview_of(found, chances, held_out, "Adam cosine"),
    ]
    for path in found:
        parts += [heading(path), overview_of([path], OVERVIEW)]
    return "\n\n".join([*parts, *(meaning_of(path, OVERVIEW) for path in found[:1])])


def held_out(results: Path) -> list[dict]:
    """Returns the runs of all suites on held-out tasks, with their scores."""
    rows = []
    for path in folders(results):
        tasks = json.loads((path / "benchmark.json").read_text())["tasks"]
        labels = {task["label"] for task in tasks if task["family"].startswith("held-out")}
        files = read(path / "results.csv"), read(path / "scores.csv")
        together = (more | row for more, row in zip(*files, strict=True))
        rows += [row for row in together if row["task"] in labels]
    return rows


def headline(results: Path) -> str:
    """Returns a table of the main results of the shipped weights."""
    rows = held_out(results)
    steps = runs(rows, "learned", "steps_speed_up")
    turns = read(results / "paired_seconds.csv")
    tasks = list(dict.fromkeys(row["task"] for row in turns))
    seconds = np.array(
        [[float(r["seconds_speed_up"]) for r in turns if r["task"] == task] for task in tasks]
    )
    where = (
        f"{steps.shape[0]} small networks with data that the weights were not trained on, "
        f"{steps.shape[1]} runs each"
    )
    cost = {
        (r["parameters"], r["tensors"], r["optimizer"]): r for r in read(results / "throughput.csv")
    }
    step, behind = cost["1000000", "100", "geodesic_rnn as shipped"], missed(results)
    losses, tests = (finals("real_dev", f"{split}_loss") for split in ("validation", "test"))
    own, adamw = "learned num_steps", "AdamW warm-up cosine"
    ratios = {
        name: float(np.exp(np.log(x.mean(1) / losses[adamw].mean(1)).mean()))
        for name, x in losses.items()
    }
    others = [name for name in ratios if name != adamw and not name.startswith("learned")]
    best = min(others, key=ratios.get)
    chances = [float(probability_of_improvement(-x[own], -x[adamw])) for x in (losses, tests)]
    lines = [
        [f"Final validation loss of {len(losses[own])} networks, as people train them, after 2,000 "
         "to 3,000 steps, given `num_steps`; parts of the recipe were chosen on them",
         f"**{ratios[own]:.2f}** times that of a tuned AdamW with warm-up and cosine (tuned "
         f"{best}, the best of {len(others)} others: {ratios[best]:.2f} times)"],
        ["Probability of a lower final loss than that AdamW",
         f"{chances[0]:.2f} on validation data, {chances[1]:.2f} on test data"],
        [f"Short runs: steps to the final training loss of a tuned Adam, {where}",
         f"{_estimate(iqm, steps)} times fewer (interquartile mean: of the middle half)"],
        ["Seconds to the same loss, in interleaved runs",
         f"{_estimate(iqm, seconds)} times fewer (interquartile mean)"],
        ["Task kinds from its own training set on which most runs never reach a tuned Adam's loss",
         f"{len(behind)}: {', '.join(behind)}"],
        ["Cost of the optimizer, for 100 tensors of 10,000 parameters",
         f"A step takes {float(step['ratio_to_adam_foreach']):.1f} times as long as one of "
         "PyTorch's foreach Adam. The state has "
         f"{float(step['state_bytes_per_parameter']):.0f} bytes a parameter (Adam: 8)."],
    ]  # fmt: skip
    return markdown_table(["measure", "shipped weights, nothing tuned"], lines)


def missed(results: Path) -> list[str]:
    """Returns the kinds of training tasks whose median run does not reach Adam's loss."""
    found = []
    for path in folders(results):
        scores = [row for row in read(path / "scores.csv") if row["entrant"] == "learned"]
        for task in json.loads((path / "benchmark.json").read_text())["tasks"]:
            mine = [float(r["steps_speed_up"]) for r in scores if r["task"] == task["label"]]
            found += [KINDS.get(task["kind"], task["label"])] if np.median(mine) == 0 else []
    return found


def speed_ups(results: Path, picture: Path) -> None:
    """Plots the speed-up in steps of each run on held-out tasks, and the median of each task."""
    rows = held_out(results)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, (colour, label) in SHOWN.items():
        for place, values in enumerate(runs(rows, name, "steps_speed_up")):
            axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.3, ms=4, mew=0)
            axes.plot(np.median(values), place, "o", color=colour, ms=8,
                      label=label if place == 0 else None)  # fmt: skip
    axes.axvline(1, color="0.2", lw=1)
    axes.set_yticks(range(len(tasks)), [plain_name(task) for task in tasks])
    axes.invert_yaxis()
    axes.set(xlabel="times fewer steps to the final training loss of a tuned Adam (0: missed)")
    axes.set_xlim(left=-0.1)
    axes.grid(axis="x", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(picture, dpi=130, metadata={"Software": None})


def plain_name(task: str) -> str:
    """Returns a task's label for readers, which has the data and the network."""
    for old, new in PLAIN.items():
        task = task.replace(old, new)
    return task


def _estimate(statistic, scores: np.ndarray) -> str:
    low, high = stratified_bootstrap(statistic, scores)
    return f"**{float(statistic(scores)):.2f}** [{low:.2f}, {high:.2f}]"


def _lower(rows: list[dict], column: str, than: str) -> str:
    mine, theirs = (-runs(rows, name, column) for name in ("learned", than))
    return f"{float(probability_of_improvement(mine, theirs)):.2f}"


def heading(path: Path) -> str:
    families = [t["family"] for t in json.loads((path / "benchmark.json").read_text())["tasks"]]
    trained = families.count("in-family")
    return f"**{path.name}** (in-family: {trained or 'none'} of {len(families)} tasks)"


def task_by_task(results: Path) -> str:
    """Returns a table of each task's median run, for the untuned optimizer beside tuned Adam."""
    lines = []
    for path in folders(results):
        facts = json.loads((path / "benchmark.json").read_text())
        rows = [row for row in read(path / "scores.csv") if row["entrant"] == "learned"]
        for task in facts["tasks"]:
            mine = [row for row in rows if row["task"] == task["label"]]
            medians = (np.median([float(row[name]) for row in mine]) for name in SCORES)
            family, steps = task["family"], str(task["steps"])
            lines.append([task["label"], family, steps, *(f"{m:.2f}" for m in medians)])
    return markdown_table(["task", "relation to training", "steps", *SCORES.values()], lines)
