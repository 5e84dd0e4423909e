"""Turns the state of a LearnedOptimizer into what is saved, and back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from learned_opt.flat_buffers import Block, own

# Settings by which the state of another optimizer is recognized. Each optimizer of torch has some.
THEIRS = ("betas", "momentum", "eps", "foreach", "fused", "capturable", "differentiable")


class AsSaved:
    """Wraps the saved entries of one key of the state, so that torch does not convert them."""

    def __init__(self, entries: Any) -> None:
        self.entries = entries


def as_saved(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    _check_loaded(state_dict, {name for group in optimizer.param_groups for name in group})
    return state_dict | {"state": {k: AsSaved(v) for k, v in state_dict["state"].items()}}


def _check_loaded(state_dict: dict[str, Any], known: set[str]) -> None:
    """Raises ValueError for a state_dict whose groups are not those of a LearnedOptimizer.

    Groups may have more entries, because schedulers and users add some. An entry that is typical of
    other optimizers is accepted only if it is `known`, that is, in this optimizer's groups.
    """
    advice = "load what the state_dict() of a LearnedOptimizer returned, or start without a state"
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


def copied(value: Any, device: torch.device) -> Any:
    """Returns a copy of `value` with tensors at any depth on `device`, in their own dtype."""
    return tree_map(
        lambda x: x.to(device, copy=True) if isinstance(x, Tensor) else copy.deepcopy(x), value
    )


def rule_entries(blocks: list[Block]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yields each parameter with the rule's entries of its state."""
    for block in blocks:
        yield from zip(block.params, block.states, strict=True)


def on_its_own(entries: dict[str, Any], views: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the entries of a parameter, with those of the rule copied to their own storage."""
    return {
        name: own(x) if name in views and isinstance(x, Tensor) else x
        for name, x in entries.items()
    }


def apart(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns a state_dict with copies of the rule's entries, which later steps do not change."""
    state = {k: dict(x) if isinstance(x, dict) else x for k, x in state_dict["state"].items()}
    live, saved = (
        [p for group in groups for p in group["params"]]
        for groups in (optimizer.param_groups, state_dict["param_groups"])
    )
    number = dict(zip(live, saved, strict=True))
    for _, blocks in cast(Any, optimizer)._blocks.values():
        for p, views in rule_entries(blocks):
            if p in optimizer.state and p in number:
                state[number[p]] = on_its_own(optimizer.state[p], views)
    return state_dict | {"state": state}
