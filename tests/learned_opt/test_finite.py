"""NaN and infinity are refused in every number of every config, found by introspection."""

from __future__ import annotations

import importlib
import math
import pkgutil
import types
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml

import learned_opt
from learned_opt.benchmarking.config import BenchmarkConfig, BenchmarkTask
from learned_opt.benchmarking.entrants import Entrant, Group
from learned_opt.cli import COMMANDS, parse
from learned_opt.config import TrainConfig
from learned_opt.errors import ConfigError
from learned_opt.tasks.kinds import KINDS, UNDRAWN, WORKLOADS, TaskConfig
from learned_opt.tasks.workloads.continued import ContinuedOptions

BAD = (math.nan, math.inf, -math.inf)
# Arguments without a default, or whose default is refused.
NEEDED = {
    Entrant: {"name": "a", "optimizer": "torch.optim.SGD"},
    Group: {"tensors": ("vector",)},
    ContinuedOptions: {"base": {"kind": "image_mlp"}},
}


def parts(hint: Any) -> list[type]:
    """The dataclasses that a field of type `hint` can hold."""
    if is_dataclass(hint):
        return [hint]
    return [found for inner in get_args(hint) for found in parts(inner)]


def config_classes() -> list[type]:
    """All that YAML can fill: the commands' configs, their parts, and the options of each kind."""
    found: dict[type, None] = {}
    left = [command.config_class for command in COMMANDS.values()]
    left += [kind.Options for kind in (KINDS | UNDRAWN | WORKLOADS).values()]
    while left:
        cls = left.pop()
        if cls not in found:
            found[cls] = None
            left += [part for hint in get_type_hints(cls).values() for part in parts(hint)]
    return list(found)


def poisoned(hint: Any, bad: float) -> Iterator[Any]:
    """Values of a field of type `hint`, each with the number `bad` in one place."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in (int, float):
        yield bad
    elif hint is Any:
        yield from (bad, [1, bad], {"values": [(0.9, bad)]})
    elif origin in (Union, types.UnionType):
        for each in inner:
            yield from poisoned(each, bad)
    elif origin is tuple and Ellipsis not in inner:
        for i, each in enumerate(inner):
            for value in poisoned(each, bad):
                yield tuple(value if i == j else 1 for j in range(len(inner)))
    elif origin in (tuple, list):
        for value in poisoned(inner[0], bad):
            yield origin((value,))
    elif origin is dict:
        for value in poisoned(inner[1], bad):
            yield {"mlp": value}
    else:
        known = hint in (str, bool, type(None)) or is_dataclass(hint) or origin is Literal
        assert known, f"{hint}: say here what a number in it looks like"


CASES = [
    (cls, name, value)
    for cls in config_classes()
    for name, hint in get_type_hints(cls).items()
    for bad in BAD
    for value in poisoned(hint, bad)
]


def test_the_configs_are_found() -> None:
    """Every dataclass that is named as configs are: what `config_classes` misses is not tested."""
    named = set()
    for module in pkgutil.walk_packages(learned_opt.__path__, "learned_opt."):
        named |= {
            cls
            for cls in vars(importlib.import_module(module.name)).values()
            if isinstance(cls, type)
            and is_dataclass(cls)
            and cls.__name__.endswith(("Config", "Options"))
        }
    assert named <= {*config_classes()} and {BenchmarkTask, Entrant, Group} < {*config_classes()}


@pytest.mark.parametrize("cls", config_classes(), ids=lambda cls: cls.__name__)
def test_no_number_of_a_config_is_nan_or_infinite(cls: type) -> None:
    needed = NEEDED.get(cls, {})
    cls(**needed)
    for _, name, value in (case for case in CASES if case[0] is cls):
        with pytest.raises(ValueError, match=rf"\b{name}\b") as raised:
            cls(**needed | {name: value})
        assert "nan" in str(raised.value) or "inf" in str(raised.value), (name, value)


def yaml_of(name: str, value: Any) -> dict:
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize(
    ("command", "name", "value", "says"),
    [
        ("train", "step_size.sigma", math.nan, "sigma=nan of StepSizeConfig"),
        ("train", "learning_rate", math.inf, "learning_rate=inf"),
        ("train", "imitation_weight", [math.nan, 0.0], r"imitation_weight\[0\]=nan"),
        ("train", "weights.imitation", [1.0, math.inf], r"weights.imitation\[1\]=inf"),
        ("train", "rule_config.hidden", math.nan, "rule_config.hidden=nan"),
        ("train", "geodesics.family.input_noise", [math.nan, 1.0], r"input_noise\[0\]=nan"),
        ("geodesics", "family.task.init_scale", math.inf, "init_scale=inf of TaskConfig"),
        ("benchmark", "time_limit", -math.inf, "time_limit=-inf"),
        (
            "benchmark",
            "tasks",
            [{"task": {"kind": "adding", "options": {"gain": math.inf}}}],
            "options.gain=inf of TaskConfig",
        ),
        ("benchmark", "tasks", [{"targets": [0.1, math.inf]}], r"targets\[1\]=inf"),
        (
            "benchmark",
            "entrants",
            [NEEDED[Entrant] | {"kwargs": {"lr": math.nan}}],
            "kwargs.lr=nan of Entrant",
        ),
    ],
)
def test_yaml_and_the_command_line_refuse_them_too(command, name, value, says, tmp_path) -> None:
    (path := tmp_path / "config.yaml").write_text(yaml.safe_dump(yaml_of(name, value)))
    text = yaml.safe_dump(value, default_flow_style=True, width=9999).removesuffix("...\n").strip()
    for args in (["--config", str(path)], [f"--{name}={text}"]):
        with pytest.raises(ConfigError, match=says):
            parse([command, "--output", "unused", *args])


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"learning_rate": 1e30}, r"learning_rate is 1e\+30; use at most 1"),
        ({"imitation_weight": (-1.0, 0.0)}, r"imitation_weight is \(-1.0, 0.0\); use 0 or more"),
        ({"weights": {"meta_loss": (1.0, -0.1)}}, r"weights.meta_loss is \(1.0, -0.1\); use 0"),
    ],
)
def test_numbers_that_no_training_survives_are_refused(wrong: dict, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        TrainConfig(**wrong)


def test_whole_numbers_of_any_size_are_finite() -> None:
    assert BenchmarkConfig(reporting_seeds=[10**400]).reporting == [10**400]
    assert TaskConfig(test_size=10**400).test_size == 10**400
