"""Convolutional networks on labelled images, with and without normalization layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from geodesic.finite import check_finite
from learned_opt.errors import ConfigError
from learned_opt.tasks.base import choice, log_uniform
from learned_opt.tasks.data import load_images
from learned_opt.tasks.kinds import SINGLE, Draw, TaskConfig, register
from learned_opt.tasks.module import ACTIVATION_MODULES, ModuleTask

if TYPE_CHECKING:
    from learned_opt.tasks.families import FamilyConfig

GROUP = 4  # the least number of channels of a group, so that its statistics are meaningful

NORMS = {
    "none": lambda channels: nn.Identity(),
    # Always use the statistics of the batch: a module with running averages is not a pure
    # function of θ.
    "batch": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
    "group": lambda channels: nn.GroupNorm(math.gcd(channels, max(1, channels // GROUP)), channels),
    "layer": lambda channels: nn.GroupNorm(1, channels),
}


@dataclass(frozen=True)
class ConvOptions:
    """The settings that only convolutional networks have.

    Attributes:
        norm: The normalization after each convolution: none, batch, group (of at least four
            channels) or layer. Batch normalization uses the statistics of its batch, in evaluations
            too.
    """

    norm: str = "none"

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if self.norm not in NORMS:
            raise ConfigError(f"norm is {self.norm!r}; use one of {list(NORMS)}")


@register("conv")
class ConvTask(ModuleTask):
    """Classifies by 3×3 convolutions of stride 2 with `hidden` channels and a linear layer."""

    Options = ConvOptions

    @classmethod
    def make(
        cls, config: TaskConfig, data_root: str | Path | None = None, draw: Draw = SINGLE
    ) -> ConvTask:
        data = load_images(config.data, data_root)
        if not config.hidden or len(data.image_shape) not in (2, 3):
            raise ConfigError(
                f"kind {config.kind!r} needs at least one width in hidden={config.hidden}, and "
                f"images (height, width) or (height, width, channels), but those of {data.name} "
                f"are {data.image_shape}"
            )
        height, width, channels = (*data.image_shape, 1)[:3]
        image = (channels, height, width)
        train_x, test_x = (  # flattened and unflattened: vmap refuses channels-last strides
            draw.share(x.unflatten(1, (height, width, channels)).movedim(-1, 1).flatten(1))
            for x in (data.train_x, data.test_x)
        )
        train_x, test_x = train_x.unflatten(-1, image), test_x.unflatten(-1, image)
        train_y, test_y = draw.rename(data.train_y, data.test_y, classes=data.num_classes)
        network = partial(cls.network, config, image, data.num_classes)
        chance = math.log(data.num_classes)
        return cls(config, network, (train_x, train_y), (test_x, test_y), chance, draw)

    @staticmethod
    def network(config: TaskConfig, image: tuple[int, int, int], classes: int) -> nn.Module:
        layers, (channels, height, width) = [], image
        for i, o in pairwise((channels, *config.hidden)):
            layers += [nn.Conv2d(i, o, 3, 2, 1), NORMS[config.own.norm](o)]
            layers += [ACTIVATION_MODULES[config.activation]()]
            height, width = (height + 1) // 2, (width + 1) // 2
        features = config.hidden[-1] * height * width
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, classes))

    @classmethod
    def architecture(cls, family: FamilyConfig, rng: torch.Generator) -> TaskConfig:
        """Returns a random config with half as many channels as an MLP has units, to save time."""
        low, high = (max(1, width // 2) for width in family.width)
        return TaskConfig(
            kind=cls.kind,
            data=family.data,
            hidden=tuple(log_uniform(rng, low, high) for _ in range(choice(rng, (1, 2)))),
            activation=choice(rng, family.activations),
            batch_size=choice(rng, family.batch_sizes),
            options={"norm": choice(rng, tuple(NORMS))},
        )


class Block(nn.Module):
    """A residual block φ(f(x) + shortcut(x)); f is two normalized 3×3 convolutions (He 2016)."""

    def __init__(self, i: int, o: int, stride: int, norm: str, activation: str) -> None:
        super().__init__()
        bias = norm == "none"
        self.activation = ACTIVATION_MODULES[activation]()
        self.first = nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=bias), NORMS[norm](o))
        self.second = nn.Sequential(nn.Conv2d(o, o, 3, 1, 1, bias=bias), NORMS[norm](o))
        same = i == o and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(i, o, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.second(self.activation(self.first(x))) + self.shortcut(x))


@register("resnet")
class ResNetTask(ConvTask):
    """Classifies by a residual network.

    It has a 3×3 convolution, a block for each width in `hidden` (with stride 2 except the first),
    the mean over positions, and a linear layer. Three widths give ResNet-8.
    """

    @staticmethod
    def network(config: TaskConfig, image: tuple[int, int, int], classes: int) -> nn.Module:
        norm, first = config.own.norm, config.hidden[0]
        stem = [nn.Conv2d(image[0], first, 3, 1, 1, bias=norm == "none"), NORMS[norm](first)]
        blocks = [
            Block(i, o, 1 if index == 0 else 2, norm, config.activation)
            for index, (i, o) in enumerate(pairwise((first, *config.hidden)))
        ]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(config.hidden[-1], classes)]
        stem.append(ACTIVATION_MODULES[config.activation]())
        return nn.Sequential(*stem, *blocks, *head)

    @classmethod
    def architecture(cls, family: FamilyConfig, rng: torch.Generator) -> TaskConfig:
        """Returns a random config of two blocks, the second with twice the channels."""
        width = log_uniform(rng, *(max(1, width // 4) for width in family.width))
        return TaskConfig(
            kind=cls.kind,
            data=family.data,
            hidden=(width, 2 * width),
            activation=choice(rng, family.activations),
            batch_size=choice(rng, family.batch_sizes),
            options={"norm": choice(rng, tuple(NORMS))},
        )
