"""Dynamic String Sampling: searches for a path from θ_a to θ_b along which F ≤ λ.

Freeman & Bruna, "Topology and Geometry of Half-Rectified Network Optimization", ICLR 2017
(arXiv 1611.01540). A string of beads connects θ_a and θ_b. If F exceeds the level on the segment
between two beads, a new bead is inserted there and descends until F ≤ αλ; then its two segments are
tested. The string is never shortened, so its length is only an upper bound on the geodesic's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from geodesic.arguments import check_pairs, constant_level, errors_of_points
from geodesic.device import makes_tensors_on_cpu
from geodesic.level_set import SublevelSet, allowance
from geodesic.path import fractions, length, normalized_length


@dataclass(frozen=True)
class StringSampling:
    """The settings of Dynamic String Sampling.

    With the defaults every sample of a connecting path lies in the sublevel set (slack 1).

    Attributes:
        bead_target: α in (0, 1]. A bead is trained until F ≤ λ - (1 - α)|λ|, which is αλ if λ > 0.
        slack: at least 1. A segment passes if F ≤ λ + (slack - 1)|λ| on its grid.
        insertion: where a bead is inserted on a failing segment: at the "midpoint", or at the
            "worst" point of the grid, where F - λ is largest (the first such point). If F is flat,
            use the midpoint.
        grid: the number of grid steps on a segment, at least 2; both ends are grid points.
        max_depth: the largest number of rounds of insertion. If a pair is not connected after them,
            it counts as not connected.
        always_insert: whether to begin with a trained midpoint bead even if the chord passes.
        optimizer: "adam" (β = .9, .999) or "sgd". Each bead starts with a fresh optimizer.
        learning_rate: the learning rate of the beads.
        max_gradient_norm: longer gradients are scaled to this norm; None does not clip.
        max_steps: the number of descent steps of a bead after which its pair counts as not
            connected.
        check_every: the number of descent steps between two tests of whether a bead has reached its
            target.
    """

    bead_target: float = 0.95
    slack: float = 1.0
    insertion: str = "worst"
    grid: int = 20
    max_depth: int = 10
    always_insert: bool = False
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    max_gradient_norm: float | None = None
    max_steps: int = 10_000
    check_every: int = 1

    def __post_init__(self):
        for name, valid, fix in (
            ("bead_target", 0 < self.bead_target <= 1, "be in (0, 1], such as 0.95 or 0.98"),
            ("slack", 1 <= self.slack < torch.inf, "be at least 1, which allows no excess"),
            ("insertion", self.insertion in ("midpoint", "worst"), "be 'midpoint' or 'worst'"),
            ("optimizer", self.optimizer in ("adam", "sgd"), "be 'adam' or 'sgd'"),
            ("learning_rate", 0 < self.learning_rate < torch.inf, "be positive, such as 1e-3"),
            (
                "max_gradient_norm",
                self.max_gradient_norm is None or self.max_gradient_norm > 0,
                "be positive, or None not to clip",
            ),
        ):
            if not valid:
                raise ValueError(f"{name} must {fix}; got {getattr(self, name)!r}")
        least = {"grid": 2, "max_depth": 1, "max_steps": 1, "check_every": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}; got {value!r}")


# Values in the order of the fields, from the scripts behind the paper's Figure 1,
# github.com/danielfreeman11/convex-nets at 252a823. The scripts test a bead every 15 full-batch
# steps (polynomials), every 100 minibatches of 128 (CIFAR-10), or every epoch: 550 minibatches of
# 100 images (MNIST), 2323 of 20 × 20 words (PTB). For PTB they also halve the rate each epoch after
# the fourth. They do not limit the steps of a bead for the polynomials and MNIST; the limit is 10⁶
# steps for CIFAR-10 and 100 epochs for PTB.
PRESETS = {
    name: StringSampling(*values)
    for name, values in {
        "cubic": (0.95, 1.1, "midpoint", 100, 10, True, "adam", 1e-3, None, 300_000, 15),
        "quadratic": (0.95, 1.1, "midpoint", 100, 10, True, "adam", 1e-3, None, 300_000, 15),
        "mnist": (0.98, 1.02, "worst", 20, 10, True, "adam", 1e-4, None, 55_000, 550),
        "cifar": (0.98, 1.1, "worst", 20, 10, True, "sgd", 0.1, None, 1_000_000, 100),
        "ptb": (0.98, 1.1, "midpoint", 20, 10, True, "sgd", 1.0, 5.0, 232_300, 2323),
    }.items()
}


@dataclass
class Strings:
    """The result of `sample_strings`: one string for each pair.

    Attributes:
        paths: a list of ``(n, d)`` tensors from exactly θ_a to exactly θ_b. For a pair that is not
            connected it is the last string whose beads had all reached their targets.
        connected: ``(pairs,)`` bool; whether every segment passes, on the grid and with the slack
            of the settings. False means that DSS found no connection, not that there is none.
        num_beads: ``(pairs,)``; the number n of beads, both ends included, as in the paper.
        length: ``(pairs,)``; |γ|.
        normalized_length: ``(pairs,)``; |γ| / |θ_a - θ_b|.
        max_loss: ``(pairs,)``; the largest F on the grids of the path, inf if F was NaN.
        rounds: ``(pairs,)``; the number of rounds of insertion.
        loss_evaluations: ``(pairs,)``; the number of points at which F alone was computed.
        gradient_evaluations: ``(pairs,)``; the number of points at which the gradient was computed.
    """

    paths: list[Tensor]
    connected: Tensor
    num_beads: Tensor
    length: Tensor
    normalized_length: Tensor
    max_loss: Tensor
    rounds: Tensor
    loss_evaluations: Tensor
    gradient_evaluations: Tensor


@torch.no_grad()
@makes_tensors_on_cpu
def sample_strings(
    loss_fn: Callable[..., Tensor],
    theta_a: Tensor,
    theta_b: Tensor,
    level: float | Tensor | Callable[[Tensor], Tensor],
    settings: StringSampling = StringSampling(),
    loss_args: tuple[Tensor, ...] = (),
    train_fn: Callable[..., Tensor] | None = None,
    chunk_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Strings:
    """Returns strings that connect pairs inside sublevel sets, by Dynamic String Sampling.

    This tests whether two points are connected below a level. It is cheaper than `find_geodesics`,
    which also makes the path short::

        result = geodesic.sample_strings(loss_fn, theta_a[None], theta_b[None], level=0.1)
        result.connected[0], result.paths[0]

    The beads of all pairs descend in one `torch.func.vmap`, and a bead leaves it when it reaches
    its target. Pairs do not wait for each other: a pair's next round begins right after its last
    bead is done. Its result does not depend on the other pairs, apart from rounding.

    When a bead is inserted, its target is set by the level at its arclength fraction. Later
    insertions can change this fraction. If the level falls along the path, a bead's loss may then
    lie above the level at its new fraction, and the bead is trained further in the next round.

    Args:
        loss_fn: F; ``loss_fn(theta, *args)`` maps ``(d,)`` to a scalar. It must be deterministic
            and support `torch.func.vmap`.
        theta_a: ``(pairs, d)``, float32 or float64.
        theta_b: ``(pairs, d)``, of the same dtype.
        level: λ; a number, a tensor ``(pairs,)``, or a callable from ``(pairs, m)`` arclength
            fractions to levels, such as `geodesic.sgd_profile` returns.
        settings: see `StringSampling`; `PRESETS` has the published ones.
        loss_args: tensors with a leading dimension of pairs, passed to ``loss_fn`` and
            ``train_fn``.
        train_fn: the function that beads descend if it is not F, because F has no gradient or needs
            all data. ``train_fn(theta, step, *args)`` returns a scalar and supports vmap. ``step``
            is an int that counts descent steps over all rounds and selects the minibatch, the same
            for all beads. Random draws in it (dropout) are seeded by the step and are the same for
            all beads, too.
        chunk_size: the number of points evaluated at once; lower it if memory runs out.
        progress: called after every step with the numbers of pairs finished and beads in training.

    Returns:
        one string of beads for each pair, and whether it connects the pair.

    Raises:
        ValueError: a shape or dtype is wrong, a value is not finite, or F(θ_a) or F(θ_b) exceeds
            the level by more than the slack.
    """
    check_pairs(theta_a, theta_b, loss_args, chunk_size=chunk_size)
    if error := next(filter(None, errors_of_points(theta_a, theta_b, None)), None):
        raise ValueError(error)
    sublevel = SublevelSet(loss_fn, tuple(loss_args), len(theta_a), chunk_size)
    sublevel.set_level(level if callable(level) else constant_level(level, theta_a))
    ends = torch.stack((theta_a, theta_b), dim=1)
    sampling = _Sampling(ends, sublevel, settings, loss_fn, train_fn)
    while len(sampling.beads.pair):
        sampling.step()
        if progress is not None:
            progress(sampling.finished, len(sampling.beads.pair))
    return sampling.result()


class _Sampling:
    """The strings of all pairs, and the beads that are in training."""

    def __init__(
        self,
        ends: Tensor,
        sublevel: SublevelSet,
        settings: StringSampling,
        loss_fn: Callable[..., Tensor],
        train_fn: Callable[..., Tensor] | None,
    ) -> None:
        self.sublevel, self.settings = sublevel, settings
        self.loss_fn, self.train_fn = loss_fn, train_fn
        self.steps = 0
        grids = ends.new_full((1, settings.grid + 1), torch.nan)
        self.strings = [_String(path, grids.clone()) for path in ends]
        self.beads = _join(self._rounds(list(range(len(ends)))))

    def step(self) -> None:
        """Tests the beads that are due, moves the others, and begins rounds of pairs in turn."""
        gradients, complete = self._test()
        if len(self.beads.pair):
            if self.train_fn is not None:
                gradients = self._gradients_to_train(self.train_fn)
            assert gradients is not None  # of F, which come with its values
            self.beads.descend(gradients, self.settings)
        self.steps += 1
        for row in complete:
            string = self.strings[row]
            string.path, string.losses = string.draft, string.known
        if complete:
            self.beads = _join([self.beads, *self._rounds(complete)])

    def _test(self) -> tuple[Tensor | None, list[int]]:
        """Removes the beads that are due and have reached their targets, and those of lost pairs.

        Returns the gradients of F at the beads that stay, if it is F that they descend, and the
        pairs whose round is complete.
        """
        beads, settings, gradients = self.beads, self.settings, None
        due = (beads.age % settings.check_every == 0) | (beads.age == settings.max_steps)
        due &= beads.age > 0
        if self.train_fn is None:
            gradients, values = self._evaluate(grad_and_value(self.loss_fn))
            self.sublevel.gradient_evaluations += self._per_pair(beads.pair)
        elif due.any():
            values = torch.full_like(beads.target, torch.nan)
            values[due] = self._evaluate(self.loss_fn, due)
            self.sublevel.loss_evaluations += self._per_pair(beads.pair[due])
        if not due.any():
            return gradients, []

        reached = due & (values <= beads.target).cpu()
        lost = (beads.age == settings.max_steps) | ~beads.theta.isfinite().all(1).cpu()
        lost &= due & ~reached
        stay = ~reached & ~torch.isin(beads.pair, beads.pair[lost])
        for index in reached.nonzero().flatten().tolist():
            self.strings[beads.pair[index]].draft[beads.slot[index]] = beads.theta[index]
        left = torch.cat((beads.pair[stay], beads.pair[lost]))
        complete = beads.pair[reached & ~torch.isin(beads.pair, left)].unique().tolist()
        if not stay.all():
            self.beads = beads.take(stay)
            gradients = None if gradients is None else gradients[stay]
        return gradients, complete

    def _gradients_to_train(self, train_fn: Callable[..., Tensor]) -> Tensor:
        theta, pair = self.beads.theta, self.beads.pair
        # The random draws of a step, as of dropout, must not depend on the batch.
        with torch.random.fork_rng([theta.device] if theta.is_cuda else []):
            gradients = self._evaluate(grad(partial(_seeded, train_fn, self.steps)))
        self.sublevel.gradient_evaluations += self._per_pair(pair)
        return gradients

    def _evaluate(self, function: Callable, which: Tensor | slice = slice(None)):
        """Returns `function` at the beads, or at `which` of them."""
        theta, pair = self.beads.theta[which], self.beads.pair[which]
        mapped, at_once = vmap(function, randomness="same"), self.sublevel.chunk_size
        parts = [
            mapped(points, *(argument[rows] for argument in self.sublevel.loss_args))
            for points, rows in zip(theta.split(at_once), pair.split(at_once), strict=True)
        ]
        if torch.is_tensor(parts[0]):
            return torch.cat(parts)
        return tuple(torch.cat(kind) for kind in zip(*parts, strict=True))

    def _rounds(self, rows: list[int]) -> list["_Beads"]:
        strings = [self.strings[row] for row in rows]
        _sample(strings, rows, self.sublevel, self.settings.grid)
        return [_round(string, row, self.sublevel, self.settings)
                for string, row in zip(strings, rows, strict=True)]  # fmt: skip

    def _per_pair(self, pairs: Tensor) -> Tensor:
        return torch.bincount(pairs, minlength=len(self.strings))

    @property
    def finished(self) -> int:
        """The number of pairs without a bead in training."""
        return len(self.strings) - len(self.beads.pair.unique())

    def result(self) -> Strings:
        paths = [string.path for string in self.strings]
        return Strings(
            paths=paths,
            connected=torch.tensor([string.connected for string in self.strings]),
            num_beads=torch.tensor([len(path) for path in paths]),
            length=torch.stack([length(path) for path in paths]),
            normalized_length=torch.stack([normalized_length(path) for path in paths]),
            max_loss=torch.stack([string.losses.amax() for string in self.strings]),
            rounds=torch.tensor([string.rounds for string in self.strings]),
            loss_evaluations=self.sublevel.loss_evaluations,
            gradient_evaluations=self.sublevel.gradient_evaluations,
        )


def _seeded(train_fn: Callable, step: int, theta: Tensor, *args: Tensor) -> Tensor:
    torch.manual_seed(step)
    return train_fn(theta, step, *args)


@dataclass
class _String:
    """A pair's string, and its draft for the round in progress.

    The draft replaces the string when all beads of the round have reached their targets. Losses are
    F on the grid of every segment, NaN if a segment has not been evaluated.
    """

    path: Tensor  # (n, d)
    losses: Tensor  # (n - 1, grid + 1)
    draft: Tensor = field(init=False)  # (n', d)
    known: Tensor = field(init=False)  # (n' - 1, grid + 1), the losses of the draft
    rounds: int = 0
    connected: bool = False


@dataclass
class _Beads:
    """The beads in training, of all pairs. `pair`, `slot` and `age` are on the CPU."""

    theta: Tensor  # (beads, d)
    target: Tensor  # (beads,)
    mean: Tensor  # (beads, d), Adam's moments; (beads, 0) for SGD
    square: Tensor
    pair: Tensor  # (beads,)
    slot: Tensor  # (beads,), index in the pair's draft
    age: Tensor  # (beads,), steps trained

    def take(self, index: Tensor) -> "_Beads":
        return _Beads(*(value[index] for value in vars(self).values()))

    def descend(self, gradients: Tensor, settings: StringSampling) -> None:
        """Moves every bead by one step, in place."""
        self.age += 1
        if settings.max_gradient_norm is not None:
            norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
            gradients = gradients * (settings.max_gradient_norm / norms).clamp_max(1)
        if settings.optimizer == "adam":  # Kingma & Ba 2015, arXiv 1412.6980, with its constants
            age = self.age[:, None].to(gradients)
            self.mean.lerp_(gradients, 0.1)
            self.square.lerp_(gradients.square(), 0.001)
            scale = (self.square / (1 - 0.999**age)).sqrt() + 1e-8
            gradients = self.mean / (1 - 0.9**age) / scale
        self.theta -= settings.learning_rate * gradients


def _join(parts: list[_Beads]) -> _Beads:
    return _Beads(*map(torch.cat, zip(*(vars(part).values() for part in parts), strict=True)))


def _sample(strings: list[_String], rows: list[int], sublevel: SublevelSet, grid: int) -> None:
    """Evaluates F on the grid of every new segment, and stores it in the strings."""
    new = [string.losses[:, 0].isnan() for string in strings]
    segments = [
        torch.stack((string.path[:-1], string.path[1:]), dim=1)[mask]
        for string, mask in zip(strings, new, strict=True)
    ]
    counts = [len(part) for part in segments]
    owners = torch.tensor(rows).repeat_interleave(torch.tensor(counts))
    losses = sublevel.losses(torch.cat(segments), grid, owners)[:, 0].split(counts)
    for string, mask, part in zip(strings, new, losses, strict=True):
        string.losses[mask] = part


def _round(string: _String, row: int, sublevel: SublevelSet, settings: StringSampling) -> _Beads:
    """Returns the beads that the string needs next; none if it passes or is given up."""
    path, grid, pair = string.path, settings.grid, torch.tensor([row])
    t = torch.linspace(0, 1, grid + 1, dtype=path.dtype, device=path.device)
    knots = fractions(path)
    s = torch.lerp(knots[:-1, None], knots[1:, None], t)
    level = sublevel.level(s.view(1, -1), pair).view_as(s)
    excess = string.losses - level - (settings.slack - 1) * level.abs()
    over = ~(excess <= allowance(level))
    if string.rounds == 0:
        _check_ends(string.losses[0], level[0], over[0], row)

    failing = over.any(1)
    at_midpoint = settings.always_insert and string.rounds == 0  # whatever the insertion is
    string.connected = not failing.any() and not at_midpoint
    # Beads above the level. This occurs only if λ falls: the string grew, and so the bead is now at
    # a fraction where λ is lower than its target was.
    fallen = torch.nn.functional.pad(over[1:, 0], (1, 1))
    kept = ~fallen[:-1] & ~fallen[1:]
    added = ((failing | at_midpoint) & kept).nonzero().flatten()
    if string.connected or string.rounds == settings.max_depth:
        added, fallen = added[:0], torch.zeros_like(fallen)
    else:
        string.rounds += 1
    weight = torch.full_like(t[:1], 0.5).expand(len(added))
    if settings.insertion == "worst" and not at_midpoint:
        weight = t[1:-1][excess[added, 1:-1].argmax(1)]
    points = torch.lerp(path[added], path[added + 1], weight[:, None])

    old = torch.arange(len(path), device=path.device)
    order = torch.cat((old, added + 0.5)).argsort()
    string.draft = torch.cat((path, points))[order]
    string.known = path.new_full((len(string.draft) - 1, grid + 1), torch.nan)
    kept[added] = False
    string.known[order.argsort()[: len(path) - 1][kept]] = string.losses[kept]
    slot = torch.cat((fallen, torch.ones_like(added, dtype=torch.bool)))[order].nonzero().flatten()
    theta = string.draft[slot]
    level = sublevel.level(fractions(string.draft)[None, slot], pair)[0]
    moment = torch.zeros_like(theta) if settings.optimizer == "adam" else theta[:, :0]
    return _Beads(
        theta=theta,
        target=level - (1 - settings.bead_target) * level.abs(),
        mean=moment,
        square=moment.clone(),
        pair=torch.full((len(slot),), row),
        slot=slot.cpu(),
        age=torch.zeros(len(slot), dtype=torch.long),
    )


def _check_ends(losses: Tensor, level: Tensor, over: Tensor, row: int) -> None:
    for name, end in (("theta_a", 0), ("theta_b", -1)):
        if not level[end].isfinite():
            raise ValueError(
                f"level must be finite, got {level[end].item()} at {name} of pair {row}; "
                "drop pairs of a diverged run"
            )
        if over[end]:
            raise ValueError(
                f"level must be at least F({name}) = {losses[end].item()} up to the slack, got "
                f"{level[end].item()} for pair {row}; train {name} further, or raise the level"
            )
