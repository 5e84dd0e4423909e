"""The rule of "Learning gradient descent: better generalization and longer horizons"."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from learned_opt.rules.base import Observation, register
from learned_opt.rules.cell import per_task
from learned_opt.rules.coordinatewise_lstm import CoordinatewiseLSTM, lstm_layers
from learned_opt.rules.layout import State

BETA = 0.95  # the decay of both moments, as in the paper
EPS = 1e-8


@register
class RNNProp(CoordinatewiseLSTM):
    """u = −α tanh(Linear(LSTM(LSTM(ELU(Linear([g/√v̂, m̂/√v̂])))))), the same for every coordinate.

    Lv, Jiang & Li 2017 (arXiv 1703.03633). m̂ and v̂ are Adam's bias-corrected moments with
    β₁ = β₂ = .95, so the scale of the loss does not matter, and no coordinate moves by more than α
    in a step. The update is not odd in the gradient and not zero for a zero gradient, so parameters
    without a gradient move.

    The paper also describes a way of training, which differs here in four points. The paper scales
    single coordinates at random; here whole tensors are scaled (`log10_reparametrization` of a
    family). The paper adds a convex term to the loss of each task; here that is a task of its own
    (`kinds: {mlp: 1, quadratic: 1}`). The paper minimizes the last loss of a window; here it is the
    mean. Weights are initialized as everywhere in this package. See configs/train/rnnprop.yaml.

    The state takes 8 bytes, and 8 for each hidden unit of each LSTM, for each coordinate: 328 bytes
    at the published size.

    Args:
        hidden: the number of units of the first layer and of each LSTM.
        layers: the number of stacked LSTMs.
        alpha: α, the longest step of a coordinate.
    """

    name = "rnnprop"
    entries = ("hidden", "moments")

    def __init__(self, hidden: int = 20, layers: int = 2, alpha: float = 0.1) -> None:
        super().__init__(hidden, layers, preset="quadratic")  # inputs and outputs are not scaled
        self._config = {"hidden": hidden, "layers": layers, "alpha": alpha}
        self.alpha = alpha
        self.inlet = nn.Linear(2, hidden)
        self.cells = lstm_layers(hidden, hidden, layers)

    def init_state(self, params: Tensor, shapes: tuple[tuple[int, ...], ...]) -> State:
        state = super().init_state(params, shapes)
        moments = params.new_zeros(*params.shape[:-1], 2, params.shape[-1])
        return replace(state, coordinate=state.coordinate | {"moments": moments})

    def observe(
        self, grads: Tensor, params: Tensor, state: State, in_place: bool = False
    ) -> tuple[Observation, State]:
        step = state.step + 1
        moments = state.coordinate["moments"].lerp(torch.stack([grads, grads**2], -2), 1 - BETA)
        correction = 1 - BETA**step
        if isinstance(step, Tensor):
            correction = state.layout.expand(correction)
        m, v = (moments / correction).unbind(-2)
        features = torch.stack([grads, m], -2) / (v.sqrt() + EPS).unsqueeze(-2)
        none = grads.new_empty(*grads.shape[:-1], 0, len(state.layout.shapes))
        kept = state.coordinate | {"moments": moments}
        return Observation(features, none, state.layout), state.advanced(coordinate=kept)

    def respond(
        self, observation: Observation, hidden: Tensor, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        x = observation.coordinate
        x = per_task(self.inlet.weight, x) @ x + self.inlet.bias.unsqueeze(-1)
        x = replace(observation, coordinate=nn.functional.elu(x))
        out, hidden = super().respond(x, hidden, in_place)
        return -self.alpha * out.tanh(), hidden
