"""The rule of this project: an RNN that mixes normalised gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from learned_opt.errors import ConfigError
from learned_opt.rules.base import (
    Chunk,
    Layout,
    Observation,
    State,
    UpdateRule,
    as_numbers,
    due,
    join,
    register,
)
from learned_opt.rules.basis import ENTRIES, follow, start
from learned_opt.rules.cell import LSTMCell, per_task

BETAS = (0.5, 0.9, 0.99)  # momenta: a few steps, Adam's, and one that averages noise away
BETA_V = 0.99  # second moment
RATES = tuple((beta,) for beta in (*BETAS, BETA_V))
EPS = 1e-12  # below any gradient that matters, so that the rule does not see the loss's scale
CLIP = 1.5  # a tensor's gradient counts at most so many times its usual RMS: outliers make no spike
VANISHED = 1e-3  # r is at least this share of its peak: gradients that vanish are not blown up
VECTOR_SIZE = 0.1  # usual RMS of biases and gains
LARGEST = 4.0  # size that steps are relative to, in units of the usual one
MIN_SIZE = 0.03  # least size of a tensor that the network is told; of wide matrices less
STEP = 0.1  # relative step of the untrained rule, near Adam(0.003-0.01) on default inits
MAX_STEP = 1.0  # no tensor moves by more than this share of its size ρ in one update
LONGEST = 2000.0  # the clock stops here: beyond the longest runs trained on it means nothing
WIDEST = 3072.0  # inputs: as LONGEST, for what the network is told of a matrix's width
DIRECTIONS = 1 + len(BETAS)
# What the network is told in logarithms x, as max(x, least) / unit + shift: rows of m̂_k/r, the
# gradient's decline, growth, size, and how noisy the gradient is.
LOGS = ((-5.0, 1.0, 0.0),) * DIRECTIONS + (
    (-7.0, 3.0, 0.0), (-math.inf, 1.0, 0.0), (-math.inf, 3.0, 1.0), (-math.inf, 2.0, 0.0)
)  # fmt: skip
TENSOR_ENTRIES = ("initial_rms", "peak_gradient", "gradient_rms")  # of State.tensor
TENSOR_INPUTS = 20  # rows of Observation.tensor that the network sees; the mixing needs the rest:
MIXING = DIRECTIONS + 2  # RMS of each m̂_k/r, 1/r̄, size with its decay


@register
class GeodesicRNN(UpdateRule):
    """u = −a ρ Σ_k c_k m̂_k/r: no gradient, no update.

    m̂_k: the gradient, clipped to 1.5 times its tensor's usual RMS, and its bias-corrected averages
    at β = .5, .9, .99; r = √v̂ at β = .99, at least a thousandth of the peak of r̄, its RMS over the
    tensor. ρ is the tensor's size: RMS(θ), but from once to four times the usual one, for matrices
    the RMS 1/√(3 fan_in) of torch's default init and for vectors 0.1: steps relative to the RMS of
    embeddings, which start at N(0, 1), and of gains, which start at 1, would be too long. An LSTM
    emits c and o, a = 0.1 e^o, softly limited to move no tensor by more than ρ in the step that it
    is made in; its output layer starts at zero, with a bias that makes the rule Adam (β = .9, .99)
    with a relative step of 10 %.
    From step t = decay_after on, a is multiplied by decay_after / t: Σ a diverges and Σ a² does not
    (Robbins & Monro 1951), so that a run comes to rest. Steps relative to a tensor that gradient
    noise makes grow would not.

    With a `basis`, all this is done in the eigenbases of the gradients of matrices (basis.py): the
    untrained rule is SOAP (Vyas et al. 2024) with relative steps.

    Args:
        hidden: LSTM units.
        per: "tensor", one LSTM state for each tensor: it sees RMS and cosines of the m̂_k/r,
            that is how noisy and how curved the way is, the gradient's decline, the tensor's
            size, shape and growth, and the time; u is then odd in the gradients. "coordinate":
            one for each coordinate, which sees its own m̂_k/r besides.
        decay_after: steps; about a third of the longest runs that the rule is trained on.
        basis: most rows, or columns, for which a matrix is turned on that side; 0: none is. Only
            with per="tensor".
        every: steps from one look of the network at a tensor to the next, at first fewer (`due`);
            what it says, and what it is told of the past, holds in between. Above 1 only with
            per="tensor".

    State: 20 bytes per parameter; with per="coordinate" 8 more for each hidden unit; with a basis
    8 for each number of the squares of the sides that are turned.
    """

    name = "geodesic_rnn"
    kernels = ("_tensor_features", "_gains")
    entries = ("averages", *TENSOR_ENTRIES, "hidden", *ENTRIES)

    def __init__(
        self,
        hidden: int = 32,
        per: str = "tensor",
        decay_after: int = 1000,
        basis: int = 0,
        every: int = 1,
    ) -> None:
        super().__init__()
        if per not in ("tensor", "coordinate") or min(hidden, decay_after, every) < 1:
            raise ConfigError(
                f"per is {per!r}, hidden {hidden}, decay_after {decay_after} and every {every}; "
                "use 'tensor' or 'coordinate', and at least 1"
            )
        if basis < 0 or (per == "coordinate" and (basis or every > 1)):
            raise ConfigError(
                f"basis is {basis} and every {every}; use at least 0 and 1, and these for "
                "per='coordinate'"
            )
        self.hidden_per = per
        self.gains_per_tensor = self.weights_per_task = per == "tensor"
        self.decay_after = decay_after
        self._config = {"hidden": hidden, "per": per, "decay_after": decay_after}
        self.basis, self.every = basis, every
        if basis:
            self._config["basis"] = basis
        if every > 1:
            self._config["every"] = every
        inputs = TENSOR_INPUTS + (DIRECTIONS + 1 if per == "coordinate" else 0)
        self.cell = LSTMCell(inputs, hidden)
        self.head = nn.Linear(hidden, DIRECTIONS + 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.bias[1 + BETAS.index(0.9)] = 1.0

    @property
    def config(self) -> dict:
        return self._config

    def init_state(self, params: Tensor, shapes: tuple[tuple[int, ...], ...]) -> State:
        layout, lead, d = Layout(tuple(shapes)), params.shape[:-1], params.shape[-1]
        # the last gradient, its averages and r: one block, so that observing copies nothing
        coordinate = {"averages": params.new_zeros(*lead, DIRECTIONS + 1, d)}
        tensor = {name: params.new_zeros(*lead, 1, len(shapes)) for name in TENSOR_ENTRIES}
        where, units = (coordinate, d) if self.hidden_per == "coordinate" else (tensor, len(shapes))
        kept = DIRECTIONS if self.every > 1 else 0  # what the network said last
        where["hidden"] = params.new_zeros(*lead, 2 * self.cell.hidden + kept, units)
        matrix = start(params, layout, self.basis) if self.basis else ()
        return State(layout, 0, coordinate, tensor, matrix)

    def observe(
        self, grads: Tensor, params: Tensor, state: State, in_place: bool = False
    ) -> tuple[Observation, State]:
        lead, layout, tensors = grads.shape[:-1], state.layout, len(state.layout.shapes)
        rows, counts = state.coordinate["averages"], layout.numbers(math.prod, grads)
        if not in_place:
            rows = rows.clone()
        size = (layout.squared_norms(grads) / counts).sqrt()
        share = self._clip(size, state)
        compiling = torch.compiler.is_compiling()  # asked once: a frame may fall back to Python
        # outliers are clipped before they are all that a basis sees for a hundred steps
        into = None if compiling else rows[..., 0, :]
        grads = torch.mul(grads, layout.expand(share), out=into)
        basis, matrix = None, state.matrix
        if self.basis:
            basis, matrix = follow(grads, rows, state, self.basis, in_place)
        step = _as_tensor(state.step, grads) + 1
        betas = layout.constant(RATES, step)
        # the weight with which an average is its own bias-corrected one
        weights = ((1 - betas) / (1 - betas**step)).to(grads.dtype)
        peak = state.tensor["peak_gradient"].squeeze(-2)
        if self.basis:  # in that of a first gradient only rounding is left of most coordinates
            peak = torch.maximum(peak, size * share)
        floor = (VANISHED * peak).clamp(min=EPS)
        look = self._look(state.step, counts) if self.every > 1 else counts
        moved, sums = [], grads.new_zeros(*lead, tensors, DIRECTIONS**2 + 3)
        for chunk in layout.chunks:
            row = _average(
                chunk.of(rows), chunk.of(grads), *map(chunk.spread, (weights, floor)), compiling
            )
            if compiling:
                moved.append(row.flatten(-2))
            if look is not None:
                _add_moments(sums, chunk, row, chunk.of(params))
        if compiling:
            rows = rows.copy_(join(moved))
        state = State(
            layout, state.step + 1, state.coordinate | {"averages": rows}, state.tensor, matrix
        )
        if look is None:
            return Observation(rows, grads.new_empty(*lead, 0, tensors), layout, basis), state
        moments, means = (layout.reduce(sums) / counts.unsqueeze(-1)).split([DIRECTIONS**2, 3], -1)
        tensor, *kept = self._tensor_features(
            moments.unflatten(-1, (DIRECTIONS, DIRECTIONS)), means.sqrt(), step,
            layout.numbers(_is_matrix, means), layout.numbers(_fan_in, means),
            layout.constant(LOGS, means),
            state.tensor["initial_rms"], state.tensor["peak_gradient"],
        )  # fmt: skip
        kept = dict(zip(TENSOR_ENTRIES, kept, strict=True))
        if self.every > 1:
            look = look.expand(*lead, 1, tensors)
            tensor = torch.cat([tensor, look], -2)
            kept = {k: torch.where(look > 0, x, state.tensor[k]) for k, x in kept.items()}
        return Observation(rows, tensor, layout, basis), replace(state, tensor=state.tensor | kept)

    @torch.compiler.disable  # for Python to say
    def _look(self, step: int | Tensor, like: Tensor) -> Tensor | None:
        """1 for tensors that the network looks at after so many steps and 0 for others, as `like`,
        (tensors,) or (1,); None if there are none."""
        looks = [due(t, self.every) for t in as_numbers(step)]
        return like.new_tensor(looks) if any(looks) else None

    @staticmethod
    def _clip(rms: Tensor, state: State) -> Tensor:
        """What is left of each tensor's gradient, (*tasks, tensors): min(1, CLIP · r̄ / RMS(g)),
        with the r̄ of the step before."""
        usual = state.tensor["gradient_rms"].squeeze(-2)
        left = (CLIP * usual / rms.clamp(min=EPS)).clamp(max=1)
        return torch.where(usual > 2 * EPS, left, 1)  # nothing is usual before a first gradient

    def _tensor_features(
        self, gram: Tensor, rms: Tensor, step: Tensor, matrix: Tensor, fan_in: Tensor,
        scales: Tensor, initial_rms: Tensor, peak_gradient: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Observation.tensor, (*tasks, TENSOR_INPUTS + MIXING, tensors), from the second moments
        (*tasks, tensors, 4, 4) of m̂_k/r, the RMS (*tasks, tensors, 3) of g, r and θ, and whether
        tensors are matrices and how wide, (tensors,), and LOGS; the next initial_rms, peak_gradient
        and gradient_rms."""
        rms_g, r_bar, rms_p = rms[..., 0], rms[..., 1] + EPS, rms[..., 2]
        start = torch.where(step == 1, rms_p, initial_rms.squeeze(-2))
        peak = torch.maximum(peak_gradient.squeeze(-2), r_bar)
        adam = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()  # RMS of m̂_k/r
        safe = adam + 1e-6
        cosine = gram / (safe.unsqueeze(-1) * safe.unsqueeze(-2))
        usual = torch.where(matrix > 0, (3 * fan_in).rsqrt(), VECTOR_SIZE)
        floor = usual.clamp(max=MIN_SIZE)
        size = torch.maximum(rms_p, floor)
        # matrices that start far below the usual size, as tables of positions, do well to reach it
        full = torch.where(matrix > 0, usual, floor)
        grown = torch.maximum(rms_p, full) / torch.maximum(start, full)
        ratios = [r_bar / peak, grown, size, rms_g / r_bar + 1e-6]
        logs = torch.cat([safe, torch.stack(ratios, -1)], -1).log()
        least, unit, shift = scales.unbind(-1)
        logs = logs.maximum(least) / unit + shift
        clock = step.clamp(max=LONGEST).to(rms.dtype).log()
        told = [clock / 5 - 1, (clock / 2 - 1).tanh(), (clock - 5).tanh(),
                matrix, fan_in.clamp(max=WIDEST).log() / 3]  # fmt: skip
        told = torch.stack(torch.broadcast_tensors(*told), -1).expand(*size.shape, -1)
        rest = (self.decay_after / step).clamp(max=1).to(rms.dtype)
        inputs = [
            logs[..., :DIRECTIONS], *(cosine[..., i, i + 1 :] for i in range(DIRECTIONS - 1)),
            logs[..., DIRECTIONS:-1], told,
            (rms_p / size).unsqueeze(-1), logs[..., -1:],
        ]  # fmt: skip
        rho = rms_p.clamp(usual, LARGEST * usual) * rest
        mixing = [adam, torch.stack([1 / r_bar, rho], -1)]
        kept = (x.unsqueeze(-2) for x in (start, peak, r_bar))
        return torch.cat(inputs + mixing, dim=-1).mT, *kept

    def respond(
        self, observation: Observation, hidden: Tensor, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.hidden_per == "tensor":
            gains, hidden = self.gains(observation.tensor, hidden)
            return self.mix(gains, observation), hidden
        row, tensor, layout = observation.coordinate, observation.tensor, observation.layout
        if in_place:  # tensors side by side, (*, tensors, features, units)
            n = tensor.shape[-1]
            row, state = (x.unflatten(-1, (n, -1)).movedim(-2, -3) for x in (row, hidden))
            tensor = tensor.mT.unsqueeze(-1)
        else:
            index = layout.tensor_of.to(tensor.device) if isinstance(layout, Layout) else layout
            tensor, state = tensor[..., index], hidden
        own = self._own(row, tensor)
        h, state = self.cell(own, state, tensor[..., :TENSOR_INPUTS, :], in_place)
        update = self._coordinate_update(self._head(h), row, tensor)
        return (update.flatten(-2), hidden) if in_place else (update, state)

    def gains(self, tensor: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What multiplies the `features` of each tensor, (*tasks, 4, tensors), and the next
        recurrent state; from `Observation.tensor`."""
        if self.every > 1:
            return self._gains_or_last(tensor, hidden)
        return self._gains(tensor, hidden)

    def _gains_or_last(self, tensor: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`gains`, of tensors that the network does not look at those of its last look."""
        last, gains = hidden.split([2 * self.cell.hidden, DIRECTIONS], -2)
        if not tensor.shape[-2]:
            return gains, hidden
        new, state = self._gains(tensor[..., :-1, :], last)
        hidden = torch.where(tensor[..., -1:, :] > 0, torch.cat([state, new], -2), hidden)
        return hidden[..., -DIRECTIONS:, :], hidden

    def _gains(self, tensor: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        h, hidden = self.cell(tensor[..., :TENSOR_INPUTS, :], hidden)
        mixture, scale = _mixture(self._head(h), tensor)
        return scale * mixture, hidden

    def features(self, observation: Observation) -> Tensor:
        """m̂_k/r, (*tasks, 4, d)."""
        return _normal(observation.coordinate)

    def mix(self, gains: Tensor, observation: Observation) -> Tensor:
        """Σ_k gains_k features_k, (*tasks, d), in the coordinates of θ; gains (*tasks, 4,
        tensors)."""
        update = self._mix(gains, observation)
        return update if observation.basis is None else observation.basis.turn_back(update)

    def _head(self, h: Tensor) -> Tensor:
        return per_task(self.head.weight, h) @ h + self.head.bias.unsqueeze(-1)

    @staticmethod
    def _own(row: Tensor, tensor: Tensor) -> Tensor:
        """m̂_k/r and log(r/r̄)/3, (*, 5, units): what a coordinate sees of itself."""
        noise = (row[..., -1:, :] * tensor[..., -2:-1, :]).log() / 3
        return torch.cat([_normal(row), noise], -2)

    @staticmethod
    def _coordinate_update(out: Tensor, row: Tensor, tensor: Tensor) -> Tensor:
        """(*, units), from what the head says of each coordinate, (*, 5, units)."""
        mixture, scale = _mixture(out, tensor)
        mixed = (mixture * row[..., :-1, :]).sum(-2, keepdim=True)
        return (scale * mixed / row[..., -1:, :]).squeeze(-2)

    def _mix(self, gains: Tensor, observation: Observation) -> Tensor:
        """Σ_k gains_k features_k, with gains (*, 4, tensors) of whole tensors."""
        rows = observation.coordinate
        if isinstance(observation.layout, Tensor):
            return (gains[..., observation.layout] * _normal(rows)).sum(-2)
        updates = []
        for chunk in observation.layout.chunks:
            (first, *others, r), weights = chunk.of(rows).unbind(-3), chunk.spread(gains).unbind(-3)
            update = first * weights[0]  # term by term, which is the same however chunks are made
            for row, weight in zip(others, weights[1:], strict=True):
                update.addcmul_(row, weight)
            updates.append(update.div_(r).flatten(-2))
        return join(updates) if updates else rows[..., 0, :]


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1


def _fan_in(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])


def _mixture(out: Tensor, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """c, (*, 4, units), and −a ρ, (*, 1, units), from what the head says, (*, 5, units)."""
    mixture, log_step = out[..., :-1, :], out[..., -1:, :].clamp(-5, 5)
    rms, size = tensor[..., -MIXING:-2, :], tensor[..., -1:, :]
    step = STEP * log_step.exp()
    moved = step * (mixture.abs() * rms).sum(-2, keepdim=True)  # at most, in units of size
    return mixture, -step * size / (1 + moved / MAX_STEP)


def _as_tensor(step: int | Tensor, x: Tensor) -> Tensor:
    """A count, (tensors,) or (1,), fit for powers near 1."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64  # Apple's has no float64
    return step.to(dtype) if isinstance(step, Tensor) else x.new_full((1,), step, dtype=dtype)


def _average(row: Tensor, g: Tensor, weights: Tensor, floor: Tensor, compiling: bool) -> Tensor:
    """Rows [g, m̂, r] (*, 5, n, size) one step on, from g (*, n, size): in place, with g there
    already, unless `compiling`."""
    g, m, r = g.unsqueeze(-3), row[..., 1:-1, :, :], row[..., -1:, :, :]
    if compiling:  # one loop is made of it all, but not of writes to views
        m = m.lerp(g, weights[:-1])
        r = r.square().lerp(g * g, weights[-1:]).sqrt().maximum(floor.unsqueeze(-3))
        return torch.cat([g, m, r], -3)
    m.lerp_(g, weights[:-1])
    r.square_().lerp_(g * g, weights[-1:]).sqrt_().clamp_(min=floor.unsqueeze(-3))
    return row


def _add_moments(sums: Tensor, chunk: Chunk, row: Tensor, params: Tensor) -> None:
    """To sums (*, tensors, 16 + 3) what rows [g, m̂, r] (*, 5, n, size) and params (*, n, size) have
    of ⟨m̂_j/r, m̂_k/r⟩ and of the squares of g, r and θ."""
    gram, squares = sums.split([DIRECTIONS**2, 3], -1)
    gram, squares = gram.unflatten(-1, (DIRECTIONS, DIRECTIONS)), squares.mT
    normal = row[..., :-1, :, :] / row[..., -1:, :, :]
    for (own, directions), (_, new), (_, theta) in zip(
        *map(chunk.parts, (normal, row, params)), strict=True
    ):
        gram[..., own, :, :].add_(_gram(directions))
        ends = new[..., ::DIRECTIONS, :, :]  # g and r
        squares[..., :-1, own].add_(torch.linalg.vecdot(ends, ends))
        squares[..., -1, own].add_(torch.linalg.vecdot(theta, theta))


def _gram(normal: Tensor) -> Tensor:
    """⟨m̂_j/r, m̂_k/r⟩, (*, n, 4, 4), of m̂_k/r (*, 4, n, size)."""
    normal = normal.movedim(-2, -3)
    if not torch.compiler.is_compiling():
        return normal @ normal.mT
    rows = normal.unbind(-2)
    products = {
        (i, j): (rows[i] * rows[j]).sum(-1) for j in range(DIRECTIONS) for i in range(j + 1)
    }
    lines = [[products[min(i, j), max(i, j)] for j in range(DIRECTIONS)] for i in range(DIRECTIONS)]
    return torch.stack([torch.stack(line, -1) for line in lines], -2)


def _normal(rows: Tensor) -> Tensor:
    """Rows [m̂_k, r] (*, 5, n) -> m̂_k/r (*, 4, n)."""
    return rows[..., :-1, :] / rows[..., -1:, :]
