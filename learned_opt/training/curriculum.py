"""Longer runs when shorter ones have nothing more to teach."""

from __future__ import annotations

import math

from torch import Tensor

from learned_opt.config import CurriculumConfig


class Curriculum:
    """Lengths N_1 < N_2 < …, each validated at the next (Chen et al. 2020, arXiv 2010.09089).

    Runs are N_i steps long. Validation runs are N_{i+1} steps; when `patience` validations in a
    row have brought no better score, training goes on with N_{i+1}, from the best weights of the
    stage. At the last length, which is also validated at, it goes on to the end.

    Attributes:
        stage: i, from 0.
        best: the best score of the stage, less is better.
        best_weights: those that had it.
        stale: validations since.
    """

    def __init__(self, config: CurriculumConfig) -> None:
        self.config = config
        self._enter(0)

    def _enter(self, stage: int) -> None:
        self.stage, self.best, self.stale = stage, math.inf, 0
        self.best_weights: dict[str, Tensor] = {}

    @property
    def length(self) -> int:
        return self.config.lengths[self.stage]

    @property
    def validation_length(self) -> int:
        return self.config.lengths[min(self.stage + 1, len(self.config.lengths) - 1)]

    def validated(self, score: float, weights: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Takes note of a validation of `weights`; those to go on from if the stage is over."""
        if score < self.best:
            self.best, self.stale = score, 0
            self.best_weights = {name: value.clone() for name, value in weights.items()}
        else:
            self.stale += 1
        if self.stale < self.config.patience or self.stage + 1 == len(self.config.lengths):
            return None
        weights = self.best_weights or weights
        self._enter(self.stage + 1)
        return weights

    def state_dict(self) -> dict:
        names = ("stage", "best", "stale", "best_weights")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)
