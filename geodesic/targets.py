"""Makes data sets of target paths: SGD runs, pairs of their iterates, and a path for each pair.

A shard holds the runs of one problem (runs of one shape). Each run gives up to `pairs_per_run`
consecutive pairs (θ_a, θ_b) = (θ_t, θ_{t+T}); each pair begins where the one before ends.
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
    """Describes the target paths of a data set.

    Attributes:
        horizon: The number T of SGD steps between θ_a and θ_b.
        updates: The number K of updates in which the rule should cover one path. Each of its
            updates then covers as much as T/K steps of SGD.
        pairs_per_run: The number of consecutive pairs that one SGD run gives.
        stride: The number of SGD steps between recorded iterates. It must divide the horizon.
        level: "constant" is the level λ = F(θ_a); "sgd_profile" falls as SGD's own loss does.
        num_segments: The number of straight segments of a geodesic.
        path: "geodesic", or, for comparison, the "chord" of each pair or SGD's own "trajectory".
            Chords and trajectories may exceed the level.
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
                f"1, and num_segments={self.num_segments} at least 2"
            )


class Problem(NamedTuple):
    """Runs of one shape, from which target paths are made.

    Attributes:
        theta: The starting points, (runs, d).
        grad_fn: The minibatch gradients of all runs, see GradFn.
        loss_fn: F(θ, *args) on the fixed evaluation set, from θ (d,) to a scalar. It must support
            `torch.func.vmap`.
        loss_args: The further arguments of loss_fn, each with a leading dimension of runs.
        facts: JSON facts about the problem that are stored in the shard's record.
    """

    theta: Tensor
    grad_fn: GradFn
    loss_fn: Callable[..., Tensor]
    loss_args: tuple[Tensor, ...]
    facts: dict

    def losses(self, theta: Tensor) -> Tensor:
        """Returns F of every run: (runs, d) -> (runs,)."""
        return torch.func.vmap(self.loss_fn)(theta, *self.loss_args)


class Pairs(NamedTuple):
    """Pairs of iterates of SGD runs, with the records between them."""

    run: Tensor  # (pairs,), the number of the run
    start: Tensor  # (pairs,), the number of the record that is θ_a
    points: Tensor  # (pairs, T / stride + 1, d), the records from θ_a to θ_b
    losses: Tensor  # (pairs, T / stride + 1), F at these records


def run_teacher(problem: Problem, steps: int, stride: int) -> Trajectory:
    """Runs SGD from `problem.theta`, each run at 0.32 to 1 times its own probed learning rate."""
    rate = probe_learning_rate(problem.grad_fn, problem.losses, problem.theta)
    rate = rate * 10 ** torch.linspace(-0.5, 0, len(rate))  # so that the runs differ in speed
    return sgd_trajectory(problem.grad_fn, problem.losses, problem.theta, rate, steps, stride)


def consecutive_pairs(trajectory: Trajectory, horizon: int) -> Pairs:
    """Returns the consecutive pairs θ_t, θ_{t+T} of each run, up to the first that goes uphill.

    A pair goes uphill if F(θ_b) > F(θ_a). Runs that diverged or are stuck give no pairs.
    """
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
    """Returns the geodesics of all pairs.

    Where the chord exceeds the level, the search starts from the recorded SGD trajectory.
    """
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
    """Returns the tensors and facts of one shard. A chord is stored as its two ends.

    Paths other than geodesics count as certified, because they need not stay below the level.
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
    """Makes the shards that are missing in `folder`, and returns the finished data set.

    Args:
        folder: the folder of the data set; it is created if it does not exist.
        problems: maps the number of a shard to its problem.
        num_shards: the number of shards.
        config: what the target paths are.
        header: identifies the problems; a folder with another header is refused.
        progress: wraps the iterable of shard numbers, for example in a progress bar.
        rank: the number of this process among the `world_size` processes that share the work.
        world_size: the number of processes that call this at the same time.
    """
    targets = asdict(config)
    if config.path == "geodesic":  # data sets from before this setting existed stay valid
        del targets["path"]
    dataset = PathDataset.create(folder, header | {"targets": targets}, num_shards)
    dataset.fill(lambda i: solve_problem(problems(i), config), rank, world_size, progress)
    return dataset


def target_paths(tensors: dict[str, Tensor], updates: int, runs: int) -> tuple[Tensor, Tensor]:
    """Returns the target points of a shard's runs, along all pairs of each run.

    Args:
        tensors: the tensors of the shard.
        updates: the number K of updates along each pair, equal in arclength.
        runs: the number of runs of the shard.

    Returns:
        points, (runs, P·K + 1, d): K updates along each of up to P pairs. A run with fewer pairs is
        padded with its last point, and a run without pairs with zeros.
        lengths, (runs,): the number of updates before the padding. A run ends before its first
        pair without a certified path.
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
