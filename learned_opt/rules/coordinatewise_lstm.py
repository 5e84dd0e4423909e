"""The rule of "Learning to learn by gradient descent by gradient descent"."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from learned_opt.rules.base import Layout, Observation, State, UpdateRule, register
from learned_opt.rules.cell import LSTMCell, per_task


@register
class CoordinatewiseLSTM(UpdateRule):
    """u = 0.01 · Linear(LSTM(LSTM(LogAndSign(g)))), one LSTM for every coordinate alike.

    LogAndSign(g) = [max(log|g| / k, −1), clip(g eᵏ, −1, 1)] with k = 5. The preset of the
    authors' code (google-deepmind/learning-to-learn), which differs from their paper
    (Andrychowicz et al. 2016, arXiv 1606.04474) in k and in the output scale. As published it
    is not gated by the gradient: a zero gradient does move a parameter.

    State: 8 bytes per hidden unit of each layer and coordinate, 320 at the published size.
    """

    name = "coordinatewise_lstm"
    hidden_per = "coordinate"
    weights_per_task = True

    def __init__(self, hidden: int = 20, layers: int = 2, log_scale: float = 5.0,
                 output_scale: float = 0.01) -> None:  # fmt: skip
        super().__init__()
        self._config = {"hidden": hidden, "layers": layers, "log_scale": log_scale,
                        "output_scale": output_scale}  # fmt: skip
        self.log_scale, self.output_scale = log_scale, output_scale
        self.cells = nn.ModuleList(LSTMCell(hidden if i else 2, hidden) for i in range(layers))
        self.head = nn.Linear(hidden, 1)

    @property
    def config(self) -> dict:
        return self._config

    def init_state(self, params: Tensor, shapes: tuple[tuple[int, ...], ...]) -> State:
        rows = sum(2 * cell.hidden for cell in self.cells)
        hidden = params.new_zeros(*params.shape[:-1], rows, params.shape[-1])
        return State(Layout(tuple(shapes)), 0, {"hidden": hidden}, {})

    def observe(self, grads: Tensor, params: Tensor, state: State,
                in_place: bool = False) -> tuple[Observation, State]:  # fmt: skip
        log = (grads.abs() + torch.finfo(grads.dtype).eps).log() / self.log_scale
        sign = (grads * math.exp(self.log_scale)).clamp(-1, 1)
        features = torch.stack([log.clamp(min=-1), sign], dim=-2)
        none = grads.new_empty(*grads.shape[:-1], 0, len(state.layout.shapes))
        return Observation(features, none, state.layout), replace(state, step=state.step + 1)

    def respond(self, observation: Observation, hidden: Tensor,
                in_place: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
        x, states = observation.coordinate, []
        split = hidden.split([2 * cell.hidden for cell in self.cells], dim=-2)
        for cell, state in zip(self.cells, split, strict=True):
            x, state = cell(x, state, in_place=in_place)
            states.append(state)
        out = per_task(self.head.weight, x) @ x + self.head.bias.unsqueeze(-1)
        return self.output_scale * out.squeeze(-2), hidden if in_place else torch.cat(states, -2)
