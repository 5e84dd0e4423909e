"""A curriculum that lengthens runs when validation stops improving."""

from __future__ import annotations

import math

from torch import Tensor

from learned_opt.config import CurriculumConfig


class Curriculum:
    """A curriculum of run lengths N_1 < N_2 < … (Chen et al. 2020, arXiv 2010.09089).

    In stage i, runs have N_i steps and validation runs N_{i+1} steps. When `patience` validations
    in a row have not improved the score, training continues with N_{i+1} from the best weights of
    the stage. The last length is also that of its validation runs, and its stage lasts to the end.

    Attributes:
        stage: the number of the stage, from 0.
        best: the best (lowest) score of the stage.
        best_weights: the weights with that score.
        stale: the number of validations since then.
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
        """Records the score of `weights`; returns the best weights if the stage ends."""
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
