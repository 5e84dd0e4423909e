"""The problems on which comparison.py compares ways to find a path."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from geodesic import LevelProfile, resample, sgd_profile
from geodesic.level_set import SublevelSet
from geodesic.path import chord
from geodesic.solve import BULGES, CHORD_SAMPLES, _bulge
from geodesic.targets import consecutive_pairs, run_teacher
from learned_opt.config import FamilyConfig, GeodesicsConfig
from learned_opt.target_paths import make_problem

SEGMENTS = 32


@dataclass(frozen=True)
class Case:
    family: str
    name: str
    loss_fn: Callable[[Tensor], Tensor]
    theta_a: Tensor
    theta_b: Tensor
    level: float | LevelProfile
    exact: float | None = None  # the length, if it is known in closed form
    trajectory: Tensor | None = None  # an initial path for all methods

    @property
    def start(self) -> Tensor:
        """Returns the initial path of all methods, the trajectory or our solver's bulging chord."""
        if self.trajectory is not None:
            return resample(self.trajectory, SEGMENTS)
        return _bulge(self.theta_a[None], self.theta_b[None], SEGMENTS, BULGES[0], 0)[0]

    def sublevel(self, rows: int) -> SublevelSet:
        sublevel = SublevelSet(self.loss_fn, (), rows, 1024)
        constant = not callable(self.level)
        sublevel.set_level(self.theta_a.new_full((rows,), self.level) if constant else self.level)
        return sublevel

    def chord_excess(self) -> float:
        straight = chord(self.theta_a, self.theta_b, 1)[None]
        return float(self.sublevel(1).certify(straight, CHORD_SAMPLES, torch.arange(1)).peak)


def bump(x: Tensor) -> Tensor:
    return torch.exp(-x.square().sum() / 2)


def shell(x: Tensor) -> Tensor:
    return (x.square().sum() - 1) ** 2


def linear_net(x: Tensor) -> Tensor:
    u, v = x.chunk(2)
    return 0.5 * (u @ v - 1) ** 2


def muller_brown(x: Tensor) -> Tensor:
    """Returns the potential of Müller & Brown, Theor. Chim. Acta 53 (1979), 75-93."""
    height, xx, xy, yy, x0, y0 = x.new_tensor(
        [[-200, -100, -170, 15], [-1, -1, -6.5, 0.7], [0, 0, 11, 0.6],
         [-10, -10, -6.5, 0.7], [1, 0, -0.5, -1], [0, 0.5, 1.5, 1]]
    )  # fmt: skip
    dx, dy = x[0] - x0, x[1] - y0
    return (height * torch.exp(xx * dx**2 + xy * dx * dy + yy * dy**2)).sum()


def ends(radius: float, angle: float, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(d)
    draw = torch.randn(d, 2, generator=generator, dtype=torch.float64)
    x, y = torch.linalg.qr(draw)[0].T
    return radius * x, radius * (math.cos(angle) * x + math.sin(angle) * y)


def around(radius: float, inner: float, angle: float) -> float:
    """Returns the length of two tangents and an arc, the shortest path around a ball.

    The path joins points of the same radius.
    """
    arc = angle - 2 * math.acos(inner / radius)
    return 2 * math.sqrt(radius**2 - inner**2) + inner * arc


def closed_form_cases() -> Iterator[Case]:
    for d, angle in product((2, 10, 1000), (2.6, 3.1)):
        name, exact = f"d = {d}, φ = {angle}", around(1.5, 1, angle)
        yield Case("ball", name, bump, *ends(1.5, angle, d), math.exp(-0.5), exact)
    for share in (0.02, 0.2, 0.6, 0.95):
        level = share * math.sin(1.4) ** 4
        exact = around(1, math.sqrt(1 - math.sqrt(level)), 2.8)
        yield Case("shell", f"λ = {share} of the chord's", shell, *ends(1, 2.8, 10), level, exact)
    # u = v on the path, which goes around a ball. Exactly opposite ends would keep DSS and NEB on a
    # ridge by symmetry, so the angle is 3.1.
    for width, level in product((2, 10), (0.01, 0.1, 0.4)):
        a, b = (torch.cat((end, end)) for end in ends(1, 3.1, width))
        exact = around(math.sqrt(2), math.sqrt(2 * (1 - math.sqrt(2 * level))), 3.1)
        yield Case("linear net", f"p = {width}, λ = {level}", linear_net, a, b, level, exact)


def muller_brown_cases() -> Iterator[Case]:
    """Yields cases from the deepest minimum to the two others.

    Only the level -41, which is below the saddle, has no path.
    """
    deepest, other, middle = torch.tensor(
        [[-0.558224, 1.441726], [0.623499, 0.028038], [-0.050011, 0.466694]], dtype=torch.float64
    )
    for end, name in ((middle, "1 saddle"), (other, "2 saddles")):
        for level in (-41.0, -40.6, -40.0, -35.0, -20.0):
            family = "Müller-Brown" if level > -40.66 else "disconnected"
            yield Case(family, f"{name}, λ = {level}", muller_brown, deepest, end, level)


def digits_cases(count: int) -> Iterator[Case]:
    """Yields the first pair in each draw of small networks whose chord sgd_profile excludes."""
    family = FamilyConfig(hidden_layers=(1, 2), width=(8, 32), projection_probability=0)
    config = GeodesicsConfig(family=family, evaluation_size=128)
    for index in range(count):
        problem = make_problem(config, index)
        pairs = consecutive_pairs(run_teacher(problem, 320, 10), 320)
        for run, points, losses in zip(pairs.run, pairs.points, pairs.losses, strict=True):
            batch = tuple(arg[run] for arg in problem.loss_args)
            loss_fn = partial(lambda theta, batch, f: f(theta, *batch), batch=batch,
                              f=problem.loss_fn)  # fmt: skip
            profile, name = sgd_profile(loss_fn, points), f"{problem.facts['task']}, draw {index}"
            case = Case("digits", name, loss_fn, points[0], points[-1], profile, None, points)
            if case.chord_excess() > 1e-3 * float(losses[0]):
                yield case
                break
