"""Replays a rule on the observations of a rollout, with an autograd graph of its meta-parameters.

A rollout runs without a graph. For each tensor the objectives need ⟨u_s, y⟩ and |u_s − y|² of the
updates u_s in the rollout, with given y. There are two ways to compute them with a graph:

- `SampledReplay` works for any rule. It runs the network again on a random subset of coordinates.
  All coordinates share the network, so the results are unbiased, at a fraction of the cost.
- `TensorReplay` is for rules with gains per tensor, u = Σ_k c_k f_k. It needs only the inner
  products of the f_k with y and with each other. It uses all coordinates, and runs the network once
  for each tensor.

The tensors of all tasks are numbered together, task by task, so results are
(steps, tasks · tensors).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from learned_opt.rules.base import Observation, TensorGains, UpdateRule, merge_tasks
from learned_opt.rules.layout import Layout, State
from learned_opt.tasks.base import generator

TINY = 1e-30  # an update with a squared norm below this has no direction


class Replay(ABC):
    """The updates u_s of one rollout. Call `see` for each observation before the other methods."""

    @abstractmethod
    def see(self, observation: Observation) -> None: ...

    @abstractmethod
    def inner(self, y: Sequence[Tensor]) -> Tensor:
        """Returns ⟨u_s, y_s⟩ of each tensor, (steps, tasks · tensors), for y_s (tasks, d)."""

    @abstractmethod
    def moments(self, y: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns |u_s|², ⟨u_s, y_s⟩ and |y_s|² of each tensor, (steps, tasks · tensors).

        All three are computed from the same coordinates.
        """

    @abstractmethod
    def squared_error(self, y: Sequence[Tensor]) -> Tensor:
        """Returns |u_s − y_s|² of each tensor, (steps, tasks · tensors)."""

    @abstractmethod
    def lengths(self, u: Sequence[Tensor]) -> Tensor:
        """Returns numbers (steps, tasks · tensors) whose gradient is that of log ℓ_s.

        ℓ_s measures the length of the updates u_s (tasks, d) on each tensor. The values of the
        numbers have no meaning.
        """


def start_replay(rule: UpdateRule, state: State, coordinates: int, *key: object) -> Replay:
    """Returns the replay for `rule`, of a rollout that continues from `state`.

    Args:
        rule: the rule.
        state: the state of the rule before the rollout.
        coordinates: the number of coordinates that a SampledReplay draws.
        key: the key of that draw.
    """
    if rule.gains_per_tensor:
        return TensorReplay(cast(TensorGains, rule), state)
    return SampledReplay(rule, state, coordinates, *key)


def sum_by_tensor(x: Tensor, layout: Layout) -> Tensor:
    """Sums x (*tasks, d) over the coordinates of each tensor: (tasks · tensors,)."""
    return torch.stack([part.sum(-1) for part in x.split(layout.sizes, -1)], -1).flatten()


def _finite(x: Tensor) -> Tensor:
    """Replaces values that are not finite by 1, because 0 · NaN would spread to other tasks.

    Their task has weight 0. The value is not 0, because rules divide.
    """
    return x.nan_to_num(1.0, 1.0, 1.0)


class SampledReplay(Replay):
    def __init__(self, rule: UpdateRule, state: State, coordinates: int, *key: object) -> None:
        self.rule, self.layout = rule, state.layout
        layout = self.layout
        d, tensors = sum(layout.sizes), len(layout.sizes)
        tasks = rule.hidden(state).shape[0]
        draw = torch.randperm(tasks * d, generator=generator("coordinates", *key))
        self.index = draw[:coordinates]
        self.share = len(self.index) / (tasks * d)
        self.tensor_of = self.index // d * tensors + layout.tensor_of[self.index % d]
        self.tensors = tasks * tensors
        self.hidden = rule.pick_hidden(state, self.index)
        self.seen: list[Observation] = []

    def see(self, observation: Observation) -> None:
        self.seen.append(observation.pick(self.index))

    def _updates(self) -> Tensor:
        updates, hidden = [], _finite(self.hidden)
        for seen in self.seen:
            seen = Observation(_finite(seen.coordinate), _finite(seen.tensor), seen.layout)
            update, hidden = self.rule.respond(seen, hidden)
            updates.append(update)
        return torch.stack(updates)

    def _per_tensor(self, x: Tensor) -> Tensor:
        total = x.new_zeros(len(x), self.tensors)
        return total.index_add(1, self.tensor_of.to(x.device), x) / self.share

    def inner(self, y: Sequence[Tensor]) -> Tensor:
        y = torch.stack([v.flatten()[self.index] for v in y])
        return self._per_tensor(self._updates() * y)

    def moments(self, y: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        u, y = self._updates(), torch.stack([v.flatten()[self.index] for v in y])
        return tuple(self._per_tensor(x) for x in (u * u, u * y, y * y))

    def squared_error(self, y: Sequence[Tensor]) -> Tensor:
        y = torch.stack([v.flatten()[self.index] for v in y])
        return self._per_tensor((self._updates() - y).square())

    def lengths(self, u: Sequence[Tensor]) -> Tensor:
        layout, along = self.layout, []
        for update in u:
            squares = layout.squared_norms(update).clamp(min=TINY)
            along.append((update / layout.expand(squares)).nan_to_num(0.0, 0.0, 0.0))
        return self.inner(along)


class TensorReplay(Replay):
    def __init__(self, rule: TensorGains, state: State) -> None:
        self.rule = rule
        self.hidden = merge_tasks(rule.hidden(state))
        self.seen: list[Observation] = []

    def see(self, observation: Observation) -> None:
        self.seen.append(observation)

    def _gains(self) -> Tensor:
        """Returns the gains, (steps, features, tasks · tensors)."""
        gains, hidden = [], _finite(self.hidden)
        for seen in self.seen:
            gain, hidden = self.rule.gains(_finite(merge_tasks(seen.tensor)), hidden)
            gains.append(gain)
        return torch.stack(gains)

    def _products(self, observation: Observation, y: Tensor | None = None) -> Tensor:
        """Returns ⟨f_k, y⟩, (features, 1, tasks · tensors).

        Without y it returns ⟨f_j, f_k⟩, (features, features, tasks · tensors).
        """
        sizes = observation.layout.sizes
        if y is not None and observation.basis is not None:
            y = observation.basis.turn(y)
        features = self.rule.features(observation).split(sizes, -1)
        others = features if y is None else y.unsqueeze(-2).split(sizes, -1)
        products = [f @ o.mT for f, o in zip(features, others, strict=True)]
        products = torch.stack(products, -1).movedim(0, -2).flatten(-2)
        return products.nan_to_num(0.0, 0.0, 0.0)  # for tasks that diverged, see _finite

    def inner(self, y: Sequence[Tensor]) -> Tensor:
        products = [self._products(*pair) for pair in zip(self.seen, y, strict=True)]
        return (self._gains() * torch.stack(products).squeeze(2)).sum(1)

    def moments(self, y: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        gram = torch.stack([self._products(seen) for seen in self.seen])
        gains = self._gains()
        own = (gains.unsqueeze(1) * gram * gains.unsqueeze(2)).sum((1, 2))
        products = [self._products(*pair) for pair in zip(self.seen, y, strict=True)]
        cross = (gains * torch.stack(products).squeeze(2)).sum(1)
        squares = [sum_by_tensor(v.square(), self.seen[0].layout) for v in y]
        return own, cross, torch.stack(squares)

    def squared_error(self, y: Sequence[Tensor]) -> Tensor:
        own, cross, squares = self.moments(y)
        return (own - 2 * cross + squares).clamp(min=0)

    def lengths(self, u: Sequence[Tensor]) -> Tensor:
        """Returns numbers with the gradient of log|c_s|, where c_s are the gains; see StepSize."""
        return (self.shares.detach() * self.shares).sum(1)

    @cached_property
    def shares(self) -> Tensor:
        """c_s / |c_s| with |c_s| detached, (steps, features, tasks · tensors)."""
        gains = self._gains()
        return gains / gains.detach().norm(dim=1, keepdim=True).clamp(min=TINY)
