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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from learned_opt.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from learned_opt.rules.basis import Basis

# torch.compiler.disable, except that torch's compiler, which takes a second to import, is imported
# at the first call and not here.
not_compiled = torch._disable_dynamo
CHUNK = 1 << 15  # coordinates: few enough to stay in cache, enough to hide the cost of a call
SMALL = 1 << 12  # the most coordinates of tensors of several sizes that are processed together
UNITS = 1 << 12  # as CHUNK, for an LSTM, whose 16 to 20 hidden units have four gates each
MIN_UNITS = 1 << 9  # of each of many tasks: shorter rows cost more than cache misses


@dataclass(frozen=True)
class Layout:
    """Describes how a flat vector is divided into tensors.

    Attributes:
        shapes: the shapes of the tensors.
        local: if tensors are sharded over processes, the shapes of the parts on this process.
        reduction: adds sums over these parts, (*, tensors, *), over all processes.
        chunk: the number of coordinates that are processed together; None for all.
        gather: maps the part on this process, (*, local coordinates), and the number of its tensor
            to all coordinates of the tensor, (*, coordinates).
        scatter: the inverse of `gather`.
    """

    shapes: tuple[tuple[int, ...], ...]
    local: tuple[tuple[int, ...], ...] | None = None
    reduction: Callable[[Tensor], Tensor] | None = None
    chunk: int | None = CHUNK
    gather: Callable[[Tensor, int], Tensor] | None = None
    scatter: Callable[[Tensor, int], Tensor] | None = None

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of coordinates of each tensor on this process."""
        return tuple(math.prod(s) for s in self.local or self.shapes)

    @cached_property
    def tensor_of(self) -> Tensor:
        """(d,), the number of the tensor of each coordinate."""
        numbers, sizes = range(len(self.sizes)), self.sizes
        numbers, sizes = (torch.tensor(x, dtype=torch.long, device="cpu") for x in (numbers, sizes))
        return numbers.repeat_interleave(sizes)

    @cached_property
    def runs(self) -> list[tuple[int, int, int, int]]:
        """Ranges of coordinates, as (first tensor, number of tensors, start, stop).

        Each run is either several neighboring tensors of one size or a part of one large tensor,
        so its coordinates are a matrix (tensors, size). It has at most about `chunk` coordinates.
        """
        return self.runs_of(self.chunk)

    def runs_of(self, chunk: int | None) -> list[tuple[int, int, int, int]]:
        """Returns the `runs` for another size of chunk."""
        if chunk not in self._runs:
            self._runs[chunk] = self._divide(chunk)
        return self._runs[chunk]

    @cached_property
    def _runs(self) -> dict[int | None, list[tuple[int, int, int, int]]]:
        return {}

    def _divide(self, limit: int | None) -> list[tuple[int, int, int, int]]:
        runs, first, start = [], 0, 0
        for size, equal in groupby(self.sizes):
            last = first + len(list(equal))
            chunk = limit or max(1, size * (last - first))
            for i in range(first, last, step := max(1, chunk // max(1, size))):
                n = min(step, last - i)
                stop = start + n * size
                runs += [(i, n, a, min(a + chunk, stop)) for a in range(start, stop, chunk)]
                start = stop
            first = last
        return runs

    @cached_property
    def chunks(self) -> list[Chunk]:
        """The `runs`, with small ones combined, so that many small tensors need few calls."""
        gathered: list[list[tuple[int, int, int, int]]] = []
        for run in self.runs:
            if not gathered or run[3] - gathered[-1][0][2] > SMALL:
                gathered.append([])
            gathered[-1].append(run)
        return [Chunk(tuple(runs)) for runs in gathered]

    def reduce(self, sums: Tensor) -> Tensor:
        """Adds sums over the parts of tensors on this process to those of the other processes."""
        return sums if self.reduction is None else self.reduction(sums)

    def squared_norms(self, x: Tensor) -> Tensor:
        """Returns |x|² of each tensor, (*, tensors), for x (*, d)."""
        squares = x.new_zeros(*x.shape[:-1], len(self.sizes))
        for i, n, a, b in self.runs:
            part = _side_by_side(x[..., a:b], n)
            squares[..., i : i + n] += torch.linalg.vecdot(part, part)
        return self.reduce(squares)

    def expand(self, x: Tensor) -> Tensor:
        """Repeats a value of each tensor, (*, tensors), for each of its coordinates, (*, d)."""
        parts = []
        for chunk in self.chunks:
            part = chunk.spread(x)
            size = (chunk.where.stop - chunk.where.start) // part.shape[-2]
            parts.append(part.expand(*part.shape[:-1], size).flatten(-2))
        return join(parts) if parts else x[..., :0]

    def numbers(self, of: Callable[[tuple[int, ...]], float], x: Tensor) -> Tensor:
        """Returns `of(shape)` of each tensor, (tensors,), with the dtype and device of `x`."""
        key = (of, x.dtype, x.device)
        if key not in self._made:
            self._made[key] = x.new_tensor([float(of(shape)) for shape in self.shapes])
        return self._made[key]

    def constant(self, values: tuple, x: Tensor) -> Tensor:
        """Returns `values` as a tensor with the dtype and device of `x`."""
        key = (values, x.dtype, x.device)
        if key not in self._made:
            self._made[key] = x.new_tensor(values)
        return self._made[key]

    @cached_property
    def _made(self) -> dict[tuple, Tensor]:
        return {}  # cached: a copy to an accelerator at every step would wait for the device


@dataclass(frozen=True)
class Chunk:
    """Coordinates that are processed together, as a matrix (n, size).

    A row of the matrix is one of n tensors of equal size, or a part of one tensor. A chunk of
    tensors of several sizes has a single row.

    Attributes:
        runs: neighboring runs of the layout.
    """

    runs: tuple[tuple[int, int, int, int], ...]

    @cached_property
    def where(self) -> slice:
        return slice(self.runs[0][2], self.runs[-1][3])

    def of(self, x: Tensor) -> Tensor:
        """Returns the coordinates of x in this chunk: (*, d) -> (*, n, size)."""
        n = self.runs[0][1] if len(self.runs) == 1 else 1
        return _side_by_side(x[..., self.where], n)

    def spread(self, x: Tensor) -> Tensor:
        """Returns a value of each tensor, (*, tensors), in a shape that broadcasts with `of`.

        The result is (*, n, 1) or (*, 1, size). A value (*, 1) that all tensors share gives
        (*, 1, 1).
        """
        if x.shape[-1] == 1 or len(self.runs) == 1:
            first, n, *_ = self.runs[0]
            return x[..., None] if x.shape[-1] == 1 else x[..., first : first + n, None]
        if x.device not in self._tensor_of:
            counts = torch.tensor([[i, (b - a) // n] for f, n, a, b in self.runs
                                   for i in range(f, f + n)], device="cpu")  # fmt: skip
            self._tensor_of[x.device] = counts[:, 0].repeat_interleave(counts[:, 1]).to(x.device)
        return x.index_select(-1, self._tensor_of[x.device]).unsqueeze(-2)

    @cached_property
    def _tensor_of(self) -> dict[torch.device, Tensor]:
        return {}

    def parts(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Splits x (*, n, size), as `of` returns it, by runs.

        Yields the slice of the tensors of a run and their coordinates, (*, tensors, size).
        """
        if len(self.runs) == 1:
            first, n, *_ = self.runs[0]
            yield slice(first, first + n), x
            return
        row, start = x.squeeze(-2), self.where.start
        for first, n, a, b in self.runs:
            yield slice(first, first + n), _side_by_side(row[..., a - start : b - start], n)


@dataclass(frozen=True)
class State:
    """The state of a rule in a training run.

    Attributes:
        layout: how d coordinates are divided into tensors.
        step: the number of updates made so far; (tensors,) if the tensors differ in it.
        coordinate: features of each coordinate by name, (*tasks, features, d).
        tensor: features of each tensor by name, (*tasks, features, tensors).
        matrix: for each tensor, square matrices by name, (*tasks, n, n); see basis.py.
    """

    layout: Layout
    step: int | Tensor
    coordinate: dict[str, Tensor]
    tensor: dict[str, Tensor]
    matrix: tuple[dict[str, Tensor], ...] = ()

    def map(self, f: Callable[[Tensor], Tensor]) -> State:
        """Returns the state with `f` applied to all tensors except the step."""

        def each(entries: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: f(x) for name, x in entries.items()}

        return State(
            self.layout, self.step, each(self.coordinate), each(self.tensor),
            tuple(map(each, self.matrix)),
        )  # fmt: skip


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
    """

    coordinate: Tensor
    tensor: Tensor
    layout: Layout | Tensor | None
    basis: Basis | None = None

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
        runs = self.layout.runs_of(width)
        if not self.tensor.shape[-2]:
            width = width or max(1, d)
            runs = [(0, 0, a, min(a + width, d)) for a in range(0, d, width)]
        for i, n, a, b in runs:
            where = slice(a, b)
            part = Observation(self.coordinate[..., where], self.tensor[..., i : i + n], None)
            yield where, part


def _side_by_side(x: Tensor, n: int) -> Tensor:
    """Reshapes (*, n · size) to (*, n, size). `unflatten` takes three times as long."""
    return x.view(*x.shape[:-1], n, -1)


def due(step: int, every: int) -> bool:
    """Whether something that is renewed every `every` steps is due after `step` steps.

    Before the first multiple of `every` it is also due after 0, 1, 2, 4, 8, ... steps.
    """
    return step % every == 0 or (step < every and step & (step - 1) == 0)


def as_numbers(step: int | Tensor) -> list[int]:
    """Returns `State.step` as a list of ints, which waits for the device.

    Tensors on the meta device, which have no values, give 0.
    """
    if not isinstance(step, Tensor):
        return [step]
    return [0] * step.numel() if step.is_meta else [int(t) for t in step.tolist()]


def join(pieces: list[Tensor]) -> Tensor:
    """Concatenates pieces along the last dimension; a single piece is returned without a copy."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


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

    A subclass holds only meta-parameters, is registered under its `name`, and returns in `config`
    the constructor arguments that build it again.
    """

    name: ClassVar[str]
    hidden_per: str  # "coordinate" or "tensor": which of them has a recurrent state of its own
    # Whether u = Σ_k c_k f_k with gains c of each tensor. The rule then has three more methods:
    # `gains(tensor, hidden)` returns c, `features(observation)` returns f, which does not depend on
    # meta-parameters, and `mix(gains, observation)` returns the sum. Training is far cheaper then.
    gains_per_tensor: bool = False
    directions: tuple[str, ...] = ()  # the names of these f_k, for `diagnostics`
    # Whether `respond` also accepts a set of weights for each task, with the leading dimensions of
    # its observation. Otherwise training uses vmap, which is slower.
    weights_per_task: bool = False
    every: int = 1  # the network runs in every so many steps of a tensor, see `due`
    kernels: ClassVar[tuple[str, ...]] = ()  # methods that `compile_kernels` compiles
    # The names of all State entries of this rule, with any config. They tell the entries of a rule
    # with more state, which are refused, from entries that other code has added, which are kept.
    entries: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor arguments, as JSON."""

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
        """Returns the statistics of this step, and the next state except its `hidden`.

        Args:
            grads: (*tasks, d).
            params: (*tasks, d).
            state: the state before this step.
            in_place: whether the tensors of `state` may be overwritten.
        """

    @abstractmethod
    def respond(
        self, observation: Observation, hidden: Tensor, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Returns the update of the observed coordinates, (*tasks, n), and the next `hidden`.

        Args:
            observation: what `observe` returned, or a part of it.
            hidden: the recurrent state, (*tasks, rows, units).
            in_place: whether to overwrite `hidden`. Only rules with hidden_per="coordinate" are
                called so, with one of `Observation.pieces` and without an autograd graph.
        """

    def compile_kernels(self) -> None:
        """Compiles the methods named in `kernels`, once for all sizes of tensors.

        Compiling the whole step would take minutes if tensors have many sizes. `fullgraph` is not
        set, so that a program with many optimizers falls back to Python beyond torch's limit of
        recompilations.
        """
        for module in self.modules():
            for name in getattr(module, "kernels", ()):
                kernel = torch.compile(getattr(module, name), dynamic=True)
                setattr(module, name, kernel)

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
        """Returns the update by `respond`, and `state` with the next recurrent state.

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

    @torch.no_grad()
    def update(
        self, grads: Tensor, params: Tensor, state: State, in_place: bool = False
    ) -> tuple[Tensor, State]:
        """Returns the update u, (*tasks, d), which is added to params, and the next state.

        Args:
            grads: (*tasks, d).
            params: (*tasks, d).
            state: the state of these parameters.
            in_place: whether the tensors of `state` are overwritten.
        """
        return self.advance(*self.observe(grads, params, state, in_place), in_place)


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
