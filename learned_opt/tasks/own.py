"""A task in a file of the user: `--task my_module:make_task`."""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from learned_opt.errors import ConfigError
from learned_opt.tasks.base import Batch, Task
from learned_opt.tasks.kinds import SINGLE, Draw, TaskConfig, register
from learned_opt.tasks.module import ModuleTask, cross_entropy, squared_error

if TYPE_CHECKING:
    from learned_opt.tasks.families import FamilyConfig

MAKE = "write `def make_task(draw)` in my_module.py, and give my_module:make_task"


@dataclass(frozen=True)
class OwnOptions:
    """The settings of a task in a file of your own.

    Attributes:
        function: "my_module:make_task", a function that takes a `Draw` and returns the task. The
            module is in the current folder or installed.
        source: The digest of the module's file, which `--task` fills in. It keeps results of
            another version of the file apart.
    """

    function: str = ""
    source: str = ""


@register("own", drawn=False)
class OwnTask(ModuleTask):
    """F(θ) = the mean loss of your module on your data.

        def make_task(draw):
            x = torch.linspace(-3, 3, 200).unsqueeze(1)
            make_model = lambda: nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
            return OwnTask(make_model, (x, x.sin()), batch_size=32, draw=draw)

    `learned-opt benchmark --task my_module:make_task` calls the function once in each process.
    `train` calls it once for each draw, which is `draw.num_tasks` tasks that differ in their
    initial weights. Random numbers that the function takes from `draw.rng` differ from draw to
    draw, and all tasks of a draw share them. `benchmark` calls it with `draw.rng` None.

    Args:
        make_model: returns the module with fresh weights, from torch's global random numbers. The
            module has no dropout and no running statistics, see `ModuleTask`.
        train: the training inputs and targets, (n, …) each; integer targets are classes.
        test: the test inputs and targets; by default the training data.
        batch_size: the number of examples in a minibatch.
        losses: returns the loss of each element from outputs and targets; by default the
            cross-entropy for classes, and the squared error for other targets.
        chance: the loss of a guess that ignores the inputs. By default it is the loss of equal
            probabilities for all classes, or of the mean target.
        draw: the argument of the function, which says how many tasks to make at once.
        name: the name in tables.
    """

    Options = OwnOptions
    unused = ("data", "hidden", "activation", "batch_size", "init", "init_scale", "train_size",
              "test_size")  # fmt: skip

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        train: Batch,
        test: Batch | None = None,
        batch_size: int = 64,
        losses: Callable[[Tensor, Tensor], Tensor] | None = None,
        chance: float | None = None,
        draw: Draw = SINGLE,
        name: str = "own",
    ) -> None:
        targets = train[1]
        classes = not targets.is_floating_point()
        losses = losses or (cross_entropy if classes else squared_error)
        if chance is None:
            guess = targets.float().mean(0).expand_as(targets)
            chance = (
                math.log(int(targets.max()) + 1)
                if classes
                else float(losses(guess, targets).mean())
            )
        train, test = (tuple(map(draw.share, part)) for part in (train, test or train))
        config = TaskConfig(name=name, batch_size=batch_size)
        super().__init__(config, make_model, train, test, chance, draw, losses)

    @classmethod
    def make(
        cls, config: TaskConfig, data_root: str | Path | None = None, draw: Draw = SINGLE
    ) -> Task:
        """Returns the task that the function of `config` returns.

        Raises:
            ConfigError: there is no such function, it raised an error, or it returned another
                number of tasks or no task.
        """
        name = config.own.function
        function = load(name)
        try:
            task = function(draw)
        except Exception as error:
            raise ConfigError(f"task={name!r} raised {_told(error)}") from error
        if not isinstance(task, Task) or task.num_tasks != draw.num_tasks:
            found = f", num_tasks={task.num_tasks}" if isinstance(task, Task) else ""
            raise ConfigError(
                f"task={name!r} returned {type(task).__name__}{found}; return a learned_opt.Task "
                f"with num_tasks={draw.num_tasks}, as OwnTask(..., draw=draw) has"
            )
        return task

    @classmethod
    def architecture(cls, family: FamilyConfig, rng: torch.Generator) -> TaskConfig:
        """Families cannot draw such a task at random, so this raises NotImplementedError."""
        raise NotImplementedError  # a family can have it only as its `task`


def own_task(function: str) -> TaskConfig:
    """Returns the config of the task that `function`, "my_module:make_task", returns.

    Raises:
        ConfigError: there is no such function, it raises an error, or it returns no task.
    """
    path = sys.modules[load(function).__module__].__file__
    source = hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""
    options = {"function": function, "source": source}
    config = TaskConfig(name=function, kind="own", options=options)
    OwnTask.make(config)  # raises its errors before there is an output folder
    return config


def load(name: str) -> Callable[[Draw], Task]:
    """Imports and returns the function `name`, as "my_module:make_task".

    Raises:
        ConfigError: there is no such module or function, or importing it raised an error.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ConfigError(f"task={name!r} is not of the form module:function; {MAKE}")
    if os.getcwd() not in sys.path:  # last, so that installed modules come first
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.partition(".")[0]:
            raise ConfigError(f"task={name!r} cannot be imported: {_told(error)}") from error
        raise ConfigError(
            f"task={name!r}: there is no {module_name}.py in {os.getcwd()!r}; {MAKE}"
        ) from None
    except Exception as error:
        raise ConfigError(f"task={name!r} cannot be imported: {_told(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"task={name!r}: {module_name} has no function {function_name!r}; {MAKE}")
    return function


def _told(error: Exception) -> str:
    """Returns the text of an error in the user's code, with file and line."""
    *_, frame = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})"
