"""Makes target paths for a family of tasks, with the geodesic package."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import partial
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from geodesic.dataset import PathDataset
from geodesic.files import user_path, write_atomic
from geodesic.processes import process_rank
from geodesic.targets import Problem, write_dataset
from learned_opt.config import GeodesicsConfig
from learned_opt.errors import ConfigError, OutputError
from learned_opt.interrupts import accept_interrupts, children_spared, raised
from learned_opt.output_folder import claim_output
from learned_opt.progress import tracked
from learned_opt.run import one_thread
from learned_opt.tasks.base import seed_of
from learned_opt.tasks.families import FamilyConfig, sample_tasks, shard_key

GRACE = 10.0  # the number of seconds that a terminated process has before it is killed
# Settings of families that older data sets do not record; these had the default values.
NEWER = (
    "kinds",
    "text",
    "train_sizes",
    "log10_reparametrization",
    "reparametrize",
    "equalize_gradients",
    "task",
)


@one_thread()
def make_geodesics(
    config: GeodesicsConfig, output: str | Path, plot: bool = False, processes: int = 1
) -> PathDataset:
    """Makes a data set of target paths from SGD runs and the geodesics that shorten them.

        from learned_opt import FamilyConfig, GeodesicsConfig, make_geodesics

        config = GeodesicsConfig(family=FamilyConfig(num_tasks=2), num_shards=8)
        paths = make_geodesics(config, "runs/paths")
        paths.shard(0)["beads"]

    This is the command `learned-opt geodesics`. It writes the data set into `geodesics/` in
    `output`, and the config, the versions, the hardware and a summary beside it. It also prints the
    summary. Another call with the same config makes only the missing shards. In a torchrun job, all
    processes call this function.

    Args:
        config: the tasks, and how paths are made from their runs.
        output: the folder of the results; created if it does not exist.
        plot: plots some paths into `plots/`.
        processes: the number of processes that share the work on this machine. With more than one,
            a script must call this under `if __name__ == "__main__":`.

    Returns:
        The finished data set.

    Raises:
        ConfigError: a setting cannot be used.
        DataError: the family's data are missing or damaged.
        OutputError: `output` is in use, holds results of another config, or cannot be written to.
        DatasetError: `geodesics/` in `output` holds shards of another data set.
    """
    if processes < 1:
        raise ConfigError(f"processes is {processes}; use at least 1 and at most your CPU cores")
    rank, world_size = process_rank()
    output = user_path(output, "output", OutputError).absolute()
    claim = partial(claim_output, output, asdict(config), "geodesics", ("data_root",))
    with claim() if rank == 0 else nullcontext():
        folder = output / "geodesics"
        if processes > 1:
            make_problem(config, 0)  # raises here, once, if data are missing
            # An error that one of the processes raised is raised again below, by this one.
            with suppress(torch.multiprocessing.ProcessRaisedException):
                _spawn(config, folder, processes)
        dataset = write_geodesics(config, folder, rank, world_size)
        if rank == 0:
            summarize(dataset, output)
            if plot:
                _plot(config, dataset, output / "plots")
    return dataset


def make_problem(config: GeodesicsConfig, index: int) -> Problem:
    """Returns the runs of shard `index`, which are one draw of the family."""
    key = shard_key(config.seed, index)
    task, seed = sample_tasks(config.family, key, config.data_root), seed_of("sgd", *key)

    def grad_fn(theta: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return task.loss_and_grad(theta, task.batch(seed, step))

    batch = task.fixed_batch(config.evaluation_size)
    facts = {"index": index, "task": task.name}
    if hasattr(task, "config"):  # which a task of the user's need not have
        facts["batch_size"] = task.config.batch_size
    return Problem(
        task.init(seed), grad_fn, lambda theta, *batch: task.loss(theta, batch), batch, facts
    )


def write_geodesics(
    config: GeodesicsConfig, folder: str | Path, rank: int = 0, world_size: int = 1
) -> PathDataset:
    """Makes the shards of `config` that are missing in `folder`, and returns the data set.

    Args:
        config: the config of the data set.
        folder: the folder of the data set.
        rank: the number of this process among the `world_size` processes that share the work; the
            first one shows progress.
        world_size: the number of processes.
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
        _shown if rank == 0 else iter,
        rank,
        world_size,
    )


def _shown(shards: Iterable[int]) -> Iterable[int]:
    return tracked(list(shards), "geodesics", "shards")


def summarize(dataset: PathDataset, output: Path) -> None:
    """Prints the summary of a data set and writes it to geodesics.txt."""
    text = describe(dataset)
    write_atomic(output / "geodesics.txt", f"{text}\n".encode())
    print(text)


def describe(dataset: PathDataset) -> str:
    """Returns a summary: dropped runs, and the shares of feasible chords and certified paths."""
    facts = [dataset.facts(i) for i in range(len(dataset))]
    total = {k: sum(f.get(k, 0) for f in facts)
             for k in ("runs", "diverged", "stuck", "pairs", "chord", "certified")}  # fmt: skip
    pairs = max(total["pairs"], 1)
    chords = total["chord"] / pairs
    lines = [
        f"{total['runs']} SGD runs, of which {total['diverged']} diverged and {total['stuck']} got "
        f"stuck and were dropped; {total['pairs']} pairs at level "
        f"{dataset.header['targets']['level']}",
        f"The chord is feasible in {chords:.1%} of the pairs, and a path is certified in "
        f"{total['certified'] / pairs:.1%}.",
    ]
    if chords >= 0.95:
        lines.append("The target paths are chords, so these data do not test geodesics.")
    return "\n".join(lines)


def _spawn(config: GeodesicsConfig, folder: Path, processes: int) -> None:
    """Runs `_make_share` in `processes` processes, and ends all of them before it returns."""
    with children_spared():
        context = torch.multiprocessing.spawn(
            _make_share, (config, folder, processes), processes, join=False, daemon=True
        )
    try:
        while not context.join():
            pass
    finally:
        for process in context.processes:
            process.terminate()
        for process in context.processes:
            process.join(GRACE)
            process.kill()
            process.join()


def _make_share(local_rank: int, config: GeodesicsConfig, folder: Path, processes: int) -> None:
    """Makes the share of one of `processes` local processes, in a torchrun or SLURM job also."""
    with raised(last_of_process=True), one_thread():  # torch hides interrupts of spawned ones
        accept_interrupts()
        rank, world_size = process_rank()
        write_geodesics(config, folder, rank * processes + local_rank, world_size * processes)


def _plot(config: GeodesicsConfig, dataset: PathDataset, folder: Path) -> None:
    """Plots some paths. The config determines the plots, so a resumed run may overwrite them."""
    from geodesic.plot import plot_dataset  # local, because it imports matplotlib

    folder.mkdir(exist_ok=True)
    for name, figure in plot_dataset(dataset, partial(make_problem, config)):
        file = BytesIO()
        figure.savefig(file, format="png", dpi=150)
        write_atomic(folder / f"{name}.png", file.getvalue())
        print(folder / f"{name}.png")
