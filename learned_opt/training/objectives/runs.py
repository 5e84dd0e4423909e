"""Runs of the rule that meta-training continues window by window."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learned_opt.errors import ConfigError
from learned_opt.rules import Layout, State, UpdateRule
from learned_opt.rules.steps import due
from learned_opt.tasks.base import Task, generator, seed_of
from learned_opt.training.objectives.base import Context, Objective

if TYPE_CHECKING:
    from learned_opt.config import TrainConfig

KINDS = ("coordinate", "tensor", "matrix")  # the fields of a State that contain tensors
LOST = 3.0  # a run ends if all its losses exceed so many times that of chance, or θ overflows


@dataclass
class OpenRun:
    """A run in progress.

    Attributes:
        key: the key of its tasks and minibatches.
        horizon: the number of steps after which it ends.
        theta: the parameters, (tasks, d), or (2 · pairs · tasks, d) for pairs of particles.
        state: the state of the rule.
        xi: for pairs, the sum of the perturbations so far in terms of the weights,
            (pairs · tasks, weights).
    """

    key: tuple[object, ...]
    horizon: int
    theta: Tensor
    state: State
    xi: Tensor | None = None


class RunObjective(Objective):
    """An objective that learns from windows of runs, in truncated unrolls.

    Each meta-update continues one of `open_runs` runs, which take turns, by `window` updates. The
    length of a run is drawn log-uniformly from `horizon`, or is that of the curriculum.
    """

    runs = True

    def __init__(self, config: TrainConfig, rule: UpdateRule) -> None:
        super().__init__(config, rule)
        starts = range(0, config.longest_run, config.unroll)
        if not all(due(step, rule.every) for step in starts):
            raise ConfigError(
                f"window is {config.window}, but the rule's network runs every {rule.every} steps; "
                "use a multiple of that, because a window must begin with a run of the network"
            )
        if config.known_length and not rule.falls:
            raise ConfigError(
                f"known_length is {config.known_length}, but rule {config.rule!r} does not use the "
                "length of a run; use 0, or geodesic_rnn"
            )
        self.open_runs: list[OpenRun | None] = [None] * config.open_runs

    @abstractmethod
    def window(
        self, rule: UpdateRule, task: Task, run: OpenRun, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Advances `run` by `steps`; returns the loss to learn from and the tasks' mean losses."""

    def open(self, key: tuple[object, ...], horizon: int, task: Task, rule: UpdateRule) -> OpenRun:
        theta = task.init(seed_of(*key))
        return OpenRun(key, horizon, theta, self.state(theta, key, horizon, task, rule))

    def state(
        self, theta: Tensor, key: tuple[object, ...], horizon: int, task: Task, rule: UpdateRule
    ) -> State:
        """Returns the state at the start of a run, which is told its length or not."""
        told = torch.rand((), generator=generator("known length", *key)) < self.config.known_length
        state = rule.init_state(theta, task.shapes)
        return replace(state, num_steps=horizon) if told else state

    def loss(self, context: Context, item: dict) -> Tensor:
        slot = self._updates_before(item["number"]) % len(self.open_runs)
        run = self.open_runs[slot]
        key = run.key if run else ("train", self.config.seed, context.rank, item["number"])
        task = context.draw(context.family, *key)
        run = run or self.open(key, context.length or self._horizon(key), task, context.rule)
        steps = min(self.config.unroll, run.horizon - run.state.step)
        loss, losses = self.window(context.rule, task, run, steps)
        context.count(steps * len(run.theta))
        context.log("train/loss", losses.nanmean())
        lost = ~(losses < LOST * task.chance).any() or not run.theta.isfinite().all()
        self.open_runs[slot] = None if lost or run.state.step >= run.horizon else run
        return loss

    def _updates_before(self, number: int) -> int:
        cycle = self.config.objectives
        cycles, rest = divmod(number, len(cycle))
        return cycles * cycle.count(self.name) + cycle[:rest].count(self.name)

    def _horizon(self, key: tuple[object, ...]) -> int:
        low, high = torch.tensor(self.config.horizon).double().log()
        share = torch.rand((), generator=generator("horizon", *key), dtype=torch.double)
        return round(float((low + share * (high - low)).exp()))

    def limit(self, task: Task) -> float | Tensor:
        """Returns the value at which losses are clipped, a number or (tasks,)."""
        clip = self.config.loss_clip
        return math.inf if clip is None else clip * task.chance

    def state_dict(self) -> dict:
        return {"runs": [run and pack(run) for run in self.open_runs]}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.open_runs = [packed and unpack(packed, device) for packed in state["runs"]]


def pack(run: OpenRun) -> dict:
    """Returns a run as a dict of tensors and plain values."""
    state = run.state.map(Tensor.cpu)
    packed = {"key": list(run.key), "horizon": run.horizon, "theta": run.theta.cpu()}
    packed |= {"layout": asdict(state.layout), "step": state.step, "num_steps": state.num_steps}
    packed["xi"] = run.xi if run.xi is None else run.xi.cpu()
    return packed | {kind: getattr(state, kind) for kind in KINDS}


def unpack(packed: dict, device: torch.device) -> OpenRun:
    """Inverts `pack`."""
    layout = Layout(tuple(map(tuple, packed["layout"]["shapes"])))
    kinds = (packed[kind] for kind in KINDS)
    told = packed.get("num_steps")  # older checkpoints have none
    state = State(layout, packed["step"], *kinds, num_steps=told)
    state = state.map(lambda x: x.to(device))
    xi = packed["xi"] if packed["xi"] is None else packed["xi"].to(device)
    theta = packed["theta"].to(device)
    return OpenRun(tuple(packed["key"]), packed["horizon"], theta, state, xi)
