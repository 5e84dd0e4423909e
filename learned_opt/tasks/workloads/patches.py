"""Auto-encoders of patches of scikit-learn's two sample photographs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from geodesic.finite import check_finite
from learned_opt.errors import ConfigError
from learned_opt.tasks.base import generator
from learned_opt.tasks.kinds import TaskConfig, register_workload
from learned_opt.tasks.module import squared_error
from learned_opt.tasks.workloads.base import Device, Workload

SIDE = 8  # pixels of a patch
SHARES = (0.8, 0.9)  # where validation and test begin, as shares of a photograph's width


@lru_cache(maxsize=1)
def load_patches() -> dict[str, Tensor]:
    """Returns the patches (n, 3·SIDE²) by split, standardized by a single mean and deviation.

    Training patches are from the left of both photographs, at every fourth pixel. The other patches
    are from the right and do not overlap.
    """
    from sklearn.datasets import load_sample_images

    splits: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for image in load_sample_images().images:
        pixels = torch.tensor(image).float().movedim(-1, 0)
        width = pixels.shape[-1]
        edges = [0, *(SIDE * round(share * width / SIDE) for share in SHARES), width]
        for (split, found), (left, right) in zip(splits.items(), pairwise(edges), strict=True):
            step = SIDE // 2 if split == "train" else SIDE
            part = pixels[..., left:right].unfold(1, SIDE, step).unfold(2, SIDE, step)
            found.append(part.permute(1, 2, 0, 3, 4).reshape(-1, 3 * SIDE**2))
    data = {split: torch.cat(found) for split, found in splits.items()}
    mean, std = data["train"].mean(), data["train"].std()
    return {split: (x - mean) / std for split, x in data.items()}


@dataclass(frozen=True)
class PatchOptions:
    """The settings of patch auto-encoders.

    Attributes:
        noise: the standard deviation of noise on the training inputs, whose pixels have 1.
    """

    noise: float = 0.0

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if self.noise < 0:
            raise ConfigError(f"noise is {self.noise}; use at least 0")


@register_workload("patch_autoencoder")
class PatchWorkload(Workload):
    """The mean squared error of reconstructing a patch, in training from a noisy one.

    `hidden` has the widths from the input to the code. The decoder mirrors them.
    """

    Options = PatchOptions
    unused = (*Workload.unused, "data")

    @classmethod
    def read(cls, config: TaskConfig, data_root: str | Path | None, device: Device) -> Self:
        data = {}
        for split, x in load_patches().items():
            order = torch.randperm(len(x), generator=generator("patches", split))
            size = config.train_size if split == "train" else config.test_size
            data[split] = (x[order[:size]],) * 2
        return cls(config, data, float(data["train"][0].square().mean()), device)

    def network(self) -> nn.Module:
        widths = [3 * SIDE**2, *self.config.hidden]
        layers = []
        for i, o in pairwise([*widths, *reversed(widths[:-1])]):
            layers += [nn.Linear(i, o), nn.Identity() if o == widths[-1] else nn.SiLU()]
        return nn.Sequential(*layers[:-1])

    def augment(self, inputs: Tensor, rng: torch.Generator) -> Tensor:
        noise = torch.randn(inputs.shape, generator=rng).to(inputs.device)
        return inputs + self.config.own.noise * noise

    losses = staticmethod(squared_error)
