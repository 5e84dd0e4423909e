"""Target paths from a family of tasks: where tasks meet the geodesic package."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from geodesic.dataset import PathDataset
from geodesic.targets import Problem, write_dataset
from learned_opt.config import GeodesicsConfig
from learned_opt.tasks.base import seed_of
from learned_opt.tasks.families import FamilyConfig, sample_tasks

# Settings of families that older data sets do not name: such a set is of a family without them.
NEWER = (
    "kinds",
    "text",
    "train_sizes",
    "log10_reparametrization",
    "reparametrize",
    "equalize_gradients",
    "task",
)


def make_problem(config: GeodesicsConfig, index: int) -> Problem:
    """The runs of shard `index`: one draw of the family."""
    key = ("train", config.seed, index)
    task, seed = sample_tasks(config.family, key, config.data_root), seed_of("sgd", *key)

    def grad_fn(theta: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return task.loss_and_grad(theta, task.batch(seed, step))

    batch = task.fixed_batch(config.evaluation_size)
    facts = {"index": index, "task": task.name, "batch_size": task.config.batch_size}
    return Problem(
        task.init(seed), grad_fn, lambda theta, *batch: task.loss(theta, batch), batch, facts
    )


def make_geodesics(
    config: GeodesicsConfig,
    folder: str | Path,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    rank: int = 0,
    world_size: int = 1,
) -> PathDataset:
    """The data set of `config` in `folder`: what is missing is made, what is there is kept.

    Args:
        progress: wraps the numbers of the shards to make.
        rank: of this process among `world_size` that make it together.
    """
    family, default = asdict(config.family), asdict(FamilyConfig())
    header = {
        "family": {k: v for k, v in family.items() if k not in NEWER or v != default[k]},
        "evaluation_size": config.evaluation_size,
        "seed": config.seed,
    }
    return write_dataset(
        folder,
        lambda index: make_problem(config, index),
        config.num_shards,
        config.targets,
        header,
        progress,
        rank,
        world_size,
    )


def describe(dataset: PathDataset) -> str:
    """What came of the runs: shares of chords and certificates, runs that were dropped."""
    facts = [dataset.facts(i) for i in range(len(dataset))]
    total = {k: sum(f.get(k, 0) for f in facts)
             for k in ("runs", "diverged", "stuck", "pairs", "chord", "certified")}  # fmt: skip
    pairs = max(total["pairs"], 1)
    chords = total["chord"] / pairs
    lines = [
        f"{total['runs']} SGD runs: {total['diverged']} diverged and {total['stuck']} stuck were "
        f"dropped; {total['pairs']} pairs, level {dataset.header['targets']['level']}",
        f"chord feasible {chords:.1%}, certified in all {total['certified'] / pairs:.1%}",
    ]
    if chords >= 0.95:
        lines.append("the target paths are chords: nothing here speaks for or against geodesics")
    return "\n".join(lines)
