"""Matrix factorization from some of the entries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geodesic.finite import check_finite
from learned_opt.errors import ConfigError
from learned_opt.tasks.base import choice, generator, log_uniform
from learned_opt.tasks.kinds import SINGLE, Draw, TaskConfig, register
from learned_opt.tasks.module import ModuleTask, squared_error

if TYPE_CHECKING:
    from learned_opt.tasks.families import FamilyConfig

OBSERVED = 0.8  # the share of the entries to train on; the rest is to test on
INIT_STD = 0.1  # near the saddle at zero, because the entries themselves are of size 1


@dataclass(frozen=True)
class MatrixOptions:
    """The settings that only matrix factorization has.

    Attributes:
        rows: The number of rows of M.
        columns: The number of columns of M.
        rank: The rank of M and of the factors.
    """

    rows: int = 32
    columns: int = 24
    rank: int = 4

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if not 1 <= self.rank <= min(self.rows, self.columns) or self.rows * self.columns < 2:
            raise ConfigError(
                f"rank={self.rank} must be from 1 to the smaller of rows={self.rows} and "
                f"columns={self.columns}, and M must have at least two entries"
            )


class Factors(nn.Module):
    def __init__(self, own: MatrixOptions) -> None:
        super().__init__()
        self.u = nn.Parameter(INIT_STD * torch.randn(own.rows, own.rank))
        self.v = nn.Parameter(INIT_STD * torch.randn(own.columns, own.rank))

    def forward(self, entries: Tensor) -> Tensor:
        """Returns u_i · v_j, (n,), of rows and columns (i, j), (n, 2)."""
        return (F.embedding(entries[:, 0], self.u) * F.embedding(entries[:, 1], self.v)).sum(-1)


@register("matrix_factorization")
class MatrixTask(ModuleTask):
    """F(U, V) = the mean of (u_i · v_j − M_ij)² over the observed entries.

    M = A Bᵀ / √rank with standard normal A and B, so entries have variance 1 and the minimum is 0.
    Each task of a draw has its own M; that of a single task is determined by its `Options`.
    """

    Options = MatrixOptions
    unused = ("data", "hidden", "activation", "init")

    @classmethod
    def make(
        cls, config: TaskConfig, data_root: str | Path | None = None, draw: Draw = SINGLE
    ) -> MatrixTask:
        own, rng = config.own, draw.rng or generator("matrix")
        a = torch.randn(*draw.lead, own.rows, own.rank, generator=rng)
        b = torch.randn(*draw.lead, own.columns, own.rank, generator=rng)
        m = (a @ b.mT).flatten(-2) * own.rank**-0.5
        order = torch.randperm(own.rows * own.columns, generator=rng)
        entries = torch.stack([order // own.columns, order % own.columns], -1)
        cut = min(max(1, round(OBSERVED * len(order))), len(order) - 1)
        train, test = (
            (draw.share(entries[part]), m[..., order[part]])
            for part in (slice(cut), slice(cut, None))
        )
        chance = train[1].square().mean(-1)
        return cls(config, lambda: Factors(own), train, test, chance, draw, squared_error)

    @classmethod
    def architecture(cls, family: FamilyConfig, rng: torch.Generator) -> TaskConfig:
        rows, columns = (max(2, log_uniform(rng, *family.width)) for _ in range(2))
        rank = min(rows, columns, choice(rng, (1, 2, 4, 8)))
        return TaskConfig(
            kind=cls.kind,
            batch_size=choice(rng, family.batch_sizes),
            options={"rows": rows, "columns": columns, "rank": rank},
        )
