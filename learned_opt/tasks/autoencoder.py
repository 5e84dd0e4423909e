"""Auto-encoders of images."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from learned_opt.errors import ConfigError
from learned_opt.tasks.base import choice, log_uniform
from learned_opt.tasks.data import load_images
from learned_opt.tasks.kinds import SINGLE, Draw, TaskConfig, register
from learned_opt.tasks.module import ACTIVATION_MODULES, ModuleTask, squared_error

if TYPE_CHECKING:
    from learned_opt.tasks.families import FamilyConfig


@register("autoencoder")
class AutoencoderTask(ModuleTask):
    """The mean squared error, over pixels, of a symmetric fully connected auto-encoder.

    `hidden` has the widths down to the code: (32, 8) is pixels-32-8-32-pixels. The code has no
    activation. Images are standardized, so the output zero has a loss of 1 (Hinton & Salakhutdinov
    2006 use pixels in [0, 1] and cross-entropy). Each task of a draw has a random linear map of the
    images.
    """

    @classmethod
    def make(
        cls, config: TaskConfig, data_root: str | Path | None = None, draw: Draw = SINGLE
    ) -> AutoencoderTask:
        if not config.hidden:
            raise ConfigError("hidden is empty; give an autoencoder at least the width of its code")
        data = load_images(config.data, data_root)
        train, test = draw.share(data.train_x), draw.share(data.test_x)
        if draw.rng is not None:
            pixels = train.shape[-1]
            maps = torch.randn(*draw.lead, pixels, pixels, generator=draw.rng) * pixels**-0.5
            train, test = train @ maps, test @ maps
        down = (data.train_x.shape[1], *config.hidden)

        def network() -> nn.Module:
            layers = []
            for i, o in pairwise(down + down[-2::-1]):
                layers += [nn.Linear(i, o), ACTIVATION_MODULES[config.activation]()]
            layers[2 * len(config.hidden) - 1] = nn.Identity()
            return nn.Sequential(*layers[:-1])

        chance = train.square().mean((-2, -1))
        return cls(config, network, (train, train), (test, test), chance, draw, squared_error)

    @classmethod
    def architecture(cls, family: FamilyConfig, rng: torch.Generator) -> TaskConfig:
        low, high = (max(1, layers) for layers in family.hidden_layers)
        layers = choice(rng, range(low, high + 1))
        return TaskConfig(
            kind=cls.kind,
            data=family.data,
            hidden=tuple(log_uniform(rng, *family.width) for _ in range(layers)),
            activation=choice(rng, family.activations),
            batch_size=choice(rng, family.batch_sizes),
        )
