"""The stages of training: the first stage, the target paths and the meta-training."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from geodesic.files import user_path
from geodesic.processes import process_rank
from learned_opt.config import TrainConfig
from learned_opt.errors import ConfigError, OutputError
from learned_opt.interrupts import is_first
from learned_opt.output_folder import claim_output
from learned_opt.rules import make_rule
from learned_opt.run import one_thread
from learned_opt.target_paths import summarize, write_geodesics
from learned_opt.training.initial_rule import part_like


@one_thread()
def train(config: TrainConfig, output: str | Path) -> Path:
    """Meta-trains an update rule, after making missing target paths.

        import learned_opt

        config = learned_opt.TrainConfig(objectives=("meta_loss",), updates=600)
        weights = learned_opt.train(config, "runs/mine")
        optimizer = learned_opt.LearnedOptimizer(model.parameters(), weights=weights)

    This is the command `learned-opt train`. It writes `weights.safetensors`, checkpoints, logs,
    plots, the config, the versions and the hardware into `output`. Another call with the same
    config resumes from the last checkpoint and gives the same weights. In a torchrun job, all
    processes call this function.

    Args:
        config: the rule, the tasks and the training. `config.smoke()` shrinks it to seconds.
        output: the folder of the results; created if it does not exist.

    Returns:
        The path of the weights file.

    Raises:
        ConfigError: a setting cannot be used here. This is raised before any work is done.
        DataError: a data set is missing or damaged, or no target path is certified.
        WeightsError: the initial weights cannot be read.
        OutputError: `output` is in use, holds results of another config, or cannot be written to.
        DatasetError: the target paths are those of other tasks.
    """
    from learned_opt.training.fit import WEIGHTS, check, fit  # local: Lightning is slow to import

    check(config)  # now, because making the target paths takes long
    output = user_path(output, "output", OutputError).absolute()
    first = is_first()
    if first:  # only here, because the other processes might see its incomplete folder
        _check_dataset(config)
    settings, free = asdict(config), ("accelerator", "logger", "geodesics.data_root")
    if config.first is not None:
        if process_rank()[1] > 1:
            raise ConfigError(
                f"first={config.first} is a stage for one process, but {process_rank()[1]} were "
                "launched; train it by itself in one process, and set start_from to its weights"
            )
        if first:
            print(f"the first of two stages, in {output / 'first'}")
            train(first_stage(config), output / "first")
            print(f"the second stage, in {output}")
        config = replace(config, start_from=str(output / "first" / WEIGHTS))
    with claim_output(output, settings, "train", free) if first else nullcontext():
        paths = None
        if "imitation" in config.objectives:
            folder = user_path(config.dataset or output / "geodesics", "dataset", ConfigError)
            paths = write_geodesics(config.geodesics, folder, *process_rank())
            if first:
                summarize(paths, output)
        return fit(config, output, paths)


def first_stage(config: TrainConfig) -> TrainConfig:
    """Returns the config of the first stage: `config` with the settings in `first`.

    Raises:
        ConfigError: `first` has a setting that is unknown, of a wrong type or invalid.
    """
    from learned_opt.parsing import config_from  # local: jsonargparse is slow to import

    one = {"first": None, "devices": 1, "num_nodes": 1, "strategy": "auto"}
    try:
        stage = config_from(TrainConfig, asdict(config) | one | (config.first or {}))
        if stage.geodesics.data_root is None:
            stage = replace(
                stage, geodesics=replace(stage.geodesics, data_root=config.geodesics.data_root)
            )
        rule, before = (make_rule(c.rule, **c.rule_config) for c in (config, stage))
        part_like(rule, before, "its rule")
    except ValueError as error:
        raise ConfigError(f"first={config.first}: {' '.join(str(error).split())}") from error
    return stage


def _check_dataset(config: TrainConfig) -> None:
    """Raises ConfigError if the data set's folder has other files than target paths."""
    folder = user_path(config.dataset or "", "dataset", ConfigError)
    if config.dataset is None or not folder.exists() or (folder / "manifest.json").exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        inner = folder / "geodesics"
        hint = f"{str(inner)!r}" if (inner / "manifest.json").exists() else "an empty or new one"
        raise ConfigError(
            f"dataset={config.dataset!r} is not a folder of target paths, and not empty; use {hint}"
        )
