"""The rule of "Learning to learn by gradient descent by gradient descent" (L2L)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from learned_opt.errors import ConfigError
from learned_opt.rules.base import Observation, UpdateRule, register
from learned_opt.rules.cell import LSTMCell, per_task
from learned_opt.rules.layout import Layout, State

PRESETS = {
    "deepmind-code": {"log_scale": 5.0, "output_scale": 0.01},
    "paper": {"log_scale": 10.0, "output_scale": 0.1},
    "quadratic": {"log_scale": 0.0, "output_scale": 1.0},  # paper and code agree on quadratics
}


def lstm_layers(inputs: int, hidden: int, layers: int) -> nn.ModuleList:
    """Returns stacked LSTMs with a forget-gate bias of 1, as in the authors' code."""
    if min(hidden, layers) < 1:
        raise ConfigError(f"hidden is {hidden} and layers is {layers}; use at least 1 for each")
    cells = nn.ModuleList(LSTMCell(hidden if i else inputs, hidden) for i in range(layers))
    for cell in cells:
        nn.init.ones_(cell.bias.data[hidden : 2 * hidden])
    return cells


@register
class CoordinatewiseLSTM(UpdateRule):
    """u = s · Linear(LSTM(LSTM(LogAndSign(g)))), with the same network for every coordinate.

        LogAndSign(g) = [max(log|g| / k, −1), clip(g eᵏ, −1, 1)]

    Andrychowicz et al. 2016 (arXiv 1606.04474) and their code (google-deepmind/learning-to-learn)
    use different k and s:

        preset          k     s
        deepmind-code   5     0.01
        paper           10    0.1
        quadratic       none  1      paper and code on quadratics: the input is g itself

    As published, the update is not zero for a zero gradient, so parameters without a gradient move.

    The state takes 8 bytes for each hidden unit of each layer and each coordinate, which is 320
    bytes for each coordinate at the published size.

    Args:
        hidden: the number of LSTM units of each layer.
        layers: the number of stacked LSTMs.
        preset: the source of k and s.
        log_scale: k, instead of the preset's; 0 feeds g itself.
        output_scale: s, instead of the preset's.
    """

    name = "coordinatewise_lstm"
    entries = ("hidden",)
    hidden_per = "coordinate"
    weights_per_task = True

    def __init__(
        self,
        hidden: int = 20,
        layers: int = 2,
        preset: str = "deepmind-code",
        log_scale: float | None = None,
        output_scale: float | None = None,
    ) -> None:
        super().__init__()
        if preset not in PRESETS:
            raise ConfigError(f"preset is {preset!r}; use one of {', '.join(PRESETS)}")
        given = {"log_scale": log_scale, "output_scale": output_scale}
        scales = PRESETS[preset] | {k: v for k, v in given.items() if v is not None}
        self._config = {"hidden": hidden, "layers": layers, **scales}
        self.log_scale, self.output_scale = scales["log_scale"], scales["output_scale"]
        self.cells = lstm_layers(2 if self.log_scale else 1, hidden, layers)
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
        features = grads.unsqueeze(-2)
        if self.log_scale:
            log = (grads.abs() + torch.finfo(grads.dtype).eps).log() / self.log_scale
            sign = (grads * math.exp(self.log_scale)).clamp(-1, 1)
            features = torch.stack([log.clamp(min=-1), sign], dim=-2)
        none = grads.new_empty(*grads.shape[:-1], 0, len(state.layout.shapes))
        return Observation(features, none, state.layout), state.advanced()

    def respond(self, observation: Observation, hidden: Tensor,
                in_place: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
        x, states = observation.coordinate, []
        split = hidden.split([2 * cell.hidden for cell in self.cells], dim=-2)
        for cell, state in zip(self.cells, split, strict=True):
            x, state = cell(x, state, in_place=in_place)
            states.append(state)
        out = per_task(self.head.weight, x) @ x + self.head.bias.unsqueeze(-1)
        return self.output_scale * out.squeeze(-2), hidden if in_place else torch.cat(states, -2)
