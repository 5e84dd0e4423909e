"""Writes the tables of README.md and docs/ and two figures from the committed results.

python -m experiments.pages.readme           # rewrites the pages, validation.png and speed_up.png
python -m experiments.pages.readme --check   # exits with code 1 if a page is not up to date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict

import numpy as np

from experiments.geodesics.certificates import table as certificates_table
from experiments.geodesics.comparison import table as comparison_table
from experiments.geodesics.feasibility import readme_table as feasibility_table
from experiments.geodesics.feasibility import table as trajectories_table
from experiments.geodesics.figure1 import SETTINGS as FIGURE1
from experiments.geodesics.predictability import width_table
from experiments.geodesics.throughput import pairs_table, scaling_table
from experiments.optimizer.contract import table as contract_table
from experiments.optimizer.odd_nets import table as odd_nets_table
from experiments.pages.benchmark_tables import benchmark, headline, speed_ups, task_by_task
from experiments.pages.field import ends, going_on
from experiments.result_files import RESULTS, ROOT, markdown_table, read
from experiments.speed.paired_seconds import table as seconds_table
from experiments.training.ablation import paths_table
from experiments.training.ablation import table as ablation_table
from experiments.training.l2l import section as l2l_section
from experiments.training.throughput_tables import (
    growth_table,
    memory_table,
    shares_table,
    speed_table,
    weak_table,
)
from learned_opt.benchmarking.stats import probability_of_improvement

PICTURE = ROOT / "docs" / "validation.png"
ARMS = {  # the files of results/generalization, and their names on the pages
    "shipped": "**first generation**",
    "second": "its second stage alone",
    "mlps": "its first stage",
    "l2l": "L2L LSTM",
    "initial": "untrained rule",
    "scaled": "untrained, step tuned",
}
BASELINES = ("Adam (tuned)", "SGD momentum (tuned)", "Adam 1e-3")
METRICS = ("final_train_loss", "mean_loss")
LONG = ("final_train_loss", "largest_rise", "largest_rise_minibatches")
# The colors of Okabe and Ito, which color-blind people can distinguish.
COLOURS = {"shipped": "#D55E00", "second": "#0072B2", "mlps": "#E69F00", "l2l": "#CC79A7"}

Cells = dict[tuple[str, str], dict[str, np.ndarray]]  # (task, steps) -> entrant -> (seeds, 2)


def load() -> Cells:
    """Returns means over runs, for each training seed if a rule has several."""
    groups: dict = defaultdict(list)
    for row in read(RESULTS / "validation" / "results.csv"):
        if row["entrant"] in BASELINES:
            key = (row["task"].rsplit(" ", 1)[0], row["steps"])
            groups[key, row["entrant"], ""].append([float(row[m]) for m in METRICS])
    for path in sorted((RESULTS / "generalization").glob("*-[0-9].csv")):
        arm, seed = path.stem.rsplit("-", 1)
        for row in read(path):
            groups[(row["task"], row["steps"]), arm, seed].append([float(row[m]) for m in METRICS])
    cells: dict = defaultdict(lambda: defaultdict(list))
    for (key, entrant, _), values in groups.items():
        cells[key][entrant].append(np.mean(values, axis=0))
    return {k: {e: np.array(v) for e, v in row.items()} for k, row in cells.items()}


def results(cells: Cells) -> str:
    scale = json.loads((RESULTS / "generalization" / "scaled-0.json").read_text())["scale"]
    return (
        "Each cell shows the final loss on all training data / the mean loss over the run, as "
        "means of 5 runs. Columns of trained rules are means over training seeds ("
        + seeds_text(cells)
        + "), ± the standard deviation of the final losses. Learning rates are tuned for the final "
        "loss. *Untrained, step tuned* multiplies the untrained rule's step by the factor that "
        f"gives the lowest mean loss on these very runs. The best factor is {scale:g}"
        + (", so its column equals that of the untrained rule.\n\n" if scale == 1 else ".\n\n")
        + losses(cells, {b: b for b in BASELINES} | ARMS)
        + "\n\n![Losses of the learned rules relative to tuned Adam](validation.png)\n\n"
        + long_runs()
    )


def losses(cells: Cells, entrants: dict[str, str]) -> str:
    """Returns a table with a row for each task and a column for each of `entrants` with results."""
    entrants = {e: t for e, t in entrants.items() if any(e in row for row in cells.values())}
    rows = []
    for (task, steps), row in cells.items():
        line = [f"{task}, {steps}"]
        for entrant in entrants:
            seeds = row.get(entrant)
            if seeds is None:
                line.append("–")
                continue
            final, mean = seeds.mean(0)
            spread = f" ± {seeds[:, 0].std(ddof=1):.1g}" if len(seeds) > 1 else ""
            line.append(f"{final:.3g}{spread} / {mean:.3g}")
        rows.append(line)
    return markdown_table(["task, steps", *entrants.values()], rows)


def seeds_text(cells: Cells) -> str:
    """Returns how many training seeds each arm has."""
    counts = {a: max(len(row.get(a, ())) for row in cells.values()) for a in COLOURS}
    return ", ".join(f"{ARMS[a].strip('*')} {n}" for a, n in counts.items() if n)


def long_runs() -> str:
    """Returns a table of first-generation weights and Adam, with its best rate for each row."""
    learned, adam = (
        {key: np.array(runs) for key, runs in grouped(name, *columns).items()}
        for name, columns in (("long", ()), ("long_adam", ("lr",)))
    )

    def show(runs: np.ndarray) -> tuple[str, ...]:
        return f"{runs[:, 0].mean():.2g}", *(f"{rise:.3g}" for rise in runs[:, 1:].max(0))

    lines = []
    for key, mine in learned.items():
        rates = (runs for k, runs in adam.items() if k[:2] == key)
        other = min(rates, key=lambda runs: runs[:, 0].mean())
        lower = probability_of_improvement(-mine[:, :1].T, -other[:, :1].T)
        bad = np.sum(~np.isfinite(mine[:, 0]))
        (loss, *rises), (adams_loss, *adams_rises) = show(mine), show(other)
        (rise, adams_rise), (small, adams_small) = zip(rises, adams_rises, strict=True)
        figures = loss, adams_loss, f"{lower:.2f}", rise, adams_rise, small, adams_small
        lines.append([*key, *figures, f"{bad} of {len(mine)}"])
    return (
        "The next table shows runs of these weights that are far longer than their training "
        "runs. It compares training losses, with Adam at a constant rate: the best of the rate "
        "that was tuned for short runs, that rate times 0.3, and that rate times 0.1. None "
        "of them has a schedule, and validation losses were not measured. *P* is the "
        "probability that a run's final loss is lower than that of a run of Adam. "
        "*Largest rise* is the factor by which the loss on all training data, plus .001, rises "
        "above its running minimum; it is measured every 100 steps. *Minibatches* is the same "
        "factor for means of 100 minibatch losses. It is mostly noise: a network that no "
        "longer moves shows it as well.\n\n"
        + markdown_table(["task", "steps", "final loss", "Adam's", "P(lower)", "largest rise",
                          "Adam's", "minibatches", "Adam's", "diverged"], lines)
    )  # fmt: skip


def grouped(name: str, *columns: str) -> dict[tuple[str, ...], list[list[float]]]:
    """Returns a dict from (task, steps, *columns) to each run's final loss and largest rises."""
    groups: dict = defaultdict(list)
    for row in read(RESULTS / "generalization" / f"{name}.csv"):
        key = tuple(row[column] for column in ("task", "steps", *columns))
        groups[key].append([float(row[column]) for column in LONG])
    return groups


def picture(cells: Cells) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for metric, (axis, title) in enumerate(
        zip(axes, ("final training loss", "mean loss over the run"), strict=True)
    ):
        for i, row in enumerate(cells.values()):
            base = row["Adam (tuned)"][0, metric]
            for arm, colour in COLOURS.items():
                if arm in row:
                    ratios = row[arm][:, metric] / base
                    axis.plot(ratios, [i] * len(ratios), "o", color=colour, alpha=0.45, ms=4, mew=0)
                    name = ARMS[arm].strip("*") if i == 0 else None
                    axis.plot(ratios.mean(), i, "o", color=colour, ms=8, label=name)
            ratio = row["SGD momentum (tuned)"][0, metric] / base
            label = "SGD momentum (tuned)" if i == 0 else None
            axis.plot(ratio, i, "|", color="0.4", ms=14, mew=2, label=label)
        axis.axvline(1, color="0.2", lw=1)
        axis.set(xscale="log", title=title)
        low, high = axis.get_xlim()
        few = high > 100 * low  # three labels per decade would overlap
        axis.xaxis.set_major_locator(LogLocator(subs=(1,) if few else (1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="x", color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(cells)), [f"{task}, {steps} steps" for task, steps in cells])
    axes[0].invert_yaxis()
    figure.supxlabel("relative to tuned Adam, less is better", fontsize="medium")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3,
                  frameon=False)  # fmt: skip
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=130, metadata={"Software": None})


def throughput() -> str:
    lines = [
        [
            row["optimizer"],
            f"{int(row['parameters']):,}",
            row["tensors"],
            f"{float(row['ms']):.3g}",
            f"{float(row['ratio_to_adam_foreach']):.3g}",
            f"{float(row['state_bytes_per_parameter']):.0f}",
        ]
        for row in read(RESULTS / "throughput.csv")
        if int(row["parameters"]) == 1_000_000
    ]
    header = [
        "optimizer",
        "parameters",
        "tensors",
        "ms",
        "× Adam foreach",
        "state, bytes/parameter",
    ]
    return markdown_table(header, lines)


def memory() -> str:
    lines = [
        [row["optimizer"], row["tensors"], f"{float(row['peak_bytes_per_parameter']):.0f}"]
        for row in read(RESULTS / "throughput_memory.csv")
    ]
    header = ["optimizer", "tensors of 10,000,000 parameters", "peak, bytes/parameter"]
    return markdown_table(header, lines)


def training() -> str:
    path = RESULTS / "throughput_training.csv"
    lines = [
        [row["task"], f"{int(row['parameters']):,}", row["tensors"], f"{float(row['ms']):.3g}",
         f"{float(row['ratio_to_adam_foreach']):.2f}"]
        for row in (read(path) if path.exists() else ())
        if row["optimizer"] == "geodesic_rnn"
    ]  # fmt: skip
    return markdown_table(
        ["task", "parameters", "tensors", "ms", "training step, × Adam foreach"], lines
    )


def figure1() -> str:
    """Returns a table of means over pairs for each level with results."""
    lines = []
    for name, setting in FIGURE1.items():
        path = RESULTS / "figure1" / f"{name}.csv"
        groups: dict = defaultdict(list)
        for row in read(path) if path.exists() else ():
            groups[float(row["level"]), row["method"]].append(row)
        for level in sorted({level for level, _ in groups}):
            sampled, shortened = (groups[level, method] for method in ("DSS", "shortened"))
            found = [row for row in sampled if row["found"] == "1"]
            lines.append(
                [
                    name,
                    f"{level:g}",
                    f"{setting.lengths[level]:.3f}",
                    _mean(found, "normalized_length_weights"),
                    f"{setting.beads.get(level, '')}",
                    _mean(found, "beads"),
                    _mean(found, "normalized_length"),
                    _mean([r for r in shortened if r["found"] == "1"], "normalized_length"),
                    f"{len(found)} of {len(sampled)}",
                ]
            )
    header = ["F", "level", "length, published", "length, DSS", "beads, published", "beads, DSS",
              "length in all parameters, DSS", "length in all parameters, shortened",
              "pairs connected"]  # fmt: skip
    return markdown_table(header, lines)


def _mean(rows: list[dict[str, str]], column: str) -> str:
    values = [float(row[column]) for row in rows]
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{np.mean(values):.3f} ± {spread:.2f}" if values else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    cells = load()
    blocks = {
        "headline": headline(RESULTS),
        "real_dev": ends("real_dev"),
        "going_on_dev": going_on("going_on_dev"),
        "results": results(cells),
        "feasibility": feasibility_table(),
        "trajectories": trajectories_table(),
        "throughput": throughput(),
        "memory": memory(),
        "training": training(),
        "figure1": figure1(),
        "comparison": comparison_table(RESULTS / "geodesics_comparison.csv"),
        "scaling": scaling_table(RESULTS),
        "pairs": pairs_table(RESULTS),
        "width": width_table(),
        "contract": contract_table(RESULTS / "contract.csv"),
        "l2l": l2l_section(),
        "ablation": ablation_table(),
        "ablation_paths": paths_table(),
        "benchmark": benchmark(RESULTS),
        "task_by_task": task_by_task(RESULTS),
        "seconds": seconds_table(RESULTS),
        "training_speed": speed_table(RESULTS),
        "training_shares": shares_table(RESULTS),
        "training_memory": memory_table(RESULTS),
        "training_growth": growth_table(RESULTS),
        "weak_scaling": weak_table(RESULTS),
        "odd_nets": odd_nets_table(),
        "certificates": certificates_table(),
    }
    docs = ROOT / "docs"
    pages = ("geodesic_studies.md", "contract.md", "recipes.md", "l2l.md", "training_speed.md",
             "model_card.md", "ablation.md", "results.md", "performance.md",
             "robustness.md")  # fmt: skip
    for page in (ROOT / "README.md", *(docs / name for name in pages)):
        before = page.read_text()
        text = re.sub(
            r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)",
            lambda match: f"{match[1]}{blocks[match[2]]}\n{match[3]}",
            before,
            flags=re.DOTALL,
        )
        if check and text != before:
            sys.exit(f"{page.name} does not match the results; run experiments/pages/readme.py")
        if not check:
            page.write_text(text)
    if not check:
        picture(cells)
        speed_ups(RESULTS, ROOT / "docs" / "speed_up.png")


if __name__ == "__main__":
    main()
