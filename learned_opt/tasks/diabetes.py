"""Regression on the diabetes data that come with scikit-learn."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from learned_opt.tasks.base import choice, log_uniform
from learned_opt.tasks.kinds import SINGLE, Draw, TaskConfig, register
from learned_opt.tasks.module import ACTIVATION_MODULES, ModuleTask, squared_error

if TYPE_CHECKING:
    from learned_opt.tasks.families import FamilyConfig

TRAIN = 353  # four fifths of the 442 patients; 89 remain to test on


@lru_cache(maxsize=1)
def load_diabetes() -> tuple[Tensor, Tensor]:
    """Returns the training and the test data, (n, 11) each.

    The columns are ten numbers of each patient and the progression of the disease. They are
    standardized by the mean and the standard deviation of the training data.
    """
    from sklearn.datasets import load_diabetes  # local, because importing it takes a second

    x, y = load_diabetes(return_X_y=True, scaled=False)
    values = np.random.default_rng(0).permutation(np.column_stack([x, y]))
    mean, std = values[:TRAIN].mean(0), values[:TRAIN].std(0)
    train, test = np.split((values - mean) / std, [TRAIN])
    return torch.from_numpy(train).float(), torch.from_numpy(test).float()


@register("diabetes")
class DiabetesTask(ModuleTask):
    """The mean squared error of an MLP that predicts the progression of diabetes from ten numbers.

    Targets are standardized, so guessing their mean has a loss of 1. Each task of a draw rotates
    all eleven numbers and predicts the last from the others. The data are from Efron et al. 2004,
    "Least angle regression".
    """

    unused = ("init", "data")

    @classmethod
    def make(
        cls, config: TaskConfig, data_root: str | Path | None = None, draw: Draw = SINGLE
    ) -> DiabetesTask:
        train, test = map(draw.share, load_diabetes())
        inputs = train.shape[-1] - 1
        if draw.rng is not None:
            normal = torch.randn(*draw.lead, inputs + 1, inputs + 1, generator=draw.rng)
            rotation, _ = torch.linalg.qr(normal)
            train, test = train @ rotation, test @ rotation
        train, test = (part.split([inputs, 1], -1) for part in (train, test))
        chance = train[1].square().mean((-2, -1))

        def network() -> nn.Module:
            layers = []
            for i, o in pairwise((inputs, *config.hidden, 1)):
                layers += [nn.Linear(i, o), ACTIVATION_MODULES[config.activation]()]
            return nn.Sequential(*layers[:-1])

        return cls(config, network, train, test, chance, draw, squared_error)

    @classmethod
    def architecture(cls, family: FamilyConfig, rng: torch.Generator) -> TaskConfig:
        layers = choice(rng, range(family.hidden_layers[0], family.hidden_layers[1] + 1))
        return TaskConfig(
            kind=cls.kind,
            hidden=tuple(log_uniform(rng, *family.width) for _ in range(layers)),
            activation=choice(rng, family.activations),
            batch_size=choice(rng, family.batch_sizes),
        )
