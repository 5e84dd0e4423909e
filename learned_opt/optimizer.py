"""The drop-in optimizer: an update rule with the interface of torch.optim.Optimizer."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from numbers import Real
from operator import is_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from learned_opt.flat_buffers import Block, partition, whole
from learned_opt.rules import UpdateRule
from learned_opt.rules.steps import as_numbers, not_compiled
from learned_opt.rules.trained import TRAINED, is_trained
from learned_opt.saved_state import AsSaved, apart, as_saved, copied, on_its_own, rule_entries
from learned_opt.weights import load_rule

SMALL = 0.02  # an lr of at most this was probably meant for Adam or SGD
OURS = ("torch", "learned_opt")  # frames that warnings look through


class LearnedOptimizer(Optimizer):
    """A torch optimizer that updates parameters by a learned rule and needs no learning rate.

        θ_i ← θ_i + lr · u_i − lr · weight_decay · (|u_i| / |θ_i|) θ_i,    u the update of the rule

    for each row i of a matrix; vectors, such as biases, are one row.

    Use it as `optimizer = LearnedOptimizer(model.parameters())`. Here `lr` multiplies the whole
    update, and the rule was trained with 1; with Adam's 1e-3 it would train a thousand times too
    slowly.

    If a tensor or its gradient is not finite, or its square overflows float32, a step skips that
    tensor and its state. `skipped_steps()` returns how often that happened.

    Parameters may have any floating dtype (features and state are float32), be on several devices,
    and be sharded by FSDP2. Statistics of a tensor are summed over its shards, so a sharded run
    makes the same updates as an unsharded one. FSDP1 is refused, and ZeroRedundancyOptimizer is not
    supported.

    The state of a parameter p is in float32: "step", "skipped" and "clock", the number of steps of
    the run; the rule's averages of each coordinate, (*p.shape, features); a few small vectors for
    the whole tensor; and, for a matrix under the shipped rule, two square matrices for each side of
    up to 256, if no side is above 4,096. The shipped rule takes 20 bytes for each parameter (Adam:
    8), and 8 n² bytes for each such side of length n: 36 bytes for each parameter of a square
    matrix of at most 256 rows. Other code may add entries to the state of p; they are kept, saved
    and loaded. `state_dict()` returns copies.

    Args:
        params: tensors, or dicts of groups with their own `lr`, `weight_decay`, `num_steps` and
            `maximize`.
        lr: multiplies the whole update; the rule was trained with 1. A value above 0 and up to 0.02
            gives a warning, because it was probably meant for another optimizer.
        weight_decay: decoupled, and relative to each row's own step |u_i|/|θ_i|, see the equation,
            so the same value suits all tensors. A value of 1 shrinks θ_i by as much as the update
            adds, but never beyond zero. A row that does not move does not decay. If it is None,
            matrices have the weight decay that goes with the weights, and vectors have none.
        weights: a weights file of `learned-opt train`, "hf://owner/name" for a repository of the
            Hugging Face Hub, or a rule; by default the shipped weights.
        num_steps: the number of steps of the whole run, if it is known. Steps then rise over its
            first twentieth and fall to zero at its end, so leave other schedules out; and the
            shipped network has the less say the longer the run is. State and checkpoints keep it.
            After `num_steps` steps there is a warning, and further steps are small. If it is
            None, steps fall in a way that suits any length; runs of at most 300 steps are the same
            either way. Rules of another kind than the shipped one refuse it.
        maximize: maximizes instead of minimizing.
        revision: the commit of the repository. It is required if `weights` is on the Hugging Face
            Hub.
        diagnose: keeps the facts that `diagnostics()` returns. You can set it at any time, as in
            `optimizer.diagnose = True`.

    Raises:
        WeightsError: the weights cannot be used.
        TypeError: an argument is unknown, or belongs to another optimizer.
        ValueError: lr or weight_decay is not a number, is negative or not finite; num_steps is not
            a positive int, or the rule has no use for it; or parameters are flattened by FSDP1.
            `load_state_dict` raises it for the state of another optimizer, and `step` for a loaded
            state of another rule or shape.
        RuntimeError: a gradient is sparse or complex. `step` raises it.
    """

    diagnose = False  # of those that were pickled before there was this

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        weight_decay: float | None = None,
        weights: str | Path | UpdateRule | None = None,
        *,
        num_steps: int | None = None,
        maximize: bool = False,
        revision: str | None = None,
        diagnose: bool = False,
        **unknown: Any,
    ) -> None:
        _refuse(unknown)
        _check(lr, weight_decay, num_steps)
        rule = weights if isinstance(weights, UpdateRule) else load_rule(weights, revision)
        self.rule, self.diagnose = rule, diagnose
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "num_steps": num_steps, "maximize": maximize
        }  # fmt: skip
        super().__init__(params, defaults)
        self._forget()
        _warn_of_small(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group["lr"], group["weight_decay"], group["num_steps"])
            if group["num_steps"] is not None and not self.rule.falls:
                raise ValueError(
                    f"num_steps is {group['num_steps']}, but rule {self.rule.name!r} does not use "
                    "it; leave it out, or use a rule of the kind geodesic_rnn"
                )
            if any(getattr(p, "_fsdp_flattened", False) for p in group["params"]):
                raise ValueError(
                    "params are flattened by FullyShardedDataParallel, so the shapes of the "
                    "tensors are lost; use FSDP2, torch.distributed.fsdp.fully_shard"
                )
        except ValueError:
            self.param_groups.pop()
            raise
        if hasattr(self, "_blocks"):  # `__init__` warns of its own groups
            _warn_of_small([group])

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"rule": self.rule, "diagnose": self.diagnose}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in (self.defaults, *self.param_groups):  # what is older than these settings
            group.setdefault("maximize", False)
            group.setdefault("num_steps", None)
        for p, entries in self.state.items():
            if isinstance(entries, AsSaved):
                saved = entries.entries
                if isinstance(p, Tensor):  # as torch does, leave entries of other keys unchanged
                    saved = {name: copied(x, p.device) for name, x in saved.items()}
                self.state[p] = saved

    def _forget(self) -> None:
        """Clears derived caches: the blocks of each group, and the copies of the rule by device."""
        self._blocks: dict[int, tuple[list[Tensor], list[Block]]] = {}
        self._rules: dict[torch.device, UpdateRule] = {}
        self._clock: int | None = None  # the steps of the run, read from the state when needed
        self._ended: set[float] = set()  # the values of num_steps whose end was noticed

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient, and returns the loss of the closure."""
        for number in [n for n in self._blocks if n >= len(self.param_groups)]:
            del self._blocks[number]  # the group was removed
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [
            (group, block)
            for number, group in enumerate(self.param_groups)
            for block in self._blocks_of(number, [p for p in group["params"] if _moves(p)])
        ]
        if not torch.compiler.is_compiling():  # a compiled step leaves the time to the state
            self._tick(work)
        for group, block in work:
            block.update(
                self._rule_on(block.params[0].device), group["lr"], group["weight_decay"],
                group["maximize"], self.diagnose,
            )  # fmt: skip
        return loss

    def _tick(self, work: list[tuple[dict[str, Any], Block]]) -> None:
        """Tells blocks the time, and warns where the run gets longer than was said.

        Their clocks count on by themselves. Those of new blocks are set to that of the tensor that
        took part in a step last, so that a layer that is unfrozen late knows the time of the run.
        """
        if self._clock is None:
            states = [x for p, x in self.state.items() if isinstance(p, Tensor)]
            clocks = [as_numbers(x[k]) for x in states for k in ("clock", "step") if k in x]
            self._clock = max((n for numbers in clocks for n in numbers), default=0)
            for _, block in work:
                block.set_clock(self._clock)
        for group in self.param_groups:
            _check_length(group["num_steps"])  # it may have been set anew
        for group, block in work:
            block.set_length(group["num_steps"])
        lengths = {group["num_steps"] or math.inf for group in self.param_groups}
        for num_steps in sorted(n for n in lengths - self._ended if n <= self._clock):
            self._ended.add(num_steps)
            warnings.warn(
                f"num_steps is {num_steps}, and the run goes on beyond that with small steps; "
                "pass the number of steps of the whole run, or set it in optimizer.param_groups",
                stacklevel=_level_of_caller(),
            )
        self._clock += 1

    def skipped_steps(self) -> int:
        """Returns how many updates of single tensors were skipped, and warns if there were any.

        An update is skipped if the tensor or its gradient is not finite. Reading the count waits
        for the device.
        """
        states = [entries for p, entries in self.state.items() if isinstance(p, Tensor)]
        skipped = int(sum(float(entries.get("skipped", 0)) for entries in states))
        if skipped:
            warnings.warn(
                f"{skipped} updates of tensors were skipped, because they or their gradients were "
                "not finite; find the first loss that is not finite, or clip gradients",
                stacklevel=2,
            )
        return skipped

    def diagnostics(self) -> dict[str | tuple[int, int], dict[str, Any]]:
        """Returns what the last step did to each tensor; `diagnose` must be on.

            optimizer = LearnedOptimizer(model.named_parameters(), diagnose=True)
            ...  # some steps
            optimizer.diagnostics()["0.weight"]["relative_step"]

        The facts are not part of the state, so they change no step and no checkpoint. After loading
        a checkpoint there are none until the next step. With `diagnose` a step takes a few more
        passes over the parameters, and is not compiled; without it, diagnostics cost
        nothing. Reading the facts waits for the device.

        The entries of a parameter are

        - "relative_step": the RMS of the step without decay, divided by the RMS of the parameter
          before the step;
        - "gains": a number for each direction d_k. The step is lr · Σ_k gain_k d_k, and the d_k are
          the gradient and its averages, normalized to about unit size. A negative gain means a step
          downhill. The entry is empty for rules that do not mix whole tensors;
        - "decay": the share of the parameter that weight decay removed;
        - "skipped": the number of updates skipped so far because the tensor or its gradient was not
          finite. If the last step was skipped, the other entries are 0.

        Returns:
            a dict of these entries for each parameter that took part in the last step. Its key is
            the parameter's name if the groups have names, else (number of the group, position in
            it).

        Raises:
            RuntimeError: `diagnose` is off.
        """
        if not self.diagnose:
            raise RuntimeError(
                "diagnostics are not kept; pass diagnose=True to LearnedOptimizer, or set "
                "optimizer.diagnose = True before a step"
            )
        found: dict[str | tuple[int, int], dict[str, Any]] = {}
        for number, group in enumerate(self.param_groups):
            _, blocks = self._blocks.get(number, ([], []))
            facts = {p: fact for block in blocks for p, fact in block.facts(self.rule.directions)}
            names = group.get("param_names")
            for i, p in enumerate(group["params"]):
                if p in facts:
                    found[names[i] if names else (number, i)] = facts[p]
        return found

    def _blocks_of(self, group: int, params: list[Tensor]) -> list[Block]:
        """Returns blocks of a group's parameters `params`; those of the last step if they match."""
        members, blocks = self._blocks.get(group, ([], []))
        same = len(members) == len(params) and all(map(is_, members, params))
        if not same or not all(block.is_state_of(self.state) for block in blocks):
            blocks = self._rebuild(blocks, params)
            self._blocks[group] = params, blocks
        return blocks

    @not_compiled  # compilers cannot make views of a tensor subclass
    def _rebuild(self, old: list[Block], params: list[Tensor]) -> list[Block]:
        """Returns new blocks of `params` with their present state.

        Parameters of `old` blocks that are not in `params` keep their state.
        """
        self._clock = None  # compiled steps may have been made since
        gone = {p for block in old for p in block.params}.difference(params)
        for p, views in rule_entries(old):
            if p in gone and p in self.state:  # a view would keep the whole old buffer alive
                self.state[p].update(on_its_own(self.state[p], views))
        trained = self._was_trained()
        blocks = [
            Block(members, self.rule, [self.state[p] for p in members])
            for members in partition(params)
        ]
        for block in blocks:
            block.set_trained(trained)
        for p, views in rule_entries(blocks):
            entries = self.state[p]
            others = {name: x for name, x in entries.items() if name not in views}
            entries.clear()
            entries.update(views | others)  # in place, as torch's optimizers do
        return blocks

    def _was_trained(self) -> bool:
        """Whether the net was trained before the first step, which the rule may want to know.

        It is told by all matrices with a gradient in the first step, and kept in the state.
        """
        states = (x for p, x in self.state.items() if isinstance(p, Tensor))
        known = [x[TRAINED] for x in states if TRAINED in x]
        if known or not self.rule.trained_starts:
            return any(bool(x) for x in known if not x.is_meta)
        params = (p for group in self.param_groups for p in group["params"])
        return is_trained(whole(p) for p in params if p.dim() > 1 and not p.is_meta and _moves(p))

    def _rule_on(self, device: torch.device) -> UpdateRule:
        if device not in self._rules:
            here = next(self.rule.parameters()).device == device
            self._rules[device] = self.rule if here else copy.deepcopy(self.rule).to(device)
        return self._rules[device]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as torch does, but with copies of the rule's entries.

        The entries themselves are views of larger buffers, which later steps change.
        """
        handle = self.register_state_dict_post_hook(apart, prepend=True)  # before users' hooks
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state from a copy of `state_dict`, in float32.

        torch's own method would cast the state to the parameters' dtype and share its tensors.

        Raises:
            ValueError: the state is not that of a LearnedOptimizer, or has other groups. Nothing is
                changed then.
        """
        handle = self.register_load_state_dict_pre_hook(as_saved)  # after users' hooks
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()


def _moves(p: Tensor) -> bool:
    """Whether this step updates the parameter.

    Raises:
        RuntimeError: the gradient is sparse, or the parameter complex.
    """
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
    """Raises TypeError for unknown arguments, and explains why there are no betas or momentum."""
    if "compile" in unknown:
        raise TypeError(
            f"compile is {unknown['compile']!r}, but version 0.1.0 was the last with it, because "
            "it gained nothing on a CPU; leave it out, or compile your whole training step with "
            "torch.compile"
        )
    if unknown:
        given = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
        raise TypeError(
            f"LearnedOptimizer has no argument {given}; leave it out, because the rule has learned "
            "what betas, momentum and eps set in other optimizers; the arguments are params, lr, "
            "weight_decay, weights, num_steps, maximize, revision and diagnose"
        )


def _warn_of_small(groups: list[dict[str, Any]]) -> None:
    """Warns of a small lr. Call it directly from what users call, so that their line is shown."""
    small = [lr for lr in (float(group["lr"]) for group in groups) if 0 < lr <= SMALL]
    if small:
        warnings.warn(
            f"lr is {small[0]:g}, but the lr of a LearnedOptimizer multiplies the whole update, "
            "and its rule was trained for 1, so this is nearly always too slow; leave lr out",
            stacklevel=3,
        )


def _level_of_caller() -> int:
    """Returns the `stacklevel` of a warning that shows the first line outside torch and here."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in OURS:
        level, frame = level + 1, frame.f_back
    return level


def _check_length(num_steps: int | None) -> None:
    if num_steps is not None and (type(num_steps) is not int or num_steps < 1):
        raise ValueError(
            f"num_steps is {num_steps!r}; use a positive int, the number of calls of step() in the "
            "whole run, or None if it is not known"
        )


def _check(lr: float | Tensor, weight_decay: float | None, num_steps: int | None) -> None:
    _check_length(num_steps)
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, not of shape {tuple(lr.shape)}")
    given = {"lr": lr} if weight_decay is None else {"lr": lr, "weight_decay": weight_decay}
    for name, value in given.items():
        number = isinstance(value, (Tensor, Real)) and not isinstance(value, bool)
        if not number or not 0 <= float(value) < float("inf"):
            raise ValueError(f"{name} is {value!r}; use a finite number of at least 0")
