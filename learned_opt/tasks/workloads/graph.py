"""A graph network that predicts hidden features in a graph of scikit-learn's breast cancer data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geodesic.finite import check_finite
from learned_opt.errors import ConfigError
from learned_opt.tasks.base import Batch, generator
from learned_opt.tasks.kinds import TaskConfig, register_workload
from learned_opt.tasks.workloads.base import Device, Workload

NEIGHBOURS = 6
NODES = {"train": 369, "validation": 100, "test": 100}  # of 569
MASKS = 8  # the number of random choices of hidden features that an evaluation averages over


@lru_cache(maxsize=1)
def load_graph() -> tuple[Tensor, Tensor]:
    """Returns standardized features (569, 30) and the normalized adjacency matrix as a sparse one.

    The matrix is D^(−1/2) (A + I) D^(−1/2) (Kipf & Welling 2017). An edge joins each node to its
    NEIGHBOURS nearest nodes in the first ten features.
    """
    from sklearn.datasets import load_breast_cancer
    from sklearn.neighbors import kneighbors_graph

    x = load_breast_cancer().data
    x = np.random.default_rng(0).permutation((x - x.mean(0)) / x.std(0))
    near = kneighbors_graph(x[:, :10], NEIGHBOURS).toarray()
    adjacency = torch.from_numpy(np.maximum(near, near.T)).float() + torch.eye(len(x))
    scale = adjacency.sum(1).rsqrt()
    adjacency = scale[:, None] * adjacency * scale
    return torch.from_numpy(x).float(), adjacency.to_sparse()


@dataclass(frozen=True)
class GraphOptions:
    """The settings of graph networks.

    Attributes:
        hidden_share: the probability that a feature of a node is hidden from the network.
        dropout: the dropout probability.
    """

    hidden_share: float = 0.3
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if not (0 < self.hidden_share < 1 and 0 <= self.dropout < 1):
            raise ConfigError(
                f"hidden_share={self.hidden_share} must be between 0 and 1, and "
                f"dropout={self.dropout} must be at least 0 and less than 1"
            )


class GraphNet(nn.Module):
    """A network of layers h' = relu(h V + Â h W + b).

    Its inputs are the features, 0 where they are hidden, and ones where they are hidden.
    """

    def __init__(self, adjacency: Tensor, features: int, hidden: tuple[int, ...],
                 dropout: float) -> None:  # fmt: skip
        super().__init__()
        self.register_buffer("adjacency", adjacency, persistent=False)
        self.dropout = nn.Dropout(dropout)
        sizes = list(pairwise((2 * features, *hidden)))
        self.own = nn.ModuleList(nn.Linear(i, o) for i, o in sizes)
        self.near = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in sizes)
        self.head = nn.Linear(hidden[-1], features)

    def forward(self, x: Tensor) -> Tensor:
        """(nodes, 2 · features) -> (nodes, features)."""
        for own, near in zip(self.own, self.near, strict=True):
            x = F.relu(own(x) + torch.sparse.mm(self.adjacency, near(x)))
            x = self.dropout(x)
        return self.head(x)


@register_workload("graph")
class GraphWorkload(Workload):
    """The mean squared error of predicting the hidden features of nodes.

    They are predicted from the other features of the node and from its neighbors. Features have
    variance 1. Every step processes the whole graph and hides other features, but its loss is that
    of the training nodes only.
    """

    Options = GraphOptions
    unused = (*Workload.unused, "data", "train_size", "test_size", "batch_size")

    @classmethod
    def read(cls, config: TaskConfig, data_root: str | Path | None, device: Device) -> Self:
        features, _ = load_graph()
        nodes = torch.arange(len(features)).split(list(NODES.values()))
        data = {split: (i, features[i]) for split, i in zip(NODES, nodes, strict=True)}
        return cls(config, data, 1.0, device)

    def network(self) -> nn.Module:
        features, adjacency = load_graph()
        own = self.config.own
        return GraphNet(adjacency, features.shape[1], self.config.hidden, own.dropout)

    def batch(self, seed: int, step: int) -> Batch:
        """Returns the network's inputs, (nodes, 2 · features), and which features are hidden."""
        features, _ = load_graph()
        rng = generator("batch", seed, step)
        hidden = torch.rand(features.shape, generator=rng) < self.config.own.hidden_share
        seen = torch.cat([features.masked_fill(hidden, 0.0), hidden.float()], 1)
        return seen.to(self.device), hidden.to(self.device)

    def loss(self, module: nn.Module, seed: int, step: int) -> Tensor:
        return self._of(module, "train", seed, step)

    def evaluate(self, module: nn.Module, split: str) -> tuple[float, float]:
        losses = [float(self._of(module, split, -1, step)) for step in range(MASKS)]
        return float(np.mean(losses)), float("nan")

    def _of(self, module: nn.Module, split: str, seed: int, step: int) -> Tensor:
        seen, hidden = self.batch(seed, step)
        nodes, features = self.data[split]
        errors = (module(seen)[nodes] - features).square()
        return errors[hidden[nodes]].mean()
