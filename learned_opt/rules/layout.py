"""How a flat vector divides into tensors, and the state that a rule keeps for it.

Tensors are flattened and concatenated along the last dimension. Their entries are called
coordinates. Ranges of coordinates are processed together, few enough to stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 16  # coordinates: few enough to stay in cache, enough to hide the cost of a call
SMALL = 1 << 12  # the most coordinates of tensors of several sizes that are processed together


class Span(NamedTuple):
    """A range of coordinates: neighboring tensors of one size, or a part of one large tensor.

    Its coordinates are a matrix (tensors, size).

    Attributes:
        first: the number of its first tensor.
        number: how many tensors it has.
        start: its first coordinate.
        stop: the coordinate after its last.
    """

    first: int
    number: int
    start: int
    stop: int

    @property
    def tensors(self) -> slice:
        return slice(self.first, self.first + self.number)

    @property
    def where(self) -> slice:
        return slice(self.start, self.stop)

    def of(self, x: Tensor) -> Tensor:
        """Returns these coordinates of x, (*, d), as a matrix (*, tensors, size)."""
        return x[..., self.where].view(*x.shape[:-1], self.number, self.size)

    @property
    def size(self) -> int:
        """The coordinates of each tensor."""
        return (self.stop - self.start) // max(1, self.number)


@dataclass(frozen=True)
class Layout:
    """Describes how a flat vector is divided into tensors.

    Attributes:
        shapes: the shapes of the tensors.
        local: if tensors are sharded over processes, the shapes of the parts on this process.
        reduction: adds sums over these parts, (*, tensors, *), over all processes.
        chunk: the number of coordinates that are processed together; None for all.
        row_reduction: as `reduction`, for sums over the parts of `rows(vectors)`, (*, rows).
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
    row_reduction: Callable[[Tensor, bool], Tensor] | None = None

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of coordinates of each tensor on this process."""
        return tuple(math.prod(s) for s in self.local or self.shapes)

    @cached_property
    def tensor_of(self) -> Tensor:
        """(d,), the number of the tensor of each coordinate."""
        numbers, sizes = (
            torch.tensor(x, dtype=torch.long, device="cpu")
            for x in (range(len(self.sizes)), self.sizes)
        )
        return numbers.repeat_interleave(sizes)

    @cached_property
    def spans(self) -> list[Span]:
        """The ranges of coordinates that are processed together, of about `chunk` at most."""
        return self.spans_of(self.chunk)

    @cached_property
    def groups(self) -> tuple[Span, ...]:
        """Neighboring tensors of one size, whole."""
        return tuple(_neighbors((True, 1, size) for size in self.sizes))

    def spans_of(self, chunk: int | None) -> list[Span]:
        """Returns the `spans` for another size of chunk."""
        if chunk not in self._spans:
            self._spans[chunk] = self._divide(chunk)
        return self._spans[chunk]

    @cached_property
    def _spans(self) -> dict[int | None, list[Span]]:
        return {}

    def _divide(self, limit: int | None) -> list[Span]:
        spans, first, start = [], 0, 0
        for size, equal in groupby(self.sizes):
            last = first + len(list(equal))
            chunk = limit or max(1, size * (last - first))
            for i in range(first, last, step := max(1, chunk // max(1, size))):
                count = min(step, last - i)
                stop = start + count * size
                spans += [
                    Span(i, count, a, min(a + chunk, stop)) for a in range(start, stop, chunk)
                ]
                start = stop
            first = last
        return spans

    @cached_property
    def chunks(self) -> list[Chunk]:
        """The `spans`, with small ones combined, so that many small tensors need few calls."""
        gathered: list[list[Span]] = []
        for span in self.spans:
            if not gathered or span.stop - gathered[-1][0].start > SMALL:
                gathered.append([])
            gathered[-1].append(span)
        return [Chunk(tuple(spans)) for spans in gathered]

    def rows(self, vectors: bool) -> tuple[Span, ...]:
        """Returns the rows of the matrices; with `vectors`, also each vector as one row.

        A row of a convolution is all that belongs to one output channel. The rows count as tensors
        of the spans, and a span has the neighboring rows of one size.
        """
        return self._rows[vectors]

    @cached_property
    def _rows(self) -> tuple[tuple[Span, ...], ...]:
        parts = [*map(_rows_of, self.local or self.shapes)]
        return tuple(tuple(_neighbors(parts, vectors)) for vectors in (False, True))

    def reduce(self, sums: Tensor) -> Tensor:
        """Adds sums over the parts of tensors on this process to those of the other processes."""
        return sums if self.reduction is None else self.reduction(sums)

    def squared_norms(self, x: Tensor) -> Tensor:
        """Returns |x|² of each tensor, (*, tensors), for x (*, d)."""
        return self.reduce(_norms(x, self.groups).square())

    def row_norms(self, x: Tensor, vectors: bool) -> Tensor:
        """Returns |x| of each of `rows`, (*, rows), for x (*, d)."""
        norms = _norms(x, self.rows(vectors))
        if self.row_reduction is None:
            return norms
        return self.row_reduction(norms.square(), vectors).sqrt()

    def expand(self, x: Tensor) -> Tensor:
        """Repeats a value of each tensor, (*, tensors), for each of its coordinates, (*, d)."""
        parts = []
        for chunk in self.chunks:
            part = chunk.spread(x)
            size = (chunk.where.stop - chunk.where.start) // part.shape[-2]
            parts.append(part.expand(*part.shape[:-1], size).flatten(-2))
        return join(parts) if parts else x[..., :0]

    def scale(self, x: Tensor, share: Tensor, out: Tensor) -> Tensor:
        """Writes x (*, d), times a number of each tensor (*, tensors), into `out`; returns it."""
        for chunk in self.chunks:
            torch.mul(chunk.of(x), chunk.spread(share), out=chunk.of(out))
        return out

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
        spans: neighboring spans of the layout.
    """

    spans: tuple[Span, ...]

    @cached_property
    def where(self) -> slice:
        return slice(self.spans[0].start, self.spans[-1].stop)

    def of(self, x: Tensor) -> Tensor:
        """Returns the coordinates of x in this chunk: (*, d) -> (*, n, size)."""
        n = self.spans[0].number if len(self.spans) == 1 else 1
        return _side_by_side(x[..., self.where], n)

    def spread(self, x: Tensor) -> Tensor:
        """Returns a value of each tensor, (*, tensors), in a shape that broadcasts with `of`.

        The result is (*, n, 1) or (*, 1, size). A value (*, 1) that all tensors share gives
        (*, 1, 1).
        """
        if x.shape[-1] == 1:
            return x[..., None]
        if len(self.spans) == 1:
            return x[..., self.spans[0].tensors, None]
        if x.device not in self._tensor_of:
            counts = torch.tensor(
                [[i, span.size] for span in self.spans
                 for i in range(span.first, span.first + span.number)], device="cpu",
            )  # fmt: skip
            self._tensor_of[x.device] = counts[:, 0].repeat_interleave(counts[:, 1]).to(x.device)
        return x.index_select(-1, self._tensor_of[x.device]).unsqueeze(-2)

    @cached_property
    def _tensor_of(self) -> dict[torch.device, Tensor]:
        return {}

    def parts(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Splits x (*, n, size), as `of` returns it, by spans.

        Yields the slice of the tensors of a span and their coordinates, (*, tensors, size).
        """
        if len(self.spans) == 1:
            yield self.spans[0].tensors, x
            return
        row, start = x.squeeze(-2), self.where.start
        for span in self.spans:
            part = row[..., span.start - start : span.stop - start]
            yield span.tensors, _side_by_side(part, span.number)


@dataclass(frozen=True)
class State:
    """The state of a rule in a training run.

    Attributes:
        layout: how d coordinates are divided into tensors.
        step: the number of updates made so far; (tensors,) if the tensors differ in it.
        coordinate: features of each coordinate by name, (*tasks, features, d).
        tensor: features of each tensor by name, (*tasks, features, tensors).
        matrix: for each tensor, square matrices by name, (*tasks, n, n); see basis.py.
        clock: the number of steps of the run so far, as `step`; None if every tensor took part in
            all of them, so that it equals `step`.
        num_steps: the number of steps of the whole run; None if it is not known.
    """

    layout: Layout
    step: int | Tensor
    coordinate: dict[str, Tensor]
    tensor: dict[str, Tensor]
    matrix: tuple[dict[str, Tensor], ...] = ()
    clock: int | Tensor | None = None
    num_steps: int | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> State:
        """Returns the state with `f` applied to all tensors except the step and the clock."""

        def each(entries: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: f(x) for name, x in entries.items()}

        return replace(
            self, coordinate=each(self.coordinate), tensor=each(self.tensor),
            matrix=tuple(map(each, self.matrix)),
        )  # fmt: skip

    def advanced(self, **changes: Any) -> State:
        """Returns the state after one more step, with these entries replaced."""
        clock = None if self.clock is None else self.clock + 1
        return replace(self, step=self.step + 1, clock=clock, **changes)


def join(pieces: list[Tensor]) -> Tensor:
    """Concatenates pieces along the last dimension; a single piece is returned without a copy."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def in_place_pays() -> bool:
    """Whether parts of a tensor may be overwritten: autograd and compilers need copies."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def collect(pieces: Iterator[Tensor], out: Tensor) -> Tensor:
    """Concatenates pieces along the last dimension, into `out` where neither autograd nor the
    compiler is at work, so that few pieces are in memory at a time."""
    if not in_place_pays():
        return join([*pieces] or [torch.empty_like(out)])
    start = 0
    for piece in pieces:
        stop = start + piece.shape[-1]
        out[..., start:stop] = piece
        start = stop
    return out


def _rows_of(part: tuple[int, ...]) -> tuple[bool, int, int]:
    """Returns whether a tensor is a matrix, the number of its rows, and their size."""
    rows = part[:1] if len(part) > 1 else ()
    return len(part) > 1, math.prod(rows), math.prod(part[len(rows) :])


def _neighbors(parts: Iterable[tuple[bool, int, int]], vectors: bool = True) -> Iterator[Span]:
    """Yields the spans of neighboring rows of one size; parts are as `_rows_of` returns them."""
    first = start = 0
    for (matrix, size), same in groupby(parts, key=lambda part: (part[0], part[2])):
        number = sum(rows for _, rows, _ in same)
        stop = start + number * size
        if matrix or vectors:
            yield Span(first, number, start, stop)
            first += number
        start = stop


def _norms(x: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """Returns the norms of all tensors of some spans, (*, tensors), for x (*, d)."""
    norms = [torch.linalg.vector_norm(span.of(x), dim=-1) for span in spans]
    return join(norms or [x.new_zeros(*x.shape[:-1], 0)])


def _side_by_side(x: Tensor, n: int) -> Tensor:
    """Reshapes (*, n · size) to (*, n, size). `unflatten` takes three times as long."""
    return x.view(*x.shape[:-1], n, -1)
