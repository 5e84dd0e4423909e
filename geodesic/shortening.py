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
    measure = sublevel.certify if strict else sublevel.sample
    path = path.clone()
    tiny = torch.finfo(path.dtype).tiny
    samples = measure(path, per_segment, rows)
    ends = sublevel.gradients(path[:, [0, -1]], rows)
    sites = _sites(sublevel, path, samples, ends, rows)
    damping = torch.ones_like(path[:, 0, 0])
    trust = torch.full_like(damping, TRUST)
    entered = samples.feasible.clone()
    shortest, least = path.clone(), torch.where(entered, _energy(path), torch.inf)
    penalties = torch.zeros_like(damping)
    away = torch.zeros_like(rows)
    norms = torch.zeros_like(damping)
    curvature = torch.zeros_like(sites.excess)
    iterations = torch.zeros_like(rows)
    residual = torch.full_like(damping, torch.inf)
    active = torch.arange(len(rows))
    for _ in range(max_iterations):
        active = active[sublevel.affords(rows[active], path.shape[1] - 1)]
        if len(active) == 0:
            break
        shortens = entered[active]
        here = _take(samples, active)
        bend = curvature[active] * (damping[active] * norms[active]).square()[:, None]
        step, multipliers, predicted = _step(
            path[active],
            _take(sites, active),
            damping[active],
            trust[active],
            shortens,
            least[active].isinf() & (not strict),
            bend,
        )
        candidate = path[active]
        candidate[:, 1:-1] += step
        trial = measure(candidate, per_segment, rows[active])

        # While shortening, E plus an exact penalty (whose weight exceeds the multipliers) has to
        # fall. While pushing in, the violation has to fall by a tenth of the linear prediction.
        margin = sites.margin[active, candidate.shape[1] - 2 : -2].clone()
        margin[:, [0, -1]] = 0
        penalty = torch.maximum(penalties[active], 2 * multipliers.amax(1))
        penalties[active] = torch.where(shortens, penalty, 0)
        energy, trial_energy = _energy(path[active]), _energy(candidate)
        merit = energy + penalty * (here.peak + margin).clamp_min(0).sum(1)
        trial_merit = trial_energy + penalty * (trial.peak + margin).clamp_min(0).sum(1)
        violation = here.peak.clamp_min(0).sum(1)
        trial_violation = trial.peak.clamp_min(0).sum(1)
        eta = damping[active]
        accepted = torch.where(
            shortens,
            trial_merit < merit,
            trial.feasible | (trial_violation < violation * (1 - 0.1 * eta)),
        )
        norm = (_energy(torch.nn.functional.pad(step, (0, 0, 1, 1))) * 2).sqrt()
        residual[active] = norm / (eta * length(path[active]).clamp_min(tiny))
        norms[active] = norm / eta
        reached = torch.cat((trial.excess[:, 1:, 0], trial.inner), dim=1)
        missed = (reached - predicted[:, :-2]).clamp_min(0) * ~accepted[:, None]
        curvature[active, :-2] = missed / norm.square().clamp_min(tiny)[:, None]
        iterations[active] += 1

        converged = here.feasible & (residual[active] < STOP_RESIDUAL)
        settled = (
            here.feasible
            & trial.feasible
            & accepted
            & (energy - trial_energy < STOP_DECREASE * energy * eta)
        )
        damping[active] = torch.where(accepted, (4 * eta).clamp_max(1), eta / 4)
        failed = ~accepted & (damping[active] < SMALLEST_DAMPING)
        moved, kept = active[accepted], accepted.nonzero().squeeze(1)
        path[moved] = candidate[kept]
        _put(samples, moved, _take(trial, kept))
        shorter = accepted & trial.feasible & (trial_energy < least[active])
        shortest[active[shorter]] = candidate[shorter]
        least[active[shorter]] = trial_energy[shorter]
        # A path that stays outside the set for too long is pushed in.
        away[active] = torch.where(samples.feasible[active], 0, away[active] + 1)
        lost = ~samples.feasible[active] & shortens & (failed | (away[active] >= PATIENCE))
        back = ~samples.feasible[active] & ~shortens & least[active].isfinite()
        back &= (failed | (away[active] >= LAST_PATIENCE)) & (trust[active] > LEAST_TRUST)
        entered[active] = (shortens & ~lost) | samples.feasible[active] | back
        failed &= ~lost & ~back
        damping[active[lost | back]] = 1
        curvature[active[lost | back]] = 0
        if back.any():
            again = active[back]
            path[again], trust[again], away[again] = shortest[again], trust[again] / 4, 0
            _put(samples, again, measure(path[again], per_segment, rows[again]))
        moved = active[accepted | back]
        active = active[~(converged | settled | failed)]
        stale = moved[torch.isin(moved, active)]
        if len(stale):
            loss_and_gradient = (ends[0][stale], ends[1][stale])
            fresh = _sites(
                sublevel, path[stale], _take(samples, stale), loss_and_gradient, rows[stale]
            )
            _put(sites, stale, fresh)
    found = least.isfinite()
    path = torch.where(found[:, None, None], shortest, path)
    return Shortened(path, found, iterations, residual)


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
