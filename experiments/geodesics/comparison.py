"""Compares the geodesic solver with other ways to find a path. See throughput.py.

The other methods are ASE's nudged elastic band, a penalty method, projected curve shortening and
Dynamic String Sampling. The cases are known problems and networks.

Work is gradients + losses / 3, because a gradient is a forward pass and a backward pass of twice
its cost. Seconds are CPU time of the thread, so they do not depend on other processes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.geodesics.problems import (
    SEGMENTS,
    Case,
    bump,
    closed_form_cases,
    digits_cases,
    ends,
    muller_brown_cases,
)
from experiments.result_files import markdown, read, save
from geodesic import find_geodesic, length, resample
from geodesic.dss import StringSampling, sample_strings
from geodesic.path import fractions, subdivide
from geodesic.solve import CERTIFICATE_SAMPLES

# A baseline's path is judged at these multiples of our work. The limit on the work of a baseline in
# a setting keeps the total at minutes. ASE processes one image at a time, and more work of NEB did
# not shorten its paths.
LADDER = (1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
MOST_WORK = {"small": 5e4, "large": 1e4, "NEB": 1.5e3}  # small has up to 100 parameters
# The swept settings, of which the best at each budget is reported. Margins and weights are in units
# of the chord's excess over the level, and rates in units of |θ_b - θ_a| / √d. Each weight has a
# margin of about the excess that it permits.
MARGINS = (0.0, 1e-3, 3e-3, 1e-2)
WEIGHTS = ((0.3, 0.03), (1, 0.01), (10, 0.003), (1, 0.0))  # and their margins
PENALTIES = tuple((*weight, rate) for weight, rate in product(WEIGHTS, (0.01, 0.03)))


class Trace:
    """Counts the evaluations of a baseline on a case, in several settings at once, and its paths.

    Judging a path costs no evaluations, and the best path so far counts. This favors the baselines.
    """

    def __init__(self, case: Case, settings: list[str], work: float, limit: float):
        self.settings, self.rows = settings, torch.arange(len(settings))
        self.sublevel, self._judge = case.sublevel(len(settings)), case.sublevel(len(settings))
        self._work, self._ladder = work, [b for b in LADDER if b < limit] + [limit]
        self._seconds, self._clock = 0.0, time.process_time()
        self.seen: list[dict] = []

    def visit(self, path: Tensor, converged: bool = False) -> bool:
        """Judges the paths (settings, K + 1, d) if due. Returns False if the budget is spent."""
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
    """Runs Dynamic String Sampling with strict settings, which ends by itself at any budget."""
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
    """Moves each bead to the middle of its neighbors, and then by a Newton step into the set."""
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
    """Runs Adam on √(K Σ|Δ|²) + weight · Σ relu(F - λ + margin)² at beads and midpoints.

    The first term equals the length if beads are equally spaced, which minimizes it. The learning
    rate follows a cosine to 0 at the end, so there is a run for each budget.
    """
    settings = [f"weight {w:g} margin {m:g} rate {r:g}" for w, m, r in PENALTIES]
    weights, margins, rates = torch.tensor(PENALTIES).to(case.theta_a).T[..., None]
    distance = torch.linalg.vector_norm(case.theta_b - case.theta_a)
    weights, margins = weights * distance / scale**2, margins * scale
    rates = (rates * distance / case.start.shape[1] ** 0.5)[..., None]
    start, seen = case.start.expand(len(settings), -1, -1), []
    for budget in [b for b in (1, 3, 10) if b < limit / 2] + [limit]:
        trace = Trace(case, settings, work, budget)
        # Adam is invariant to scale, so a parameter multiplied by a rate moves by that rate.
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
    """Runs ASE's NEB with improved tangents, its default spring constant and FIRE."""
    try:
        from ase import Atoms
        from ase.calculators.calculator import Calculator
        from ase.mep import NEB
        from ase.optimize import FIRE
    except ImportError as error:
        raise ImportError("the nudged elastic band needs ASE; run pip install ase") from error
    trace, d = Trace(case, [""], work, limit), len(case.theta_a)
    atoms, dtype = -(-d // 3), case.theta_a.dtype

    def theta_of(image: Atoms) -> Tensor:
        return torch.from_numpy(image.positions.ravel()[:d].copy()).to(dtype)

    class Potential(Calculator):
        implemented_properties = ("energy", "forces")
        known = None  # θ, F and gradient of all inner images, evaluated together when one moved

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
            forces = np.zeros(atoms.positions.size)  # 0 for the padding of d to atoms
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
    """Returns the rows of our solver, DSS and the baselines at 1, 10 and most times our work."""
    own, scale = ours(case), case.chord_excess()
    work = own["gradient_evaluations"] + own["loss_evaluations"] / 3
    seen = {"ours": [own], "DSS": [dss(case)]}
    for name, method in BASELINES.items():
        size = "small" if len(case.theta_a) <= 100 else "large"
        most = MOST_WORK[name if name in MOST_WORK else size] / work
        seen[name] = method(case, work, scale, min(100, max(1, most)))
    certified = [e["length"] for entries in seen.values() for e in entries if e["certified"]]
    # Without a closed form, the reference is the shortest certified path of any method.
    reference = case.exact or min(certified, default=math.nan)
    error = 1.02 * abs(own["length"] / reference - 1) if own["certified"] else -1
    rows = []
    for method, entries in seen.items():
        for entry in entries:
            entry["length_error"] = entry["length"] / reference - 1
        # The least gradients after which it is certified and as close to the reference length as
        # ours; and after which it is within .2 % of it and its excess is 1 % of the chord's.
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
    """Returns a table of certified cases and median length errors in geodesics_comparison.csv."""
    rows = read(path)
    cells = defaultdict(lambda: defaultdict(dict))  # the row by family, column and case
    for row in rows:
        columns, method = cells[row["family"]], row["method"]
        columns[f"{method}, most work" if method in SWEPT else method][row["case"]] = row
        if method in SWEPT and row["budget"] == "1":  # the lowest budget
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
