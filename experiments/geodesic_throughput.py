"""What the geodesic solver finds and costs, beside other ways to find a path. See throughput.py.

`comparison`: known problems and networks, against ASE's nudged elastic band, a penalty method,
projected curve shortening and Dynamic String Sampling. `pairs`: a thousand pairs of SGD iterates.
`scaling`: cost against segments, pairs and parameters. `profile`: where the time goes.

Work is gradients + losses / 3: a gradient is a forward pass and a backward pass of twice the cost.
Seconds are the thread's own, so that they do not depend on what else the machine does.
"""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from rows import save
from torch import Tensor

from geodesic import (
    Geodesic,
    LevelProfile,
    find_geodesic,
    find_geodesics,
    length,
    resample,
    sgd_profile,
)
from geodesic import shortening as shortening_module
from geodesic import solve as solve_module
from geodesic.dss import StringSampling, sample_strings
from geodesic.level_set import SublevelSet
from geodesic.path import chord, fractions, subdivide
from geodesic.solve import BULGES, CERTIFICATE_SAMPLES, CHORD_SAMPLES, _bulge
from geodesic.targets import Pairs, Problem, consecutive_pairs, run_teacher
from learned_opt.config import FamilyConfig, GeodesicsConfig
from learned_opt.geodesics import make_problem
from learned_opt.tasks.data import load_images
from learned_opt.tasks.mlp import MLPTask, TaskConfig

SEGMENTS = 32
# Level, pairs and digits in F (None: all 1437): what minutes allow on one core.
PAIRS = (("constant", 1000, None), ("sgd_profile", 30, None), ("sgd_profile", 200, 128))
# Digits times points at once: activations of twice as many do not stay in the cache, and F takes
# 1.5 times as long.
AT_ONCE = 50_000
# Multiples of our work at which a baseline's path is judged, and the most work for a baseline and
# setting: together minutes. ASE goes image by image, and what more NEB does is no shorter.
LADDER = (1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
MOST_WORK = {"small": 5e4, "large": 1e4, "NEB": 1.5e3}  # small: up to 100 parameters
# Swept, the best at each budget reported. Margins and weights are in units of the chord's excess
# over the level, rates of |θ_b - θ_a| / √d. A weight needs a margin of about what it lets through.
MARGINS = (0.0, 1e-3, 3e-3, 1e-2)
WEIGHTS = ((0.3, 0.03), (1, 0.01), (10, 0.003), (1, 0.0))  # and their margins
PENALTIES = tuple((*weight, rate) for weight, rate in product(WEIGHTS, (0.01, 0.03)))


@dataclass(frozen=True)
class Case:
    family: str
    name: str
    loss_fn: Callable[[Tensor], Tensor]
    theta_a: Tensor
    theta_b: Tensor
    level: float | LevelProfile
    exact: float | None = None  # length, where known in closed form
    trajectory: Tensor | None = None  # a first path for all methods

    @property
    def start(self) -> Tensor:
        """Where all methods start: the trajectory, or the bulging chord that ours tries first."""
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
    """Müller & Brown, Theor. Chim. Acta 53 (1979), 75-93."""
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
    """The shortest way around a ball between points of one radius: two tangents and an arc."""
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
    # u = v on the path, which goes around a ball. Exactly opposite ends would leave DSS and NEB on
    # a ridge by symmetry; 3.1 takes no luck.
    for width, level in product((2, 10), (0.01, 0.1, 0.4)):
        a, b = (torch.cat((end, end)) for end in ends(1, 3.1, width))
        exact = around(math.sqrt(2), math.sqrt(2 * (1 - math.sqrt(2 * level))), 3.1)
        yield Case("linear net", f"p = {width}, λ = {level}", linear_net, a, b, level, exact)


def muller_brown_cases() -> Iterator[Case]:
    """From the deepest minimum to the two others; only at -41, below the saddle, is no way."""
    deepest, other, middle = torch.tensor(
        [[-0.558224, 1.441726], [0.623499, 0.028038], [-0.050011, 0.466694]], dtype=torch.float64
    )
    for end, name in ((middle, "1 saddle"), (other, "2 saddles")):
        for level in (-41.0, -40.6, -40.0, -35.0, -20.0):
            family = "Müller-Brown" if level > -40.66 else "disconnected"
            yield Case(family, f"{name}, λ = {level}", muller_brown, deepest, end, level)


def digits_cases(count: int) -> Iterator[Case]:
    """From each draw of small networks the first pair of a run whose chord sgd_profile refuses."""
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


class Trace:
    """A baseline on a case, several settings side by side: evaluations, and its paths judged.

    Judging is free of charge, and the best path so far is what counts: nothing is held against a
    baseline that it could have known.
    """

    def __init__(self, case: Case, settings: list[str], work: float, limit: float):
        self.settings, self.rows = settings, torch.arange(len(settings))
        self.sublevel, self._judge = case.sublevel(len(settings)), case.sublevel(len(settings))
        self._work, self._ladder = work, [b for b in LADDER if b < limit] + [limit]
        self._seconds, self._clock = 0.0, time.process_time()
        self.seen: list[dict] = []

    def visit(self, path: Tensor, converged: bool = False) -> bool:
        """Judges the paths (settings, K + 1, d) when due. False when the budget is spent."""
        counts = int(self.sublevel.gradient_evaluations[0]), int(self.sublevel.loss_evaluations[0])
        spent, budget = (counts[0] + counts[1] / 3) / self._work, None
        while self._ladder and (spent >= self._ladder[0] or (converged and budget is None)):
            budget = self._ladder.pop(0)
        if budget is not None:
            self._seconds += time.process_time() - self._clock
            self.judge(path, budget, *counts, self._seconds / len(self.settings))
            self._clock = time.process_time()
        return bool(self._ladder)

    def judge(self, path: Tensor, budget: float, gradients: int, losses: int, seconds: float):
        found = self._judge.certify(path, CERTIFICATE_SAMPLES, self.rows)
        self.seen += [
            {
                "budget": budget,
                "settings": setting,
                "certified": int(found.feasible[i]),
                "excess": float(found.peak[i].amax()),
                "max_loss": float(found.max_loss[i]),
                "length": float(length(path[i])),
                "gradient_evaluations": gradients,
                "loss_evaluations": losses,
                "seconds": seconds,
            }
            for i, setting in enumerate(self.settings)
        ]


def ours(case: Case) -> dict:
    ends = case.theta_a, case.theta_b
    return _once(case, partial(find_geodesic, case.loss_fn, *ends, case.level, SEGMENTS,
                               case.trajectory))  # fmt: skip


def dss(case: Case) -> dict:
    """Strict settings; it ends by itself, whatever the budget."""
    ends, settings = (case.theta_a[None], case.theta_b[None]), StringSampling(max_steps=3000)
    return _once(case, partial(sample_strings, case.loss_fn, *ends, case.level, settings))


def _once(case: Case, solve: Callable) -> dict:
    start, trace = time.process_time(), Trace(case, [""], 1, 1)
    found = solve()
    path = found.paths[0] if hasattr(found, "paths") else found.path
    counts = int(found.gradient_evaluations), int(found.loss_evaluations)
    trace.judge(path[None], 1, *counts, time.process_time() - start)
    return trace.seen[0]


def curve_shortening(case: Case, work: float, scale: float, limit: float) -> list[dict]:
    """Beads go to the middle of their neighbours, then by one Newton step into the set."""
    trace = Trace(case, [f"margin {m:g}" for m in MARGINS], work, limit)
    margins = scale * torch.tensor(MARGINS).to(case.theta_a)[:, None]
    path = case.start.repeat(len(MARGINS), 1, 1)
    reach = torch.linalg.vector_norm(case.theta_b - case.theta_a) / 4
    while trace.visit(path):
        path[:, 1:-1] = (path[:, :-2] + path[:, 2:]) / 2
        losses, gradients = trace.sublevel.gradients(path[:, 1:-1], trace.rows)
        excess = losses - trace.sublevel.level(fractions(path)[:, 1:-1], trace.rows) + margins
        norms = torch.linalg.vector_norm(gradients, dim=-1).clamp_min(1e-12)
        steps = torch.minimum(excess.clamp_min(0) / norms, reach) / norms
        path[:, 1:-1] -= steps[..., None] * gradients
        path = resample(path, SEGMENTS)
    return trace.seen


def penalty(case: Case, work: float, scale: float, limit: float) -> list[dict]:
    """Adam on √(K Σ|Δ|²) + weight · Σ relu(F - λ + margin)² at beads and middles of segments.

    The first term is the length, which evenly spaced beads minimise. The rate falls along a cosine
    to 0 at the end, so there is a run for each budget.
    """
    settings = [f"weight {w:g} margin {m:g} rate {r:g}" for w, m, r in PENALTIES]
    weights, margins, rates = torch.tensor(PENALTIES).to(case.theta_a).T[..., None]
    distance = torch.linalg.vector_norm(case.theta_b - case.theta_a)
    weights, margins = weights * distance / scale**2, margins * scale
    rates = (rates * distance / case.start.shape[1] ** 0.5)[..., None]
    start, seen = case.start.expand(len(settings), -1, -1), []
    for budget in [b for b in (1, 3, 10) if b < limit / 2] + [limit]:
        trace = Trace(case, settings, work, budget)
        # Adam does not see scales: a parameter times a rate moves by that rate.
        moved = torch.zeros_like(start[:, 1:-1], requires_grad=True)
        optimizer = torch.optim.Adam([moved], lr=1.0)
        steps = math.ceil(budget * work / (2 * SEGMENTS - 1))
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

        def whole(moved=moved) -> Tensor:
            return start + torch.nn.functional.pad(rates * moved, (0, 0, 1, 1))

        while trace.visit(whole().detach()):
            path = whole()
            points = subdivide(path, 2)[:, 1:-1]
            losses, gradients = trace.sublevel.gradients(points.detach(), trace.rows)
            s = fractions(subdivide(path.detach(), 2))[:, 1:-1]
            excess = losses - trace.sublevel.level(s, trace.rows) + margins
            push = 2 * (weights * excess.clamp_min(0))[..., None] * gradients
            lengths = (SEGMENTS * path.diff(dim=1).square().sum((1, 2))).sqrt()
            optimizer.zero_grad()
            (lengths.sum() + (push * points).sum()).backward()
            optimizer.step()
            cosine.step()
        seen += trace.seen
    return seen


def elastic_band(case: Case, work: float, scale: float, limit: float) -> list[dict]:
    """ASE's NEB, improved tangents, its default spring and FIRE."""
    try:
        from ase import Atoms
        from ase.calculators.calculator import Calculator
        from ase.mep import NEB
        from ase.optimize import FIRE
    except ImportError as error:
        raise ImportError("the nudged elastic band is ASE's; pip install ase") from error
    trace, d = Trace(case, [""], work, limit), len(case.theta_a)
    atoms, dtype = -(-d // 3), case.theta_a.dtype

    def theta_of(image: Atoms) -> Tensor:
        return torch.from_numpy(image.positions.ravel()[:d].copy()).to(dtype)

    class Potential(Calculator):
        implemented_properties = ("energy", "forces")
        known = None  # θ, F and gradient, of all inner images at once where one has moved

        def calculate(self, atoms=None, properties=("forces",), system_changes=()):
            super().calculate(atoms, properties, system_changes)
            theta = theta_of(atoms)
            if self.known is None or not torch.equal(self.known[0], theta):
                inner = [i.calc for i in images[1:-1]]
                group = inner if self in inner else [self]
                points = torch.stack([theta_of(c.image) for c in group])
                losses, gradients = trace.sublevel.gradients(points[None], trace.rows)
                for calculator, *known in zip(group, points, losses[0], gradients[0], strict=True):
                    calculator.known = known
            forces = np.zeros(atoms.positions.size)  # none on what pads d to atoms
            forces[:d] = -self.known[2].double().numpy()
            self.results = {"energy": float(self.known[1]), "forces": forces.reshape(-1, 3)}

    images = []
    for theta in case.start:
        positions = np.zeros(3 * atoms)
        positions[:d] = theta.double().numpy()
        images.append(Atoms(["H"] * atoms, positions.reshape(-1, 3), calculator=Potential()))
        images[-1].calc.image = images[-1]
    optimizer = FIRE(NEB(images, method="improvedtangent"), logfile=None)
    for _ in optimizer.irun(fmax=1e-6, steps=10**9):
        path = torch.stack([theta_of(image) for image in images])[None]
        if not trace.visit(path):
            break
    else:
        trace.visit(path, converged=True)
    return trace.seen


def compare(case: Case) -> list[dict]:
    """A row for ours and DSS, and for the other baselines at 1, 10 and most times our work."""
    own, scale = ours(case), case.chord_excess()
    work = own["gradient_evaluations"] + own["loss_evaluations"] / 3
    seen = {"ours": [own], "DSS": [dss(case)]}
    for name, method in BASELINES.items():
        size = "small" if len(case.theta_a) <= 100 else "large"
        most = MOST_WORK[name if name in MOST_WORK else size] / work
        seen[name] = method(case, work, scale, min(100, max(1, most)))
    certified = [e["length"] for entries in seen.values() for e in entries if e["certified"]]
    # Without a closed form: the shortest certified path that any method found.
    reference = case.exact or min(certified, default=math.nan)
    error = 1.02 * abs(own["length"] / reference - 1) if own["certified"] else -1
    rows = []
    for method, entries in seen.items():
        for entry in entries:
            entry["length_error"] = entry["length"] / reference - 1
        # The least gradients with which it is certified and as close to the reference length as
        # ours; and with which it is within .2 % of it and sticks out by 1 % of what the chord does.
        strict, lenient = (
            min((e["gradient_evaluations"] for e in entries if abs(e["length_error"]) <= most and
                 (e["certified"] or e["excess"] <= allowed)), default="")
            for most, allowed in ((error, -math.inf), (max(error, 2e-3), 0.01 * scale))
        )  # fmt: skip
        last = max(entry["budget"] for entry in entries)
        for budget in sorted({1, min(10, last), last}):
            best = min(
                (entry for entry in entries if entry["budget"] <= budget),
                key=lambda e: (-e["certified"], e["length"] if e["certified"] else e["excess"]),
            )
            rows.append(
                {"family": case.family, "case": case.name, "parameters": len(case.theta_a),
                 "method": method, "exact": case.exact or "", "chord_excess": scale}
                | best
                | {"budget": budget, "gradients_same": strict, "gradients_lenient": lenient}
            )  # fmt: skip
    return rows


BASELINES = {"NEB": elastic_band, "curve shortening": curve_shortening, "penalty": penalty}
SWEPT = ("curve shortening", "penalty")


def comparison(output: Path) -> str:
    warm_up()
    cases = [*closed_form_cases(), *muller_brown_cases(), *digits_cases(6)]
    rows = []
    for case in cases:
        rows += compare(case)
        print(case.family, case.name, f"{time.process_time():.0f}", flush=True)
        save(output, "geodesics_comparison", rows, settings={
            "segments": SEGMENTS, "margins": MARGINS, "penalties": PENALTIES})  # fmt: skip
    return table(output / "geodesics_comparison.csv")


def warm_up() -> None:
    find_geodesic(bump, *ends(1.5, 2.6, 2), math.exp(-0.5))


def table(path: Path) -> str:
    """Markdown from geodesics_comparison.csv: certified cases, and their median length error."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    cells = defaultdict(lambda: defaultdict(dict))  # family, then column, then case: its row
    for row in rows:
        columns, method = cells[row["family"]], row["method"]
        columns[f"{method}, most work" if method in SWEPT else method][row["case"]] = row
        if method in SWEPT and row["budget"] == "1":  # the first of rising budgets; the last stays
            columns[f"{method}, same work"][row["case"]] = row

    def cell(group: list[dict]) -> str:
        errors = [float(row["length_error"]) for row in group if row["certified"] == "1"]
        error = 100 * statistics.median(errors) if errors else 0
        text = f", {error:+.2g} %" if abs(error) < 100 else f", {error:+.0f} %"
        return f"{len(errors)} of {len(group)}{text if errors else ''}"

    lines = []
    for family, columns in cells.items():
        ours = columns["ours"]
        counts = (
            f"{statistics.median(int(row[f'{kind}_evaluations']) for row in ours.values()):.0f}"
            for kind in ("gradient", "loss")
        )
        line = {"problem": family, "our gradients, losses": ", ".join(counts)}
        lines.append(line | {name: cell(list(group.values())) for name, group in columns.items()})
        for method in SWEPT:
            last = columns[f"{method}, most work"]
            ratios = [
                int(row["gradients_lenient"]) / int(ours[case]["gradient_evaluations"])
                for case, row in last.items()
                if row["gradients_lenient"] and ours[case]["gradients_lenient"]
            ]
            times = f", {statistics.median(ratios):.1f} ×" if ratios else ""
            lines[-1][f"{method}, gradients to .2 %"] = f"{len(ratios)} of {len(last)}{times}"
    return markdown(lines)


def digits_runs(hidden: int, runs: int, size: int | None) -> Problem:
    """SGD runs of 64-hidden-10 nets from different inits, F on `size` (None: all) digits."""
    task = MLPTask(TaskConfig(hidden=(hidden,)), load_images("digits"), runs)
    x, y = (part[0] for part in task.fixed_batch(size))  # the same for all runs: no loss_args

    def grad_fn(theta: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return task.loss_and_grad(theta, task.batch(0, step))

    facts = {"task": task.name, "examples": len(y)}
    return Problem(task.init(0), grad_fn, lambda theta: task.loss(theta, (x, y)), (), facts)


def solve_saved(path: str, level: str, count: int, size: int | None) -> dict:
    """In a process of its own, whose peak memory is therefore the solver's."""
    torch.set_num_threads(1)
    problem, pairs = digits_runs(32, 1, size), Pairs(*torch.load(path))
    # Early, middle and late pairs alike, whatever the count.
    keep = torch.linspace(0, len(pairs.run) - 1, min(count, len(pairs.run))).long()
    points, chunk_size = pairs.points[keep], AT_ONCE // problem.facts["examples"]
    del pairs
    warm_up()
    before, start = peak_memory(), time.process_time()
    found = find_geodesics(
        problem.loss_fn,
        points[:, 0],
        points[:, -1],
        sgd_profile(problem.loss_fn, points, (), chunk_size) if level == "sgd_profile" else None,
        initial_path=points,
        chunk_size=chunk_size,
    )
    seconds = time.process_time() - start
    chords, certified = found.chord_feasible, found.certified
    shortened = found.normalized_length[certified & ~chords]
    return {
        "level": level,
        "pairs": len(points),
        "parameters": found.path.shape[-1],
        "examples": problem.facts["examples"],
        "chord": int(chords.sum()),
        "shortened": len(shortened),
        "not_certified": int((~certified).sum()),
        "normalized_length": float(shortened.mean()) if len(shortened) else math.nan,
        "seconds": seconds,
        "loss_evaluations": float(found.loss_evaluations.double().mean()),
        "gradient_evaluations": float(found.gradient_evaluations.double().mean()),
        "most_gradient_evaluations": int(found.gradient_evaluations.max()),
        "input_mb": points.nbytes / 2**20,
        "before_mb": before,
        "peak_mb": peak_memory(),
    }


def peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KiB


def pairs(output: Path) -> str:
    """Consecutive pairs of SGD runs, T = 320, as `learned-opt geodesics` makes them."""
    problem = digits_runs(32, 220, None)
    found = consecutive_pairs(run_teacher(problem, 1600, 10), 320)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "pairs.pt")
        torch.save(tuple(found), path)
        available = len(found.run)
        del problem, found
        for arguments in PAIRS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(solve_saved, (path, *arguments)))
            print(rows[-1], flush=True)
            save(output, "geodesics_pairs", rows, available=available)
    return markdown(rows)


def markdown(rows: list[dict]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ball_batch(count: int, d: int, dtype: torch.dtype = torch.float64) -> tuple:
    angles = torch.linspace(2.2, 2.8, count).tolist() if count > 1 else [2.6]
    points = zip(*(ends(1.5, angle, d) for angle in angles), strict=True)
    return bump, *(torch.stack(end).to(dtype) for end in points), math.exp(-0.5)


def digits_pair(hidden: int, size: int | None = 128) -> tuple:
    """The first 320 steps of a run, under the level that its chord leaves."""
    problem = digits_runs(hidden, 1, size)
    run = run_teacher(problem, 320, 10)
    points = run.points.transpose(0, 1)
    profile = sgd_profile(problem.loss_fn, points)
    return problem.loss_fn, points[:, 0], points[:, -1], profile, points


FITTED = ("seconds", "seconds_an_iteration", "gradient_evaluations", "loss_evaluations")


def _find(arguments: tuple, num_segments: int = SEGMENTS) -> Geodesic:
    loss_fn, theta_a, theta_b, level, *start = arguments
    chunk_size = max(8, min(256, 2**24 // theta_a.shape[1]))  # at most 64 MB of points in float32
    return find_geodesics(
        loss_fn, theta_a, theta_b, level, num_segments, *start, chunk_size=chunk_size
    )


def scaling(output: Path) -> str:
    """Cost against one quantity at a time, and its exponent: the slope of the log-log line."""
    digits = "digits 64-h-10, 128 examples, sgd_profile"
    series = [
        ("segments", "ball, d = 10, 8 pairs", (8, 16, 32, 64, 128), lambda _: ball_batch(8, 10)),
        ("pairs", "ball, d = 10", (1, 3, 10, 30, 100, 300, 1000), lambda n: ball_batch(n, 10)),
        ("parameters", "ball, float32", (1_000, 10_000, 100_000, 1_000_000),
         lambda d: ball_batch(1, d, torch.float32)),
        ("parameters", digits, (1_060, 10_060, 100_060), lambda d: digits_pair((d - 10) // 75)),
    ]  # fmt: skip
    warm_up()
    rows, exponents = [], {}
    for quantity, problem, values, make in series:
        group = []
        for value in values:
            arguments, seconds = make(value), []
            for _ in range(3 if value <= 10_000 else 1):
                start = time.process_time()
                found = _find(arguments, value if quantity == "segments" else SEGMENTS)
                seconds.append(time.process_time() - start)
            group.append(
                {
                    "quantity": quantity,
                    "problem": problem,
                    "value": value,
                    "certified": float(found.certified.double().mean()),
                    "iterations": float(found.iterations.double().mean()),
                    "gradient_evaluations": float(found.gradient_evaluations.double().mean()),
                    "loss_evaluations": float(found.loss_evaluations.double().mean()),
                    "seconds": min(seconds),
                    "seconds_an_iteration": min(seconds) / max(1, int(found.iterations.max())),
                }
            )
            print(group[-1], flush=True)
        logs = np.log([[row[k] for k in ("value", *FITTED)] for row in group])
        # Below, what does not grow hides the slope: the last three values say where it goes.
        exponents[f"{quantity}, {problem}"] = {
            name: [float(np.polyfit(logs[at:, 0], logs[at:, i + 1], 1)[0]) for at in (0, -3)]
            for i, name in enumerate(FITTED)
        }
        rows += group
        save(output, "geodesics_scaling", rows, exponents_all_and_last_three=exponents)
    lines = [{"cost against": key} | {k: f"{v[0]:.2f}, {v[1]:.2f}" for k, v in fit.items()}
             for key, fit in exponents.items()]  # fmt: skip
    return markdown(rows) + "\n\n" + markdown(lines)


def scaling_table(folder: Path) -> str:
    """Markdown from geodesics_scaling: ends of each series, and the exponent of its seconds."""
    with (folder / "geodesics_scaling.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    facts = json.loads((folder / "geodesics_scaling.json").read_text())
    lines = []
    for name, fit in facts["exponents_all_and_last_three"].items():
        series = [row for row in rows if f"{row['quantity']}, {row['problem']}" == name]
        line = {"cost against": series[0]["quantity"], "problem": series[0]["problem"]}
        for column, text in {
            "value": "from, to",
            "gradient_evaluations": "gradients a pair",
            "loss_evaluations": "losses a pair",
            "seconds": "seconds",
        }.items():
            line[text] = ", ".join(f"{float(series[i][column]):.3g}" for i in (0, -1))
        exponents = ", ".join(f"{value:.2f}" for value in fit["seconds"])
        lines.append(line | {"exponent of seconds: all, last three": exponents})
    return markdown(lines)


@contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Exclusive seconds of the solver's parts."""
    seconds, running = defaultdict(float), []

    def timed(function: Callable, name: str) -> Callable:
        def wrapper(*args, **kwargs):
            start = time.process_time()
            running.append(0.0)
            result = function(*args, **kwargs)
            spent = time.process_time() - start
            seconds[name] += spent - running.pop()
            if running:
                running[-1] += spent
            return result

        return wrapper

    parts = {
        "F": (SublevelSet, "_evaluate"),
        "gradients": (SublevelSet, "gradients"),
        "level": (SublevelSet, "level"),
        "rest of sampling": (SublevelSet, "sample"),
        "dual problem": (shortening_module, "nonnegative_qp"),
        "Gram products and step": (shortening_module, "_step"),
        "rest of sites": (shortening_module, "_sites"),
        "copies of sites and samples": (shortening_module, "_put"),
        "rest of shortening": (solve_module, "shorten"),
        "DSS": (solve_module, "sample_strings"),
    }
    with ExitStack() as stack:
        for name, (owner, attribute) in parts.items():
            function = timed(getattr(owner, attribute), name)
            stack.enter_context(mock.patch.object(owner, attribute, function))
        yield seconds


def profile(output: Path) -> str:
    """Share of each part of the solver's time."""
    warm_up()
    problems = {
        "ball, d = 10, 1 pair": ball_batch(1, 10),
        "ball, d = 10, 300 pairs": ball_batch(300, 10),
        "ball, d = 100,000, float32": ball_batch(1, 100_000, torch.float32),
        "digits 64-32-10, all 1437": digits_pair(32, None),
    }
    rows = []
    for problem, arguments in problems.items():
        with stopwatch() as seconds:
            start = time.process_time()
            _find(arguments)
            total = time.process_time() - start
        rows += [{"problem": problem, "seconds": total, "part": part, "share": spent / total}
                 for part, spent in sorted(seconds.items(), key=lambda item: -item[1])]  # fmt: skip
    save(output, "geodesics_profile", rows)
    return markdown(rows)


PARTS = {"comparison": comparison, "pairs": pairs, "scaling": scaling, "profile": profile}
