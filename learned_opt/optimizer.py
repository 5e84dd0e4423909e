"""The drop-in optimizer: a rule with torch.optim's face."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from operator import is_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from learned_opt.blocks import Block, guarded_update, own, partition
from learned_opt.rules import UpdateRule
from learned_opt.weights import load_rule

SMALL = 0.02  # an lr of at most this was meant for Adam or SGD
# Of these settings every optimizer of torch has some, and most others do.
THEIRS = ("betas", "momentum", "eps", "foreach", "fused", "capturable", "differentiable")


class LearnedOptimizer(Optimizer):
    """θ ← θ + lr · u − lr · weight_decay · (|u| / |θ|) θ, with u a learned rule's update.

    Needs no learning rate: `optimizer = LearnedOptimizer(model.parameters())`. Here `lr` multiplies
    the whole update, and 1 is what the rule was trained for: with Adam's 1e-3 it would train a
    thousand times too slowly.

    A gradient that is not finite, or so large that its square is not in float32, or a parameter
    that is so: the parameter stays as it is, and so does its state; `skipped_steps()` counts.

    Parameters may be of any floating type (features and state are float32), on several devices,
    and sharded by FSDP2: statistics of a tensor are summed over its shards, so a sharded run is the
    run of the whole. The first FSDP is refused, ZeroRedundancyOptimizer not supported.

    Args:
        params: tensors, or dicts of groups with their own `lr`, `weight_decay` and `maximize`.
        lr: multiplies the whole update; 1 is what the rule was trained for. Above 0 and up to 0.02
            it is taken for another optimizer's learning rate, with a warning.
        weight_decay: decoupled and relative to the tensor's own step |u|/|θ|, so dimensionless:
            1 takes back as much of θ as the update adds, but never more than all of it. A tensor
            that does not move does not decay.
        weights: a weights file of `learned-opt train`, "hf://owner/name" of the Hugging Face Hub,
            or a rule; by default the shipped one.
        maximize: ascend instead of descend.
        compile: the rule's update by `torch.compile`. Needs a C++ compiler, and at the first steps
            time. On a CPU some seconds, whatever the tensors, as only `kernels` of the rule are
            compiled; on an accelerator, where the whole update is, the more the more sizes of
            tensors there are, and not if sharded.
        revision: commit of a repository on the Hub, needed there.

    State of a parameter p, in float32: "step" and "skipped"; per coordinate the rule's averages, of
    shape (*p.shape, features); per tensor a few small vectors and, of the shipped rule's matrices,
    two square ones for each side of up to 256. That rule keeps 20 bytes per parameter (Adam: 8),
    and 8 for each number in the squares of these sides.

    Others may keep entries of their own in the state of p: they stay, and are saved and loaded.
    Entries of the rule are views of larger buffers, but are saved as tensors of their own size;
    `state_dict()` copies them.

    Raises:
        WeightsError: the weights cannot be used.
        TypeError: an argument is another optimizer's, or unknown.
        ValueError: lr or weight_decay is no number, negative or not finite; parameters are
            flattened by FSDP1; in `load_state_dict`, groups are another optimizer's; in `step`, a
            loaded state is of another rule or shape.
        RuntimeError: in `step`, for sparse or complex gradients.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        weights: str | Path | UpdateRule | None = None,
        *,
        maximize: bool = False,
        compile: bool = False,
        revision: str | None = None,
        **unknown: Any,
    ) -> None:
        _refuse(unknown)
        _check(lr, weight_decay)
        rule = weights if isinstance(weights, UpdateRule) else load_rule(weights, revision)
        self.rule, self.compile = rule, compile
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)
        self._forget()
        _warn_of_small(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group["lr"], group["weight_decay"])
            if any(getattr(p, "_fsdp_flattened", False) for p in group["params"]):
                raise ValueError(
                    "params are flattened by FullyShardedDataParallel, so that no process knows "
                    "their tensors; use FSDP2, torch.distributed.fsdp.fully_shard"
                )
        except ValueError:
            self.param_groups.pop()
            raise
        if hasattr(self, "_blocks"):  # `__init__` warns of its own groups
            _warn_of_small([group])

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"rule": self.rule, "compile": self.compile}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            group.setdefault("maximize", False)  # checkpoints may be older than the setting
        for p, entries in self.state.items():
            if isinstance(entries, _AsSaved):
                saved = entries.entries
                if isinstance(p, Tensor):  # what belongs to no parameter torch leaves as it is
                    saved = {name: _copied(x, p.device) for name, x in saved.items()}
                self.state[p] = saved

    def _forget(self) -> None:
        """Drops what can be made anew: blocks of each group's parameters, rules by device."""
        self._blocks: dict[int, tuple[list[Tensor], list[Block]]] = {}
        self._rules: dict[torch.device, UpdateRule] = {}
        self._guarded = guarded_update
        if self.compile:
            self._guarded = torch.compile(guarded_update, dynamic=False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient; returns the closure's loss."""
        for number in [n for n in self._blocks if n >= len(self.param_groups)]:
            del self._blocks[number]  # of a group that was taken out
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            for block in self._blocks_of(number, [p for p in group["params"] if _moves(p)]):
                device = block.params[0].device
                guarded = guarded_update if device.type == "cpu" else self._guarded
                block.update(
                    self._rule_on(device), guarded, group["lr"], group["weight_decay"],
                    group["maximize"],
                )  # fmt: skip
        return loss

    def skipped_steps(self) -> int:
        """How many updates of single tensors were skipped, as they or their gradients were not
        finite.

        Reading the count waits for the device; warns if there are any.
        """
        states = [entries for p, entries in self.state.items() if isinstance(p, Tensor)]
        skipped = int(sum(float(entries.get("skipped", 0)) for entries in states))
        if skipped:
            warnings.warn(
                f"{skipped} updates of tensors were skipped: they or their gradients were not "
                "finite; look for the first such loss, or clip gradients",
                stacklevel=2,
            )
        return skipped

    def _blocks_of(self, group: int, params: list[Tensor]) -> list[Block]:
        """The blocks of a group's parameters that have gradients; the last ones if they fit."""
        members, blocks = self._blocks.get(group, ([], []))
        same = len(members) == len(params) and all(map(is_, members, params))
        if not same or not all(block.is_state_of(self.state) for block in blocks):
            blocks = self._rebuild(blocks, params)
            self._blocks[group] = params, blocks
        return blocks

    @torch.compiler.disable  # compilers cannot make views of a type of its own
    def _rebuild(self, old: list[Block], params: list[Tensor]) -> list[Block]:
        """Blocks of `params` with the state that they have; parameters of `old` that are not among
        them keep theirs."""
        gone = {p for block in old for p in block.params}.difference(params)
        for p, views in _entries(old):
            if p in gone and p in self.state:  # a view would keep the whole old buffer
                self.state[p].update(_on_its_own(self.state[p], views))
        blocks = [
            Block(members, self.rule, [self.state[p] for p in members])
            for members in partition(params)
        ]
        for p, views in _entries(blocks):
            entries = self.state[p]
            others = {name: x for name, x in entries.items() if name not in views}
            entries.clear()
            entries.update(views | others)  # in place, as torch's optimizers do
        return blocks

    def _rule_on(self, device: torch.device) -> UpdateRule:
        if device not in self._rules:
            rule, compile = self.rule, self.compile and device.type == "cpu"
            if compile or next(rule.parameters()).device != device:
                rule = copy.deepcopy(rule).to(device)
            if compile:
                rule.compile_kernels()
            self._rules[device] = rule
        return self._rules[device]

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with copies of what the rule keeps: live entries are views of larger
        buffers."""
        handle = self.register_state_dict_post_hook(_apart, prepend=True)  # before the user's
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state_dict, in float32 and cloned: torch alone would cast the state to the
        parameters' dtype and share its tensors.

        Raises:
            ValueError: it is not a LearnedOptimizer's, or of other groups; nothing was changed.
        """
        handle = self.register_load_state_dict_pre_hook(_as_saved)  # the last: after the user's
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()


class _AsSaved:
    """Entries of a parameter, or of whatever others keep state for, that torch does not look
    into."""

    def __init__(self, entries: Any) -> None:
        self.entries = entries


def _as_saved(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    _check_loaded(state_dict, {name for group in optimizer.param_groups for name in group})
    return state_dict | {"state": {k: _AsSaved(v) for k, v in state_dict["state"].items()}}


def _check_loaded(state_dict: dict[str, Any], known: set[str]) -> None:
    """Refuses a state_dict whose groups are not a LearnedOptimizer's. Other entries of groups are
    welcome, as schedulers and users add them; so are settings of other optimizers that are `known`
    in this one's groups."""
    advice = "load what the state_dict() of a LearnedOptimizer returned, or start without"
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"state_dict has {list(state_dict)}, not state and param_groups; {advice}")
    for number, group in enumerate(state_dict["param_groups"]):
        lacking = [name for name in ("params", "lr", "weight_decay") if name not in group]
        theirs = {name: group[name] for name in THEIRS if name in group and name not in known}
        if lacking or theirs:
            found = f"lacks {', '.join(lacking)}" if lacking else f"has {theirs}"
            raise ValueError(
                f"param_groups[{number}] of the state_dict {found}, so it is of another "
                f"optimizer; {advice}"
            )


def _copied(value: Any, device: torch.device) -> Any:
    """A copy with its tensors, at any depth, on `device`, in their own dtype."""
    return tree_map(
        lambda x: x.to(device, copy=True) if isinstance(x, Tensor) else copy.deepcopy(x), value
    )


def _entries(blocks: list[Block]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Parameters, and what their blocks keep of them."""
    for block in blocks:
        yield from zip(block.params, block.states, strict=True)


def _on_its_own(entries: dict[str, Any], views: dict[str, Tensor]) -> dict[str, Any]:
    """The entries of a parameter, those of a rule as tensors with their own storage."""
    return {
        name: own(x) if name in views and isinstance(x, Tensor) else x
        for name, x in entries.items()
    }


def _apart(optimizer: LearnedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict that steps will not change, but for what others keep in it."""
    state = {k: dict(x) if isinstance(x, dict) else x for k, x in state_dict["state"].items()}
    live, saved = (
        [p for group in groups for p in group["params"]]
        for groups in (optimizer.param_groups, state_dict["param_groups"])
    )
    number = dict(zip(live, saved, strict=True))
    for _, blocks in optimizer._blocks.values():
        for p, views in _entries(blocks):
            if p in optimizer.state and p in number:
                state[number[p]] = _on_its_own(optimizer.state[p], views)
    return state_dict | {"state": state}


def _moves(p: Tensor) -> bool:
    """Whether a parameter takes part in this step."""
    if p.grad is None or not p.numel():
        return False
    if p.grad.is_sparse or p.is_complex():
        kind = "sparse gradients" if p.grad.is_sparse else "complex parameters"
        raise RuntimeError(
            f"LearnedOptimizer does not support {kind}; give such parameters (here of shape "
            f"{tuple(p.shape)}) to another optimizer, such as torch.optim.SparseAdam"
        )
    return True


def _refuse(unknown: dict[str, Any]) -> None:
    """Python's own TypeError would not say why an optimizer takes no betas."""
    if unknown:
        given = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
        raise TypeError(
            f"LearnedOptimizer has no argument {given}: its rule has learned what other optimizers "
            "are told by betas, momentum or eps, so leave it out; it takes params, lr, "
            "weight_decay, weights, maximize, compile and revision"
        )


def _warn_of_small(groups: list[dict[str, Any]]) -> None:
    """To be called by what the user calls."""
    small = [lr for lr in (float(group["lr"]) for group in groups) if 0 < lr <= SMALL]
    if small:
        warnings.warn(
            f"lr is {small[0]:g}, but a LearnedOptimizer's lr multiplies the whole update, and its "
            "rule was trained for 1: this is too slow in nearly all cases; leave lr out",
            stacklevel=3,
        )


def _check(lr: float | Tensor, weight_decay: float) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, not of shape {tuple(lr.shape)}")
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        number = isinstance(value, (Tensor, Real)) and not isinstance(value, bool)
        if not number or not 0 <= float(value) < float("inf"):
            raise ValueError(f"{name} is {value!r}; use a finite number of at least 0")
