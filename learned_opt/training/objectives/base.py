"""The interface of objectives: the loss of a meta-update, and the state kept between updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from learned_opt.rules import UpdateRule
from learned_opt.tasks.base import Task

if TYPE_CHECKING:  # the config reads the registry of objectives
    from learned_opt.config import TrainConfig
    from learned_opt.tasks.families import FamilyConfig


@dataclass(frozen=True)
class Context:
    """What an objective is given of the training around it.

    Attributes:
        rule: the rule that is trained.
        family: the tasks of the rule's own runs.
        rank: the number of this process.
        draw: returns the tasks of a family and a key.
        log: records a number of this update by its name.
        count: adds to the number of inner steps that were made.
        length: the length of runs that a curriculum sets; None without one.
    """

    rule: UpdateRule
    family: FamilyConfig
    rank: int
    draw: Callable[..., Task]
    log: Callable[[str, Tensor], None]
    count: Callable[[int | Tensor], None]
    length: int | None = None


class Objective(ABC):
    """An objective of meta-training, named by `name` in the config's `objectives`.

    Randomness is keyed by (seed, rank, number of the update), and everything else that an update
    depends on is in `state_dict`, so a resumed run makes the same updates as an uninterrupted one.
    A task that diverges must leave the gradient finite, because under DDP every rank takes part in
    every reduction.
    """

    name: ClassVar[str]
    runs: ClassVar[bool] = False  # whether it trains on windows of the rule's own runs

    def __init__(self, config: TrainConfig, rule: UpdateRule) -> None:
        self.config = config

    @abstractmethod
    def loss(self, context: Context, item: dict) -> Tensor:
        """Returns a scalar whose gradient is the meta-gradient of update item["number"].

        The gradient is in the parameters of `context.rule`, and `item` comes from data.py.
        """

    def state_dict(self) -> dict:
        """Returns tensors and plain values, so that checkpoints load with weights_only=True."""
        return {}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Restores what `state_dict` returned."""
        assert not state


def between(ends: tuple[float, float], share: float) -> float:
    """Interpolates linearly between two numbers."""
    return ends[0] + (ends[1] - ends[0]) * share
