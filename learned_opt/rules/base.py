"""The interface of update rules: pure functions `init_state` and `update` of a network.

The weights of the network are called meta-parameters, and the entries of the parameters that the
rule updates are called coordinates. Tensors are flattened and concatenated along the last
dimension: params, grads and updates are (*tasks, d). Features of each coordinate are
(*tasks, features, d), and features of each tensor are (*tasks, features, tensors).

`update` is `observe`, which computes statistics of gradients and parameters without
meta-parameters, followed by `respond`, which runs the network and computes the update. Training
first runs the rule without an autograd graph and stores the observations of some coordinates. It
then replays `respond` on these observations with a graph.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from learned_opt.errors import ConfigError, did_you_mean
from learned_opt.rules.layout import Layout, Span, State

if TYPE_CHECKING:
    from learned_opt.rules.basis import Basis

UNITS = 1 << 12  # as CHUNK, for an LSTM, whose 20 hidden units have four gates each
MIN_UNITS = 1 << 9  # of each of many tasks: shorter rows cost more than cache misses


@dataclass(frozen=True)
class Observation:
    """The input of `respond`.

    Attributes:
        coordinate: features of each coordinate, (*tasks, C, d).
        tensor: features of each tensor, (*tasks, Q, tensors). Q is 0 for a rule without such
            features, and in steps in which the network is not run.
        layout: assigns coordinates to tensors: a Layout; an index (n,) for coordinates that were
            picked; None for one of the `pieces`, whose tensors have equal numbers of coordinates.
        basis: the basis in which `coordinate` is given; None for the parameters' own.
        spent: whether the update may be written over the first features of coordinates.
    """

    coordinate: Tensor
    tensor: Tensor
    layout: Layout | Tensor | None
    basis: Basis | None = None
    spent: bool = False

    def pick(self, index: Tensor) -> Observation:
        """Returns the coordinates `index` (n,) of the flattened (*tasks, d), with tasks merged."""
        if self.basis is not None:
            raise ValueError(
                "index cannot pick coordinates in an eigenbasis, because each is a combination of "
                "many parameters; use a rule with basis=0"
            )
        d, tensors = self.coordinate.shape[-1], self.tensor.shape[-1]
        task, where = index // d, index % d
        return Observation(
            pick_columns(self.coordinate, index),
            merge_tasks(self.tensor),
            task * tensors + self.layout.tensor_of[where],
        )

    def pieces(self) -> Iterator[tuple[slice, Observation]]:
        """Yields (slice, sub-observation) pieces that are small enough for the cache of an LSTM.

        The tensors of a piece have one size. Without features of tensors a piece may be any range
        of coordinates.
        """
        d, width = self.coordinate.shape[-1], self.layout.chunk
        if width:
            width = max(MIN_UNITS, UNITS // math.prod(self.coordinate.shape[:-2]))
        spans = self.layout.spans_of(width)
        if not self.tensor.shape[-2]:
            width = width or max(1, d)
            spans = [Span(0, 0, start, min(start + width, d)) for start in range(0, d, width)]
        for span in spans:
            coordinate, tensor = self.coordinate[..., span.where], self.tensor[..., span.tensors]
            yield span.where, Observation(coordinate, tensor, None)


def merge_tasks(x: Tensor) -> Tensor:
    """Reshapes (tasks, features, n) to (features, tasks · n)."""
    return x if x.dim() == 2 else x.movedim(0, 1).flatten(1)


def pick_columns(x: Tensor, index: Tensor) -> Tensor:
    """Returns the columns `index` of the flattened (tasks, n) from x (tasks, features, n)."""
    if x.dim() == 2:
        return x[:, index]
    return x[index // x.shape[-1], :, index % x.shape[-1]].T


class UpdateRule(nn.Module, ABC):
    """An update rule θ ← θ + u, with u = update(∇F(θ), θ, state).

    A subclass holds only meta-parameters and is registered under its `name`. Its `config` has the
    constructor arguments that build the rule again.
    """

    name: ClassVar[str]
    hidden_per: str  # "coordinate" or "tensor": which of them has a recurrent state of its own
    gains_per_tensor: bool = False  # whether the rule is a sum as `TensorGains` says
    directions: tuple[str, ...] = ()  # the names of these f_k, for `diagnostics`
    # Whether `respond` also accepts a set of weights for each task, with the leading dimensions of
    # its observation. Otherwise training uses vmap, which is slower.
    weights_per_task: bool = False
    spends: bool = False  # whether the caller may overwrite an update that was made in place
    falls: bool = False  # whether steps fall to zero over State.num_steps, if that is known
    decay: float = 0.0  # the weight decay of matrices that goes with the rule
    trained_starts: bool = False  # whether nets that were trained before the run differ
    every: int = 1  # the network runs in every so many steps of a tensor, see `due`
    # The names of all State entries of this rule, with any config. They tell the entries of a rule
    # with more state, which are refused, from entries that other code has added, which are kept.
    entries: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor arguments, as a dict that JSON can hold."""

    @abstractmethod
    def init_state(self, params: Tensor, shapes: tuple[tuple[int, ...], ...]) -> State:
        """Returns the state before the first update.

        Args:
            params: (*tasks, d).
            shapes: the shapes of the tensors that `params` concatenates.
        """

    @abstractmethod
    def observe(
        self, grads: Tensor, params: Tensor, state: State, in_place: bool = False
    ) -> tuple[Observation, State]:
        """Returns the statistics of this step, and the next state with the old `hidden`.

        Args:
            grads: (*tasks, d).
            params: (*tasks, d).
            state: the state before this step.
            in_place: whether the tensors of `state` may be overwritten, and by the next step the
                update as well.
        """

    @abstractmethod
    def respond(
        self, observation: Observation, hidden: Tensor, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Returns the update of the observed coordinates, (*tasks, n), and the next `hidden`.

        Args:
            observation: what `observe` returned, or a part of it.
            hidden: the recurrent state, (*tasks, rows, units).
            in_place: whether to overwrite `hidden`. It is True only for rules with
                hidden_per="coordinate", with one of `Observation.pieces` as the observation and
                without an autograd graph.
        """

    def hidden(self, state: State) -> Tensor:
        """Returns the recurrent state in `state`, (*tasks, rows, units)."""
        return getattr(state, self.hidden_per)["hidden"]

    def with_hidden(self, state: State, hidden: Tensor) -> State:
        """Returns `state` with the recurrent state replaced by `hidden`."""
        entries = getattr(state, self.hidden_per) | {"hidden": hidden}
        return replace(state, **{self.hidden_per: entries})

    def pick_hidden(self, state: State, index: Tensor) -> Tensor:
        """Returns the recurrent state that belongs to `Observation.pick(index)`."""
        hidden = self.hidden(state)
        return merge_tasks(hidden) if self.hidden_per == "tensor" else pick_columns(hidden, index)

    def advance(
        self, observation: Observation, state: State, in_place: bool = False
    ) -> tuple[Tensor, State]:
        """Calls `respond`; returns its update, and `state` with the next recurrent state.

        The recurrent state is overwritten if `in_place`.
        """
        hidden = self.hidden(state)
        if self.hidden_per == "tensor" or torch.is_grad_enabled():
            updates, hidden = self.respond(observation, hidden)
        else:
            hidden = hidden if in_place else hidden.clone()
            updates = torch.empty_like(observation.coordinate[..., 0, :])
            for where, piece in observation.pieces():
                updates[..., where], _ = self.respond(piece, hidden[..., where], in_place=True)
        return updates, self.with_hidden(state, hidden)

    def moved(self, params: Tensor, update: Tensor, layout: Layout) -> Tensor:
        """Returns the parameters after an update and the rule's weight decay, (*tasks, d).

        For autograd, what decay takes is a constant.
        """
        if self.decay:
            update = decay_(update.clone(), params, layout, self.decay, vectors=False)
        return params + update

    @torch.no_grad()
    def update(
        self, grads: Tensor, params: Tensor, state: State, in_place: bool = False
    ) -> tuple[Tensor, State]:
        """Returns the update u, (*tasks, d), which is added to params, and the next state.

        Args:
            grads: (*tasks, d).
            params: (*tasks, d).
            state: the state of these parameters.
            in_place: whether the tensors of `state` are overwritten, and by the next step the
                update as well.
        """
        return self.advance(*self.observe(grads, params, state, in_place), in_place)


class TensorGains(UpdateRule):
    """A rule whose update is u = Σ_k c_k f_k, with gains c of each tensor and features f.

    Features do not depend on meta-parameters. So training has to replay the network alone, which
    is far cheaper, and the size of a step follows from the gains.
    """

    gains_per_tensor = True

    @abstractmethod
    def gains(self, tensor: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gains c, (*tasks, features, tensors), and the next `hidden`.

        Args:
            tensor: `Observation.tensor`.
            hidden: the recurrent state, (*tasks, rows, tensors).
        """

    @abstractmethod
    def features(self, observation: Observation) -> Tensor:
        """Returns the features f, (*tasks, features, d)."""

    @abstractmethod
    def mix(self, gains: Tensor, observation: Observation) -> Tensor:
        """Returns Σ_k gains_k f_k in the coordinates of θ, (*tasks, d)."""

    def respond(
        self, observation: Observation, hidden: Tensor, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        gains, hidden = self.gains(observation.tensor, hidden)
        return self.mix(gains, observation), hidden


def decay_(
    update: Tensor,
    params: Tensor,
    layout: Layout,
    weight_decay: float | Tensor,
    vectors: bool = True,
) -> Tensor:
    """Adds weight decay to an update in place, and returns it:

        u_i − min(1, weight_decay · |u_i| / |θ_i|) θ_i,    for each row i of a matrix

    A vector counts as one row. A row that does not move does not decay. For autograd, what decay
    takes is a constant.

    Args:
        update: u, (*tasks, d).
        params: θ, (*tasks, d).
        layout: the layout of these coordinates.
        weight_decay: one number, or one for each of `layout.rows(vectors)`, (rows,).
        vectors: whether vectors decay too.
    """
    params = params.detach()
    norm, moved = (layout.row_norms(x.detach(), vectors) for x in (params, update))
    share = (weight_decay * torch.where(norm > 0, moved / norm, 0)).clamp(max=1)
    on_cpu = params.device.type == "cpu" and not torch.compiler.is_compiling()
    finite = on_cpu and norm.isfinite().all()  # elsewhere Python would wait for the result
    for span in layout.rows(vectors):
        theta, portion = span.of(params), share[..., span.tensors, None]
        if not finite:
            theta = torch.where(portion == 0, 0, theta)  # 0 · inf is not 0
        span.of(update).addcmul_(theta, portion, value=-1)
    return update


def trainable(rule: UpdateRule) -> list[nn.Parameter]:
    """Returns the meta-parameters that are not frozen."""
    return [p for p in rule.parameters() if p.requires_grad]


_REGISTRY: dict[str, type[UpdateRule]] = {}


def register(rule: type[UpdateRule]) -> type[UpdateRule]:
    """Class decorator that lets configs and weights files refer to a rule by its `name`."""
    _REGISTRY[rule.name] = rule
    return rule


def known_entries() -> set[str]:
    """Returns the names of all State entries of the registered rules."""
    return {name for rule in _REGISTRY.values() for name in rule.entries}


def make_rule(name: str, **config: Any) -> UpdateRule:
    """Returns a freshly initialized instance of the registered rule `name`.

    Args:
        name: the name of the rule.
        config: its constructor arguments.

    Raises:
        ConfigError: there is no such rule, or it does not take these arguments.
    """
    if name not in _REGISTRY:
        raise ConfigError(
            f"rule is {name!r}; known rules are {', '.join(sorted(_REGISTRY))}"
            f"{did_you_mean(name, _REGISTRY)}"
        )
    try:
        return _REGISTRY[name](**config)
    except TypeError as error:
        known = inspect.signature(_REGISTRY[name]).parameters
        hints = {did_you_mean(key, known) for key in config if key not in known}
        raise ConfigError(
            f"rule {name!r} cannot be built from {config}: {error}{''.join(sorted(hints))}"
        ) from None
