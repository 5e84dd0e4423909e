"""A learned step-size schedule for any rule."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from learned_opt.errors import ConfigError
from learned_opt.rules.base import Observation, TensorGains, make_rule, register
from learned_opt.rules.cell import LSTMCell, per_task
from learned_opt.rules.layout import Layout, State

BETAS = (0.5, 0.9, 0.99)  # averages of the progress over a few, tens and hundreds of steps
EPS = 1e-12
LONGEST = 10_000.0  # the step number that the network sees stops here
LEAST, MOST = math.log(1e-4), math.log(10.0)  # limits of s
INPUTS = 2 * len(BETAS) + 6


@register
class Scheduled(TensorGains):
    """u = e^s · u_base: an LSTM scales the updates of another rule by one factor for each tensor.

    The factor depends on the slope of the loss along the last update m = θ_t − θ_{t−1}. The slope
    ⟨∇F(θ_t), m⟩ is negative if the step was too short, 0 at the minimum along m, and positive
    beyond. For a convex F without noise it bounds the change of the loss from above. With noise its
    sign still measures progress, because the minibatch is not the one from which m was computed.

    The inputs of each tensor are: the mean of past cosines of ∇F and m, and that mean over their
    RMS, both at β = .5, .9, .99; that RMS at β = .9; RMS(m) / RMS(θ); the gradient norm relative to
    its peak; the number of coordinates; and the step number. None depends on the scale of the loss.
    The output layer starts at zero, so the untrained rule equals its base. The form follows the
    scheduler of Celo (Moudgil et al. 2025, arXiv 2501.12670), whose input is the loss instead; but
    torch's optimizers need not be given the loss.

    The state takes 4 bytes for each parameter more than the base's, and 8 more for each hidden unit
    if the base has a recurrent state for each coordinate.

    Args:
        base: the name of the rule whose updates are scaled.
        base_config: the constructor arguments of that rule.
        hidden: the number of LSTM units.
    """

    name = "scheduled"
    entries = ("previous", "progress", "peak")  # besides those of its base

    def __init__(
        self,
        base: str = "geodesic_rnn",
        base_config: dict[str, Any] | None = None,
        hidden: int = 16,
    ) -> None:
        super().__init__()
        if base == self.name or hidden < 1:
            raise ConfigError(
                f"base is {base!r} and hidden is {hidden}; use a base other than 'scheduled', and "
                "hidden of at least 1"
            )
        self.base = make_rule(base, **(base_config or {}))
        self.hidden_per, self.gains_per_tensor = self.base.hidden_per, self.base.gains_per_tensor
        self.weights_per_task, self.every = self.base.weights_per_task, self.base.every
        self.directions, self.falls = self.base.directions, self.base.falls
        self.decay = self.base.decay
        self.trained_starts = self.base.trained_starts
        self._config = {"base": base, "base_config": self.base.config, "hidden": hidden}
        self.cell = LSTMCell(INPUTS, hidden)
        self.head = nn.Linear(hidden, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def config(self) -> dict:
        return self._config

    def init_state(self, params: Tensor, shapes: tuple[tuple[int, ...], ...]) -> State:
        state, lead, tensors = self.base.init_state(params, shapes), params.shape[:-1], len(shapes)
        coordinate = state.coordinate | {"previous": params.detach().unsqueeze(-2).clone()}
        tensor = state.tensor | {
            "progress": params.new_zeros(*lead, 2 * len(BETAS), tensors),
            "peak": params.new_zeros(*lead, 1, tensors),
        }
        rows = coordinate if self.hidden_per == "coordinate" else tensor
        hidden = rows["hidden"]
        own = hidden.new_zeros(*lead, 2 * self.cell.hidden, hidden.shape[-1])
        rows["hidden"] = torch.cat([hidden, own], -2)
        return replace(state, coordinate=coordinate, tensor=tensor)

    def observe(
        self, grads: Tensor, params: Tensor, state: State, in_place: bool = False
    ) -> tuple[Observation, State]:
        inputs, kept = self._progress(grads, params, state)
        seen, new = self.base.observe(grads, params, state, in_place)
        tensor = torch.cat([seen.tensor, inputs], -2)
        previous = params.detach().unsqueeze(-2)
        previous = state.coordinate["previous"].copy_(previous) if in_place else previous.clone()
        coordinate = new.coordinate | {"previous": previous}
        return replace(seen, tensor=tensor), replace(
            new, coordinate=coordinate, tensor=new.tensor | kept
        )

    def _progress(
        self, grads: Tensor, params: Tensor, state: State
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the network's inputs, (*tasks, INPUTS, tensors), and the next state entries."""
        layout, previous = state.layout, state.coordinate["previous"].squeeze(-2)
        sums = grads.new_zeros(*grads.shape[:-1], len(layout.sizes), 4)  # g·m, g², m², θ²
        for span in layout.spans:
            g, theta, before = (
                x[..., span.where].unflatten(-1, (span.number, -1))
                for x in (grads, params, previous)
            )
            m = theta - before
            pairs = ((g, m), (g, g), (m, m), (theta, theta))
            sums[..., span.tensors, :] += torch.stack([torch.linalg.vecdot(*p) for p in pairs], -1)
        slope, *squares = layout.reduce(sums).unbind(-1)
        g, m, theta = (x.sqrt() for x in squares)
        cosine = slope / (g * m).clamp(min=EPS)
        peak = torch.maximum(state.tensor["peak"].squeeze(-2), g)
        # There is no update before the first step, so the averages start at the second.
        made = torch.as_tensor(state.step, dtype=torch.float64, device=grads.device).clamp(min=1)
        weights = torch.stack([(1 - b) / (1 - b**made) for b in BETAS]).to(grads.dtype)
        weights = weights.reshape(len(BETAS), -1).repeat(2, 1)  # (2 · betas, tensors or 1)
        now = torch.stack([cosine] * len(BETAS) + [cosine.square()] * len(BETAS), -2)
        progress = state.tensor["progress"].lerp(now, weights.expand_as(now))
        mean, square = progress.chunk(2, -2)
        rms = square.clamp(min=EPS).sqrt()
        counts = layout.numbers(math.prod, grads)
        clock = (made + 1).clamp(max=LONGEST).log().to(grads.dtype).expand_as(g)
        inputs = [
            *(mean / rms).unbind(-2),
            *(mean * counts.sqrt()).asinh().div(3).unbind(-2),
            rms[..., 1, :].log().clamp(min=-10) / 3 + 1,
            (m / theta.clamp(min=EPS)).clamp(min=1e-7, max=10).log() / 4 + 1,
            (g / peak.clamp(min=EPS)).clamp(min=1e-9).log() / 4,
            counts.log().expand_as(g) / 4 - 1,
            clock / 5 - 1,
            (clock / 2 - 1).tanh(),
        ]
        return torch.stack(inputs, -2), {"progress": progress, "peak": peak.unsqueeze(-2)}

    def respond(
        self, observation: Observation, hidden: Tensor, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        theirs, own = self._split(hidden)
        inputs, layout = observation.tensor[..., -INPUTS:, :], observation.layout
        seen = replace(observation, tensor=observation.tensor[..., :-INPUTS, :])
        update, theirs = self.base.respond(seen, theirs, in_place)
        if self.hidden_per == "coordinate":
            inputs = _spread(inputs, layout, update.shape[-1])
        factor, own = self._factor(inputs, own, in_place)
        if self.hidden_per == "tensor":
            factor = _spread(factor, layout, update.shape[-1])
        return update * factor.squeeze(-2), hidden if in_place else torch.cat([theirs, own], -2)

    def gains(self, tensor: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        theirs, own = self._split(hidden)
        gains, theirs = self.base.gains(tensor[..., :-INPUTS, :], theirs)
        factor, own = self._factor(tensor[..., -INPUTS:, :], own)
        return gains * factor, torch.cat([theirs, own], -2)

    def features(self, observation: Observation) -> Tensor:
        return self.base.features(observation)

    def mix(self, gains: Tensor, observation: Observation) -> Tensor:
        return self.base.mix(gains, observation)

    def _split(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        own = 2 * self.cell.hidden
        return hidden[..., :-own, :], hidden[..., -own:, :]

    def _factor(
        self, inputs: Tensor, hidden: Tensor, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Returns e^s, (*, 1, units), and the next recurrent state."""
        h, hidden = self.cell(inputs, hidden, in_place=in_place)
        s = per_task(self.head.weight, h) @ h + self.head.bias.unsqueeze(-1)
        return s.clamp(LEAST, MOST).exp(), hidden


def _spread(x: Tensor, layout: Layout | Tensor | None, units: int) -> Tensor:
    """Repeats values of each tensor, (*, rows, tensors), for each of its coordinates.

    `layout` is that of an Observation.
    """
    if layout is None:
        return x.repeat_interleave(units // x.shape[-1], -1)
    return layout.expand(x) if isinstance(layout, Layout) else x[..., layout]
