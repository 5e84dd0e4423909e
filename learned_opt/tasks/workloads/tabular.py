"""Regression on small tables of scikit-learn, which networks can memorize."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from geodesic.finite import check_finite
from learned_opt.errors import ConfigError
from learned_opt.tasks.diabetes import load_diabetes
from learned_opt.tasks.kinds import TaskConfig, register_workload
from learned_opt.tasks.module import squared_error
from learned_opt.tasks.workloads.base import Device, Workload

# The target in the breast cancer data: the worst fractal dimension of a sample's cell nuclei.
TARGET = 29


@lru_cache(maxsize=2)
def load_table(name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the standardized inputs and targets (n, 1) of each split."""
    if name == "diabetes":
        train, test = load_diabetes()
        rows, target = torch.cat([train, test]), 10
    else:
        from sklearn.datasets import load_breast_cancer

        table = np.random.default_rng(1).permutation(load_breast_cancer().data)
        rows, target = torch.from_numpy((table - table.mean(0)) / table.std(0)).float(), TARGET
    y, x = rows[:, target, None], torch.cat([rows[:, :target], rows[:, target + 1 :]], 1)
    sizes = [len(rows) - 2 * (len(rows) // 5), len(rows) // 5, len(rows) // 5]
    return {
        split: (a, b)
        for split, a, b in zip(
            ("train", "validation", "test"), x.split(sizes), y.split(sizes), strict=True
        )
    }


@dataclass(frozen=True)
class RegressionOptions:
    """The settings of regression.

    Attributes:
        dropout: the dropout probability.
        noise: the standard deviation of noise on the training inputs, which have 1.
    """

    dropout: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if not 0 <= self.dropout < 1 or self.noise < 0:
            raise ConfigError(
                f"dropout={self.dropout} must be at least 0 and less than 1, and "
                f"noise={self.noise} at least 0"
            )


@register_workload("regression")
class RegressionWorkload(Workload):
    """The mean squared error of an MLP that predicts one standardized column of a table.

    `data` is "diabetes", to predict the progression of the disease, or "breast_cancer", to predict
    one of the 30 measurements of a sample from the others.
    """

    Options = RegressionOptions
    unused = (*Workload.unused, "train_size", "test_size")

    @classmethod
    def read(cls, config: TaskConfig, data_root: str | Path | None, device: Device) -> Self:
        if config.data not in ("diabetes", "breast_cancer"):
            raise ConfigError(
                f"data is {config.data!r}; use 'diabetes' or 'breast_cancer' with kind 'regression'"
            )
        data = load_table(config.data)
        return cls(config, data, float(data["train"][1].square().mean()), device)

    def network(self) -> nn.Module:
        layers: list[nn.Module] = []
        for i, o in pairwise((self.data["train"][0].shape[1], *self.config.hidden)):
            layers += [nn.Linear(i, o), nn.ReLU(), nn.Dropout(self.config.own.dropout)]
        return nn.Sequential(*layers, nn.Linear(self.config.hidden[-1], 1))

    def augment(self, inputs: Tensor, rng: torch.Generator) -> Tensor:
        noise = torch.randn(inputs.shape, generator=rng).to(inputs.device)
        return inputs + self.config.own.noise * noise

    losses = staticmethod(squared_error)
