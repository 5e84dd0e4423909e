"""The command line: `learned-opt geodesics`, `train` and `benchmark`.

The modules of a command are imported only when it runs, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass, replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, get_args, get_type_hints

from geodesic.files import user_path
from learned_opt import __version__
from learned_opt.errors import ConfigError, LearnedOptError, did_you_mean
from learned_opt.help import Option, command_help
from learned_opt.interrupts import interruptible, is_first

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


class Flag(NamedTuple):
    """A flag that is not a setting of the config.

    Attributes:
        value: the name of its value in `--help`; empty for a switch.
        text: its description in `--help`.
        type: the type of its value.
    """

    value: str
    text: str
    type: type = str


class Command(NamedTuple):
    """A command.

    Attributes:
        summary: its description in `--help`.
        config: the class of its config, as "module:name".
        function: the function that it calls, as "module:name".
        flags: the flags that are arguments of the function.
        task_flags: the flags that are arguments of the config's method `on`, besides the task.
    """

    summary: str
    config: str
    function: str
    flags: Mapping[str, Flag] = MappingProxyType({})
    task_flags: Mapping[str, Flag] = MappingProxyType({})

    @property
    def config_class(self) -> type:
        return resolve_name(self.config)


COMMANDS = {
    "geodesics": Command(
        "Make a data set of target paths from SGD runs and the geodesics that shorten them.",
        "learned_opt.config:GeodesicsConfig",
        "learned_opt.target_paths:make_geodesics",
        {
            "plot": Flag("", "Plots some paths into the folder plots/"),
            "processes": Flag("N", "The number of processes on this machine (default: 1)", int),
        },
    ),
    "train": Command(
        "Meta-train an update rule, after making missing target paths.",
        "learned_opt.config:TrainConfig",
        "learned_opt.training.stages:train",
    ),
    "benchmark": Command(
        "Compare optimizers: tune them on some seeds and report them on others.",
        "learned_opt.benchmarking.config:BenchmarkConfig",
        "learned_opt.benchmarking:benchmark",
        task_flags={"steps": Flag("N", "The number of steps for --task (default: 1000)", int)},
    ),
}
FLAGS = {
    "output": Flag("DIR", "The folder of the results; repeat an interrupted command to resume"),
    "config": Flag("FILE", "A YAML file with the settings below; flags override it"),
    "smoke": Flag("", "Shrinks everything to seconds, to test whether it works"),
    "task": Flag(
        "MODULE:FUNCTION",
        "A task of your own, in place of those in the config. FUNCTION in MODULE.py, in the "
        "current folder, returns it",
    ),
}


def make_parser(command: str) -> ArgumentParser:
    """Returns the parser of the arguments after the name of a command."""
    from learned_opt.parsing import make_parser  # local, because it imports jsonargparse

    parser = make_parser(COMMANDS[command].config_class)
    parser.add_argument("--config", action="config")
    parser.add_argument("--output", type=str, required=True)
    for name, flag in _flags(command).items():
        if name not in ("config", "output"):
            how = {"type": flag.type | None} if flag.value else {"action": "store_true"}
            parser.add_argument(f"--{name}", **how)
    return parser


def parse(args: list[str] | None) -> tuple[Callable, Any, Path]:
    """Returns the function of the command in `args`, its config and its output folder.

    Raises:
        ConfigError: an argument is missing, unknown, of a wrong type or invalid.
    """
    name, *args = _command(sys.argv[1:] if args is None else args)
    command = COMMANDS[name]
    config_class = command.config_class
    from jsonargparse import ArgumentError

    _check_file(args)
    try:
        parser = make_parser(name)
        settings = vars(parser.instantiate(parser.parse_args(args)))
        output, _, smoke, task = (settings.pop(flag) for flag in FLAGS)
        extras, of_task = (
            {flag: x for flag in flags if (x := settings.pop(flag)) is not None}
            for flags in (command.flags, command.task_flags)
        )
        config = config_class(**settings)
    except (ArgumentError, ValueError) as error:
        text = " ".join(str(error).split())  # jsonargparse's messages have several lines
        raise ConfigError(f"{text}{_suggestion(text, config_class)}") from error
    if of_task and task is None:
        raise ConfigError(
            f"--{min(of_task)} goes with --task; set that of other tasks in the file after --config"
        )

    def changed(config: Any) -> Any:
        if task is not None:
            from learned_opt.tasks.own import own_task

            config = config.on(own_task(task), **of_task)
        return config.smoke() if smoke else config

    if name == "train" and config.first is not None:
        from learned_opt.training.stages import first_stage

        first = first_stage(config)  # checks the settings, and completes them for `changed`
        config = replace(config, first=asdict(changed(first))) if smoke or task else config
    return partial(resolve_name(command.function), **extras), changed(config), Path(output)


def _flags(command: str) -> dict[str, Flag]:
    """Returns all flags of a command that are not settings of its config."""
    return {**FLAGS, **COMMANDS[command].flags, **COMMANDS[command].task_flags}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see learned-opt --help")


def _command(args: list[str]) -> list[str]:
    """Returns `args` if they begin with the name of a command.

    Prints the help or the version and exits if `args` ask for it.
    """
    if args and args[0] in COMMANDS:
        if {"-h", "--help"} & {*args}:
            print(help_of(args[0]))
            sys.exit()
        return args
    parser = _Parser(
        prog="learned-opt",
        description="Learned optimizers for PyTorch: train one, benchmark it, make its data.",
        epilog="`learned-opt command --help` lists the settings of a command.",
    )
    parser.add_argument("--version", action="version", version=f"learned-opt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary, add_help=False)
    parser.parse_args(args)
    raise AssertionError("argparse knows a command that COMMANDS does not have")


def help_of(name: str) -> str:
    """Returns the text that `--help` of a command prints."""
    command = COMMANDS[name]
    options = [Option(f"--{flag}", value, text) for flag, (value, text, _) in _flags(name).items()]
    usage = f"learned-opt {name} --output DIR [--config FILE] [--SETTING VALUE ...]"
    return command_help(usage, command.summary, options, command.config_class)


def _check_file(args: list[str]) -> None:
    """Checks that the file after --config, if any, has settings by name.

    Raises:
        ConfigError: it has not.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")
    if (name := parser.parse_known_args(args)[0].config) is None:
        return
    import yaml

    from learned_opt.yaml_size import check_size

    path = user_path(name, "config", ConfigError)
    if not path.is_file():
        return  # jsonargparse's error says so
    try:
        check_size(text := path.read_text(encoding="utf-8"))
        settings = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"config={name!r} is not a text file ({error}); use a YAML file"
        ) from error
    except yaml.YAMLError as error:
        text = " ".join(str(error).split())
        raise ConfigError(
            f"config={name!r} is not usable YAML; correct the file: {text}"
        ) from error
    if settings is None:
        raise ConfigError(
            f"config={name!r} has no settings: it is empty or has only comments; leave --config "
            "out to use the defaults"
        )
    if not isinstance(settings, dict):
        raise ConfigError(
            f"config={name!r} contains a value of type {type(settings).__name__}, not settings by "
            "name; write key: value on each line"
        )


# jsonargparse's messages about unknown keys.
_UNKNOWN = re.compile(r"does not accept option '([^']+)'|Option '([^']+)' is not accepted|"
                      r"unrecognized arguments: --([\w.]+)")  # fmt: skip


def _suggestion(text: str, config_class: type) -> str:
    """Returns a suggestion for the unknown key that the error `text` names, if it names one."""
    found = _UNKNOWN.search(text)
    if found is None:
        return ""
    known = {*FLAGS, *_keys(config_class)}
    unknown = (key for key in next(filter(None, found.groups())).split(".") if key not in known)
    return did_you_mean(next(unknown, ""), sorted(known))


def _keys(hint: Any) -> set[str]:
    """Returns the names of the fields of dataclasses in the type `hint`, nested ones included."""
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return {*hints}.union(*map(_keys, hints.values()))
    return set().union(*map(_keys, get_args(hint)))


def main(args: list[str] | None = None) -> None:
    """Runs the command of `args`, by default the arguments of the process."""
    from geodesic.manifest import DatasetError

    with interruptible():
        try:
            run, config, output = parse(args)
            result = run(config, output)
        except (LearnedOptError, DatasetError) as error:
            print(f"learned-opt: error: {error}", file=sys.stderr)
            sys.exit(2)
        if isinstance(result, Path) and is_first():  # the weights file of `train`
            print(
                f"{result}\n"
                f"use it with LearnedOptimizer(model.parameters(), weights={str(result)!r})"
            )


if __name__ == "__main__":
    main()
