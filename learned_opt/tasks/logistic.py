"""Logistic regression on labelled images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from learned_opt.tasks.base import choice
from learned_opt.tasks.data import load_images
from learned_opt.tasks.kinds import SINGLE, Draw, TaskConfig, register
from learned_opt.tasks.module import ModuleTask

if TYPE_CHECKING:
    from learned_opt.tasks.families import FamilyConfig


@register("logistic")
class LogisticTask(ModuleTask):
    """The cross-entropy of x -> W x + b. θ starts at zero, where F = log(number of classes)."""

    unused = ("init", "init_scale", "hidden", "activation")

    @classmethod
    def make(
        cls, config: TaskConfig, data_root: str | Path | None = None, draw: Draw = SINGLE
    ) -> LogisticTask:
        data = load_images(config.data, data_root)
        pixels, classes = data.train_x.shape[1], data.num_classes

        def linear() -> nn.Module:
            module = nn.Linear(pixels, classes)
            for p in module.parameters():
                nn.init.zeros_(p)
            return module

        train_y, test_y = draw.rename(data.train_y, data.test_y, classes=classes)
        train, test = (draw.share(data.train_x), train_y), (draw.share(data.test_x), test_y)
        return cls(config, linear, train, test, math.log(classes), draw)

    @classmethod
    def architecture(cls, family: FamilyConfig, rng: torch.Generator) -> TaskConfig:
        size = choice(rng, family.batch_sizes)
        return TaskConfig(kind=cls.kind, data=family.data, batch_size=size)
