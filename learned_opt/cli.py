"""The command line: `learned-opt geodesics`, `train` and `benchmark`.

What a command needs is imported once it is known which one is meant, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, is_dataclass, replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, get_args, get_type_hints

from learned_opt import __version__
from learned_opt.errors import ConfigError, LearnedOptError, did_you_mean
from learned_opt.help import Option, command_help
from learned_opt.interrupts import interruptible, is_first

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


class Flag(NamedTuple):
    """A flag that is no setting of the config: what `--help` says of it, and of which type it is;
    without a `value` it is a switch."""

    value: str
    text: str
    type: type = str


class Command(NamedTuple):
    """A command: its config and function by "module:name", and the flags that are arguments of the
    function."""

    summary: str
    config: str
    function: str
    flags: dict[str, Flag]

    @property
    def config_class(self) -> type:
        return resolve_name(self.config)


COMMANDS = {
    "geodesics": Command(
        "Make a data set of target paths: SGD runs, and the geodesics that shorten them.",
        "learned_opt.config:GeodesicsConfig",
        "learned_opt.geodesics:make_geodesics",
        {
            "plot": Flag("", "draw pictures of some paths into plots/"),
            "processes": Flag("N", "processes that share the work here (default: 1)", int),
        },
    ),
    "train": Command(
        "Meta-train an update rule, after making the target paths that are missing.",
        "learned_opt.config:TrainConfig",
        "learned_opt.training.stages:train",
        {},
    ),
    "benchmark": Command(
        "Compare optimizers, tuned on some seeds and reported on others.",
        "learned_opt.benchmarking.config:BenchmarkConfig",
        "learned_opt.benchmarking:benchmark",
        {},
    ),
}
FLAGS = {
    "output": Flag("DIR", "folder of the results; the same command resumes what is there"),
    "config": Flag("FILE", "YAML file of the settings below; flags win over it"),
    "smoke": Flag("", "shrink everything to seconds, to see whether it works"),
}


def make_parser(command: str) -> ArgumentParser:
    """Of what comes after the name of a command."""
    from learned_opt.parsing import make_parser  # here: it imports jsonargparse

    parser = make_parser(COMMANDS[command].config_class)
    parser.add_argument("--config", action="config")
    parser.add_argument("--output", type=str, required=True)
    for name, flag in (FLAGS | COMMANDS[command].flags).items():
        if name not in ("config", "output"):
            how = {"type": flag.type | None} if flag.value else {"action": "store_true"}
            parser.add_argument(f"--{name}", **how)
    return parser


def parse(args: list[str] | None) -> tuple[Callable, Any, Path]:
    """The command, its config and its output folder.

    Raises:
        ConfigError: an argument is missing, unknown, of another type, or refused by its config.
    """
    name, *args = _command(sys.argv[1:] if args is None else args)
    command = COMMANDS[name]
    config_class = command.config_class
    from jsonargparse import ArgumentError

    try:
        parser = make_parser(name)
        settings = vars(parser.instantiate(parser.parse_args(args)))
        output, smoke, _ = (settings.pop(flag) for flag in FLAGS)
        extras = {flag: settings.pop(flag) for flag in command.flags}
        config = config_class(**settings)
    except (ArgumentError, ValueError) as error:
        _check_file(args)
        text = " ".join(str(error).split())  # jsonargparse breaks lines
        raise ConfigError(f"{text}{_suggestion(text, config_class)}") from error
    if name == "train" and config.first is not None:
        from learned_opt.training.stages import first_stage

        first = first_stage(config)  # for what it complains of, and to shrink it with its own rest
        config = replace(config, first=asdict(first.smoke())) if smoke else config
    config = config.smoke() if smoke else config
    given = {flag: value for flag, value in extras.items() if value is not None}
    return partial(resolve_name(command.function), **given), config, Path(output)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see learned-opt --help")


def _command(args: list[str]) -> list[str]:
    """`args`, which begin with the name of a command; prints help or the version and exits where
    they ask for it."""
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
    """What `--help` of a command prints."""
    command = COMMANDS[name]
    flags = FLAGS | command.flags
    options = [Option(f"--{flag}", value, text) for flag, (value, text, _) in flags.items()]
    usage = f"learned-opt {name} --output DIR [--config FILE] [--SETTING VALUE ...]"
    return command_help(usage, command.summary, options, command.config_class)


def _check_file(args: list[str]) -> None:
    """That the file after --config, if any, holds settings by name; read when parsing has failed.

    Raises:
        ConfigError: it does not.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")
    if (name := parser.parse_known_args(args)[0].config) is None:
        return
    import yaml

    from geodesic.files import user_path

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


def _suggestion(text: str, config_class: type) -> str:
    """What a key that is unknown, as `text` says, was perhaps meant to be."""
    found = _UNKNOWN.search(text)
    if found is None:
        return ""
    known = {*FLAGS, *_keys(config_class)}
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
    from geodesic.dataset import DatasetError

    with interruptible():
        try:
            run, config, output = parse(args)
            result = run(config, output)
        except (LearnedOptError, DatasetError) as error:
            print(f"learned-opt: error: {error}", file=sys.stderr)
            sys.exit(2)
        if isinstance(result, Path) and is_first():  # of `train`
            print(
                f"{result}\nuse them: LearnedOptimizer(model.parameters(), weights={str(result)!r})"
            )


if __name__ == "__main__":
    main()
