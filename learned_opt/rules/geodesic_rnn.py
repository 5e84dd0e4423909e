"""The rule of this project: an RNN that mixes normalised gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from learned_opt.errors import ConfigError
from learned_opt.rules.base import CHUNK, Layout, Observation, State, UpdateRule, register
from learned_opt.rules.cell import LSTMCell

BETAS = (0.5, 0.9, 0.99)  # momenta: a few steps, Adam's, and one that averages noise away
BETA_V = 0.99  # second moment
EPS = 1e-12  # below any gradient that matters, so that the rule does not see the loss's scale
BIAS_RMS = 0.03  # stands in for the RMS of tensors that start at zero
STEP = 0.1  # relative step of the untrained rule, near Adam(0.003-0.01) on default inits
MAX_STEP = 1.0  # no tensor moves by more than this share of its RMS in one update
LONGEST = 2000.0  # the clock stops here: beyond the longest runs trained on it means nothing
DIRECTIONS = 1 + len(BETAS)
FEATURES = 2 * DIRECTIONS + 3
# Observation.tensor: network inputs first, then these, which the mixing needs.
EXTRA = FEATURES + 2  # bounds on the features' RMS, 1 / RMS of gradients, size of the tensor
TENSOR_INPUTS = 20


@register
class GeodesicRNN(UpdateRule):
    """u = −a ρ Σ_k (c_k m̂_k/r + d_k m̂_k/r̄): odd in the gradient, so no gradient, no update.

    m̂_k: the gradient and its bias-corrected averages at β = .5, .9, .99; r = √v̂ at β = .99,
    r̄ its RMS over the tensor: c mixes as Adam does, d as SGD with momentum does, free of the
    loss's scale. ρ = max(RMS(θ), floor) is the tensor's size, with 1/√(3 fan_in) or 0.03 as
    floor. An LSTM emits c, d and o, a = 0.1 e^o softly limited to move no tensor by more than
    its size; its output layer starts at zero, with a bias that makes the rule Adam (β = .9, .99)
    with a relative step of 10 %.

    Args:
        hidden: LSTM units.
        per: "tensor", one LSTM state for each tensor: it sees RMS and cosines of the m̂_k/r,
            that is how noisy and how curved the way is, the gradient's decline, the tensor's
            size, shape and growth, and the time. "coordinate": one for each coordinate, which
            sees its own m̂_k/r besides.

    State: 16 bytes per parameter; with per="coordinate" 8 more for each hidden unit.
    """

    name = "geodesic_rnn"

    def __init__(self, hidden: int = 32, per: str = "tensor") -> None:
        super().__init__()
        if per not in ("tensor", "coordinate"):
            raise ConfigError(f"per is {per!r}; use 'tensor' or 'coordinate'")
        self.hidden_per, self.gains_per_tensor = per, per == "tensor"
        self._config = {"hidden": hidden, "per": per}
        inputs = TENSOR_INPUTS + (DIRECTIONS + 1 if per == "coordinate" else 0)
        self.cell = LSTMCell(inputs, hidden)
        self.head = nn.Linear(hidden, FEATURES + 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.bias[1 + BETAS.index(0.9)] = 1.0

    @property
    def config(self) -> dict:
        return self._config

    def init_state(self, params: Tensor, shapes: tuple[tuple[int, ...], ...]) -> State:
        layout, lead, d = Layout(tuple(shapes)), params.shape[:-1], params.shape[-1]
        coordinate = {
            "momentum": params.new_zeros(*lead, len(BETAS), d),
            "second_moment": params.new_zeros(*lead, 1, d),
        }
        tensor = {
            "initial_rms": params.new_zeros(*lead, 1, len(shapes)),
            "peak_gradient": params.new_zeros(*lead, 1, len(shapes)),
        }
        where, units = (coordinate, d) if self.hidden_per == "coordinate" else (tensor, len(shapes))
        where["hidden"] = params.new_zeros(*lead, 2 * self.cell.hidden, units)
        return State(layout, 0, coordinate, tensor)

    def observe(self, grads: Tensor, params: Tensor, state: State,
                in_place: bool = False) -> tuple[Observation, State]:  # fmt: skip
        lead, tensors = grads.shape[:-1], len(state.layout.shapes)
        momentum, second = state.coordinate["momentum"], state.coordinate["second_moment"]
        if not in_place:
            momentum, second = momentum.clone(), second.clone()
        step = state.step + 1
        # (1 − β) / (1 − βᵗ): the weight with which an average is its own bias-corrected one
        weights = [(1 - b) / (1 - b**step) for b in (*BETAS, BETA_V)]
        rows = grads.new_empty(*lead, DIRECTIONS + 1, grads.shape[-1])  # g, m̂, r
        gram = grads.new_zeros(*lead, tensors, DIRECTIONS, DIRECTIONS)
        squares = grads.new_zeros(*lead, tensors, DIRECTIONS + 2)  # of g, m̂, r and θ
        for lo, hi, spans in state.layout.chunks:
            g, row = grads[..., lo:hi], rows[..., lo:hi]
            row[..., 0, :] = g
            for k, w in enumerate(weights[:-1]):
                torch.lerp(momentum[..., k, lo:hi], g, w, out=momentum[..., k, lo:hi])
            row[..., 1:-1, :] = momentum[..., lo:hi]
            v = second[..., 0, lo:hi]
            v.lerp_(g * g, weights[-1])
            torch.sqrt(v, out=row[..., -1, :]).add_(EPS)
            normal = row[..., :-1, :] / row[..., -1:, :]
            for i, a, b in spans:
                n, p = normal[..., a - lo : b - lo], params[..., a:b]
                gram[..., i, :, :] += n @ n.mT
                squares[..., i, :-1] += row[..., a - lo : b - lo].square().sum(-1)
                squares[..., i, -1] += torch.linalg.vecdot(p, p)
        sizes = torch.tensor(state.layout.sizes, dtype=grads.dtype, device=grads.device)
        tensor, kept = self._tensor_features(
            gram / sizes[:, None, None], (squares / sizes[:, None]).sqrt(), state, step
        )
        coordinate = state.coordinate | {"momentum": momentum, "second_moment": second}
        return (
            Observation(rows, tensor, state.layout),
            State(state.layout, step, coordinate, state.tensor | kept),
        )

    @staticmethod
    def _tensor_features(
        gram: Tensor, rms: Tensor, state: State, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Network inputs and EXTRA, (*tasks, Q, tensors), from the second moments
        (*tasks, tensors, 4, 4) of m̂_k/r and the RMS (*tasks, tensors, 6) of m̂_k, r and θ."""
        r_bar, rms_p = rms[..., -2] + EPS, rms[..., -1]
        start = state.tensor["initial_rms"].squeeze(-2) if state.step else rms_p
        peak = torch.maximum(state.tensor["peak_gradient"].squeeze(-2), r_bar)
        direction = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()  # RMS of m̂_k/r
        raw = rms[..., :DIRECTIONS] / r_bar.unsqueeze(-1)  # RMS of m̂_k/r̄
        safe = direction + 1e-6
        cosine = gram / (safe.unsqueeze(-1) * safe.unsqueeze(-2))
        matrix = torch.tensor([float(len(s) > 1) for s in state.layout.shapes]).to(rms)
        fan_in = torch.tensor(
            [s[1:].numel() if len(s) > 1 else 1 for s in map(torch.Size, state.layout.shapes)]
        ).to(rms)
        floor = torch.where(matrix > 0, (3 * fan_in).rsqrt(), BIAS_RMS).clamp(max=BIAS_RMS)
        size = torch.maximum(rms_p, floor)
        clock = torch.full_like(rms_p, min(step, LONGEST)).log()
        inputs = [
            *safe.log().clamp(min=-5).unbind(-1),
            *(cosine[..., i, j] for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))),
            (r_bar / peak).log() / 3,
            (size / torch.maximum(start, floor)).log(),
            size.log() / 3 + 1,
            clock / 5 - 1,
            (clock / 2 - 1).tanh(),
            (clock - 5).tanh(),
            matrix.expand_as(rms_p),
            (fan_in.log() / 3).clamp(max=2.0).expand_as(rms_p),
            (rms_p / size),
            (raw[..., 0] + 1e-6).log() / 2,
        ]
        assert len(inputs) == TENSOR_INPUTS
        between = (direction[..., 2] * raw[..., 2]).sqrt()  # by Cauchy and Schwarz
        bounds = [*direction.unbind(-1), *raw.unbind(-1), between, *direction[..., 2:].unbind(-1)]
        extra = [*bounds, 1 / r_bar, size]
        kept = {"initial_rms": start.unsqueeze(-2), "peak_gradient": peak.unsqueeze(-2)}
        return torch.stack(inputs + extra, dim=-2), kept

    def respond(self, observation: Observation, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if self.hidden_per == "tensor":
            gains, hidden = self.gains(observation.tensor, hidden)
            return self._mix(gains, observation), hidden
        d = observation.coordinate.shape[-1]
        width = d if torch.is_grad_enabled() else CHUNK
        index = observation.layout
        index = index.tensor_of if isinstance(index, Layout) else index
        updates, states = [], []
        for lo in range(0, d, width):
            row = observation.coordinate[..., lo : lo + width]
            tensor = observation.tensor[..., index[lo : lo + width]]
            r = row[..., -1:, :]
            own = torch.cat([row[..., :-1, :] / r, (r * tensor[..., -2:-1, :]).log() / 3], -2)
            inputs = torch.cat([tensor[..., :TENSOR_INPUTS, :], own], -2)
            gains, state = self._gains(inputs, tensor, hidden[..., lo : lo + width])
            updates.append((gains * _features(row)).sum(-2))
            states.append(state)
        return torch.cat(updates, -1), torch.cat(states, -1)

    def gains(self, tensor: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What multiplies the `features` of each tensor, (*tasks, 11, tensors), and the next
        recurrent state; from `Observation.tensor`."""
        return self._gains(tensor[..., :TENSOR_INPUTS, :], tensor, hidden)

    def features(self, observation: Observation) -> Tensor:
        """m̂_k/r and m̂_k, (*tasks, 11, d)."""
        return _features(observation.coordinate)

    def _gains(self, inputs: Tensor, tensor: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(*tasks, 11, units): what multiplies m̂_k/r (first four) and m̂_k (last four)."""
        h, hidden = self.cell(inputs, hidden)
        out = self.head.weight @ h + self.head.bias.unsqueeze(-1)
        mixture, log_step = out[..., :-1, :], out[..., -1:, :].clamp(-5, 5)
        rms, inverse_r, size = tensor[..., -EXTRA:-2, :], tensor[..., -2:-1, :], tensor[..., -1:, :]
        step = STEP * log_step.exp()
        moved = step * (mixture.abs() * rms).sum(-2, keepdim=True)  # at most, in units of size
        scale = -step * size / (1 + moved / MAX_STEP)
        gains = scale * mixture
        n = DIRECTIONS
        return torch.cat([gains[..., :n, :], gains[..., n : 2 * n, :] * inverse_r, gains[..., 2 * n : 2 * n + 1, :] * inverse_r.sqrt(), gains[..., 2 * n + 1 :, :]], -2), hidden

    def _mix(self, gains: Tensor, observation: Observation) -> Tensor:
        """Σ_k gains_k features_k, with gains (*, 11, tensors) of whole tensors."""
        rows = observation.coordinate
        if isinstance(observation.layout, Tensor):
            return (gains[..., observation.layout] * _features(rows)).sum(-2)
        updates = torch.empty_like(rows[..., 0, :])
        weights = gains.mT.unsqueeze(-2)  # (*, tensors, 1, features)
        for lo, hi, spans in observation.layout.chunks:
            features = _features(rows[..., lo:hi])
            for i, a, b in spans:
                mixed = weights[..., i, :, :] @ features[..., a - lo : b - lo]
                updates[..., a:b] = mixed.squeeze(-2)
        return updates


def _features(rows: Tensor) -> Tensor:
    """Rows [m̂_k, r] (*, 5, n) -> [m̂_k/r, m̂_k, m̂/√r, soft-thresholded m̂/r] (*, 11, n)."""
    m, r = rows[..., :-1, :], rows[..., -1:, :]
    normal = m / r
    steady = normal[..., 2:, :]
    size = steady.abs()
    return torch.cat([normal, m, m[..., 2:3, :] * r.rsqrt(), steady * (size / (1 + size))], -2)
