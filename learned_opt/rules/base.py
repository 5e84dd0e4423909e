"""What an update rule is: a pure pair `init_state`, `update` on a module of meta-parameters.

Coordinates are flat and last: params, grads and updates are (*tasks, d), the concatenation of
tensors of known shapes; per-coordinate features are (*tasks, features, d), per-tensor ones
(*tasks, features, tensors).

`update` = `observe` (statistics of gradients and parameters; no meta-parameters) followed by
`respond` (the network, the update). Training rolls a rule out without a graph, keeps the
observations of some coordinates, and replays `respond` on them with one.
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

CHUNK = 1 << 15  # coordinates: few enough to stay in cache, enough to hide what a call costs
SMALL = 1 << 12  # coordinates of tensors of several sizes that are worked on together
UNITS = 1 << 12  # the same for an LSTM, whose 16 to 20 hidden units have four gates each
MIN_UNITS = 1 << 9  # of each task, where there are many: shorter rows cost more than the cache


@dataclass(frozen=True)
class Layout:
    """How a flat vector divides into tensors.

    Attributes:
        shapes: of the tensors.
        local: of the parts of them that are here, where they are sharded over processes.
        reduction: adds sums over these parts, (*, tensors, *), to those of the other processes.
        chunk: coordinates to work on at a time; None: all.
        gather: x (*, coordinates here) of a tensor, and its number -> (*, all its coordinates).
        scatter: the inverse.
    """

    shapes: tuple[tuple[int, ...], ...]
    local: tuple[tuple[int, ...], ...] | None = None
    reduction: Callable[[Tensor], Tensor] | None = None
    chunk: int | None = CHUNK
    gather: Callable[[Tensor, int], Tensor] | None = None
    scatter: Callable[[Tensor, int], Tensor] | None = None

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Coordinates of each tensor that are here."""
        return tuple(math.prod(s) for s in self.local or self.shapes)

    @cached_property
    def tensor_of(self) -> Tensor:
        """(d,), the number of the tensor that each coordinate belongs to."""
        numbers, sizes = range(len(self.sizes)), self.sizes
        numbers, sizes = (torch.tensor(x, dtype=torch.long, device="cpu") for x in (numbers, sizes))
        return numbers.repeat_interleave(sizes)

    @cached_property
    def runs(self) -> list[tuple[int, int, int, int]]:
        """(first tensor, tensors, start, stop), in chunks: neighbours of one size, or a part of a
        large one. The coordinates of each are a matrix (tensors, size)."""
        return self.runs_of(self.chunk)

    def runs_of(self, chunk: int | None) -> list[tuple[int, int, int, int]]:
        """`runs` in chunks of another size."""
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
        """The `runs`, small ones together: what calls cost then hardly depends on the sizes."""
        gathered: list[list[tuple[int, int, int, int]]] = []
        for run in self.runs:
            if not gathered or run[3] - gathered[-1][0][2] > SMALL:
                gathered.append([])
            gathered[-1].append(run)
        return [Chunk(tuple(runs)) for runs in gathered]

    def reduce(self, sums: Tensor) -> Tensor:
        return sums if self.reduction is None else self.reduction(sums)

    def squared_norms(self, x: Tensor) -> Tensor:
        """|x|² of each tensor, (*, tensors), from (*, d)."""
        squares = x.new_zeros(*x.shape[:-1], len(self.sizes))
        for i, n, a, b in self.runs:
            part = _side_by_side(x[..., a:b], n)
            squares[..., i : i + n] += torch.linalg.vecdot(part, part)
        return self.reduce(squares)

    def expand(self, x: Tensor) -> Tensor:
        """What each tensor has, (*, tensors), for each of its coordinates, (*, d)."""
        parts = []
        for chunk in self.chunks:
            part = chunk.spread(x)
            size = (chunk.where.stop - chunk.where.start) // part.shape[-2]
            parts.append(part.expand(*part.shape[:-1], size).flatten(-2))
        return join(parts) if parts else x[..., :0]

    def numbers(self, of: Callable[[tuple[int, ...]], float], x: Tensor) -> Tensor:
        """`of` each tensor's shape, (tensors,), of the type and on the device of `x`."""
        key = (of, x.dtype, x.device)
        if key not in self._made:
            self._made[key] = x.new_tensor([float(of(shape)) for shape in self.shapes])
        return self._made[key]

    def constant(self, values: tuple, x: Tensor) -> Tensor:
        """`values` as a tensor of the type and on the device of `x`."""
        key = (values, x.dtype, x.device)
        if key not in self._made:
            self._made[key] = x.new_tensor(values)
        return self._made[key]

    @cached_property
    def _made(self) -> dict[tuple, Tensor]:
        return {}  # a copy to an accelerator would wait for it at every step


@dataclass(frozen=True)
class Chunk:
    """Coordinates to work on at a time, as a matrix (n, size): tensors of one size side by side, or
    a part of one; tensors of several sizes in one row.

    Attributes:
        runs: of the layout, neighbours.
    """

    runs: tuple[tuple[int, int, int, int], ...]

    @cached_property
    def where(self) -> slice:
        return slice(self.runs[0][2], self.runs[-1][3])

    def of(self, x: Tensor) -> Tensor:
        """(*, d) -> (*, n, size)."""
        n = self.runs[0][1] if len(self.runs) == 1 else 1
        return _side_by_side(x[..., self.where], n)

    def spread(self, x: Tensor) -> Tensor:
        """What each tensor has, (*, tensors), to go with `of`: (*, n, 1) or (*, 1, size). What all
        have in common, (*, 1), stays so."""
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
        """(*, n, size) of `of` -> which tensors, and theirs, (*, their number, their size)."""
        if len(self.runs) == 1:
            first, n, *_ = self.runs[0]
            yield slice(first, first + n), x
            return
        row, start = x.squeeze(-2), self.where.start
        for first, n, a, b in self.runs:
            yield slice(first, first + n), _side_by_side(row[..., a - start : b - start], n)


@dataclass(frozen=True)
class State:
    """What a rule remembers of a run.

    Attributes:
        layout: the tensors.
        step: updates made so far; (tensors,) where the tensors differ in it.
        coordinate: name -> (*tasks, features, d).
        tensor: name -> (*tasks, features, tensors).
        matrix: of each tensor, name -> (*tasks, n, n), see basis.py.
    """

    layout: Layout
    step: int | Tensor
    coordinate: dict[str, Tensor]
    tensor: dict[str, Tensor]
    matrix: tuple[dict[str, Tensor], ...] = ()

    def map(self, f: Callable[[Tensor], Tensor]) -> State:
        """`f` of all but the step."""

        def each(entries: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: f(x) for name, x in entries.items()}

        return State(
            self.layout, self.step, each(self.coordinate), each(self.tensor),
            tuple(map(each, self.matrix)),
        )  # fmt: skip


@dataclass(frozen=True)
class Observation:
    """What `respond` sees: `coordinate` (*tasks, C, d), `tensor` (*tasks, Q, tensors), without rows
    where the network does not look, and which tensor each coordinate belongs to: a Layout; for
    picked coordinates an index (n,); None for `pieces`, whose tensors have equal shares. `basis` is
    that of `coordinate`, None for its own."""

    coordinate: Tensor
    tensor: Tensor
    layout: Layout | Tensor | None
    basis: Basis | None = None

    def pick(self, index: Tensor) -> Observation:
        """The coordinates `index` (n,) of the flattened (*tasks, d), tasks merged."""
        if self.basis is not None:
            raise ValueError("single coordinates in an eigenbasis are none of the parameters'")
        d, tensors = self.coordinate.shape[-1], self.tensor.shape[-1]
        task, where = index // d, index % d
        return Observation(
            pick_columns(self.coordinate, index),
            merge_tasks(self.tensor),
            task * tensors + self.layout.tensor_of[where],
        )

    def pieces(self) -> Iterator[tuple[slice, Observation]]:
        """Where, and what of it: coordinates of tensors of one size, few enough for an LSTM; of
        any tensors where nothing is known of them."""
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
    """(*, coordinates of n tensors) -> (*, n, size); `unflatten` takes three times as long."""
    return x.view(*x.shape[:-1], n, -1)


def due(step: int, every: int) -> bool:
    """Whether what is made anew every so many steps is: before the first time too, after 1, 2, 4,
    8, ... steps."""
    return step % every == 0 or (step < every and step & (step - 1) == 0)


def as_numbers(step: int | Tensor) -> list[int]:
    """`State.step` in Python, which waits for the device; 0 where it has no values (meta)."""
    if not isinstance(step, Tensor):
        return [step]
    return [0] * step.numel() if step.is_meta else [int(t) for t in step.tolist()]


def join(pieces: list[Tensor]) -> Tensor:
    """Their concatenation along the last dimension; the piece itself if there is but one."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def merge_tasks(x: Tensor) -> Tensor:
    """(tasks, features, n) -> (features, tasks · n)."""
    return x if x.dim() == 2 else x.movedim(0, 1).flatten(1)


def pick_columns(x: Tensor, index: Tensor) -> Tensor:
    """Columns `index` of the flattened (tasks, n), from x (tasks, features, n)."""
    if x.dim() == 2:
        return x[:, index]
    return x[index // x.shape[-1], :, index % x.shape[-1]].T


class UpdateRule(nn.Module, ABC):
    """θ ← θ + u, with u = update(∇F(θ), θ, state).

    A subclass is registered under its `name` and says in `config` how to build it again.
    """

    name: ClassVar[str]
    hidden_per: str  # "coordinate" or "tensor": to what a recurrent state belongs
    # True if u = Σ_k c_k f_k, with gains c of each tensor from `gains(tensor, hidden)`,
    # `features(observation)` f without meta-parameters and the sum from `mix(gains, observation)`:
    # training is then far cheaper.
    gains_per_tensor: bool = False
    # True if `respond` also takes weights with the leading dimensions of its observation, a set of
    # them for each task; else vmap makes it so, at a price.
    weights_per_task: bool = False
    every: int = 1  # steps from one look of the network at a tensor to the next, see `due`
    kernels: ClassVar[tuple[str, ...]] = ()  # methods that `compile_kernels` compiles
    # All names that entries of its State have, with any config. A rule that keeps fewer refuses the
    # state of one that keeps more by them; other names belong to whoever added them.
    entries: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Constructor arguments."""

    @abstractmethod
    def init_state(self, params: Tensor, shapes: tuple[tuple[int, ...], ...]) -> State:
        """The state before the first update of params, (*tasks, d)."""

    @abstractmethod
    def observe(
        self, grads: Tensor, params: Tensor, state: State, in_place: bool = False
    ) -> tuple[Observation, State]:
        """Statistics of this step, and the state with all but `hidden` moved on."""

    @abstractmethod
    def respond(
        self, observation: Observation, hidden: Tensor, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The update of the observed coordinates, (*tasks, n), and the next recurrent state, which
        overwrites `hidden` if `in_place`: rules with hidden_per="coordinate" are then given one of
        `Observation.pieces`, and no graph is wanted."""

    def compile_kernels(self) -> None:
        """Compiles `kernels`, once for any sizes: one graph of the whole step would take minutes
        where tensors have many sizes. Not fullgraph: past torch's limit of recompilations a program
        with many optimizers goes on in Python."""
        for module in self.modules():
            for name in getattr(module, "kernels", ()):
                kernel = torch.compile(getattr(module, name), dynamic=True)
                setattr(module, name, kernel)

    def hidden(self, state: State) -> Tensor:
        return getattr(state, self.hidden_per)["hidden"]

    def with_hidden(self, state: State, hidden: Tensor) -> State:
        entries = getattr(state, self.hidden_per) | {"hidden": hidden}
        return replace(state, **{self.hidden_per: entries})

    def pick_hidden(self, state: State, index: Tensor) -> Tensor:
        """The recurrent state that goes with `Observation.pick(index)`."""
        hidden = self.hidden(state)
        return merge_tasks(hidden) if self.hidden_per == "tensor" else pick_columns(hidden, index)

    def advance(
        self, observation: Observation, state: State, in_place: bool = False
    ) -> tuple[Tensor, State]:
        """`respond`, with the recurrent state kept in `state`, and overwritten if `in_place`."""
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
        """One step.

        Args:
            grads: (*tasks, d).
            params: (*tasks, d).
            state: of these parameters; its tensors are overwritten if `in_place`.

        Returns:
            what to add to params, (*tasks, d), and the next state.
        """
        return self.advance(*self.observe(grads, params, state, in_place), in_place)


_REGISTRY: dict[str, type[UpdateRule]] = {}


def register(rule: type[UpdateRule]) -> type[UpdateRule]:
    """Makes a rule known by its `name` to configs and weights files."""
    _REGISTRY[rule.name] = rule
    return rule


def known_entries() -> set[str]:
    """Names of what registered rules keep."""
    return {name for rule in _REGISTRY.values() for name in rule.entries}


def make_rule(name: str, **config: Any) -> UpdateRule:
    """The registered rule `name`, freshly initialised."""
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
