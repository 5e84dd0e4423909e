"""Runs of the rule that meta-training comes back to, window after window."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learned_opt.config import TrainConfig
from learned_opt.errors import ConfigError
from learned_opt.rules import Layout, State, UpdateRule
from learned_opt.rules.base import due
from learned_opt.tasks.base import Task, generator, seed_of
from learned_opt.training.base import Objective

if TYPE_CHECKING:
    from learned_opt.training.module import MetaTraining

KINDS = ("coordinate", "tensor", "matrix")  # of what a State holds
LOST = 3.0  # a run ends when all its losses are so many times that of chance, or θ overflows


@dataclass
class OpenRun:
    """A run under way.

    Attributes:
        key: of its tasks and minibatches.
        horizon: steps after which it ends.
        theta: (tasks, d); of pairs (2 · pairs · tasks, d).
        state: the rule's.
        xi: of pairs, what its weights, or steps in terms of them, were perturbed by so far,
            (pairs · tasks, weights).
    """

    key: tuple[object, ...]
    horizon: int
    theta: Tensor
    state: State
    xi: Tensor | None = None


class RunObjective(Objective):
    """Learns from windows of `window` updates on `open_runs` runs in turn (truncated unrolls).

    A run is `horizon` steps long, log-uniform, or as long as the curriculum says.
    """

    def __init__(self, config: TrainConfig, rule: UpdateRule) -> None:
        super().__init__(config, rule)
        starts = range(0, config.longest_run, config.window)
        if not all(due(step, rule.every) for step in starts):
            raise ConfigError(
                f"window is {config.window}, and the rule's network looks every {rule.every} "
                "steps; use a multiple of that, as windows learn from their own looks"
            )
        self.runs: list[OpenRun | None] = [None] * config.open_runs

    @abstractmethod
    def window(
        self, rule: UpdateRule, task: Task, run: OpenRun, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Moves `run` on by `steps`; the loss to learn from, and mean losses of all tasks."""

    def open(self, key: tuple[object, ...], horizon: int, task: Task, rule: UpdateRule) -> OpenRun:
        theta = task.init(seed_of(*key))
        return OpenRun(key, horizon, theta, rule.init_state(theta, task.shapes))

    def loss(self, module: MetaTraining, item: dict) -> Tensor:
        slot = self._updates_before(item["number"]) % len(self.runs)
        run = self.runs[slot]
        key = run.key if run else ("train", self.config.seed, module.global_rank, item["number"])
        task = module.tasks(module.family, *key)
        run = run or self.open(key, self._horizon(module, key), task, module.rule)
        steps = min(self.config.window, run.horizon - run.state.step)
        loss, losses = self.window(module.rule, task, run, steps)
        module.inner_steps += steps * len(run.theta)
        module.log("train/loss", losses.nanmean(), prog_bar=True, batch_size=1)
        lost = ~(losses < LOST * task.chance).any() or not run.theta.isfinite().all()
        self.runs[slot] = None if lost or run.state.step >= run.horizon else run
        return loss

    def _updates_before(self, number: int) -> int:
        cycle = self.config.objectives
        cycles, rest = divmod(number, len(cycle))
        return cycles * cycle.count(self.name) + cycle[:rest].count(self.name)

    def _horizon(self, module: MetaTraining, key: tuple[object, ...]) -> int:
        if module.curriculum:
            return module.curriculum.length
        low, high = torch.tensor(self.config.horizon).double().log()
        share = torch.rand((), generator=generator("horizon", *key), dtype=torch.double)
        return round(float((low + share * (high - low)).exp()))

    def limit(self, task: Task) -> float | Tensor:
        """Where losses are clipped."""
        clip = self.config.loss_clip
        return math.inf if clip is None else clip * task.chance

    def state_dict(self) -> dict:
        return {"runs": [run and pack(run) for run in self.runs]}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.runs = [packed and unpack(packed, device) for packed in state["runs"]]


def pack(run: OpenRun) -> dict:
    """Tensors and plain values of a run."""
    state = run.state.map(Tensor.cpu)
    packed = {"key": list(run.key), "horizon": run.horizon, "theta": run.theta.cpu()}
    packed |= {"layout": asdict(state.layout), "step": state.step}
    packed["xi"] = run.xi if run.xi is None else run.xi.cpu()
    return packed | {kind: getattr(state, kind) for kind in KINDS}


def unpack(packed: dict, device: torch.device) -> OpenRun:
    """The run of `pack`."""
    layout = Layout(tuple(map(tuple, packed["layout"]["shapes"])))
    state = State(layout, packed["step"], *(packed[kind] for kind in KINDS))
    state = state.map(lambda x: x.to(device))
    xi = packed["xi"] if packed["xi"] is None else packed["xi"].to(device)
    theta = packed["theta"].to(device)
    return OpenRun(tuple(packed["key"]), packed["horizon"], theta, state, xi)
