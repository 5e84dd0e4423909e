"""From SGD runs to target paths on disk: runs, pairs, geodesics, shards.

A shard holds the runs of one problem (runs of one shape), of which each gives up to
`pairs_per_run` consecutive pairs (θ_a, θ_b) = (θ_t, θ_{t+T}); the pairs of one run join up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from geodesic.dataset import PathDataset
from geodesic.finite import check_finite
from geodesic.level_set import sgd_profile
from geodesic.path import length, normalized_length, resample
from geodesic.solve import Geodesic, find_geodesics
from geodesic.trajectory import GradFn, Trajectory, probe_learning_rate, sgd_trajectory


@dataclass(frozen=True)
class TargetConfig:
    """What a data set of target paths holds.

    Attributes:
        horizon: T, SGD steps between θ_a and θ_b.
        updates: K, target updates along the geodesic; T/K is the speed-up asked of the rule.
        pairs_per_run: consecutive pairs of one run.
        stride: SGD steps between recorded iterates; divides T.
        level: "constant", λ = F(θ_a), or "sgd_profile", which falls as SGD's own loss does.
        num_segments: segments of a geodesic.
        path: "geodesic"; or, to compare with, the "chord" of each pair or SGD's own "trajectory",
            neither of which is held to the level.
    """

    horizon: int = 320
    updates: int = 20
    pairs_per_run: int = 5
    stride: int = 10
    level: str = "constant"
    num_segments: int = 32
    path: str = "geodesic"

    def __post_init__(self) -> None:
        check_finite(self)
        if self.path not in ("geodesic", "chord", "trajectory"):
            raise ValueError(f"path is {self.path!r}; use 'geodesic', 'chord' or 'trajectory'")
        if self.level not in ("constant", "sgd_profile"):
            raise ValueError(f"level is {self.level!r}; use 'constant' or 'sgd_profile'")
        if self.stride < 1 or self.horizon < 1 or self.horizon % self.stride:
            raise ValueError(f"stride={self.stride} must divide horizon={self.horizon}")
        if self.updates < 1 or self.pairs_per_run < 1 or self.num_segments < 2:
            raise ValueError(
                f"updates={self.updates} and pairs_per_run={self.pairs_per_run} must be at least "
                f"1, num_segments={self.num_segments} at least 2"
            )


class Problem(NamedTuple):
    """Runs of one shape, to make target paths of.

    Attributes:
        theta: starts, (runs, d).
        grad_fn: minibatch gradients of all runs, see GradFn.
        loss_fn: F(θ, *args) -> scalar on the fixed evaluation set, θ (d,); vmap-able.
        loss_args: what loss_fn takes besides θ, each with a leading dimension of runs.
        facts: JSON facts about the problem that go into the shard's record.
    """

    theta: Tensor
    grad_fn: GradFn
    loss_fn: Callable[..., Tensor]
    loss_args: tuple[Tensor, ...]
    facts: dict

    def losses(self, theta: Tensor) -> Tensor:
        """F of every run, (runs, d) -> (runs,)."""
        return torch.func.vmap(self.loss_fn)(theta, *self.loss_args)


class Pairs(NamedTuple):
    """Pairs of runs: `run` (pairs,), `start` (pairs,) the record of θ_a, and their records."""

    run: Tensor
    start: Tensor
    points: Tensor  # (pairs, T / stride + 1, d)
    losses: Tensor  # (pairs, T / stride + 1)


def run_teacher(problem: Problem, steps: int, stride: int) -> Trajectory:
    """SGD from `problem.theta`, each run at 0.32 to 1 times its own probed learning rate."""
    rate = probe_learning_rate(problem.grad_fn, problem.losses, problem.theta)
    rate = rate * 10 ** torch.linspace(-0.5, 0, len(rate))  # teachers of several speeds
    return sgd_trajectory(problem.grad_fn, problem.losses, problem.theta, rate, steps, stride)


def consecutive_pairs(trajectory: Trajectory, horizon: int) -> Pairs:
    """For each good run its joined-up pairs θ_t, θ_{t+T}, up to the first with F(θ_b) > F(θ_a)."""
    span = horizon // trajectory.stride
    starts = torch.arange(0, len(trajectory.points) - span, span)
    ends = trajectory.losses[starts + span]
    admissible = (ends <= trajectory.losses[starts]).cumprod(0).bool()
    admissible &= ~(trajectory.diverged | trajectory.stuck)
    run, which = admissible.T.nonzero(as_tuple=True)
    records = starts[which][:, None] + torch.arange(span + 1)
    return Pairs(
        run,
        starts[which],
        trajectory.points[records, run[:, None]],
        trajectory.losses[records, run[:, None]],
    )


def solve_pairs(problem: Problem, pairs: Pairs, level: str, num_segments: int) -> Geodesic:
    """Geodesics of all pairs; the subsampled trajectory is the first path if no chord fits."""
    loss_fn, loss_args = problem.loss_fn, tuple(arg[pairs.run] for arg in problem.loss_args)
    falls = level == "sgd_profile"
    return find_geodesics(
        loss_fn,
        pairs.points[:, 0],
        pairs.points[:, -1],
        level=sgd_profile(loss_fn, pairs.points, loss_args) if falls else None,
        num_segments=num_segments,
        initial_path=pairs.points,
        loss_args=loss_args,
    )


def solve_problem(problem: Problem, config: TargetConfig) -> tuple[dict[str, Tensor], dict]:
    """One shard: tensors and facts. A chord is stored as its two ends.

    Paths other than geodesics count as certified: there is nothing that they promise.
    """
    trajectory = run_teacher(problem, config.horizon * config.pairs_per_run, config.stride)
    pairs = consecutive_pairs(trajectory, config.horizon)
    counts = {
        "runs": len(problem.theta),
        "diverged": int(trajectory.diverged.sum()),
        "stuck": int(trajectory.stuck.sum()),
        "pairs": len(pairs.run),
    }
    if not counts["pairs"]:
        return {}, problem.facts | counts
    if config.path == "geodesic":
        found = solve_pairs(problem, pairs, config.level, config.num_segments)
        fields = ("level", "length", "normalized_length", "max_loss", "certified", "chord_feasible")
        solved = {name: getattr(found, name) for name in fields}
        beads = [
            path[[0, -1]] if chord else path
            for path, chord in zip(found.path, found.chord_feasible, strict=True)
        ]
    else:
        paths = pairs.points if config.path == "trajectory" else pairs.points[:, [0, -1]]
        beads, chord = list(paths), torch.full((len(paths),), config.path == "chord")
        solved = {
            "length": length(paths),
            "normalized_length": normalized_length(paths),
            "certified": torch.ones_like(chord),
            "chord_feasible": chord,
        }
    counts["chord"] = int(solved["chord_feasible"].sum())
    counts["certified"] = int(solved["certified"].sum())
    sizes = torch.tensor([0] + [len(b) for b in beads])
    tensors = {
        "beads": torch.cat(beads),
        "bead_offsets": sizes.cumsum(0),
        "run": pairs.run,
        "time": pairs.start * config.stride,
        "learning_rate": trajectory.learning_rate[pairs.run],
        "loss_a": pairs.losses[:, 0],
        "loss_b": pairs.losses[:, -1],
    }
    return tensors | solved, problem.facts | counts


def write_dataset(
    folder: str | Path,
    problems: Callable[[int], Problem],
    num_shards: int,
    config: TargetConfig,
    header: dict,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    rank: int = 0,
    world_size: int = 1,
) -> PathDataset:
    """Makes the shards that `folder` lacks, and returns the finished data set.

    Args:
        problems: the problem of each shard, by its number.
        header: identifies the problems; a folder with another header is refused.
        progress: wraps the shard numbers, for a progress bar.
        rank: of this process among `world_size` that call this at once, each for its share.
    """
    targets = asdict(config)
    if config.path == "geodesic":  # data sets made before there was a choice stay good
        del targets["path"]
    dataset = PathDataset.create(folder, header | {"targets": targets}, num_shards)
    dataset.fill(lambda i: solve_problem(problems(i), config), rank, world_size, progress)
    return dataset


def target_paths(tensors: dict[str, Tensor], updates: int, runs: int) -> tuple[Tensor, Tensor]:
    """The joined-up target points of a shard's runs.

    Returns:
        points, (runs, P·K + 1, d): K updates along each of P pairs, equal in arclength within a
        pair; a run with fewer pairs stays at its last point, one without any at zero.
        lengths, (runs,): how many updates are real. Only certified geodesics count: a run ends
        before its first uncertified pair.
    """
    beads, offsets = tensors["beads"], tensors["bead_offsets"].tolist()
    paths: list[list[Tensor]] = [[] for _ in range(runs)]
    ended = [False] * runs
    for i, run in enumerate(tensors["run"].tolist()):
        ended[run] |= not tensors["certified"][i]
        if not ended[run]:
            points = resample(beads[offsets[i] : offsets[i + 1]][None], updates)[0]
            paths[run] += [points[1:]] if paths[run] else [points]
    joined = [torch.cat(p) if p else beads.new_zeros(1, beads.shape[-1]) for p in paths]
    longest = max(map(len, joined))
    padded = [torch.cat([p, p[-1:].expand(longest - len(p), -1)]) for p in joined]
    return torch.stack(padded), torch.tensor([len(p) - 1 for p in joined])
