"""Entrants: optimizers, what is tuned of them, and those that configs know by name."""

from __future__ import annotations

import hashlib
import importlib
import math
import re
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any, Literal

import torch
from torch import Tensor

from geodesic.files import user_path
from geodesic.finite import check_finite
from learned_opt.benchmarking.together import Together
from learned_opt.errors import ConfigError, WeightsError, did_you_mean
from learned_opt.optimizer import LearnedOptimizer
from learned_opt.tasks.trainee import TENSOR_KINDS, Parameters
from learned_opt.weights import DEFAULT

LEARNED = "learned"  # the `optimizer` of entrants that are a LearnedOptimizer


@dataclass(frozen=True)
class Group:
    """Describes kinds of tensors with an optimizer or settings of their own.

    Attributes:
        tensors: The kinds of tensors: any of embedding, head, convolution, matrix and vector.
        optimizer: The dotted path of their optimizer; the default is the entrant's.
        kwargs: The arguments for these tensors, in place of the entrant's. Text in braces is a
            number of steps, as in Entrant.
    """

    tensors: tuple[str, ...]
    optimizer: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)


@dataclass(frozen=True)
class Entrant:
    """Describes an optimizer that takes part in a benchmark.

    Attributes:
        name: The name in tables.
        optimizer: The dotted path of a torch.optim.Optimizer class, or "learned".
        kwargs: The keyword arguments, except those that are searched. Text in braces is a number of
            steps: "{steps}" is the length of the run, and "{0.02 * steps}" a share of it, rounded.
        search: The keyword arguments to tune; if empty, nothing is tuned. Each has either the
            bounds [low, high] of a log-uniform grid of half decades (…, 0.1, 0.3, 1, 3, …) or
            {values: [...]} to choose from. A grid is extended while the best value lies at an end
            of it. With several arguments, all combinations are searched.
        schedule: The schedule of the learning rate over a run: constant, cosine to zero, or
            warmup_cosine, which first rises linearly over the share `warmup` of the steps.
        warmup: The share of the steps in which the schedule warmup_cosine rises.
        weights: The weights file of a learned optimizer; null is the shipped one.
        groups: The kinds of tensors that have an optimizer or arguments of their own. If several
            groups name a kind, it belongs to the first of them. All other tensors have the
            entrant's optimizer and arguments.
        anytime: Whether the protocol "validation" measures the speed-up along one run of the full
            length. If not, the entrant is run once for each length: the full one, and 1/1.25,
            1/1.5, 1/2 and 1/3 of it. The default is true if it has no schedule and no argument
            depends on the number of steps.
    """

    name: str
    optimizer: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    schedule: Literal["constant", "cosine", "warmup_cosine"] = "constant"
    weights: str | None = None
    warmup: float = 0.05
    groups: tuple[Group, ...] = ()
    anytime: bool | None = None

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if both := sorted({*self.search} & {*self.kwargs}):
            raise ConfigError(f"entrant {self.name!r} has {both} in kwargs and in search; use one")
        for key, space in self.search.items():
            if not (is_range(space) or is_choice(space)):
                raise ConfigError(
                    f"entrant {self.name!r} has search.{key}={space!r}; use half decades "
                    "[low, high] such as [0.01, 0.3], with 0 < low <= high, or {values: [...]}"
                )
        if self.weights is not None and self.optimizer != LEARNED:
            raise ConfigError(
                f"entrant {self.name!r} has weights, but optimizer={self.optimizer!r} does not "
                f"read them; drop weights, or use optimizer: {LEARNED}"
            )
        if not 0 <= self.warmup < 1:
            raise ConfigError(
                f"entrant {self.name!r} has warmup={self.warmup}; use a share of the steps, at "
                "least 0 and less than 1"
            )
        for group in self.groups:
            if unknown := sorted({*group.tensors} - {*TENSOR_KINDS}):
                raise ConfigError(
                    f"entrant {self.name!r} has a group with tensors={unknown}; use some of "
                    f"{list(TENSOR_KINDS)}"
                )
            if group.optimizer == LEARNED != self.optimizer:
                raise ConfigError(
                    f"entrant {self.name!r} has {LEARNED!r} as the optimizer of a group; make it "
                    "the entrant's optimizer, and the other one that of a group"
                )

    @property
    def weights_hash(self) -> str | None:
        """The hash of a learned entrant's weights file; "missing" if there is none; else None."""
        if self.optimizer != LEARNED:
            return None
        path = DEFAULT if self.weights is None else user_path(self.weights, "weights", ConfigError)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"

    @property
    def knows_length(self) -> bool:
        """Whether the optimizer is told the length of a run, so that each length is another run."""
        if self.anytime is not None:
            return not self.anytime
        told = [*self.kwargs.values(), *(v for g in self.groups for v in g.kwargs.values())]
        return self.schedule != "constant" or any(_in_steps(v, 1) is not v for v in told)

    def check(self) -> None:
        """Makes the optimizer with small parameters of all kinds, to find mistakes early.

        Raises:
            ConfigError: the optimizer cannot be imported, is not an optimizer, or refuses its
                arguments, or its weights cannot be read.
        """
        spaces = self.search.items()
        chosen = {k: s[0] if is_range(s) else choices(s)[0] for k, s in spaces}
        shapes = {"vector": (2,), "convolution": (2, 2, 1, 1)}
        params = Parameters(
            [torch.zeros(shapes.get(k, (2, 2)), requires_grad=True) for k in TENSOR_KINDS],
            kinds=TENSOR_KINDS,
        )
        try:
            self.make_optimizer(params, chosen, 100)
        except (TypeError, ValueError, RuntimeError, WeightsError) as error:
            raise ConfigError(f"entrant {self.name!r} cannot be made: {error}") from error

    def make_optimizer(
        self, params: Sequence[Tensor], chosen: dict[str, Any], steps: int
    ) -> Together:
        """Returns the optimizer of `params` with the hyperparameters `chosen`.

        Its schedule ends after `steps` steps.
        """
        if not isinstance(params, Parameters):
            params = Parameters(params)
        shared = _told(self.kwargs | chosen, steps)
        members: dict[str, list[dict[str, Any]]] = {}
        taken: set[str] = set()
        for group in (*self.groups, Group(TENSOR_KINDS)):
            kinds = {*group.tensors} - taken
            taken |= kinds
            tensors = [p for p, kind in zip(params, params.kinds, strict=True) if kind in kinds]
            if tensors:
                path = group.optimizer or self.optimizer
                own = _told(group.kwargs, steps)
                members.setdefault(path, []).append({"params": tensors, **own})
        made = []
        for path, groups in members.items():
            # another optimizer gets none of the entrant's arguments except the tuned ones
            kwargs = shared if path == self.optimizer else chosen
            if path == LEARNED:
                with warnings.catch_warnings():  # a small lr is tried on purpose
                    warnings.simplefilter("ignore", UserWarning)
                    optimizer = LearnedOptimizer(groups, weights=self.weights, **kwargs)
            else:
                with redirect_stdout(StringIO()):  # some print their settings each time
                    optimizer = optimizer_class(path)(groups, **kwargs)
            made.append(optimizer)
        return Together(made, self.schedule, steps, self.warmup)


_STEPS = re.compile(r"\{(?:([0-9.eE+-]+) *\* *)?steps\}")


def _told(kwargs: dict[str, Any], steps: int) -> dict[str, Any]:
    return {key: _in_steps(value, steps) for key, value in kwargs.items()}


def _in_steps(value: Any, steps: int) -> Any:
    """Returns text in braces as a number of steps, a list of YAML as a tuple, and else `value`."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and (match := _STEPS.fullmatch(value)):
        return round(float(match[1] or 1) * steps)
    return value


def is_range(space: Any) -> bool:
    """Returns whether `space` is the [low, high] of a log-uniform grid of half decades."""
    return (
        isinstance(space, (list, tuple))
        and len(space) == 2
        and all(isinstance(x, (int, float)) for x in space)
        and 0 < space[0] <= space[1] < math.inf
        and all(abs(2 * math.log10(x) - round(2 * math.log10(x))) < 0.1 for x in space)
    )


def is_choice(space: Any) -> bool:
    """Returns whether `space` is {values: [...]}."""
    return (
        isinstance(space, dict)
        and list(space) == ["values"]
        and isinstance(space["values"], (list, tuple))
        and len(space["values"]) > 0
    )


def choices(space: dict[str, Any]) -> list[Any]:
    """Returns the values of a choice; lists, which YAML has for betas, as tuples."""
    return [tuple(v) if isinstance(v, list) else v for v in space["values"]]


def optimizer_class(path: str) -> type[torch.optim.Optimizer]:
    """Returns the optimizer class at a dotted path; raises ConfigError if there is none."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        if module.partition(".")[0] in FIELD_PACKAGES:
            raise ConfigError(
                f"optimizer is {path!r}, whose package is not installed ({error}); "
                "run pip install 'learned-opt[field]'"
            ) from error
        raise ConfigError(
            f"optimizer is {path!r}, which cannot be imported ({error}); use a dotted path such "
            f"as torch.optim.Adam, or {LEARNED!r}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(
            f"optimizer is {path!r}, which is not a torch.optim.Optimizer; use a dotted path such "
            "as torch.optim.Adam"
        )
    return found


FIELD_PACKAGES = ("schedulefree", "pytorch_optimizer", "prodigyopt")  # the extra [field]

# Each grid has nine half decades around the optimizer's usual learning rates. Weight decay and
# other arguments keep torch's defaults. For the learned optimizer, lr multiplies the update.
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
# What a user would choose instead, with the settings that its authors recommend. Weight decay does
# not act on vectors, unless a published setting has it on all tensors. The grids of tuned learning
# rates have five half decades.
_WARMUP = {"schedule": "warmup_cosine"}
_RATES = {"lr": [3e-4, 3e-2]}
_DECAY, NO_DECAY = {"weight_decay": 0.1}, Group(("vector",), kwargs={"weight_decay": 0.0})
_SOAP = "pytorch_optimizer.SOAP"
# As in Vyas et al. 2024, but sides longer than 1,024 keep their coordinates, because rotating a
# vocabulary would take seconds.
_SOAP_ARGUMENTS = {
    "betas": (0.95, 0.95),
    "precondition_frequency": 10,
    "max_precondition_dim": 1024,
}
_SCHEDULE_FREE = "schedulefree.AdamWScheduleFree"
# The settings that won AlgoPerf's self-tuning track in 2024.
_SCHEDULE_FREE_ARGUMENTS = {"betas": (0.9, 0.9955), "weight_decay": 0.081,
                            "warmup_steps": "{0.02 * steps}"}  # fmt: skip
FIELD = (
    Entrant(
        "AdamW warm-up cosine", f"{_TORCH}AdamW", _DECAY, _RATES, groups=(NO_DECAY,), **_WARMUP
    ),
    # The baseline of AlgoPerf's self-tuning ruleset, with one setting for all workloads.
    Entrant(
        "NAdamW",
        f"{_TORCH}NAdam",
        {
            "lr": 0.0019,
            "betas": (0.909, 0.9989),
            "weight_decay": 0.081,
            "decoupled_weight_decay": True,
        },
        warmup=0.1,
        **_WARMUP,
    ),
    Entrant(
        "Schedule-Free", _SCHEDULE_FREE, _SCHEDULE_FREE_ARGUMENTS | {"lr": 0.0025}, anytime=True
    ),
    Entrant("Schedule-Free tuned", _SCHEDULE_FREE, _SCHEDULE_FREE_ARGUMENTS, _RATES, anytime=True),
    Entrant(
        "Muon",
        f"{_TORCH}AdamW",
        _DECAY,
        _RATES,
        groups=(
            Group(
                ("matrix", "convolution"),
                "learned_opt.benchmarking.muon.Muon",
                {"weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"},
            ),
            NO_DECAY,
        ),
        **_WARMUP,
    ),
    Entrant("SOAP", _SOAP, _SOAP_ARGUMENTS | _DECAY | {"lr": 3e-3}, groups=(NO_DECAY,), **_WARMUP),
    Entrant("SOAP tuned", _SOAP, _SOAP_ARGUMENTS | _DECAY, _RATES, groups=(NO_DECAY,), **_WARMUP),
    Entrant(
        "Prodigy",
        "prodigyopt.Prodigy",
        _DECAY | {"lr": 1.0, "safeguard_warmup": True, "use_bias_correction": True},
        groups=(NO_DECAY,),
        schedule="cosine",
    ),
    Entrant("learned num_steps", LEARNED, {"num_steps": "{steps}"}),
)
NAMED |= {entrant.name: entrant for entrant in FIELD}
DEFAULTS = ("learned", "learned tuned", "Adam", "AdamW", "SGD momentum", "Adam cosine")


def named(name: str) -> Entrant:
    """Returns the entrant that configs call `name`."""
    if name not in NAMED:
        raise ConfigError(
            f"entrant {name!r} is not known by name; use one of {list(NAMED)}, or give its "
            f"name and optimizer{did_you_mean(name, NAMED)}"
        )
    return NAMED[name]
