"""Blocks of parameters that a rule updates together, with their state in flat buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from learned_opt.rules import Layout, State, UpdateRule
from learned_opt.rules.base import decay_, known_entries
from learned_opt.rules.basis import full_precision
from learned_opt.rules.layout import CHUNK
from learned_opt.rules.steps import not_compiled
from learned_opt.rules.trained import TRAINED

# The number of coordinates updated together, of one large tensor or of many small ones. It is large
# enough to hide the cost of a call, and small enough that scratch memory is negligible.
BLOCK = 32 * CHUNK
BLOCK_ACCELERATOR = 1 << 24  # on an accelerator calls cost more and there is more memory


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a sharded tensor (DTensor) on this process; other tensors unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """Returns all of a sharded tensor (DTensor), from all processes; other tensors unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_gradient(p: Tensor) -> Tensor:
    """Returns the gradient of the part of p on this process.

    Without FSDP's hooks, autograd may place the gradient differently from p; it is then
    redistributed.
    """
    grad = p.grad
    if hasattr(p, "placements") and grad.placements != p.placements:
        grad = grad.redistribute(p.device_mesh, p.placements)
    return local(grad)


def own(x: Tensor) -> Tensor:
    """Returns a contiguous copy in a storage of its own size, as files and safetensors need it."""
    return x.detach().clone(memory_format=torch.contiguous_format)


class View(Tensor):
    """A view of a block's buffer that becomes a plain tensor when it is saved or copied.

    A plain view would save or copy the whole buffer of the block with each bias.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # results are plain tensors

    def __reduce_ex__(self, protocol: int) -> Any:
        return own(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = copied = own(self)
        return copied


@dataclass(frozen=True)
class LastStep:
    """What the last step of a block was made of, for `LearnedOptimizer.diagnostics`.

    Attributes:
        relative: (tensors,), RMS of lr · u over the RMS of θ before the step.
        gains: (K, tensors), in u = Σ_k gains_k f_k; None for rules without gains per tensor.
        decay: (tensors,), the norm of what weight decay removed over that of θ.
    """

    relative: Tensor
    gains: Tensor | None
    decay: Tensor


class _Told:
    """A rule whose `update` also keeps the gains of its directions."""

    def __init__(self, rule: UpdateRule) -> None:
        self.rule = rule
        self.gains: Tensor | None = None

    def update(
        self, grads: Tensor, params: Tensor, state: State, in_place: bool = False
    ) -> tuple[Tensor, State]:
        observation, state = self.rule.observe(grads, params, state, in_place)
        if self.rule.gains_per_tensor:
            self.gains, _ = self.rule.gains(observation.tensor, self.rule.hidden(state))
        return self.rule.advance(observation, state, in_place)


class Block:
    """Parameters of one device and sharding, and the state that a rule keeps of them.

    `states` are the rule's entries in `Optimizer.state`, one dict for each parameter. They are
    views of the flat buffers with the shape of the parameter and features last, and sharded as the
    parameter is. "step" and "skipped" count updates, and "clock" the steps of the run. Further
    entries in `saved` belong to other code, such as wrappers of optimizers.

    Raises:
        ValueError: `saved` is the state of another rule or of other shapes.
    """

    def __init__(self, params: list[Tensor], rule: UpdateRule, saved: list[dict[str, Any]]) -> None:
        self.params = params
        parts = self.parts()
        shapes = [tuple(tuple(p.shape) for p in tensors) for tensors in (params, parts)]
        chunk = CHUNK if params[0].device.type == "cpu" else None
        self.layout = Layout(
            *shapes, _reduction(params[0]), chunk, *self._exchange(), self._row_reduction()
        )
        theta = _flatten(parts)
        fresh = rule.init_state(theta, self.layout.shapes)
        steps = theta.new_zeros(len(params))
        self.state = replace(fresh, layout=self.layout, step=steps, clock=torch.zeros_like(steps))
        self.skipped = torch.zeros_like(steps)
        # This fills the layout's caches, which a compiled step could not do.
        _ = self.layout.expand(steps), self.layout.groups, self.layout.rows(vectors=True)
        self.used = False
        self.last: LastStep | None = None  # set by steps with `diagnose`
        self.states = [self._views(i, part.shape) for i, part in enumerate(parts)]
        for views, entries in zip(self.states, saved, strict=True):
            known = known_entries() | views.keys()
            entries = {name: _as_tensor(entries[name]) for name in entries if name in known}
            had, kept = ({k: tuple(x.shape) for k, x in e.items()} for e in (entries, views))
            if had and had | {"skipped": (), "clock": ()} != kept:  # older states have neither
                raise ValueError(
                    f"state has {had}, but the rule keeps {kept}; load the state of a "
                    "LearnedOptimizer with the same rule, for parameters of the same shapes"
                )
            for name, value in entries.items():
                local(views[name]).copy_(local(value))
        self.entries = [list(views.values()) for views in self.states]

    def _last_step(
        self, told: _Told, theta: Tensor, update: Tensor, decayed: Tensor, skipped: Tensor
    ) -> LastStep:
        """Returns the facts of a step: `update` is lr · u, `decayed` the same after weight decay.

        Neither has been added to θ yet.
        """
        size, moved, taken = (
            self.layout.squared_norms(x).sqrt() for x in (theta, update, update - decayed)
        )
        step, share = (torch.where(x > 0, x / size, 0) for x in (moved, taken))
        gains = told.gains
        if gains is not None:
            gains = torch.where(self.skipped > skipped, 0, gains)
        return LastStep(step, gains, share)

    def facts(self, directions: tuple[str, ...]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yields each parameter and its facts in `last`; nothing before a step with `diagnose`.

        Args:
            directions: the names of the rows of `LastStep.gains`.
        """
        if self.last is None:
            return
        gains = [] if self.last.gains is None else self.last.gains.mT.tolist()
        directions = directions or tuple(str(k) for k in range(len(gains[0]) if gains else 0))
        columns = (x.tolist() for x in (self.last.relative, self.last.decay, self.skipped))
        for i, (p, relative, share, skipped) in enumerate(zip(self.params, *columns, strict=True)):
            own = dict(zip(directions, gains[i], strict=True)) if gains else {}
            yield p, {
                "relative_step": relative, "gains": own, "decay": share, "skipped": int(skipped)
            }  # fmt: skip

    def parts(self) -> list[Tensor]:
        """Returns the parts of the parameters on this process.

        They are looked up in every step, because `p.data` may be replaced between steps.
        """
        return [local(p.detach()) for p in self.params]

    def _exchange(self) -> tuple[Callable[[Tensor, int], Tensor] | None, ...]:
        """Returns `Layout.gather` and `Layout.scatter` of sharded parameters, else None twice."""
        if not hasattr(self.params[0], "placements"):
            return None, None
        from torch.distributed.tensor import DTensor, Replicate

        def gather(x: Tensor, i: int) -> Tensor:
            lead = x.shape[:-1].numel()  # -1 would be ambiguous if a part has no coordinates
            part = x.reshape(lead, x.shape[-1]).mT.reshape(*self.layout.local[i], lead)
            whole = _shard_like(self.params[i], part.contiguous()).full_tensor()
            return whole.flatten(0, -2).mT.reshape(*x.shape[:-1], -1)

        def scatter(x: Tensor, i: int) -> Tensor:
            p = self.params[i]
            whole = x.reshape(-1, x.shape[-1]).mT.reshape(*p.shape, -1)
            mesh, copies = p.device_mesh, [Replicate()] * p.device_mesh.ndim
            whole = DTensor.from_local(whole, mesh, copies, run_check=False)
            part = whole.redistribute(placements=p.placements).to_local()
            return part.flatten(0, -2).mT.reshape(*x.shape[:-1], self.layout.sizes[i])

        return gather, scatter

    def _row_reduction(self) -> Callable[[Tensor, bool], Tensor] | None:
        """Returns `Layout.row_reduction` of sharded parameters, else None."""
        reduce = _reduction(self.params[0])
        if reduce is None:
            return None
        from torch.distributed.tensor import DTensor, Replicate, Shard

        def numbers(vectors: bool) -> tuple[Tensor, int]:
            """Returns the numbers of the rows that this process has parts of, and that of all."""
            found, total = [], 0
            for p in self.params:
                matrix = p.dim() > 1
                count = p.shape[0] if matrix else int(vectors)
                rows = torch.arange(total, total + count, device=p.device)
                total += count
                if matrix:
                    mesh = p.device_mesh
                    copies = [Replicate()] * mesh.ndim
                    every = DTensor.from_local(rows, mesh, copies, run_check=False)
                    kept = [x if x == Shard(0) else Replicate() for x in p.placements]
                    rows = every.redistribute(placements=kept).to_local()
                found.append(rows)
            return torch.cat(found), total

        known = tuple(map(numbers, (False, True)))

        def over_parts(sums: Tensor, vectors: bool) -> Tensor:
            index, total = known[vectors]
            whole = sums.new_zeros(*sums.shape[:-1], total)
            return reduce(whole.index_copy_(-1, index, sums)).index_select(-1, index)

        return over_parts

    def _views(self, i: int, shape: torch.Size) -> dict[str, Tensor]:
        counts = {"step": self.state.step, "skipped": self.skipped, "clock": self.state.clock}
        views = {name: _view(count[i]) for name, count in counts.items()}
        start = sum(self.layout.sizes[:i])
        for name, flat in self.state.coordinate.items():
            view = flat[:, start : start + shape.numel()].reshape(len(flat), *shape)
            views[name] = _shard_like(self.params[i], _view(view.movedim(0, -1)))
        views |= {name: _view(flat[:, i]) for name, flat in self.state.tensor.items()}
        return views | (self.state.matrix[i] if self.state.matrix else {})

    def is_state_of(self, states: dict[Tensor, dict[str, Any]]) -> bool:
        """Whether the block still belongs to an optimizer's state.

        The entries of each parameter must begin with those of this block (other code may have added
        more), and its device and shape must be unchanged.
        """
        device, shapes = self.skipped.device, self.layout.shapes
        if any(
            p.device != device or p.shape != s for p, s in zip(self.params, shapes, strict=True)
        ):
            return False
        for p, mine in zip(self.params, self.entries, strict=True):
            entries = states.get(p, {}).values()
            if len(entries) < len(mine) or not all(map(is_, entries, mine)):
                return False
        return True

    def set_clock(self, steps: int) -> None:
        """Tells the state how many steps of the run were made."""
        self.state.clock.fill_(steps)

    def set_trained(self, trained: bool) -> None:
        """Tells the state whether the net was trained before."""
        if TRAINED in self.state.tensor:
            self.state.tensor[TRAINED].fill_(trained)

    def set_length(self, num_steps: int | None) -> None:
        """Tells the state how many steps the run has."""
        if num_steps != self.state.num_steps:
            self.state = replace(self.state, num_steps=num_steps)
            self.used = False  # a step in Python fills the layout's caches anew

    def update(
        self, rule: UpdateRule, lr: float | Tensor, weight_decay: float | Tensor | None,
        maximize: bool, diagnose: bool = False,
    ) -> None:  # fmt: skip
        """Updates these parameters by one step, in place.

        With `diagnose`, `last` is what the step was made of.
        """
        parts = self.parts()
        theta = _flatten(parts)
        lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
        grads = _flatten([local_gradient(p) for p in self.params])
        if maximize:
            grads = -grads
        with full_precision(theta):
            # The first step of a compiled training step is not compiled: it fills caches.
            advance = guarded_update if self.used and not diagnose else in_python
            told = _Told(rule) if diagnose else rule
            skipped = self.skipped.clone() if diagnose else None
            update = advance(told, grads, theta, self.state, self.skipped)
            self.used = True
        self.last, vectors = None, weight_decay is not None  # the rule's own is for matrices only
        decay = weight_decay if vectors else rule.decay
        decays = isinstance(decay, Tensor) or bool(decay)
        if diagnose:
            plain = update * lr
            decayed = plain.clone()
            if decays:
                decay_(decayed, theta, self.layout, decay, vectors)
            self.last = self._last_step(told, theta, plain, decayed, skipped)
        if isinstance(lr, Tensor) or (decays and not (lr == 1 and rule.spends)):
            # A tensor as `alpha` would have to be copied from the device.
            update, lr = torch.mul(update, lr, out=update if rule.spends else None), 1.0
        if decays:
            decay_(update, theta, self.layout, decay, vectors)
        updates = update.split(list(self.layout.sizes))
        updates = [u.view(part.shape) for u, part in zip(updates, parts, strict=True)]
        torch._foreach_add_(parts, updates, alpha=lr)


def guarded_update(
    rule: UpdateRule, grads: Tensor, theta: Tensor, state: State, skipped: Tensor
) -> Tensor:
    """Returns the rule's update, and advances its state in place.

    For a tensor that is not finite, or whose gradient is not, the update is zero, the state does
    not change, and `skipped`, (tensors,), counts one more.
    """
    layout = state.layout
    on_cpu = theta.device.type == "cpu" and not torch.compiler.is_compiling()
    # One test of all tensors is faster, but on other devices Python would wait for its result.
    squares = (torch.dot(x, x) for x in (grads, theta))
    if on_cpu and layout.reduce(sum(squares)[None]).isfinite():
        update, new = rule.update(grads, theta, state, in_place=True)
        _move_on(state, new)
        return update
    finite = layout.squared_norms(grads.abs() + theta.abs()).isfinite()
    here = layout.expand(finite)
    update, new = rule.update(torch.where(here, grads, 0), theta, state)
    _move_on(state, new, finite, here)
    skipped += ~finite
    return torch.where(here, update, 0)


in_python = not_compiled(guarded_update)


def _move_on(
    state: State, new: State, finite: Tensor | None = None, here: Tensor | None = None
) -> None:
    """Overwrites `state` with `new`, except where tensors are not finite.

    `finite`, (tensors,), and `here`, (d,), say so for tensors and coordinates; None means all are.
    """
    moves = [(state.step, new.step, finite)]
    for olds, news, where in (
        (state.coordinate, new.coordinate, here), (state.tensor, new.tensor, finite)
    ):  # fmt: skip
        moves += [(old, news[name], where) for name, old in olds.items()]
    for i, (olds, news) in enumerate(zip(state.matrix, new.matrix, strict=True)):
        where = None if finite is None else finite[i]
        moves += [(old, news[name], where) for name, old in olds.items()]
    state.clock.add_(1)  # whatever the rule says: steps of the run, in which it took part or not
    for old, now, where in moves:
        if where is not None:
            now = torch.where(where, now, old)
        if now is not old:
            old.copy_(now)


def partition(params: Iterable[Tensor]) -> list[list[Tensor]]:
    """Returns groups of parameters to update together, with equal shapes next to each other.

    A group has one device and sharding. The grouping does not change any update, because rules
    treat each tensor separately. Sharded parameters are grouped by their whole shapes, so that all
    processes form the same groups.
    """
    kinds: dict[tuple, list[Tensor]] = {}
    for p in params:
        kind = (p.device, getattr(p, "device_mesh", None), getattr(p, "placements", None))
        kinds.setdefault(kind, []).append(p)
    blocks = []
    for (device, *_), members in kinds.items():
        limit = BLOCK if device.type == "cpu" else BLOCK_ACCELERATOR
        size = limit
        for p in sorted(members, key=lambda p: (p.numel(), p.shape)):
            if size + p.numel() > limit:
                blocks.append([])
                size = 0
            blocks[-1].append(p)
            size += p.numel()
    return blocks


def _reduction(p: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Returns a function that sums over the processes that hold parts of p; None if not sharded."""
    mesh = getattr(p, "device_mesh", None)
    if mesh is None:
        return None
    groups = [mesh.get_group(i) for i, placed in enumerate(p.placements) if placed.is_shard()]

    def reduce(sums: Tensor) -> Tensor:
        for group in groups:
            torch.distributed.all_reduce(sums, group=group)
        return sums

    return reduce


def _as_tensor(value: Any) -> Tensor:
    """Returns `value` as a tensor, on the CPU if it was saved as a number."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def _view(x: Tensor) -> Tensor:
    return x.as_subclass(View)


def _shard_like(p: Tensor, part: Tensor) -> Tensor:
    """Returns `part`, (*local shape, features), as a DTensor with the sharding of `p`."""
    if not hasattr(p, "placements"):
        return part
    from torch.distributed.tensor import DTensor

    shape = torch.Size((*p.shape, part.shape[-1]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride
    )


def _flatten(tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0].detach().reshape(-1).to(torch.float32)
    return _flatten_dense_tensors(tensors).to(torch.float32)
