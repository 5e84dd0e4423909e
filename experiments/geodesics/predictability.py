"""Are smooth paths predictable? Are level sets of wider networks more connected?

`imitate` cuts SGD runs of small MLPs on digits into pairs θ_a = θ_t, θ_b = θ_{t+T}. It joins each
pair by the geodesic below SGD's own falling loss, by the chord, and by SGD's path, and cuts each of
these into K steps of equal length. The same RNN learns each kind of path off policy, on the same
pairs and from the same seeds. Its error on held-out pairs is compared with the paths' turning
angle.

`width` is described in connectivity.py.

    python -m experiments.geodesics.predictability imitate
    python -m experiments.geodesics.predictability width
    python -m experiments.geodesics.predictability plot   # docs/predictability.png; prints tables

These commands write predictability.csv, with a row for each held-out pair, kind and training seed,
and width.csv, with a row for each pair, level and alignment. A .json file beside each says how it
was made.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from experiments.geodesics.connectivity import WIDTHS, cells, outcome, width, width_table
from experiments.result_files import RESULTS, ROOT, markdown_table, read, save
from geodesic.path import normalized_length
from geodesic.targets import TargetConfig, consecutive_pairs, run_teacher, solve_pairs, target_paths
from learned_opt.config import GeodesicsConfig
from learned_opt.rules import UpdateRule, make_rule
from learned_opt.target_paths import make_problem
from learned_opt.tasks.base import generator, seed_of
from learned_opt.tasks.families import FamilyConfig, sample_tasks
from learned_opt.tasks.mlp import MLPTask
from learned_opt.training.objectives.imitation import HUBER, imitation_loss
from learned_opt.training.objectives.replay import sum_by_tensor

PICTURE = ROOT / "docs" / "predictability.png"
KINDS = ("geodesic", "chord", "SGD")
RULE = {"hidden": 16, "per": "tensor"}
HELD_OUT = 1000  # shards from this number on are never trained on
STREAMS = 3  # the number of streams of minibatches over which an error is averaged
# Paths bend at the start of training; later nearly every chord is feasible. The networks are small
# because there are many of them: everything takes ten minutes on one core.
CONFIG = GeodesicsConfig(
    family=FamilyConfig(num_tasks=4, hidden_layers=(1, 2), width=(8, 16), batch_sizes=(64, 128),
                        input_sizes=(16,), projection_probability=1.0),
    targets=TargetConfig(80, 10, pairs_per_run=2, stride=4, level="sgd_profile", num_segments=20),
    evaluation_size=128,
)  # fmt: skip


def turning_angle(path: Tensor) -> Tensor:
    """Returns the sum of angles between segments in radians, (..., K + 1, d) -> (...)."""
    unit = torch.nn.functional.normalize(path.double().diff(dim=-2), dim=-1)
    before, after = unit[..., :-1, :], unit[..., 1:, :]
    # Kahan's formula, because acos would turn rounding errors of a straight float32 path into 3e-4.
    return 2 * torch.atan2((before - after).norm(dim=-1), (before + after).norm(dim=-1)).sum(-1)


def make_shard(config: GeodesicsConfig, index: int) -> dict | None:
    """Returns the same pairs joined in three ways.

    The shard has the paths by kind, the number of valid steps of each run, and facts of the pairs.
    A run ends before its first pair without a certified geodesic.
    """
    problem, targets = make_problem(config, index), config.targets
    trajectory = run_teacher(problem, targets.horizon * targets.pairs_per_run, targets.stride)
    pairs = consecutive_pairs(trajectory, targets.horizon)
    if not len(pairs.run):
        return None
    found = solve_pairs(problem, pairs, targets.level, targets.num_segments)
    straight = pairs.points[:, [0, -1]]
    geodesics = zip(found.path, straight, found.chord_feasible, strict=True)
    paths_of = {
        "geodesic": [end if chord else path for path, end, chord in geodesics],
        "chord": list(straight),
        "SGD": list(pairs.points),
    }
    shard = {"index": index, "run": pairs.run, "found": found, "points": {}}
    for kind, paths in paths_of.items():
        sizes = torch.tensor([0] + [len(path) for path in paths])
        tensors = {"beads": torch.cat(paths), "bead_offsets": sizes.cumsum(0),
                   "run": pairs.run, "certified": found.certified}  # fmt: skip
        runs = len(problem.theta)
        shard["points"][kind], shard["lengths"] = target_paths(tensors, targets.updates, runs)
    shard["position"] = pairs.start // (targets.horizon // targets.stride)
    real = shard["lengths"][pairs.run]
    return shard | {"used": (shard["position"] + 1) * targets.updates <= real}


def count(shards: list[dict]) -> dict[str, int]:
    """Counts the pairs by outcome; `after_one` are certified, but follow one that is not."""
    total = Counter({"draws": len(shards)})
    for shard in shards:
        found, used = shard["found"], shard["used"]
        total["pairs"] += len(used)
        total["chord_feasible"] += int((found.chord_feasible & used).sum())
        total["shortened"] += int((~found.chord_feasible & used).sum())
        total["not_certified"] += int((~found.certified).sum())
        total["after_one"] += int((found.certified & ~used).sum())
    return dict(total)


def task_of(config: GeodesicsConfig, index: int) -> MLPTask:
    return sample_tasks(config.family, ("train", config.seed, index), config.data_root)


def train(
    config: GeodesicsConfig, shards: list[dict], kind: str, seed: int, updates: int
) -> UpdateRule:
    """Returns a rule trained on `kind`; the seed alone determines shards and minibatches."""
    torch.manual_seed(seed)
    rule = make_rule("geodesic_rnn", **RULE)
    optimizer = torch.optim.Adam(rule.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, updates)
    order = torch.randint(len(shards), (updates,), generator=generator("order", seed)).tolist()
    for number, which in enumerate(tqdm(order, f"{kind} {seed}", mininterval=10)):
        shard = shards[which]
        loss = imitation_loss(
            rule, task_of(config, shard["index"]), shard["points"][kind], shard["lengths"],
            0, student_drives=False, key=("predictability", seed, number),
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rule.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return rule


@torch.no_grad()
def errors(
    rule: UpdateRule, task: MLPTask, points: Tensor, updates: int, key: tuple
) -> tuple[Tensor, Tensor]:
    """Returns the imitation loss and Σ|u − target|² / Σ|target|² of each pair, (runs, pairs).

    The imitation loss is .487 for updates of zero.
    """
    state = rule.init_state(points[:, 0], task.shapes)
    sizes = points.new_tensor(state.layout.sizes)
    losses, squares = [], []
    for step in range(points.shape[1] - 1):
        theta, ahead = points[:, step], points[:, step + 1] - points[:, step]
        _, grad = task.loss_and_grad(theta, task.batch(seed_of(*key), step))
        update, state = rule.update(grad, theta, state)
        error, scale = (
            sum_by_tensor(x.square(), state.layout).view(len(points), -1)
            for x in (update - ahead, ahead)
        )
        loss = HUBER**2 * ((1 + error / scale.clamp(min=1e-20) / HUBER**2).sqrt() - 1)
        losses.append((loss * sizes).sum(1) / sizes.sum())
        squares.append(torch.stack([error.sum(1), scale.sum(1)]))
    squares = torch.stack(squares, -1).unflatten(-1, (-1, updates)).sum(-1)
    return torch.stack(losses, -1).unflatten(-1, (-1, updates)).mean(-1), squares[0] / squares[1]


def evaluate(
    config: GeodesicsConfig, shard: dict, rule: UpdateRule, kind: str, seed: int
) -> list[dict]:
    """Evaluates a rule on the held-out shards, and returns a row for each pair."""
    task, updates, points = task_of(config, shard["index"]), config.targets.updates, shard["points"]
    streams = [
        errors(rule, task, points[kind], updates, ("held out", shard["index"], i))
        for i in range(STREAMS)
    ]
    error, relative = (torch.stack(values).mean(0) for values in zip(*streams, strict=True))
    rows = []
    for i in shard["used"].nonzero().squeeze(1).tolist():
        run, position = int(shard["run"][i]), int(shard["position"][i])
        path = points[kind][run, position * updates : (position + 1) * updates + 1]
        rows.append(
            {
                "kind": kind,
                "seed": seed,
                "draw": shard["index"],
                "run": run,
                "position": position,
                "chord_feasible": int(shard["found"].chord_feasible[i]),
                "error": round(float(error[run, position]), 5),
                "relative_squared_error": round(float(relative[run, position]), 5),
                # Rounded, so that straight paths tie and are not ranked by rounding errors.
                "turning_angle": round(float(turning_angle(path)), 3),
                "normalized_length": round(float(normalized_length(path)), 5),
            }
        )
    return rows


def imitate(
    output: Path, config: GeodesicsConfig, draws: int, held_out: int, seeds: int, updates: int
) -> None:
    indices = (range(draws), range(HELD_OUT, HELD_OUT + held_out))
    trained, tested = (
        [shard for i in tqdm(part, "pairs") if (shard := make_shard(config, i))] for part in indices
    )
    rows, usable = [], [shard for shard in trained if shard["used"].any()]
    for seed in range(seeds):
        for kind in KINDS:
            rule = train(config, usable, kind, seed, updates)
            rows += [row for shard in tested for row in evaluate(config, shard, rule, kind, seed)]
    facts = {"updates": updates, "seeds": seeds, "rule": RULE, "config": asdict(config)}
    facts |= {"trained_on": count(trained), "held_out": count(tested)}
    save(output, "predictability", rows, **facts)


def load(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Returns the columns of predictability.csv, (seeds, pairs), by kind and by difference."""
    rows = read(folder / "predictability.csv")
    rows.sort(key=lambda row: [int(row[k]) for k in ("seed", "draw", "run", "position")])
    seeds = len({row["seed"] for row in rows})
    data = {
        kind: {
            name: np.array([float(r[name]) for r in rows if r["kind"] == kind]).reshape(seeds, -1)
            for name in list(rows[0])[1:]
        }
        for kind in KINDS
    }
    for kind in KINDS[1:]:
        pair = data[kind], data["geodesic"]
        data[f"{kind} − geodesic"] = {name: pair[0][name] - pair[1][name] for name in pair[0]}
    return data


def interval(statistic: Callable, seeds: int, draw: np.ndarray) -> str:
    """Returns statistic(seeds, pairs), given indices, and its 95 % bootstrap interval.

    The bootstrap resamples training seeds and draws of the family, but not pairs, because the pairs
    of a draw share an architecture.
    """
    rng, values = np.random.default_rng(0), []
    members = [np.flatnonzero(draw == which) for which in np.unique(draw)]
    for _ in range(1000):
        chosen = rng.integers(len(members), size=len(members))
        pairs = np.concatenate([members[i] for i in chosen])
        values.append(statistic(rng.integers(seeds, size=seeds), pairs))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return f"{statistic(np.arange(seeds), np.arange(len(draw))):.3f} [{low:.3f}, {high:.3f}]"


def centre(average: Callable, values: np.ndarray, draw: np.ndarray) -> str:
    """Returns the mean or median over pairs of the mean over seeds of values (seeds, pairs)."""
    return interval(lambda s, p: average(values[s][:, p].mean(0)), len(values), draw)


def spearman(errors: np.ndarray, x: np.ndarray, draw: np.ndarray) -> str:
    """Returns Spearman's ρ of errors (seeds, pairs), averaged over seeds, and x (pairs,)."""
    if np.ptp(x) < 1e-3:
        return "–"  # straight
    return interval(lambda s, p: spearmanr(errors[s].mean(0)[p], x[p]).statistic, len(errors), draw)


def table(folder: Path = RESULTS) -> str:
    """Returns the tables of predictability.csv and width.csv in Markdown."""
    facts, data = json.loads((folder / "predictability.json").read_text()), load(folder)
    names = list(facts["held_out"])
    counts = [[part.replace("_", " "), *(str(facts[part][name]) for name in names)]
              for part in ("trained_on", "held_out")]  # fmt: skip
    draw, bent = data["geodesic"]["draw"][0], data["geodesic"]["chord_feasible"][0] == 0
    first = data["geodesic"]["position"][0] == 0
    subsets = {"all": draw >= 0, "chord infeasible": bent, "first of a run": first,
               "second of a run": ~first}  # fmt: skip
    means, ranks = [], []
    for kind, of in data.items():
        turning, length, error = of["turning_angle"], of["normalized_length"], of["error"]
        straight = [f"{turning.mean():.2f}", f"{length.mean():.3f}"]
        # In a mean, one pair of a slow run can weigh as much as all the others.
        found = [centre(np.median, error[:, keep], draw[keep]) for keep in subsets.values()]
        relative = centre(np.median, of["relative_squared_error"], draw)
        means.append([kind, *straight, centre(np.mean, error, draw), *found, relative])
        for name, keep in subsets.items():
            found = [spearman(error[:, keep], x[0, keep], draw[keep]) for x in (turning, length)]
            ranks.append([kind, name, str(keep.sum()), *found])
    blocks = (
        markdown_table(["", *(name.replace("_", " ") for name in names)], counts),
        markdown_table(["path", "turning angle", "normalized length",
                  "mean error", *(f"median, {k} ({keep.sum()})" for k, keep in subsets.items()),
                  "median relative squared error"], means),
        markdown_table(
            ["path", "pairs", "n", "ρ(error, turning angle)", "ρ(error, normalized length)"],
            [line for line in ranks if line[-1] != "–"]),
        width_table(folder),
    )  # fmt: skip
    return "\n\n".join(blocks)


def plot(folder: Path, picture: Path) -> None:
    from matplotlib.figure import Figure

    from geodesic.plot import COLOURS

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplot_mosaic([["left", "share"], ["left", "length"]], width_ratios=(1.25, 1))
    data = load(folder)
    for kind, colour, marker in zip(KINDS, COLOURS, "o^s", strict=False):
        x, y = data[kind]["turning_angle"][0], data[kind]["error"].mean(0)
        axes["left"].plot(x, y, marker, color=colour, ms=4, mew=0, alpha=0.5,
                          label=f"{kind}, median {np.median(y):.3f}")  # fmt: skip
    axes["left"].axhline(HUBER**2 * ((1 + 1 / HUBER**2) ** 0.5 - 1), color="0.5", lw=1, ls=":",
                         label="standing still")  # fmt: skip
    axes["left"].set(
        title="Imitation of paths between the same two points",
        xlabel="turning angle of the path (radians)",
        ylabel="held-out error of the RNN",
    )
    # One pair is an outlier by a factor of ten.
    axes["left"].set_yscale("log")
    axes["left"].set_yticks(ticks := (0.2, 0.3, 0.5, 1, 2, 4), ticks)
    axes["left"].minorticks_off()
    axes["left"].legend(frameon=False)
    groups = cells(folder)
    for level, colour in zip(sorted({key[0] for key in groups}), COLOURS, strict=False):
        for aligned, style in ((0, "o--"), (1, "o-")):
            widths = sorted({key[1] for key in groups if key[0] == level})
            found = [outcome(groups[level, width, aligned]) for width in widths]
            counts = [len(groups[level, width, aligned]) for width in widths]
            face = colour if aligned else "white"
            look = {"color": colour, "mfc": face, "ms": 5, "lw": 1.3}
            shares = [f[1] / n for f, n in zip(found, counts, strict=True)]
            name = f"λ = {level}, {'aligned' if aligned else 'raw'}"
            axes["share"].plot(widths, shares, style, label=name, **look)
            axes["length"].plot(widths, [f[2] for f in found], style, **look)
    axes["share"].set(ylabel="share certified", title="Pairs of relu networks", ylim=(-0.05, 1.05))
    axes["length"].set(xlabel="hidden units", ylabel="normalized length")
    for name in ("share", "length"):
        axes[name].set_xscale("log", base=2)
        axes[name].set_xticks(WIDTHS, WIDTHS)
    axes["share"].tick_params(labelbottom=False)
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.93")
        axis.set_axisbelow(True)
    handles = axes["share"].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", frameon=False, fontsize="small")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=("imitate", "width", "plot"))
    parser.add_argument("--draws", type=int, default=16, help="draws to train on")
    parser.add_argument("--held-out", type=int, default=14, help="draws to test on")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds")
    parser.add_argument("--updates", type=int, default=150, help="updates of training")
    parser.add_argument("--pairs", type=int, default=12, help="pairs of networks per width")
    parser.add_argument("--steps", type=int, default=3000, help="steps of Adam for them")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.study == "imitate":
        imitate(args.output, CONFIG, args.draws, args.held_out, args.seeds, args.updates)
    elif args.study == "width":
        width(args.output, args.pairs, args.steps)
    else:
        plot(args.output, PICTURE)
        print(table(args.output))


if __name__ == "__main__":
    main()
