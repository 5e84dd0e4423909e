"""The drop-in optimizer: a rule with torch.optim's face."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from learned_opt.rules import Layout, State, UpdateRule
from learned_opt.rules.base import CHUNK
from learned_opt.weights import load_rule

# Coordinates of small tensors that are updated together: enough to hide what a call costs.
BLOCK = 8 * CHUNK


class LearnedOptimizer(Optimizer):
    """θ ← θ + lr · u − lr · weight_decay · (|u| / |θ|) θ, with u a learned rule's update.

    Needs no learning rate: `optimizer = LearnedOptimizer(model.parameters())`.

    Args:
        params: tensors, or dicts of groups with their own `lr` and `weight_decay`.
        lr: multiplies the whole update; 1 is what the rule was trained for.
        weight_decay: decoupled and relative to the tensor's own step |u|/|θ|, so dimensionless:
            1 takes back as much of θ as the update adds, but never more than all of it. A tensor
            that does not move does not decay.
        weights: a weights file of `learned-opt train`, or a rule; by default the shipped one.

    State of a parameter p, in float32: "step"; per coordinate the rule's averages, of shape
    (*p.shape, features); per tensor a few small vectors. The shipped rule keeps 20 bytes per
    parameter (Adam: 8).

    Raises:
        WeightsError: the weights cannot be used.
        ValueError: lr or weight_decay is negative or not finite.
        RuntimeError: in `step`, for sparse or complex gradients.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        weight_decay: float = 0.0,
        weights: str | Path | UpdateRule | None = None,
    ) -> None:
        _check(lr, weight_decay)
        self.rule = weights if isinstance(weights, UpdateRule) else load_rule(weights)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _check(self.param_groups[-1]["lr"], self.param_groups[-1]["weight_decay"])

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"rule": self.rule}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for step, params in self._blocks(group["params"]):
                self._update(params, step, float(group["lr"]), group["weight_decay"])
        return loss

    def _blocks(self, params: list[Tensor]) -> Iterable[tuple[int, list[Tensor]]]:
        """(step, parameters) to update together: large tensors alone, small ones by the chunk.

        Rules treat tensors alike and apart, so how they are grouped changes no update.
        """
        small: dict[tuple, list[Tensor]] = {}
        for p in params:
            if p.grad is None or not p.numel():
                continue
            if p.grad.is_sparse or p.is_complex():
                kind = "sparse gradients" if p.grad.is_sparse else "complex parameters"
                raise RuntimeError(
                    f"LearnedOptimizer does not support {kind}; give such parameters (here of "
                    f"shape {tuple(p.shape)}) to another optimizer, such as torch.optim.SparseAdam"
                )
            step = int(self.state[p]["step"]) if self.state[p] else 0
            if p.numel() >= CHUNK:
                yield step, [p]
                continue
            block = small.setdefault((step, p.device), [])
            block.append(p)
            if sum(q.numel() for q in block) >= BLOCK:
                yield step, small.pop((step, p.device))
        yield from ((step, block) for (step, _), block in small.items())

    def _update(self, params: list[Tensor], step: int, lr: float, weight_decay: float) -> None:
        theta = _flatten(params)
        grads = _flatten([p.grad for p in params])
        if grads.device != next(self.rule.parameters()).device:
            self.rule.to(grads.device)
        state = self._gather(params, step, theta)
        with torch.autocast(theta.device.type, enabled=False):
            update, state = self.rule.update(grads, theta, state, in_place=True)
        self._scatter(params, state)
        parts = update.split([p.numel() for p in params])
        for p, part in zip(params, parts, strict=True):
            u = part.view_as(p)
            if weight_decay and (norm := torch.linalg.vector_norm(p, dtype=u.dtype)) > 0:
                p.mul_((1 - lr * weight_decay * u.norm() / norm).clamp(min=0))
            p.add_(u, alpha=lr)

    def _gather(self, params: list[Tensor], step: int, theta: Tensor) -> State:
        """The rule's flat state of these parameters; views where there is but one."""
        layout = Layout(tuple(tuple(p.shape) for p in params))
        fresh = self.rule.init_state(theta if step == 0 else theta[:0], layout.shapes)
        if step == 0:
            return fresh
        states = [self.state[p] for p in params]
        coordinate = {
            name: _join([s[name].movedim(-1, 0).reshape(s[name].shape[-1], -1) for s in states])
            for name in fresh.coordinate
        }
        tensor = {name: torch.stack([s[name] for s in states], -1) for name in fresh.tensor}
        return State(layout, step, coordinate, tensor)

    def _scatter(self, params: list[Tensor], state: State) -> None:
        """Keeps a flat state as views in the shape of each parameter, features last."""
        sizes = [p.numel() for p in params]
        pieces = {name: flat.split(sizes, -1) for name, flat in state.coordinate.items()}
        for i, p in enumerate(params):
            kept = {n: piece[i].unflatten(-1, p.shape or (1,)) for n, piece in pieces.items()}
            kept = {n: (k if p.dim() else k.squeeze(-1)).movedim(0, -1) for n, k in kept.items()}
            kept |= {name: flat[:, i] for name, flat in state.tensor.items()}
            self.state[p] = {"step": torch.tensor(float(state.step)), **kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state_dict; torch alone would cast the state to the parameters' dtype."""
        super().load_state_dict(state_dict)
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for key, p in zip(saved["params"], group["params"], strict=True):
                if key in state_dict["state"]:
                    entries = state_dict["state"][key].items()
                    self.state[p] = {
                        k: v.to("cpu" if k == "step" else p.device, copy=True) for k, v in entries
                    }


def _check(lr: float | Tensor, weight_decay: float) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, not of shape {tuple(lr.shape)}")
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0 <= float(value) < float("inf"):
            raise ValueError(f"{name} is {value}; use a finite number of at least 0")


def _flatten(tensors: list[Tensor]) -> Tensor:
    return _join([t.detach().reshape(-1).to(torch.float32) for t in tensors])


def _join(pieces: list[Tensor]) -> Tensor:
    """Their concatenation along the last dimension; the piece itself if there is but one."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
