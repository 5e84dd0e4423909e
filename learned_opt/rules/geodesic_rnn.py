"""The rule of this project: an RNN that mixes normalized gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from learned_opt.errors import ConfigError
from learned_opt.rules.base import Observation, TensorGains, register
from learned_opt.rules.basis import ENTRIES, SELDOM, follow, start
from learned_opt.rules.cell import LSTMCell, per_task
from learned_opt.rules.fall import known_share, rest
from learned_opt.rules.layout import Chunk, Layout, State, collect, in_place_pays, join
from learned_opt.rules.moments import (
    BETAS,
    CLIP,
    DIRECTIONS,
    EPS,
    RATES,
    RECENT,
    add_moments,
    average,
    clip,
    normal,
    rescale,
)
from learned_opt.rules.steps import as_numbers, as_tensor, common, due, not_compiled
from learned_opt.rules.trained import TRAINED

VANISHED = 1e-3  # r is at least this share of its peak: vanishing gradients are not amplified
VECTOR_SIZE = 0.1  # the usual RMS of biases and gains
LARGEST = 4.0  # the largest size that steps are relative to, in units of the usual size
MIN_SIZE = 0.03  # the least size of a tensor among the network's inputs; less for wide matrices
# With `beginnings`:
VECTOR_STEP = 0.03  # ρ of vectors, in place of one to four times VECTOR_SIZE
LEAST = 0.1  # ρ of a matrix that does not start at zero is at least this share of its usual size
STEP = 0.1  # the relative step of the untrained rule, near Adam(0.003-0.01) on default inits
ADAM = 1 + BETAS.index(0.9)  # the direction of the untrained rule
MAX_STEP = 1.0  # no tensor moves by more than this share of its size ρ in one update
LONGEST = 2000.0  # the step number among the inputs stops here, beyond the longest training runs
WIDEST = 3072.0  # the fan-in among the inputs stops here, for the same reason
# Inputs that are logarithms x enter as max(x, least) / unit + shift. They are the RMS of each
# m̂_k/r, the gradient's decline, growth, size, and the noise of the gradient.
LOGS = ((-5.0, 1.0, 0.0),) * DIRECTIONS + (
    (-7.0, 3.0, 0.0), (-math.inf, 1.0, 0.0), (-math.inf, 3.0, 1.0), (-math.inf, 2.0, 0.0)
)  # fmt: skip
TENSOR_ENTRIES = ("initial_rms", "peak_gradient", "gradient_rms")  # of State.tensor
TENSOR_INPUTS = 20  # rows of Observation.tensor that are inputs of the network; the others are:
MIXING = DIRECTIONS + 1  # RMS of each m̂_k/r, size with its decay


@register
class GeodesicRNN(TensorGains):
    """u = −a ρ Σ_k c_k m̂_k/r, where an LSTM emits the gains c_k and the relative step a.

    - m̂_k are the gradient, clipped to 1.5 times its tensor's usual RMS, and its bias-corrected
      averages at β = .5, .9, .99. Without a gradient there is no update.
    - r = √v̂ at β = .99. It is at least a thousandth of the peak of r̄, which is the RMS of r over
      the tensor.
    - ρ is the size of the tensor: RMS(θ), limited to one to four times the usual size, but see
      `beginnings`. The usual size of a matrix is the RMS 1/√(3 fan_in) of torch's default init, and
      that of a vector 0.1.
      Steps relative to the RMS of embeddings, which start at N(0, 1), or of gains, which start at
      1, would be too long.
    - a = 0.1 e^o, with o from the LSTM. A soft limit keeps each tensor from moving by more than ρ
      in one step. From step t = decay_after on, a is multiplied by decay_after / t. Then Σ a
      diverges and Σ a² converges (Robbins & Monro 1951), so that a run converges even if gradient
      noise makes a tensor, and with it ρ, grow. If the number of steps N of the run is known, a is
      multiplied by min(1, decay_after / t)^(1−k) (1 − s / N)^k instead, with s the steps of the run
      before this one and k = 1 − min(1, 300 / N): short runs are as before, and steps of long ones
      fall to zero.

    The LSTM's output layer starts at zero, with a bias that makes the untrained rule Adam (β = .9,
    .99) with a relative step of 10 %. With a `basis`, all of this is done in the eigenbases of the
    gradients of matrices (basis.py), and the untrained rule is SOAP (Vyas et al. 2024) with
    relative steps.

    If the number of steps is known and `horizon` is set, the share k of the gains and of o is that
    of the untrained rule: the LSTM knows runs of some hundred steps, and in runs of thousands the
    untrained rule ends lower.

    The state takes 20 bytes for each parameter. A basis takes 8 n² for each side of n rows or
    columns that has one.

    Args:
        hidden: the number of LSTM units.
        per: "tensor": the LSTM runs once for each tensor. Its inputs are RMS and cosines of the
            m̂_k/r, which are proxies for gradient noise and curvature; the gradient's decline; the
            tensor's size, shape and growth; and the step number. The update is then odd in the
            gradients.
        decay_after: the step after which the step size decays; use about a third of the longest
            runs that the rule is trained on.
        basis: the most rows or columns for which a side of a matrix has an eigenbasis; 0 for none.
        renew: the steps between two bases, and at first fewer, see `due`. With fewer than 1,024,
            matrices with a side above 4,096, such as embeddings, have no basis.
        horizon: whether the LSTM has the less say the longer a run of known length is, as above.
        beginnings: whether nets that begin in unusual ways are treated with care. Then vectors have
            ρ = 0.03; ρ of a matrix that does not start at zero may be a tenth of the usual size; in
            runs of a known length N, a has the further factor min(1, 20 t / N)^k; of a tensor that
            joins the run d steps late, as a layer that is unfrozen, a rises over the first
            min(d, 50) steps; and averages follow at once if gradients fall to less than a thirtieth
            within 8 steps, as after a first gradient that was far too large.
        decay: the relative weight decay of matrices that the rule was made for, which a
            LearnedOptimizer has by default.
        clip_squares: v̂ is the average of the squares of gradients that are clipped to so many times
            their usual RMS. With 10 in place of 1.5, r̄ grows by up to two fifths in a step, so that
            steps soon become shorter if gradients explode, as in recurrent nets with a large gain.
        trained_starts: whether nets that were trained before, see trained.py, are treated with
            care. Then k = 1, whatever the length of the run; and if that is not known, a is
            multiplied by min(1, t / 20) / (1 + t / 100).
        every: the network runs for a tensor in every so many steps, and at first more often, see
            `due`. In between, its output and its inputs about the past are kept.
    """

    name = "geodesic_rnn"
    hidden_per, weights_per_task = "tensor", True
    directions = ("gradient", *(f"average {beta}" for beta in BETAS))
    entries = ("averages", *TENSOR_ENTRIES, RECENT, TRAINED, "hidden", *ENTRIES)
    falls = spends = True
    # Of rules that were pickled before there were these.
    renew, horizon, beginnings = SELDOM, False, False
    clip_squares, trained_starts = CLIP, False

    def __init__(
        self,
        hidden: int = 32,
        per: str = "tensor",
        decay_after: int = 1000,
        basis: int = 0,
        every: int = 1,
        renew: int = SELDOM,
        horizon: bool = False,
        decay: float = 0.0,
        beginnings: bool = False,
        clip_squares: float = CLIP,
        trained_starts: bool = False,
    ) -> None:
        super().__init__()
        if per != "tensor":
            raise ConfigError(
                f"per is {per!r}; use 'tensor' (version 0.1.0 was the last with per='coordinate')"
            )
        if min(hidden, decay_after, every) < 1 or basis < 0:
            raise ConfigError(
                f"hidden is {hidden}, decay_after {decay_after}, every {every} and basis {basis}; "
                "use at least 1, and for basis at least 0"
            )
        if renew < 1 or not 0 <= decay < math.inf:
            raise ConfigError(
                f"renew is {renew} and decay is {decay}; use at least 1 for renew, and a finite "
                "number of at least 0 for decay"
            )
        self.decay_after = decay_after
        self.basis, self.every, self.renew = basis, every, renew
        if not CLIP <= clip_squares < math.inf:
            raise ConfigError(
                f"clip_squares is {clip_squares}; use a finite number of at least {CLIP}"
            )
        if trained_starts and not horizon:
            raise ConfigError("trained_starts is True, but horizon is False; set both")
        self.horizon, self.decay, self.beginnings = horizon, decay, beginnings
        self.clip_squares, self.trained_starts = clip_squares, trained_starts
        # Of what was added later, config has only what is not as it was, so that the checksums of
        # older weights stay the same.
        later = {
            "basis": (basis, 0), "every": (every, 1), "renew": (renew, SELDOM),
            "horizon": (horizon, False), "decay": (decay, 0.0),
            "beginnings": (beginnings, False),
            "clip_squares": (clip_squares, CLIP), "trained_starts": (trained_starts, False),
        }  # fmt: skip
        self._config = {"hidden": hidden, "per": per, "decay_after": decay_after} | {
            name: value for name, (value, usual) in later.items() if value != usual
        }
        self.cell = LSTMCell(TENSOR_INPUTS, hidden)
        self.head = nn.Linear(hidden, DIRECTIONS + 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.bias[ADAM] = 1.0

    @property
    def config(self) -> dict:
        return self._config

    def init_state(self, params: Tensor, shapes: tuple[tuple[int, ...], ...]) -> State:
        layout, lead, d = Layout(tuple(shapes)), params.shape[:-1], params.shape[-1]
        # The gradient, its averages and r are one tensor, so that `observe` copies nothing. The
        # gradient's row serves for the update afterwards.
        coordinate = {"averages": params.new_zeros(*lead, DIRECTIONS + 1, d)}
        tensor = {name: params.new_zeros(*lead, 1, len(shapes)) for name in TENSOR_ENTRIES}
        if self.beginnings:
            tensor[RECENT] = params.new_zeros(*lead, 2, len(shapes))
        if self.trained_starts:
            tensor[TRAINED] = params.new_zeros(*lead, 1, len(shapes))
        kept = DIRECTIONS if self.every > 1 else 0  # the last gains
        hidden = 2 * self.cell.hidden + kept
        tensor["hidden"] = params.new_zeros(*lead, hidden, len(shapes))
        matrix = start(params, layout, self.basis, self.renew) if self.basis else ()
        return State(layout, 0, coordinate, tensor, matrix)

    def observe(
        self, grads: Tensor, params: Tensor, state: State, in_place: bool = False
    ) -> tuple[Observation, State]:
        lead, layout = grads.shape[:-1], state.layout
        rows, counts = state.coordinate["averages"], layout.numbers(math.prod, grads)
        if not in_place:
            rows = rows.clone()
        size = (layout.squared_norms(grads) / counts).sqrt()
        if self.beginnings:
            state = rescale(rows, size, state)
        share = clip(size, state)
        louder = None
        if self.clip_squares != CLIP:
            louder = clip(size, state, self.clip_squares) / share
        compiling = torch.compiler.is_compiling()  # read once: a frame may fall back to Python
        # Clip first: a basis built from few gradients may stay in use for many steps.
        if compiling:
            grads = grads * layout.expand(share)
        else:
            grads = layout.scale(grads, share, rows[..., 0, :])
        basis, matrix = None, state.matrix
        if self.basis:
            basis, matrix = follow(grads, rows, state, self.basis, self.renew, in_place)
        step = common(as_tensor(state.step, grads)) + 1
        betas = layout.constant(RATES, step)
        # With this weight in the update of an average, the average needs no bias correction.
        weights = ((1 - betas) / (1 - betas**step)).to(grads.dtype)
        peak = state.tensor["peak_gradient"].squeeze(-2)
        if self.basis:  # in the basis of a first gradient, most coordinates are rounding errors
            peak = torch.maximum(peak, size * share)
        floor = (VANISHED * peak).clamp(min=EPS)
        look = self._look(state.step, counts) if self.every > 1 else counts
        factors = (weights, floor) if louder is None else (weights, floor, louder)
        rows, sums = self._average(
            rows, grads, params, layout, factors, look is not None, compiling
        )
        fallen = rest(state, step, self.decay_after, self.beginnings).to(grads.dtype)
        state = state.advanced(coordinate=state.coordinate | {"averages": rows}, matrix=matrix)
        if look is None:
            tensor = grads.new_empty(*lead, 0, len(layout.shapes))
        else:
            tensor, kept = self._seen(layout.reduce(sums), counts, state, step, fallen, look)
            state = replace(state, tensor=state.tensor | kept)
        return Observation(rows, tensor, layout, basis, in_place), state

    def _average(
        self, rows: Tensor, grads: Tensor, params: Tensor, layout: Layout,
        factors: tuple[Tensor, ...], look: bool, compiling: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Returns the averages after this gradient and, if `look`, the sums of `add_moments`.

        Args:
            rows: [g, m̂, r] before, (*tasks, 5, d), which are overwritten.
            grads: the gradients, (*tasks, d).
            params: θ, (*tasks, d).
            layout: the layout of the coordinates.
            factors: the weights of the averages, the floor of r and, if it has one, the factor of
                the gradient of which r takes the average.
            look: whether the network runs in this step.
            compiling: whether `observe` is being compiled.
        """
        moved, sums = [], grads.new_zeros(*grads.shape[:-1], len(layout.shapes), DIRECTIONS**2 + 3)
        for chunk in layout.chunks:
            weights, floor, *louder = map(chunk.spread, factors)
            row = average(
                chunk.of(rows), chunk.of(grads), weights, floor,
                louder[0] if louder else None, compiling,
            )  # fmt: skip
            if compiling:
                moved.append(row.flatten(-2))
            if look:
                add_moments(sums, chunk, row, chunk.of(params))
        return rows.copy_(join(moved)) if compiling else rows, sums

    def _seen(
        self, sums: Tensor, counts: Tensor, state: State, step: Tensor, fallen: Tensor,
        look: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Returns Observation.tensor and the next entries of State.tensor.

        Args:
            sums: those of `add_moments`, over all parts.
            counts: the numbers of coordinates, (tensors,).
            state: the state before, but for its averages.
            step: the number of this update, (tensors,) or (1,).
            fallen: the factor by which ρ has fallen, see `rest`.
            look: 1 for tensors for which the network runs, (tensors,) or (1,).
        """
        moments, means = (sums / counts.unsqueeze(-1)).split([DIRECTIONS**2, 3], -1)
        layout = state.layout
        tensor, *found = self._tensor_features(
            moments.unflatten(-1, (DIRECTIONS, DIRECTIONS)), means.sqrt(), step, fallen,
            layout.numbers(_is_matrix, means), layout.numbers(_fan_in, means),
            layout.constant(LOGS, means),
            state.tensor["initial_rms"], state.tensor["peak_gradient"],
            known_share(state, means),
        )  # fmt: skip
        kept = dict(zip(TENSOR_ENTRIES, found, strict=True))
        if self.every > 1:
            look = look.expand(*tensor.shape[:-2], 1, tensor.shape[-1])
            tensor = torch.cat([tensor, look], -2)
            kept = {k: torch.where(look > 0, x, state.tensor[k]) for k, x in kept.items()}
        return tensor, kept

    @not_compiled  # the result decides what runs, so it must be known in Python
    def _look(self, step: int | Tensor, like: Tensor) -> Tensor | None:
        """Returns 1 for tensors for which the network runs after `step` steps, and 0 for others.

        The result is (tensors,) or (1,), with the dtype and device of `like`, or None if the
        network runs for no tensor.
        """
        looks = [due(t, self.every) for t in as_numbers(step)]
        return like.new_tensor(looks) if any(looks) else None

    def _tensor_features(
        self, gram: Tensor, rms: Tensor, step: Tensor, rest: Tensor, matrix: Tensor, fan_in: Tensor,
        scales: Tensor, initial_rms: Tensor, peak_gradient: Tensor, known: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Returns Observation.tensor and the next initial_rms, peak_gradient and gradient_rms.

        Args:
            gram: the second moments of m̂_k/r, (*tasks, tensors, 4, 4).
            rms: the RMS of g, r and θ, (*tasks, tensors, 3).
            step: the number of this update, (tensors,) or (1,).
            rest: the factor by which ρ has fallen, (tensors,) or (1,).
            matrix: 1 for matrices and 0 for vectors, (tensors,).
            fan_in: the fan-in of each tensor, (tensors,).
            scales: LOGS as a tensor.
            initial_rms: the RMS of θ before the first update, (*tasks, 1, tensors).
            peak_gradient: the largest r̄ so far, (*tasks, 1, tensors).
            known: the share of the untrained rule, see `known_share`, (*tasks, tensors) or (1,).

        Returns:
            (*tasks, TENSOR_INPUTS + MIXING, tensors), with `known` between the two for rules with a
            horizon, and three tensors (*tasks, 1, tensors).
        """
        rms_g, r_bar, rms_p = rms[..., 0], rms[..., 1] + EPS, rms[..., 2]
        start = torch.where(step == 1, rms_p, initial_rms.squeeze(-2))
        peak = torch.maximum(peak_gradient.squeeze(-2), r_bar)
        adam = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()  # RMS of m̂_k/r
        safe = adam + 1e-6
        cosine = gram / (safe.unsqueeze(-1) * safe.unsqueeze(-2))
        usual = torch.where(matrix > 0, (3 * fan_in).rsqrt(), VECTOR_SIZE)
        floor = usual.clamp(max=MIN_SIZE)
        size = torch.maximum(rms_p, floor)
        # Growth up to the usual size does not count: matrices that start far below it, such as
        # position embeddings, should reach it.
        full = torch.where(matrix > 0, usual, floor)
        grown = torch.maximum(rms_p, full) / torch.maximum(start, full)
        ratios = [r_bar / peak, grown, size, rms_g / r_bar + 1e-6]
        logs = torch.cat([safe, torch.stack(ratios, -1)], -1).log()
        least, unit, shift = scales.unbind(-1)
        logs = logs.maximum(least) / unit + shift
        clock = step.clamp(max=LONGEST).to(rms.dtype).log()
        common = [clock / 5 - 1, (clock / 2 - 1).tanh(), (clock - 5).tanh(),
                  matrix, fan_in.clamp(max=WIDEST).log() / 3]  # fmt: skip
        common = torch.stack(torch.broadcast_tensors(*common), -1).expand(*size.shape, -1)
        inputs = [
            logs[..., :DIRECTIONS], *(cosine[..., i, i + 1 :] for i in range(DIRECTIONS - 1)),
            logs[..., DIRECTIONS:-1], common,
            (rms_p / size).unsqueeze(-1), logs[..., -1:],
        ]  # fmt: skip
        least = usual
        if self.beginnings:
            least = torch.where(start > 0, LEAST * usual, usual)
        rho = rms_p.clamp(least, LARGEST * usual)
        if self.beginnings:
            rho = torch.where(matrix > 0, rho, VECTOR_STEP)
        rho = rho * rest
        if self.horizon:
            inputs.append(known.expand(*size.shape).unsqueeze(-1))
        mixing = [adam, rho.unsqueeze(-1)]
        kept = (x.unsqueeze(-2) for x in (start, peak, r_bar))
        return torch.cat(inputs + mixing, dim=-1).mT, *kept

    def gains(self, tensor: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if self.every > 1:
            return self._gains_or_last(tensor, hidden)
        return self._gains(tensor, hidden)

    def _gains_or_last(self, tensor: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `gains`; where the network does not run in this step, the last gains."""
        last, gains = hidden.split([2 * self.cell.hidden, DIRECTIONS], -2)
        if not tensor.shape[-2]:
            return gains, hidden
        new, state = self._gains(tensor[..., :-1, :], last)
        hidden = torch.where(tensor[..., -1:, :] > 0, torch.cat([state, new], -2), hidden)
        return hidden[..., -DIRECTIONS:, :], hidden

    def _gains(self, tensor: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        h, hidden = self.cell(tensor[..., :TENSOR_INPUTS, :], hidden)
        out = _applied(self.head, h)
        if self.horizon:
            known = tensor[..., TENSOR_INPUTS : TENSOR_INPUTS + 1, :]
            untrained = torch.zeros_like(out)
            untrained[..., ADAM, :] = 1.0
            out = out.lerp(untrained, known)
        mixture, scale = _mixture(out, tensor)
        return scale * mixture, hidden

    def features(self, observation: Observation) -> Tensor:
        """Returns m̂_k/r, (*tasks, 4, d)."""
        return normal(observation.coordinate)

    def mix(self, gains: Tensor, observation: Observation) -> Tensor:
        update = self._mix(gains, observation)
        return update if observation.basis is None else observation.basis.turn_back(update)

    def _mix(self, gains: Tensor, observation: Observation) -> Tensor:
        """Returns Σ_k gains_k features_k in the observation's basis; gains are (*, 4, tensors)."""
        rows = observation.coordinate
        if isinstance(observation.layout, Tensor):
            return (gains[..., observation.layout] * normal(rows)).sum(-2)

        in_place = observation.spent and in_place_pays()

        def of(chunk: Chunk) -> Tensor:
            (first, *others, r), weights = chunk.of(rows).unbind(-3), chunk.spread(gains).unbind(-3)
            # In a fixed order, so that chunks do not change rounding.
            update = first.mul_(weights[0]) if in_place else first * weights[0]
            for row, weight in zip(others, weights[1:], strict=True):
                update.addcmul_(row, weight)
            return update.div_(r).flatten(-2)

        first = rows[..., 0, :]
        pieces = map(of, observation.layout.chunks)
        if not in_place:
            return collect(pieces, first if observation.spent else torch.empty_like(first))
        for _ in pieces:
            pass
        return first


def _applied(head: nn.Linear, h: Tensor) -> Tensor:
    """Returns the head's output (*tasks, 5, units) for h (*tasks, hidden, units)."""
    return per_task(head.weight, h) @ h + head.bias.unsqueeze(-1)


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1


def _fan_in(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])


def _mixture(out: Tensor, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Returns c, (*, 4, units), and −a ρ, (*, 1, units), from the head's output, (*, 5, units)."""
    mixture, log_step = out[..., :-1, :], out[..., -1:, :].clamp(-5, 5)
    rms, size = tensor[..., -MIXING:-1, :], tensor[..., -1:, :]
    step = STEP * log_step.exp()
    moved = step * (mixture.abs() * rms).sum(-2, keepdim=True)  # an upper bound, in units of size
    return mixture, -step * size / (1 + moved / MAX_STEP)
