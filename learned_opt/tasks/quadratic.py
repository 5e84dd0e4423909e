"""Quadratics of a given condition number, and the quadratics of L2L."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from geodesic.finite import check_finite
from learned_opt.errors import ConfigError
from learned_opt.tasks.base import Batch, Task, choice, generator, log_uniform, uniform
from learned_opt.tasks.kinds import SINGLE, Draw, TaskConfig, register

if TYPE_CHECKING:
    from learned_opt.tasks.families import FamilyConfig

INIT_STD = 0.01  # as in L2L's code: θ starts near zero, where F is `chance`


@dataclass(frozen=True)
class QuadraticOptions:
    """The settings that only quadratics have.

    Attributes:
        dim: The dimension of θ.
        condition: The ratio of the largest to the smallest eigenvalue of the Hessian. Eigenvalues
            are log-spaced up to 1. null gives L2L's quadratic.
        entries: The distribution of the entries of L2L's W and y: "normal" is N(0, 1) as in the
            paper, and "uniform" is U(0, 1) as in its code.
    """

    dim: int = 10
    condition: float | None = None
    entries: str = "normal"

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if self.dim < 1 or self.entries not in ("normal", "uniform"):
            raise ConfigError(
                f"dim={self.dim} must be at least 1, and entries={self.entries!r} must be 'normal' "
                "or 'uniform'"
            )
        if self.condition is not None and self.condition < 1:
            raise ConfigError(
                f"condition is {self.condition}; use at least 1, or null for L2L's quadratic"
            )


@register("quadratic")
class QuadraticTask(Task):
    """F(θ) = ½ ‖Wθ − y‖² with W = Λ^½ Qᵀ and y = Wθ*.

    The Hessian is QΛQᵀ and the minimum 0. Without a condition number, F(θ) = ‖Wθ − y‖² with
    independent entries of W and y (Andrychowicz et al. 2016, section 3.1). Each task of a draw has
    its own W and y; those of a single task are determined by its `Options`. θ starts at N(0, .01²).
    Nothing else is random, and every batch is (W, y).
    """

    Options = QuadraticOptions
    unused = ("data", "hidden", "activation", "batch_size", "init", "train_size", "test_size")

    def __init__(self, config: TaskConfig, draw: Draw = SINGLE) -> None:
        self.config, self.num_tasks, self.device = config, draw.num_tasks, draw.device
        own, self.name = config.own, config.label
        self.shapes = ((own.dim,),)
        rng, lead = draw.rng or generator("quadratic"), self.lead
        if own.condition is None:
            random = torch.randn if own.entries == "normal" else torch.rand
            w = random(*lead, own.dim, own.dim, generator=rng)
            y = random(*lead, own.dim, generator=rng)
        else:
            q, _ = torch.linalg.qr(torch.randn(*lead, own.dim, own.dim, generator=rng).double())
            root = torch.logspace(-1, 0, own.dim, own.condition**0.5, dtype=torch.double)
            w = root.unsqueeze(-1) * q.mT
            y = w @ torch.randn(*lead, own.dim, 1, generator=rng).double()
            w, y = w.float(), y.squeeze(-1).float()
        self._data = w.to(self.device), y.to(self.device)
        self._factor = 1.0 if own.condition is None else 0.5
        self.chance = self.loss(torch.zeros_like(self._data[1]), self._data)
        scales = torch.ones(lead) if draw.init_scales is None else draw.init_scales
        self._init_std = INIT_STD * config.init_scale * scales.unsqueeze(-1)

    @classmethod
    def make(
        cls, config: TaskConfig, data_root: str | Path | None = None, draw: Draw = SINGLE
    ) -> QuadraticTask:
        return cls(config, draw)

    @classmethod
    def sample(
        cls,
        family: FamilyConfig,
        rng: torch.Generator,
        data_root: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> QuadraticTask:
        """Returns random quadratics: L2L's, or with condition numbers from 10 to 10⁴.

        They have as many dimensions as an MLP of the family has units.
        """
        options = {"dim": log_uniform(rng, *family.width)}
        options["condition"] = choice(rng, (None, 10.0, 100.0, 1e3, 1e4))
        scales = 10 ** uniform(rng, *family.log10_init_scale, (family.num_tasks,))
        config = TaskConfig(kind=cls.kind, options=options)
        return cls(config, Draw(family.num_tasks, rng, scales, device))

    def init(self, seed: int) -> Tensor:
        noise = torch.randn(*self.lead, self.dim, generator=generator("init", seed))
        return (self._init_std * noise).to(self.device)

    def batch(self, seed: int, step: int) -> Batch:
        return self._data

    def fixed_batch(self, size: int | None = None) -> Batch:
        return self._data

    def loss(self, theta: Tensor | Sequence[Tensor], batch: Batch) -> Tensor:
        theta, (w, y) = theta if isinstance(theta, Tensor) else theta[0], batch
        residual = (w @ theta.unsqueeze(-1)).squeeze(-1) - y
        return self._factor * residual.square().sum(-1)

    def evaluate(self, theta: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            loss = self.loss(theta, self._data)
        nan = torch.full_like(loss, torch.nan)
        return {"train_loss": loss, "test_loss": loss, "test_accuracy": nan}
