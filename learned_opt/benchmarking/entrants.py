"""Who takes part: optimizers, what is searched for each, and those that configs find by name."""

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

LEARNED = "learned"  # the `optimizer` of an entrant that is LearnedOptimizer


@dataclass(frozen=True)
class Group:
    """Tensors of some kinds, for an optimizer of their own or with settings of their own.

    Attributes:
        tensors: kinds of tensor, of embedding, head, convolution, matrix and vector.
        optimizer: dotted path of their optimizer; by default the entrant's.
        kwargs: arguments for these tensors, in place of the entrant's. `{steps}` as in Entrant.
    """

    tensors: tuple[str, ...]
    optimizer: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)


@dataclass(frozen=True)
class Entrant:
    """An optimizer that takes part.

    Attributes:
        name: what tables call it.
        optimizer: dotted path of a torch.optim.Optimizer class, or "learned".
        kwargs: its keyword arguments, but for those that are searched. Text in braces is a number
            of steps: "{steps}" those of the run, "{0.02 * steps}" a share of them, rounded.
        search: keyword arguments to tune, each with the [low, high] of a log-uniform grid of half
            decades (…, 0.1, 0.3, 1, 3, …) that grows where the best is at an end of it, or with
            {values: [...]} to choose from. Of several the product is searched. Empty: nothing is
            tuned.
        schedule: of the learning rate over a run: constant, cosine to zero, or warmup_cosine, which
            rises linearly over the share `warmup` of the steps before.
        warmup: see schedule.
        weights: a weights file of a learned optimizer; null is the shipped one.
        groups: kinds of tensor that have an optimizer or arguments of their own. Of several
            groups the first that names a kind has it; all other tensors are the entrant's.
        anytime: the entrant is judged along one run of the full length; by default where it has no
            schedule and no argument tells it the steps. Others run once for each length.
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
                    "the entrant's, and the other one a group's"
                )

    @property
    def weights_hash(self) -> str | None:
        """Of a learned entrant's file; a missing one is for `check` to complain about."""
        if self.optimizer != LEARNED:
            return None
        path = DEFAULT if self.weights is None else user_path(self.weights, "weights", ConfigError)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"

    @property
    def knows_length(self) -> bool:
        """Whether it is told how long a run is, so that each length is a run of its own."""
        if self.anytime is not None:
            return not self.anytime
        told = [*self.kwargs.values(), *(v for g in self.groups for v in g.kwargs.values())]
        return self.schedule != "constant" or any(_in_steps(v, 1) is not v for v in told)

    def check(self) -> None:
        """Makes the optimizer, of parameters that do not matter.

        Raises:
            ConfigError: it cannot be imported, is no optimizer, or refuses its arguments; its
                weights cannot be read.
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
        """Of `params` with the hyperparameters `chosen` and its schedule over `steps`."""
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
            # another optimizer's groups know no argument of this one, but for what is tuned
            kwargs = shared if path == self.optimizer else chosen
            if path == LEARNED:
                with warnings.catch_warnings():  # a small lr is tried on purpose
                    warnings.simplefilter("ignore", UserWarning)
                    optimizer = LearnedOptimizer(groups, weights=self.weights, **kwargs)
            else:
                with redirect_stdout(StringIO()):  # some say how they are set up, each time
                    optimizer = optimizer_class(path)(groups, **kwargs)
            made.append(optimizer)
        return Together(made, self.schedule, steps, self.warmup)


_STEPS = re.compile(r"\{(?:([0-9.eE+-]+) *\* *)?steps\}")


def _told(kwargs: dict[str, Any], steps: int) -> dict[str, Any]:
    return {key: _in_steps(value, steps) for key, value in kwargs.items()}


def _in_steps(value: Any, steps: int) -> Any:
    """Steps as a number, lists, as YAML has them, as tuples; anything else as it is."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and (match := _STEPS.fullmatch(value)):
        return round(float(match[1] or 1) * steps)
    return value


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
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        if module.partition(".")[0] in FIELD_PACKAGES:
            raise ConfigError(
                f"optimizer is {path!r}, whose package is not installed ({error}); "
                "pip install 'learned-opt[field]'"
            ) from error
        raise ConfigError(
            f"optimizer is {path!r}, which cannot be imported ({error}); use a dotted path such "
            f"as torch.optim.Adam, or {LEARNED!r}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(
            f"optimizer is {path!r}, which is no torch.optim.Optimizer; use a dotted path such as "
            "torch.optim.Adam"
        )
    return found


FIELD_PACKAGES = ("schedulefree", "pytorch_optimizer", "prodigyopt")  # the extra [field]

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
# What a user would pick instead, as its authors prescribe it. Decay is on matrices and embeddings
# only, but where a published setting has it on all. Five half decades where a rate is tuned.
_WARMUP = {"schedule": "warmup_cosine"}
_RATES = {"lr": [3e-4, 3e-2]}
_DECAY, NO_DECAY = {"weight_decay": 0.1}, Group(("vector",), kwargs={"weight_decay": 0.0})
_SOAP = "pytorch_optimizer.SOAP"
# As Vyas et al. 2024; sides longer than 1,024 keep their coordinates, as turning a vocabulary would
# take seconds.
_SOAP_ARGUMENTS = {
    "betas": (0.95, 0.95),
    "precondition_frequency": 10,
    "max_precondition_dim": 1024,
}
_SCHEDULE_FREE = "schedulefree.AdamWScheduleFree"
# The winner of AlgoPerf's self-tuning track, 2024.
_SCHEDULE_FREE_ARGUMENTS = {"betas": (0.9, 0.9955), "weight_decay": 0.081,
                            "warmup_steps": "{0.02 * steps}"}  # fmt: skip
FIELD = (
    Entrant(
        "AdamW warm-up cosine", f"{_TORCH}AdamW", _DECAY, _RATES, groups=(NO_DECAY,), **_WARMUP
    ),
    # AlgoPerf's baseline of the self-tuning ruleset: one setting for all workloads.
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
    Entrant("learned decay", LEARNED, _DECAY),
)
NAMED |= {entrant.name: entrant for entrant in FIELD}
DEFAULTS = ("learned", "learned tuned", "Adam", "AdamW", "SGD momentum", "Adam cosine")


def named(name: str) -> Entrant:
    """The entrant that configs call `name`."""
    if name not in NAMED:
        raise ConfigError(
            f"entrant {name!r} is not known by name; use one of {list(NAMED)}, or give its "
            f"name and optimizer{did_you_mean(name, NAMED)}"
        )
    return NAMED[name]
