"""Finds the geodesics of thousands of pairs shard by shard, on disk, by one process or many.

    result = find_geodesics_on_disk("paths", loss_fn, theta_a, theta_b, shard_size=64)

Run the same script under `torchrun --nproc_per_node 2` or SLURM, on one machine or on several that
share the folder, and each process does its share. A run that was killed resumes from the shards
that it has written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import fields
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor

from geodesic.arguments import check_initial_path, check_pairs, constant_level
from geodesic.dataset import PathDataset
from geodesic.device import makes_tensors_on_cpu
from geodesic.processes import process_rank
from geodesic.solve import Geodesic, Level, find_geodesics

SETTINGS = ("num_segments", "seed", "chunk_size", "max_iterations")  # of find_geodesics
DEFAULTS = {name: signature(find_geodesics).parameters[name].default for name in SETTINGS}


@makes_tensors_on_cpu
def find_geodesics_on_disk(
    folder: str | Path,
    loss_fn: Callable[..., Tensor],
    theta_a: Tensor,
    theta_b: Tensor,
    level: Level = None,
    initial_path: Tensor | None = None,
    loss_args: tuple[Tensor, ...] = (),
    shard_size: int = 64,
    name: str = "",
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    patience: float = 3600.0,
    **settings: int,
) -> Geodesic:
    """Solves the pairs as `find_geodesics` does, and saves the results in `folder` shard by shard.

    Every process returns the results of all pairs.

    Args:
        folder: the folder of the results; it is created if it does not exist.
        loss_fn: F, as for `find_geodesics`.
        theta_a: ``(pairs, d)``, float32 or float64.
        theta_b: ``(pairs, d)``, of the same dtype.
        level: λ, as for `find_geodesics`.
        initial_path: ``(pairs, n, d)``, as for `find_geodesics`.
        loss_args: tensors with a leading dimension of pairs, as for `find_geodesics`.
        shard_size: the number of pairs that are solved together and then written.
        name: a name of the problem. A folder with other pairs, levels, arguments or settings is
            recognized by checksums, but one with another ``loss_fn`` is not; give different loss
            functions different names.
        progress: wraps the iterable of shard numbers, for example tqdm.
        patience: after this many seconds without a new shard the other processes are taken for
            dead, and an error is raised.
        settings: num_segments, seed, max_iterations and chunk_size of `find_geodesics`. Only
            chunk_size may differ when a run is resumed.

    Raises:
        ValueError: `find_geodesics` raised it, for example because no pair of a shard can be
            searched.
        TypeError: there is an unknown setting.
        DatasetError: the folder holds another problem, or another process stopped.
    """
    if unknown := sorted(settings.keys() - SETTINGS):
        raise TypeError(f"settings has unknown names {unknown}; use some of {SETTINGS}")
    settings = DEFAULTS | settings
    counts = {name: value for name, value in settings.items() if name != "seed"}
    check_pairs(theta_a, theta_b, loss_args, shard_size=shard_size, **counts)
    check_initial_path(initial_path, theta_a)  # all before there is a folder
    pairs = len(theta_a)
    inputs = {"theta_a": theta_a, "theta_b": theta_b, "initial_path": initial_path}
    inputs |= {f"loss_args[{i}]": argument for i, argument in enumerate(loss_args)}
    if callable(level):
        inputs["level"] = level(torch.linspace(0, 1, 257).to(theta_a).expand(pairs, -1))
    elif level is not None:
        level = inputs["level"] = constant_level(level, theta_a)
    header = {
        "name": name,
        "pairs": pairs,
        "shard_size": shard_size,
        "settings": {name: value for name, value in settings.items() if name != "chunk_size"},
        "inputs": {k: None if v is None else _checksum(v) for k, v in inputs.items()},
    }

    def solve(index: int) -> tuple[dict[str, Tensor], dict]:
        part = torch.arange(index * shard_size, min(pairs, (index + 1) * shard_size))
        found = find_geodesics(
            loss_fn,
            theta_a[part],
            theta_b[part],
            _part_of(level, part, pairs),
            initial_path=None if initial_path is None else initial_path[part],
            loss_args=tuple(argument[part] for argument in loss_args),
            **settings,
        )
        tensors = {f.name: getattr(found, f.name) for f in fields(found)}
        return tensors, {"error": tensors.pop("error")}

    dataset = PathDataset.create(folder, header, -(-pairs // shard_size))
    dataset.fill(solve, *process_rank(), progress, patience)
    shards = [dataset.shard(i) for i in range(len(dataset))]
    tensors = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
    errors = [error for i in range(len(dataset)) for error in dataset.facts(i)["error"]]
    return Geodesic(**tensors, error=errors)


def _part_of(level: Level, part: Tensor, pairs: int) -> Level:
    if not callable(level):
        return level[part] if isinstance(level, Tensor) else level

    def of_part(s: Tensor) -> Tensor:
        every = s.new_zeros(pairs, s.shape[1])
        every[part] = s
        return level(every)[part]

    return of_part


def _checksum(value: Tensor) -> str:
    value = value.detach().cpu().contiguous()
    kind = f"{value.dtype} {tuple(value.shape)}".encode()
    return hashlib.sha256(kind + value.numpy().tobytes()).hexdigest()
