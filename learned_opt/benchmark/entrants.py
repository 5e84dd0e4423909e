"""Who takes part: optimizers, what is searched for each, and those that configs find by name."""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from learned_opt.errors import ConfigError, WeightsError
from learned_opt.optimizer import LearnedOptimizer
from learned_opt.weights import DEFAULT

LEARNED = "learned"  # the `optimizer` of an entrant that is LearnedOptimizer


@dataclass(frozen=True)
class Entrant:
    """An optimizer that takes part.

    Attributes:
        name: what tables call it.
        optimizer: dotted path of a torch.optim.Optimizer class, or "learned".
        kwargs: its keyword arguments, but for those that are searched.
        search: keyword arguments to tune, each with the [low, high] of a log-uniform grid of half
            decades (…, 0.1, 0.3, 1, 3, …) that grows where the best is at an end of it, or with
            {values: [...]} to choose from. Of several the product is searched. Empty: nothing is
            tuned.
        schedule: of the learning rate over a run: constant, or cosine to zero.
        weights: a weights file of a learned optimizer; null is the shipped one.
    """

    name: str
    optimizer: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    schedule: Literal["constant", "cosine"] = "constant"
    weights: str | None = None

    def __post_init__(self) -> None:
        if both := sorted({*self.search} & {*self.kwargs}):
            raise ConfigError(f"entrant {self.name!r} has {both} in kwargs and in search; drop one")
        for key, space in self.search.items():
            if not (is_range(space) or is_choice(space)):
                raise ConfigError(
                    f"entrant {self.name!r} has search.{key}={space!r}; use [low, high], half "
                    "decades such as 0.01, 0.03 or 0.1, with 0 < low <= high, or {values: [...]}"
                )
        if self.weights is not None and self.optimizer != LEARNED:
            raise ConfigError(
                f"entrant {self.name!r} has weights but optimizer={self.optimizer!r}; "
                f"only optimizer: {LEARNED} reads weights"
            )

    @property
    def weights_hash(self) -> str | None:
        """Of a learned entrant's file; a missing one is for `check` to complain about."""
        if self.optimizer != LEARNED:
            return None
        path = DEFAULT if self.weights is None else Path(self.weights).expanduser()
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"

    def check(self) -> None:
        """Makes the optimizer, of parameters that do not matter.

        Raises:
            ConfigError: it cannot be imported, is no optimizer, or refuses its arguments; its
                weights cannot be read.
        """
        spaces = self.search.items()
        chosen = {k: s[0] if is_range(s) else choices(s)[0] for k, s in spaces}
        try:
            optimizer = self.make_optimizer([torch.zeros(2, 2, requires_grad=True)], chosen, 1)
        except (TypeError, ValueError, RuntimeError, WeightsError) as error:
            raise ConfigError(f"entrant {self.name!r} cannot be made: {error}") from error
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(
                f"entrant {self.name!r} has optimizer={self.optimizer!r}, which is no "
                "torch.optim.Optimizer; use a dotted path such as torch.optim.Adam"
            )

    def make_optimizer(
        self, params: Sequence[Tensor], chosen: dict[str, Any], steps: int
    ) -> torch.optim.Optimizer:
        """Of `params` with the hyperparameters `chosen`, its schedule over `steps` hooked in."""
        kwargs = self.kwargs | chosen
        if self.optimizer == LEARNED:
            optimizer = LearnedOptimizer(params, weights=self.weights, **kwargs)
        else:
            optimizer = optimizer_class(self.optimizer)(params, **kwargs)
        if self.schedule == "cosine":
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            optimizer.register_step_post_hook(lambda *_: schedule.step())
        return optimizer


def is_range(space: Any) -> bool:
    """[low, high] of a log-uniform grid."""
    return (
        isinstance(space, (list, tuple))
        and len(space) == 2
        and all(isinstance(x, (int, float)) for x in space)
        and 0 < space[0] <= space[1] < math.inf
        and all(abs(2 * math.log10(x) - round(2 * math.log10(x))) < 0.1 for x in space)
    )


def is_choice(space: Any) -> bool:
    """{values: [...]}"""
    return (
        isinstance(space, dict)
        and list(space) == ["values"]
        and isinstance(space["values"], (list, tuple))
        and len(space["values"]) > 0
    )


def choices(space: dict[str, Any]) -> list[Any]:
    """The values; lists, as YAML has them for betas, as tuples."""
    return [tuple(v) if isinstance(v, list) else v for v in space["values"]]


def optimizer_class(path: str) -> type[torch.optim.Optimizer]:
    """The class at a dotted path; ConfigError where there is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"optimizer is {path!r}, which cannot be imported ({error}); use a dotted path such "
            f"as torch.optim.Adam, or {LEARNED!r}"
        ) from error


# Nine half decades each, about where practice has each optimizer's learning rate. Weight decay and
# what else has a default in torch keeps it. For the learned optimizer lr multiplies the update.
_ADAM, _SGD, _MOMENTUM = {"lr": [1e-4, 1.0]}, {"lr": [1e-3, 10.0]}, {"lr": [1e-4, 1.0]}
_TORCH = "torch.optim."
NAMED = {
    entrant.name: entrant
    for entrant in (
        Entrant("learned", LEARNED),
        Entrant("learned tuned", LEARNED, search={"lr": [1e-2, 100.0]}),
        Entrant("Adam", f"{_TORCH}Adam", search=_ADAM),
        Entrant("AdamW", f"{_TORCH}AdamW", search=_ADAM),
        Entrant("SGD", f"{_TORCH}SGD", search=_SGD),
        Entrant("SGD momentum", f"{_TORCH}SGD", {"momentum": 0.9}, _MOMENTUM),
        Entrant("NAG", f"{_TORCH}SGD", {"momentum": 0.9, "nesterov": True}, _MOMENTUM),
        Entrant("RMSprop", f"{_TORCH}RMSprop", search={"lr": [1e-5, 1e-1]}),
        Entrant("Adam cosine", f"{_TORCH}Adam", search=_ADAM, schedule="cosine"),
        Entrant("AdamW cosine", f"{_TORCH}AdamW", search=_ADAM, schedule="cosine"),
        Entrant("SGD momentum cosine", f"{_TORCH}SGD", {"momentum": 0.9}, _MOMENTUM, "cosine"),
    )
}
DEFAULTS = ("learned", "learned tuned", "Adam", "AdamW", "SGD momentum", "Adam cosine")


def named(name: str) -> Entrant:
    """The entrant that configs call `name`."""
    if name not in NAMED:
        raise ConfigError(
            f"entrant {name!r} is not known by name; use one of {list(NAMED)}, or give its "
            "name and optimizer"
        )
    return NAMED[name]
