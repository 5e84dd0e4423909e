"""Image classifiers with augmentation: MLPs, convolutional networks, ResNets and ViTs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geodesic.finite import check_finite
from learned_opt.errors import ConfigError, DataError
from learned_opt.tasks.base import Batch
from learned_opt.tasks.data import ImageData, load_images
from learned_opt.tasks.kinds import TaskConfig, register_workload
from learned_opt.tasks.workloads.base import Device, Workload


@dataclass(frozen=True)
class ImageOptions:
    """The settings of image classifiers.

    Attributes:
        pool: the side, in pixels, of the squares over which images are averaged.
        shift: the largest random shift of a training image in each direction, in pixels; zeros fill
            the border.
        flip: mirrors each training image left to right with probability 1/2.
        dropout: the dropout probability.
        classes: the classes to use, which are renumbered 0, 1, ...; all if empty.
    """

    pool: int = 1
    shift: int = 0
    flip: bool = False
    dropout: float = 0.0
    classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if self.pool < 1 or self.shift < 0 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"pool={self.pool} must be at least 1, shift={self.shift} at least 0, and "
                f"dropout={self.dropout} at least 0 and less than 1"
            )


class ImageWorkload(Workload):
    """The cross-entropy of classifying images (n, channels, height, width).

    The test split is the first `test_size` of the data set's test images. The validation split is
    the last `test_size` of its training images. The training split is the first `train_size` of the
    remaining ones.
    """

    Options = ImageOptions

    def __init__(self, config: TaskConfig, images: ImageData, device: torch.device | str) -> None:
        size = config.test_size or len(images.test_x)
        left = len(images.train_x) - size
        if left < 1:
            raise DataError(
                f"{images.name!r} has {len(images.train_x)} training images, and test_size={size} "
                "of them would be for validation; use a smaller test_size"
            )
        count = min(config.train_size or left, left)
        splits = {
            "train": (images.train_x[:count], images.train_y[:count]),
            "validation": (images.train_x[left:], images.train_y[left:]),
            "test": (images.test_x[:size], images.test_y[:size]),
        }
        height, width, channels = (*images.image_shape, 1)[:3]
        shape, pool = (height, width, channels), config.own.pool
        data: dict[str, Batch] = {
            name: (F.avg_pool2d(x.unflatten(1, shape).movedim(-1, 1), pool), y)
            for name, (x, y) in splits.items()
        }
        self.image = tuple(data["train"][0].shape[1:])
        self.classes = images.num_classes
        super().__init__(config, data, math.log(images.num_classes), device)

    @classmethod
    def read(cls, config: TaskConfig, data_root: str | Path | None, device: Device) -> Self:
        images = load_images(config.data, data_root)
        if kept := config.own.classes:
            images = only(images, tuple(kept))
        return cls(config, images, device)

    def augment(self, inputs: Tensor, rng: torch.Generator) -> Tensor:
        own, (n, _, height, width) = self.config.own, inputs.shape
        if own.flip:
            mirrored = (torch.rand(n, 1, 1, 1, generator=rng) < 0.5).to(inputs.device)
            inputs = torch.where(mirrored, inputs.flip(-1), inputs)
        if own.shift:
            padded = F.pad(inputs, (own.shift,) * 4)
            y, x = torch.randint(2 * own.shift + 1, (2, n, 1), generator=rng).to(inputs.device)
            rows = (y + torch.arange(height, device=y.device))[:, None, :, None]
            columns = (x + torch.arange(width, device=x.device))[:, None, None, :]
            image = torch.arange(n, device=y.device)[:, None, None, None]
            channel = torch.arange(inputs.shape[1], device=y.device)[None, :, None, None]
            inputs = padded[image, channel, rows, columns]
        return inputs


def only(images: ImageData, classes: tuple[int, ...]) -> ImageData:
    """Returns the images of some classes, which are renumbered in the order of `classes`."""
    parts = {}
    for split in ("train", "test"):
        x, y = getattr(images, f"{split}_x"), getattr(images, f"{split}_y")
        mine = torch.isin(y, torch.tensor(classes))
        names = torch.zeros(images.num_classes, dtype=torch.int64)
        names[list(classes)] = torch.arange(len(classes))
        parts |= {f"{split}_x": x[mine], f"{split}_y": names[y[mine]]}
    return replace(images, num_classes=len(classes), **parts)


@register_workload("image_mlp")
class MLPWorkload(ImageWorkload):
    """An MLP with the widths in `hidden`; GELU and dropout follow each hidden layer."""

    def network(self) -> nn.Module:
        layers, dropout = [nn.Flatten()], self.config.own.dropout
        for i, o in pairwise((math.prod(self.image), *self.config.hidden)):
            layers += [nn.Linear(i, o), nn.GELU(), nn.Dropout(dropout)]
        return nn.Sequential(*layers, nn.Linear(self.config.hidden[-1], self.classes))


@register_workload("image_conv")
class ConvWorkload(ImageWorkload):
    """A convolutional network of 3×3 convolutions, dropout and a linear layer.

    `hidden` has the channels of the convolutions. Batch normalization and ReLU follow each of them,
    and max pooling follows each except the first.
    """

    def network(self) -> nn.Module:
        layers = []
        for index, (i, o) in enumerate(pairwise((self.image[0], *self.config.hidden))):
            layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if index else []
        side = math.prod(n // 2 ** (len(self.config.hidden) - 1) for n in self.image[1:])
        head = nn.Linear(side * self.config.hidden[-1], self.classes)
        return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(self.config.own.dropout), head)


class ResidualBlock(nn.Module):
    """y = relu(x' + f(x)) with two 3×3 convolutions and batch normalization (He et al. 2016)."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(),
            nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o),
        )  # fmt: skip
        shortcut = nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)
        self.shortcut = nn.Identity() if (i, stride) == (o, 1) else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.inner(x))


@register_workload("image_resnet")
class ResNetWorkload(ImageWorkload):
    """A ResNet: a convolution, residual blocks, the mean over positions and a linear layer.

    There is a block for each width in `hidden`. All except the first have stride 2.
    """

    def network(self) -> nn.Module:
        first, *_ = hidden = self.config.hidden
        stem = (
            nn.Conv2d(self.image[0], first, 3, 1, 1, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(),
        )
        blocks = [ResidualBlock(i, o, 1 if index == 0 else 2)
                  for index, (i, o) in enumerate(pairwise((first, *hidden)))]  # fmt: skip
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(hidden[-1], self.classes)
        return nn.Sequential(*stem, *blocks, *head)


@dataclass(frozen=True)
class ViTOptions(ImageOptions):
    """The settings of image classifiers, and those of vision transformers.

    Attributes:
        patch: the side of a patch, in pixels.
        heads: the number of attention heads, which must divide the width.
    """

    patch: int = 4
    heads: int = 4


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) without the class token.

    It has a linear map of patches, learned positions, pre-norm layers and the mean over patches.
    """

    def __init__(self, image: tuple[int, int, int], hidden: tuple[int, ...], own: ViTOptions,
                 classes: int) -> None:  # fmt: skip
        super().__init__()
        width, (channels, height, breadth) = hidden[0], image
        self.patches = nn.Conv2d(channels, width, own.patch, own.patch)
        self.positions = nn.Embedding((height // own.patch) * (breadth // own.patch), width)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, own.heads, 4 * width, own.dropout, F.gelu, batch_first=True, norm_first=True
            )
            for _ in hidden
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions.weight
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


@register_workload("image_vit")
class ViTWorkload(ImageWorkload):
    """A vision transformer; `hidden` repeats one width, once for each layer."""

    Options = ViTOptions

    def network(self) -> nn.Module:
        own, hidden = self.config.own, self.config.hidden
        sides = [*self.image[1:], own.patch]
        if len(set(hidden)) != 1 or hidden[0] % own.heads or any(n % own.patch for n in sides):
            raise ConfigError(
                f"hidden={hidden} must repeat one width, which is a multiple of heads={own.heads}, "
                f"and patch={own.patch} must divide the sides of images {self.image}"
            )
        return ViT(self.image, hidden, own, self.classes)
