"""Runs that do not start fresh: pretrained networks, adapters, frozen layers, disturbed losses."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from geodesic.finite import check_finite
from learned_opt.errors import ConfigError
from learned_opt.tasks.base import seed_of
from learned_opt.tasks.kinds import Draw, TaskConfig, make_task, register_workload
from learned_opt.tasks.trainee import Trainee
from learned_opt.tasks.workloads.base import Device, Workload

PRETRAINING_RATE = 1e-3  # the learning rate of Adam
# Changes of the images, which a network pretrained on them does not expect: negated pixels, or a
# rotation by 90°.
SHIFTS = {
    "": lambda x: x,
    "negate": torch.neg,
    "turn": lambda x: x.rot90(1, (-2, -1)),
}


@dataclass(frozen=True)
class ContinuedOptions:
    """Describes how a run starts, and what changes during the run.

    Attributes:
        base: the workload that is trained, as its TaskConfig in YAML.
        pretrained: the workload on which Adam first trains the same network; {} for none.
        pretraining_steps: the number of Adam's steps.
        shift: the change of the images of `base`: "" for none, "negate" or "turn".
        new_head: initializes the last linear layer again after pretraining.
        rank: the rank of adapters W + B A, with B = 0 initially, of every linear layer except the
            last (LoRA, Hu et al. 2021). Only the adapters are trained then. 0 for no adapters.
        frozen: the beginning of the names of parameters that are frozen until the step `change`.
        change: the step at which the second phase begins; 0 for a single phase.
        first_scale: multiplies the loss of the step `change` only.
        scale: multiplies the loss from the step `change` on.
    """

    base: dict[str, Any] = field(default_factory=dict)
    pretrained: dict[str, Any] = field(default_factory=dict)
    pretraining_steps: int = 500
    shift: str = ""
    new_head: bool = False
    rank: int = 0
    frozen: str = ""
    change: int = 0
    first_scale: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if not self.base or self.base.get("kind") == "continued":
            raise ConfigError(
                f"base is {self.base}; kind 'continued' needs the config of another workload there"
            )
        if self.shift not in SHIFTS:
            raise ConfigError(f"shift is {self.shift!r}; use one of {list(SHIFTS)}")
        if min(self.pretraining_steps, self.rank, self.change) < 0:
            raise ConfigError(
                f"pretraining_steps={self.pretraining_steps}, rank={self.rank} and "
                f"change={self.change} must be at least 0"
            )
        if min(self.scale, self.first_scale) <= 0:
            raise ConfigError(
                f"scale={self.scale} and first_scale={self.first_scale} must be positive"
            )


@register_workload("continued")
class ContinuedWorkload(Workload):
    """Another workload, started or changed as ContinuedOptions says."""

    Options = ContinuedOptions
    unused = (*Workload.unused, "data", "hidden", "batch_size", "train_size", "test_size")

    def __init__(
        self, config: TaskConfig, data_root: str | Path | None, device: torch.device | str
    ) -> None:
        self._root, own = data_root, config.own
        self.base = make_task(to_config(own.base), data_root, Draw(device=device))
        if not isinstance(self.base, Workload):
            raise ConfigError(
                f"base has kind {self.base.config.kind!r}, which is not a workload; use a kind of "
                "workload, such as 'image_mlp'"
            )
        shift = SHIFTS[own.shift]
        data = {split: (shift(x), y) for split, (x, y) in self.base.data.items()}
        self.base.data = data
        super().__init__(config, data, self.base.chance, device)

    @classmethod
    def read(cls, config: TaskConfig, data_root: str | Path | None, device: Device) -> Self:
        return cls(config, data_root, device)

    def network(self) -> nn.Module:
        return self.base.network()

    def trainee(self, seed: int) -> Trainee:
        own, module = self.config.own, self._fresh(seed)
        if own.pretrained:
            weights = pretrained(json.dumps(own.pretrained), own.pretraining_steps, seed,
                                 self._root, self.device)  # fmt: skip
            _load(module, weights, own.new_head)
        if own.rank:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of("adapters", seed))
                _adapt(module, own.rank)
        frozen = [
            p for n, p in module.named_parameters() if own.frozen and n.startswith(own.frozen)
        ]
        if own.frozen and not frozen:
            raise ConfigError(
                f"frozen is {own.frozen!r}, but no parameter's name begins so; use the beginning "
                "of a name in the network's state_dict"
            )
        for p in frozen:
            p.requires_grad_(False)
        trainee = self.base.trainee_of(module, seed)

        def loss(step: int) -> Tensor:
            if step == own.change:
                for p in frozen:
                    p.requires_grad_()
            scale = own.scale if step >= own.change else 1.0
            scale *= own.first_scale if step == own.change else 1.0
            return scale * trainee.loss(step)

        return replace(trainee, loss=loss)


def to_config(settings: dict[str, Any]) -> TaskConfig:
    """Returns the TaskConfig of its settings in YAML."""
    try:
        return TaskConfig(**settings | {"hidden": tuple(settings.get("hidden", ()))})
    except TypeError as error:
        raise ConfigError(
            f"base or pretrained is {settings}, which is not a task's config: {error}"
        ) from error


@lru_cache(maxsize=32)
def pretrained(
    settings: str, steps: int, seed: int, data_root: str | Path | None, device: torch.device | str
) -> dict[str, Tensor]:
    """Returns the state of a workload's network after `steps` of Adam; `settings` are JSON."""
    workload = make_task(to_config(json.loads(settings)), data_root, Draw(device=device))
    module = workload._fresh(seed)
    trainee = workload.trainee_of(module, seed_of("pretraining", seed))
    optimizer = torch.optim.Adam(module.parameters(), lr=PRETRAINING_RATE)
    for step in range(steps):
        optimizer.zero_grad()
        trainee.loss(step).backward()
        optimizer.step()
    return {name: value.clone() for name, value in module.state_dict().items()}


def _load(module: nn.Module, weights: dict[str, Tensor], new_head: bool) -> None:
    if new_head:
        head = [name for name, m in module.named_modules() if isinstance(m, nn.Linear)][-1]
        weights = {name: w for name, w in weights.items() if not name.startswith(f"{head}.")}
    try:
        module.load_state_dict(weights, strict=not new_head)
    except RuntimeError as error:
        raise ConfigError(
            "pretrained has another network than base; use the same kind and widths, or new_head "
            f"if only the numbers of classes differ: {error}"
        ) from error


class LowRank(nn.Module):
    """W ↦ W + B A; initially A is as the weights of nn.Linear, and B = 0."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, inputs = weight.shape
        self.a = nn.Parameter(torch.empty(rank, inputs, device=weight.device))
        self.b = nn.Parameter(torch.zeros(out, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def _adapt(module: nn.Module, rank: int) -> None:
    """Freezes all parameters and adds adapters to all linear layers except the last."""
    for p in module.parameters():
        p.requires_grad_(False)
    layers = [m for m in module.modules() if type(m) is nn.Linear]
    for layer in layers[:-1]:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))
