"""Shortens a path inside the sublevel set by sequential quadratic programming in the H¹ metric.

The beads minimize the energy E = K/2 Σ |Δ_i|² ≥ |γ|²/2 subject to F - λ(s) ≤ 0 along the path. The
two sides are equal if the beads are evenly spaced, and at the minimum they nearly are. One
iteration solves

    min_δ  ½ δᵀAδ/η + ∇Eᵀδ    subject to    c + Jδ ≤ 0,        A = K DᵀD  (D: differences of beads)

There is one constraint c at every bead, one at the worst interior point of every segment, and one
at each end. The step δ is accepted if E plus an exact penalty on the densely sampled excess falls.
Otherwise the damping η shrinks, and the next step allows for the excess that the linearization
missed (second-order correction). The path may thus leave the set for some steps; the feasible path
of the least energy is returned. A path that starts outside the set, or stays outside for many
steps, is pushed in by the same step without ∇E.

The step is δ = -η (e + A⁻¹Jᵀμ), where e = A⁻¹∇E is the offset from the chord. The multipliers μ ≥ 0
solve a problem of 2K + 1 unknowns whatever d is, because d occurs in Gram products only. A⁻¹
removes the K² stiffness of plain curve shortening. A falling level depends on the whole path
through s, and so does J.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from geodesic.level_set import Samples, SublevelSet, worst_interior
from geodesic.path import fractions, length, segment_lengths

# Constraints aim this share of a segment's length inside the set, so that the second-order error of
# a step does not leave it. This lengthens the path by about 1e-5.
MARGIN = 1e-3
# Stop at this |δ|_A/(η|γ|). About half its square, 5e-6 of the length, can then still be gained.
STOP_RESIDUAL = 3e-3
# Stop if the relative fall of E in one undamped step is below this.
STOP_DECREASE = 1e-6
# Steps outside the set before a path is pushed back in, and before pushing is given up.
PATIENCE, LAST_PATIENCE = 8, 20
SMALLEST_DAMPING = 1e-3
# Largest displacement of a bead in one step over max(chord, path / 4), within which the
# linearization holds. A path that does not return to the set restarts from its best feasible form
# with a quarter of this, down to the least.
TRUST, LEAST_TRUST = 0.25, 0.25 / 64
# Ridge on the dual matrix, scaled to a unit diagonal. It exceeds the rounding of the Gram products.
RIDGE = {torch.float64: 1e-10, torch.float32: 1e-4}


@dataclass
class Shortened:
    """The result of `shorten`."""

    path: Tensor  # (rows, K + 1, d)
    feasible: Tensor  # (rows,), judged by the samples that were used to shorten
    iterations: Tensor  # (rows,)
    residual: Tensor  # (rows,): |δ|_A / (η |γ|) of the last step tried


def shorten(
    sublevel: SublevelSet,
    path: Tensor,
    rows: Tensor,
    per_segment: int,
    max_iterations: int,
    strict: bool = False,
) -> Shortened:
    """Returns ``path`` shortened, ``(rows, K + 1, d)`` with K ≥ 2 and fixed ends.

    A path that starts inside the set ends inside with no more energy, judged by ``per_segment``
    samples of each segment. A path that starts outside may end outside. A path whose budget of
    evaluations is used up stays as it is. With ``strict`` paths are judged by the certificate; use
    it for paths that exceed the level only a little, such as those shortened on fewer samples.
    """
    search = _Search(sublevel, path.clone(), rows, per_segment, strict)
    active = torch.arange(len(rows))
    for _ in range(max_iterations):
        active = active[sublevel.affords(rows[active], path.shape[1] - 1)]
        if len(active) == 0:
            break
        active = search.iterate(active)
    found = search.least.isfinite()
    path = torch.where(found[:, None, None], search.shortest, search.path)
    return Shortened(path, found, search.iterations, search.residual)


@dataclass
class _Trial:
    """A step of some paths, and where it leads."""

    path: Tensor  # (rows, K + 1, d)
    samples: Samples
    energy: Tensor  # (rows,)
    norm: Tensor  # (rows,): |δ|_A
    multipliers: Tensor  # (rows, n)
    predicted: Tensor  # (rows, n): c + Jδ


class _Search:
    """The states of all searches, one for each path. `active` are the numbers of some of them.

    Attributes:
        path: the paths, (rows, K + 1, d), which `iterate` changes.
        shortest: the feasible paths of the least energy so far.
        least: that energy, (rows,), and infinite before there is one.
        entered: whether a path shortens, because it was inside the set; others are pushed in.
        away: for how many steps a path has been outside the set.
        damping: η.
        trust: the largest displacement, see TRUST.
        penalties: the weights of the exact penalty.
        norms: |δ|_A / η of the last step that was tried.
        curvature: how far the linearization was off in that step, over its squared norm, (rows, n).
        iterations: how many steps were tried.
        residual: |δ|_A / (η |γ|) of the last step that was tried.
    """

    def __init__(
        self, sublevel: SublevelSet, path: Tensor, rows: Tensor, per_segment: int, strict: bool
    ) -> None:
        self.sublevel, self.rows, self.per_segment = sublevel, rows, per_segment
        self.path, self.strict = path, strict
        self.samples = self._measure(path, torch.arange(len(rows)))
        self.ends = sublevel.gradients(path[:, [0, -1]], rows)
        self.sites = _sites(sublevel, path, self.samples, self.ends, rows)
        self.damping = torch.ones_like(path[:, 0, 0])
        self.trust = torch.full_like(self.damping, TRUST)
        self.penalties, self.norms = torch.zeros_like(self.damping), torch.zeros_like(self.damping)
        self.residual = torch.full_like(self.damping, torch.inf)
        self.away, self.iterations = torch.zeros_like(rows), torch.zeros_like(rows)
        self.curvature = torch.zeros_like(self.sites.excess)
        self.entered, self.shortest = self.samples.feasible.clone(), path.clone()
        self.least = torch.where(self.entered, _energy(path), torch.inf)

    def iterate(self, active: Tensor) -> Tensor:
        """Tries a step of the `active` paths, and returns those whose search goes on."""
        here, eta = _take(self.samples, active), self.damping[active]
        energy = _energy(self.path[active])
        trial = self._try(active)
        accepted = self._accepts(active, here, energy, trial)
        self._learn(active, trial, accepted)
        converged = here.feasible & (self.residual[active] < STOP_RESIDUAL)
        settled = (
            here.feasible
            & trial.samples.feasible
            & accepted
            & (energy - trial.energy < STOP_DECREASE * energy * eta)
        )
        self.damping[active] = torch.where(accepted, (4 * eta).clamp_max(1), eta / 4)
        failed = ~accepted & (self.damping[active] < SMALLEST_DAMPING)
        self._move(active, trial, accepted)
        lost, back = self._turn(active, failed)
        moved = active[accepted | back]
        active = active[~(converged | settled | (failed & ~lost & ~back))]
        self._linearize(moved[torch.isin(moved, active)])
        return active

    def _measure(self, path: Tensor, active: Tensor) -> Samples:
        measure = self.sublevel.certify if self.strict else self.sublevel.sample
        return measure(path, self.per_segment, self.rows[active])

    def _try(self, active: Tensor) -> _Trial:
        squares = (self.damping[active] * self.norms[active]).square()
        step, multipliers, predicted = _step(
            self.path[active],
            _take(self.sites, active),
            self.damping[active],
            self.trust[active],
            self.entered[active],
            self.least[active].isinf() & (not self.strict),
            self.curvature[active] * squares[:, None],
        )
        path = self.path[active]
        path[:, 1:-1] += step
        norm = (_energy(torch.nn.functional.pad(step, (0, 0, 1, 1))) * 2).sqrt()
        samples = self._measure(path, active)
        return _Trial(path, samples, _energy(path), norm, multipliers, predicted)

    def _accepts(self, active: Tensor, here: Samples, energy: Tensor, trial: _Trial) -> Tensor:
        """Returns which steps are accepted, ``(active,)``.

        While shortening, E plus an exact penalty (whose weight exceeds the multipliers) has to
        fall. While pushing in, the violation has to fall by a tenth of the linear prediction.
        """
        shortens, segments = self.entered[active], trial.path.shape[1] - 1
        margin = self.sites.margin[active, segments - 1 : -2].clone()
        margin[:, [0, -1]] = 0
        penalty = torch.maximum(self.penalties[active], 2 * trial.multipliers.amax(1))
        self.penalties[active] = torch.where(shortens, penalty, 0)
        merit = energy + penalty * (here.peak + margin).clamp_min(0).sum(1)
        reached = trial.energy + penalty * (trial.samples.peak + margin).clamp_min(0).sum(1)
        violation, left = (x.peak.clamp_min(0).sum(1) for x in (here, trial.samples))
        enough = left < violation * (1 - 0.1 * self.damping[active])
        return torch.where(shortens, reached < merit, trial.samples.feasible | enough)

    def _learn(self, active: Tensor, trial: _Trial, accepted: Tensor) -> None:
        """Notes how long the steps were, and by how much rejected ones missed their prediction."""
        eta, tiny = self.damping[active], torch.finfo(trial.path.dtype).tiny
        self.norms[active] = trial.norm / eta
        self.residual[active] = trial.norm / (eta * length(self.path[active]).clamp_min(tiny))
        reached = torch.cat((trial.samples.excess[:, 1:, 0], trial.samples.inner), dim=1)
        missed = (reached - trial.predicted[:, :-2]).clamp_min(0) * ~accepted[:, None]
        self.curvature[active, :-2] = missed / trial.norm.square().clamp_min(tiny)[:, None]
        self.iterations[active] += 1

    def _move(self, active: Tensor, trial: _Trial, accepted: Tensor) -> None:
        moved, kept = active[accepted], accepted.nonzero().squeeze(1)
        self.path[moved] = trial.path[kept]
        _put(self.samples, moved, _take(trial.samples, kept))
        shorter = accepted & trial.samples.feasible & (trial.energy < self.least[active])
        self.shortest[active[shorter]] = trial.path[shorter]
        self.least[active[shorter]] = trial.energy[shorter]

    def _turn(self, active: Tensor, failed: Tensor) -> tuple[Tensor, Tensor]:
        """Returns which paths are lost, so that they are pushed in, and which are set back.

        A path is lost if it stays outside the set for too long. If pushing in does not help, it is
        set back to its shortest feasible form, and then moves in shorter steps.
        """
        shortens, inside = self.entered[active], self.samples.feasible[active]
        self.away[active] = torch.where(inside, 0, self.away[active] + 1)
        lost = ~inside & shortens & (failed | (self.away[active] >= PATIENCE))
        back = ~inside & ~shortens & self.least[active].isfinite()
        back &= failed | (self.away[active] >= LAST_PATIENCE)
        back &= self.trust[active] > LEAST_TRUST
        self.entered[active] = (shortens & ~lost) | inside | back
        self.damping[active[lost | back]] = 1
        self.curvature[active[lost | back]] = 0
        if back.any():
            again = active[back]
            self.path[again], self.away[again] = self.shortest[again], 0
            self.trust[again] = self.trust[again] / 4
            _put(self.samples, again, self._measure(self.path[again], again))
        return lost, back

    def _linearize(self, stale: Tensor) -> None:
        """Linearizes the constraints anew of paths that have moved."""
        if len(stale):
            ends = (self.ends[0][stale], self.ends[1][stale])
            here, samples, rows = self.path[stale], _take(self.samples, stale), self.rows[stale]
            _put(self.sites, stale, _sites(self.sublevel, here, samples, ends, rows))


def join(parts: list[Shortened]) -> Shortened:
    """Concatenates results along their rows."""
    return Shortened(*map(torch.cat, zip(*(vars(part).values() for part in parts), strict=True)))


@dataclass
class _Sites:
    """Linearized constraints at n = 2K + 1 sites: K - 1 beads, K worst segment points, 2 ends."""

    excess: Tensor  # (rows, n): c, without margin
    margin: Tensor  # (rows, n)
    weights: Tensor  # (rows, n, K - 1): the derivative of a site in the beads
    gradients: Tensor  # (rows, n, d)
    stretch: Tensor  # (rows, n, K): -λ'(s) ∂s/∂(segment length)


def _sites(
    sublevel: SublevelSet, path: Tensor, samples: Samples, ends: tuple, rows: Tensor
) -> _Sites:
    num_rows, segments = path.shape[0], path.shape[1] - 1
    beads = torch.arange(segments, device=path.device)
    # The two end constraints are linear in the neighboring bead: F_a - λ(0) + τ (g_a·Δ_1 - λ'(0)
    # s_1) ≤ 0 at τ = 1/8 segment. If an end lies on the boundary, a site near it would give the
    # same constraint with fewer digits.
    segment = torch.cat((beads[1:], beads, beads[:1], beads[-1:]))
    t = torch.cat(
        (
            path.new_zeros(num_rows, segments - 1),
            worst_interior(samples.excess),
            path.new_tensor([1.0, 0.0]).expand(num_rows, 2),
        ),
        dim=1,
    )
    knots, lengths = fractions(path), segment_lengths(path)
    s = torch.lerp(knots[:, segment], knots[:, segment + 1], t)
    points = torch.lerp(path[:, segment], path[:, segment + 1], t[..., None])
    losses, gradients = sublevel.gradients(points[:, :-2], rows)
    gradients = torch.cat((gradients, ends[1]), dim=1)
    at = torch.cat((s[:, :-2], torch.zeros_like(s[:, :1]), torch.ones_like(s[:, :1])), dim=1)
    slope = sublevel.slope(at, rows, width=1 / (8 * segments))
    excess = torch.cat((losses, ends[0]), dim=1) - sublevel.level(at, rows)
    # The certificate interpolates between samples, so the constraints include that excess as well.
    inner = slice(segments - 1, 2 * segments - 1)
    excess[:, inner] = torch.maximum(excess[:, inner], samples.inner)
    to_neighbour = points[:, -2:] - path[:, [0, -1]]
    tilt = (ends[1] * to_neighbour).sum(-1) - slope[:, -2:] * (s - at)[:, -2:]
    excess[:, -2:] = 8 * excess[:, -2:] + tilt

    one_hot = torch.nn.functional.one_hot(segment, segments).to(path)
    weights = path.new_zeros(num_rows, len(segment), segments + 1)
    weights[..., :-1] = one_hot * (1 - t[..., None])
    weights[..., 1:] += one_hot * t[..., None]
    before = (beads < segment[:, None]).to(path) + one_hot * t[..., None]
    stretch = -slope[..., None] * (before - s[..., None]) / lengths.sum(1)[:, None, None]

    mean_length = lengths.mean(1, keepdim=True)
    margin = MARGIN * mean_length * torch.linalg.vector_norm(gradients, dim=-1)
    # If F(θ_a) = λ, there is no room for a margin at the end: it grows from 0 over the segment.
    margin[:, segments - 1] *= t[:, segments - 1]
    margin[:, 2 * segments - 2] *= 1 - t[:, 2 * segments - 2]
    return _Sites(excess, margin, weights[..., 1:-1], gradients, stretch)


def _step(
    path: Tensor,
    sites: _Sites,
    damping: Tensor,
    trust: Tensor,
    shortens: Tensor,
    pushing: Tensor,
    bend: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the step of the interior beads, the multipliers, and the predicted excess c + Jδ.

    They are ``(rows, K - 1, d)``, ``(rows, n)`` and ``(rows, n)``.
    """
    segments = path.shape[1] - 1
    beads = torch.arange(1, segments, dtype=path.dtype, device=path.device)
    low, high = torch.minimum(beads[:, None], beads), torch.maximum(beads[:, None], beads)
    inverse = low * (segments - high) / segments**2  # A⁻¹ = (K DᵀD)⁻¹
    difference = torch.diff(torch.eye(segments + 1).to(path), dim=0)[:, 1:-1]
    tangents = torch.nn.functional.normalize(path.diff(dim=1), dim=-1)
    gradients, weights, stretch = sites.gradients, sites.weights, sites.stretch
    # Until a path has been inside, only gradients across it count. Along the path, beads would
    # slide to either side of an obstacle and pile up there.
    along = torch.nn.functional.normalize(weights @ difference.mT.abs() @ tangents, dim=-1)
    across = gradients - (gradients * along).sum(-1, keepdim=True) * along
    gradients = torch.where(pushing[:, None, None], across, gradients)

    line = torch.lerp(path[:, :1], path[:, -1:], (beads / segments)[:, None])
    offset = (path[:, 1:-1] - line) * shortens[:, None, None]
    site_offset = (gradients * (weights @ offset)).sum(-1)
    stretch_offset = (stretch @ (tangents * (difference @ offset)).sum(-1, keepdim=True)).squeeze(
        -1
    )

    bead_gram = weights @ inverse @ weights.mT * (gradients @ gradients.mT)
    mixed = (weights @ inverse @ difference.mT * (gradients @ tangents.mT)) @ stretch.mT
    tangent_gram = (difference @ inverse @ difference.mT) * (tangents @ tangents.mT)
    dual = bead_gram + mixed + mixed.mT + stretch @ tangent_gram @ stretch.mT
    target = sites.excess + sites.margin + bend
    target = torch.where(target > 0, target, target / damping[:, None])
    multipliers = nonnegative_qp(
        dual.double(), (target - site_offset - stretch_offset).double(), RIDGE[path.dtype]
    ).to(path)

    force = weights.mT @ (multipliers[..., None] * gradients)
    force += difference.mT @ ((multipliers[:, None] @ stretch).mT * tangents)
    step = -damping[:, None, None] * (offset + inverse @ force)
    reach = torch.maximum(
        torch.linalg.vector_norm(path[:, -1] - path[:, 0], dim=-1), length(path) / 4
    )
    largest = torch.linalg.vector_norm(step, dim=-1).amax(1).clamp_min(1e-30)
    step = step * (trust * reach / largest).clamp_max(1)[:, None, None]
    predicted = (gradients * (weights @ step)).sum(-1)
    predicted += (stretch @ (tangents * (difference @ step)).sum(-1, keepdim=True)).squeeze(-1)
    return step, multipliers, sites.excess + predicted


def nonnegative_qp(matrix: Tensor, vector: Tensor, ridge: float) -> Tensor:
    """Returns argmin over μ ≥ 0 of ½ μᵀHμ - qᵀμ, with H ``(rows, n, n)`` and q ``(rows, n)``.

    All rows are solved at once, in float64, by Mehrotra's predictor-corrector interior-point method
    (SIAM J. Optim. 2(4), 1992) on the problem scaled to a unit diagonal. ``ridge`` is added to the
    diagonal and keeps μ bounded if constraints conflict.
    """
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    # A constraint with almost no gradient cannot be satisfied by a step: its multiplier is 0.
    scale = diagonal.rsqrt().where(diagonal > 1e-16 * diagonal.amax(1, keepdim=True), 0.0)
    vector = torch.where(scale > 0, vector * scale, -torch.inf)
    unit = vector.amax(1, keepdim=True).clamp_min(1e-200)
    # Slacks beyond a thousand times the largest violation are cut off: they cannot become active.
    q = (vector / unit).clamp_min(-1e3)
    h = scale[:, :, None] * matrix * scale[:, None] + ridge * torch.eye(q.shape[1]).to(q)
    mu, z = torch.ones_like(q), torch.ones_like(q)

    def largest_step(value: Tensor, change: Tensor) -> Tensor:
        ratio = torch.where(change < 0, -value / change, torch.ones_like(value))
        return ratio.amin(1, keepdim=True).clamp_max(1)

    def newton(factor, dual_error, mu, z, complementarity) -> tuple[Tensor, Tensor]:
        right = complementarity / mu - dual_error
        d_mu = torch.cholesky_solve(right[..., None], factor).squeeze(-1)
        return d_mu, (complementarity - z * d_mu) / mu

    for _ in range(40):
        dual_error = (h @ mu[..., None]).squeeze(-1) - q - z
        gap = (mu * z).mean(1, keepdim=True)
        solved = (gap < 1e-11) & (dual_error.abs().amax(1, keepdim=True) < 1e-9)
        if bool(
            (solved | gap.isnan()).all()
        ):  # with NaN there is no solution; the step is rejected
            break
        factor = torch.linalg.cholesky_ex(h + torch.diag_embed(z / mu))[0]

        d_mu, d_z = newton(factor, dual_error, mu, z, -mu * z)
        reached = ((mu + largest_step(mu, d_mu) * d_mu) * (z + largest_step(z, d_z) * d_z)).mean(
            1, keepdim=True
        )
        centre = (reached / gap) ** 3 * gap
        d_mu, d_z = newton(factor, dual_error, mu, z, centre - mu * z - d_mu * d_z)
        mu = mu + 0.99 * largest_step(mu, d_mu) * d_mu
        z = z + 0.99 * largest_step(z, d_z) * d_z
    active = (vector.amax(1, keepdim=True) > 0) & mu.isfinite().all(1, keepdim=True)
    return torch.where(active, mu * unit * scale, 0.0)


def _energy(path: Tensor) -> Tensor:
    return path.diff(dim=1).square().sum((1, 2)) * (path.shape[1] - 1) / 2


def _take(record, index: Tensor):
    return type(record)(*(value[index] for value in vars(record).values()))


def _put(record, index: Tensor, values) -> None:
    for name, value in vars(values).items():
        getattr(record, name)[index] = value
