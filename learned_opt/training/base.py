"""What an objective is: the loss of a meta-update, and what it remembers between updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from learned_opt.config import TrainConfig
from learned_opt.rules import UpdateRule

if TYPE_CHECKING:
    from learned_opt.training.module import MetaTraining


class Objective(ABC):
    """One way to learn, under its `name` in the config's `objectives`.

    Randomness is keyed by (seed, rank, number of the update), and all else that an update depends
    on is in `state_dict`: so a resumed run makes the updates that an uninterrupted one would.
    A task that diverges leaves the gradient finite: under DDP every rank joins every reduction.
    """

    name: ClassVar[str]

    def __init__(self, config: TrainConfig, rule: UpdateRule) -> None:
        self.config = config

    @abstractmethod
    def loss(self, module: MetaTraining, item: dict) -> Tensor:
        """A scalar whose gradient in `module.rule` is the meta-gradient of update item["number"];
        `item` is one of data.py's."""

    def state_dict(self) -> dict:
        """Tensors and plain values only, so that checkpoints load with weights_only=True."""
        return {}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Takes up what `state_dict` gave."""
        assert not state


def between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * share
