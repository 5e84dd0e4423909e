"""The command line: `learned-opt geodesics`, `train` and `benchmark`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import asdict, is_dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from tqdm import tqdm

from geodesic.dataset import DatasetError, PathDataset
from geodesic.files import user_path, write_atomic
from geodesic.sharded import process_rank
from learned_opt.benchmarking import BenchmarkConfig, run_benchmark
from learned_opt.config import GeodesicsConfig, TrainConfig
from learned_opt.errors import ConfigError, LearnedOptError, OutputError, did_you_mean
from learned_opt.geodesics import describe, make_geodesics, make_problem
from learned_opt.interrupts import (
    accept_interrupts,
    children_spared,
    interruptible,
    is_first,
    raised,
)
from learned_opt.outputs import claim_output
from learned_opt.rules import make_rule
from learned_opt.training.start import part_like

GRACE = 10.0  # seconds that a process of `geodesics` has to end when it is told to


def geodesics(
    config: GeodesicsConfig, output: Path, plot: bool = False, processes: int = 1
) -> None:
    """Make a data set of target paths: SGD runs, and the geodesics that shorten them."""
    if processes < 1:
        raise ConfigError(f"processes is {processes}; use at least 1, at most the cores you have")
    _use_one_thread()
    rank, _ = process_rank()
    output = user_path(output, "output", OutputError).absolute()
    claim = partial(claim_output, output, asdict(config), "geodesics", ("data_root",))
    with claim() if rank == 0 else nullcontext():
        folder = output / "geodesics"
        if processes > 1:
            make_problem(config, 0)  # what is missing is said by this process
            # what one of them raised, this process meets as well, below
            with suppress(torch.multiprocessing.ProcessRaisedException):
                _spawn(config, folder, processes)
        elif rank:
            _make_share(0, config, folder, 1)
        if rank:
            return
        dataset = _make(config, folder, output, *process_rank())
        if plot:
            _plot(config, dataset, output / "plots")


def train(config: TrainConfig, output: Path) -> None:
    """Meta-train an update rule, after making the target paths that are missing."""
    # here: Lightning doubles the time of `--help`
    from learned_opt.training.fit import WEIGHTS, check, fit

    _use_one_thread()
    check(config)  # what cannot work is said now, not after the data
    output = user_path(output, "output", OutputError).absolute()
    first = is_first()
    if first:  # the others might see its half-made folder
        _check_dataset(config)
    settings, free = asdict(config), ("accelerator", "logger", "geodesics.data_root")
    if config.first is not None:
        if process_rank()[1] > 1:
            raise ConfigError(
                f"first={config.first} is a stage for one process, {process_rank()[1]} were "
                "launched; train it by itself, and name its weights as start_from"
            )
        if first:
            train(first_stage(config), output / "first")
        config = replace(config, start_from=str(output / "first" / WEIGHTS))
    with claim_output(output, settings, "train", free) if first else nullcontext():
        paths = None
        if "imitation" in config.objectives:
            folder = user_path(config.dataset or output / "geodesics", "dataset", ConfigError)
            if first:
                paths = _make(config.geodesics, folder, output, *process_rank())
            else:
                paths = make_geodesics(config.geodesics, folder, iter, *process_rank())
        weights = fit(config, output, paths)
    if first:
        print(
            f"{weights}\nuse them: LearnedOptimizer(model.parameters(), weights={str(weights)!r})"
        )


def first_stage(config: TrainConfig) -> TrainConfig:
    """The config that `first` makes of the rest.

    Raises:
        ConfigError: it has a setting that is unknown, of another type, or refused.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig, "config")
    one = {"first": None, "devices": 1, "num_nodes": 1, "strategy": "auto"}
    try:
        values = parser.parse_object({"config": asdict(config) | one | config.first})
        stage = parser.instantiate(values).config
        if stage.geodesics.data_root is None:
            stage = replace(
                stage, geodesics=replace(stage.geodesics, data_root=config.geodesics.data_root)
            )
        rule, before = (make_rule(c.rule, **c.rule_config) for c in (config, stage))
        part_like(rule, before, "its rule")
    except (ArgumentError, ValueError) as error:
        raise ConfigError(f"first={config.first}: {' '.join(str(error).split())}") from error
    return stage


def benchmark(config: BenchmarkConfig, output: Path) -> None:
    """Compare optimizers, tuned on some seeds and reported on others."""
    run_benchmark(config, output)


COMMANDS = {
    geodesics: GeodesicsConfig,
    train: TrainConfig,
    benchmark: BenchmarkConfig,
}


def _check_dataset(config: TrainConfig) -> None:
    """That a folder with other things in it is not taken for that of the target paths."""
    folder = user_path(config.dataset or "", "dataset", ConfigError)
    if config.dataset is None or not folder.exists() or (folder / "manifest.json").exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        inner = folder / "geodesics"
        hint = f"{str(inner)!r}" if (inner / "manifest.json").exists() else "an empty or new one"
        raise ConfigError(
            f"dataset={config.dataset!r} is no folder of target paths, and not empty; use {hint}"
        )


def _spawn(config: GeodesicsConfig, folder: Path, processes: int) -> None:
    """Runs `_make_share` in each of `processes` processes, none of which outlives this call."""
    with children_spared():
        context = torch.multiprocessing.spawn(
            _in_child, (config, folder, processes), processes, join=False, daemon=True
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


def _in_child(local_rank: int, config: GeodesicsConfig, folder: Path, processes: int) -> None:
    with raised(last_of_process=True):  # what torch passes over in a process that it spawned
        accept_interrupts()
        _make_share(local_rank, config, folder, processes)


def _make_share(local_rank: int, config: GeodesicsConfig, folder: Path, processes: int) -> None:
    """The shards of one of `processes` processes here, of all that torchrun or SLURM started."""
    _use_one_thread()
    rank, world_size = process_rank()
    first = rank == local_rank == 0
    make_geodesics(
        config,
        folder,
        _progress if first else iter,
        rank * processes + local_rank,
        world_size * processes,
    )


def _make(
    config: GeodesicsConfig, folder: Path, output: Path, rank: int = 0, world_size: int = 1
) -> PathDataset:
    dataset = make_geodesics(config, folder, _progress, rank, world_size)
    text = describe(dataset)
    write_atomic(output / "geodesics.txt", f"{text}\n".encode())
    print(text)
    return dataset


def _progress(shards: Iterable[int]) -> Iterable[int]:
    return tqdm(shards, desc="geodesics", disable=None)


def _plot(config: GeodesicsConfig, dataset: PathDataset, folder: Path) -> None:
    """Pictures that only the config determines, so that a resumed run may write them again."""
    from geodesic.plot import plot_dataset  # here: it imports matplotlib

    folder.mkdir(exist_ok=True)
    for name, figure in plot_dataset(dataset, partial(make_problem, config)):
        file = BytesIO()
        figure.savefig(file, format="png", dpi=150)
        write_atomic(folder / f"{name}.png", file.getvalue())
        print(folder / f"{name}.png")


def _use_one_thread() -> None:
    """These tensors are small: a second thread costs more than it brings."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def make_parser() -> ArgumentParser:
    # A `class_path` in `rule_config` or `kwargs` is data: a config must not run what it names.
    set_parsing_settings(instantiate_subclass_spec_in_any=False)
    parser = ArgumentParser(
        prog="learned-opt",
        description="Learned optimizers for PyTorch: make target paths, train, benchmark.",
        exit_on_error=False,
    )
    commands = parser.add_subcommands(dest="command")
    for run, config_class in COMMANDS.items():
        sub = ArgumentParser(description=run.__doc__, exit_on_error=False)
        sub.add_argument("--config", action="config", help="YAML file of the settings below")
        sub.add_argument("--output", type=str, required=True, help="folder of the results")
        sub.add_argument("--smoke", action="store_true", help="shrink everything to seconds")
        if run is geodesics:
            sub.add_argument("--plot", action="store_true", help="pictures of them in plots/")
            sub.add_argument("--processes", type=int, default=1, help="that share the work here")
        sub.add_class_arguments(config_class, as_group=False)
        commands.add_subcommand(run.__name__, sub, help=run.__doc__)
    return parser


def parse(args: list[str] | None) -> tuple[Callable, Any, Path]:
    """The command, its config and its output folder.

    Raises:
        ConfigError: an argument is missing, unknown, of another type, or refused by its config.
    """
    args = sys.argv[1:] if args is None else args
    parser = make_parser()
    try:
        namespace = parser.instantiate(parser.parse_args(args))
        run = next(c for c in COMMANDS if c.__name__ == namespace.command)
        settings = dict(vars(namespace[namespace.command]))
        output, smoke, _ = (settings.pop(key) for key in ("output", "smoke", "config"))
        # What is not a setting of the results: how they are made, and what is made of them.
        extras = ("plot", "processes") if run is geodesics else ()
        extras = {name: settings.pop(name) for name in extras}
        config = COMMANDS[run](**settings)
    except (ArgumentError, ValueError) as error:
        _check_file(args)
        text = " ".join(str(error).split())  # jsonargparse breaks lines
        raise ConfigError(f"{text}{_suggestion(text, args)}") from error
    if run is train and config.first is not None:
        first = first_stage(config)  # for what it complains of, and to shrink it with its own rest
        config = replace(config, first=asdict(first.smoke())) if smoke else config
    config = config.smoke() if smoke else config
    return partial(run, **extras), config, Path(output)


def _check_file(args: list[str]) -> None:
    """That the file after --config, if any, holds settings by name; read when parsing has failed.

    Raises:
        ConfigError: it does not.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")
    if (name := parser.parse_known_args(args)[0].config) is None:
        return
    path = user_path(name, "config", ConfigError)
    if not path.is_file():
        return  # jsonargparse says so
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"config={name!r} is no text ({error}); give a YAML file") from error
    except yaml.YAMLError as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"config={name!r} is no YAML: {text}") from error
    if settings is None:
        raise ConfigError(
            f"config={name!r} has no settings: it is empty, or all of it are comments; leave "
            "--config out for the defaults"
        )
    if not isinstance(settings, dict):
        raise ConfigError(
            f"config={name!r} is of type {type(settings).__name__}, not settings by name; write "
            "key: value on each line"
        )


# What jsonargparse says of keys that there are not.
_UNKNOWN = re.compile(r"does not accept option '([^']+)'|Option '([^']+)' is not accepted|"
                      r"unrecognized arguments: --([\w.]+)")  # fmt: skip


def _suggestion(text: str, args: list[str]) -> str:
    """What a key that is unknown, as `text` says, was perhaps meant to be."""
    command = next((c for c in COMMANDS if c.__name__ in args), None)
    found = _UNKNOWN.search(text)
    if found is None or command is None:
        return ""
    known = {"config", "output", "smoke", *_keys(COMMANDS[command])}
    unknown = (key for key in next(filter(None, found.groups())).split(".") if key not in known)
    return did_you_mean(next(unknown, ""), sorted(known))


def _keys(hint: Any) -> set[str]:
    """Names of fields of the dataclasses in the type `hint`, and of those in them."""
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return {*hints}.union(*map(_keys, hints.values()))
    return set().union(*map(_keys, get_args(hint)))


def main(args: list[str] | None = None) -> None:
    """Runs the command of `args`, by default those of the process."""
    with interruptible():
        try:
            run, config, output = parse(args)
            run(config, output)
        except (LearnedOptError, DatasetError) as error:
            print(f"learned-opt: error: {error}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
