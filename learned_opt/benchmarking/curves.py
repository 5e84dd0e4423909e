"""Plots of the report as inline SVG, which adopts the page's text color, light or dark."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from learned_opt.benchmarking.stats import TAU_MAX, performance_profile, smooth

# The first six are colors of Okabe & Ito (2008), which color-blind people can distinguish, without
# yellow and black, which are invisible on one of the two backgrounds. Further entrants also differ
# in their dashes.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9",
           "#999933", "#A0522D", "#BB4488", "#44AA99")  # fmt: skip
DASHES = ("", "5 2", "1.5 1.5", "6 2 1.5 2")  # in points, as SVG writes them
PLAIN = 6  # the number of colors that need no dashes
_TEXT = "#010203"  # stands for the page's text color while matplotlib draws
_POINTS = 100  # per curve; a phone shows no more, and the report stays small


def style(i: int) -> tuple[str, str]:
    """Returns the color and the dashes of entrant i, which are the same in every plot."""
    return COLOURS[i % len(COLOURS)], DASHES[i // PLAIN % len(DASHES)]


def loss_curves(runs: Mapping[str, Sequence[np.ndarray]], title: str) -> str:
    """Returns an `<svg>` of the smoothed losses of each entrant's runs.

    It shows the mean over seeds, in a band from the lowest to the highest. A line ends at the step
    at which the first of its runs diverged.
    """

    return _svg(lambda axes: draw_losses(axes, runs), title)


def evaluation_curves(
    runs: Mapping[str, Sequence[np.ndarray]],
    title: str,
    target: float | None = None,
    change: int = 0,
) -> str:
    """Returns an `<svg>` of the validation losses of each entrant's runs.

    It shows the mean over seeds, in a band from the lowest to the highest. A line ends where the
    first of its runs diverged.

    Args:
        runs: the steps and losses of each run, (evaluations, 2), by entrant.
        title: the label for screen readers.
        target: a loss to mark; None for none.
        change: a step to mark; 0 for none.
    """

    def draw(axes: Axes) -> None:
        axes.set(yscale="log", xlabel="step", ylabel="validation loss")
        seen = [] if target is None else [target]
        for i, curves in enumerate(runs.values()):
            length = min(map(len, curves))
            if not length:
                continue
            losses = np.stack([curve[:length, 1] for curve in curves])
            finite = np.isfinite(losses).all(0)
            _draw_runs(axes, curves[0][:length, 0][finite], losses[:, finite], i)
            seen += [*losses[:, 0], *losses[:, finite].ravel()]
        if target is not None:
            axes.axhline(target, color=_TEXT, lw=0.8, ls=":")
        if change:
            axes.axvline(change, color=_TEXT, lw=0.8, ls=":")
        start = max((curve[0, 1] for curves in runs.values() for curve in curves if len(curve)),
                    default=0.0)  # fmt: skip
        _limit(axes, min(seen, default=0.0), start, 1.05)

    return _svg(draw, title)


def draw_losses(axes: Axes, runs: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Draws the curves of `loss_curves`, each labeled with its entrant."""
    axes.set(yscale="log", xlabel="step", ylabel="minibatch training loss")
    start, least = 0.0, np.inf
    for i, (name, losses) in enumerate(runs.items()):
        losses = np.stack(losses)
        curves = smooth(losses)
        curves = np.where(np.isfinite(curves).all(0), curves, np.nan)
        if np.isnan(curves[:, 0]).any():
            continue
        index = np.linspace(0, losses.shape[1] - 1, _POINTS).astype(int)
        _draw_runs(axes, index + 1, curves[:, index], i, name)
        start = max(start, losses[:, 0].max())
        least = min(least, np.nanmin(np.where(curves > 0, curves, np.nan)))
    _limit(axes, least, start, 1.5)


def _draw_runs(axes: Axes, steps: np.ndarray, losses: np.ndarray, i: int, label: str = "") -> None:
    """Draws the mean of losses (runs, steps) of entrant i, in a band from lowest to highest."""
    line = _line(i)
    axes.plot(steps, losses.mean(0), label=label, **line)
    band = {"color": line["color"], "alpha": 0.12, "lw": 0}
    axes.fill_between(steps, losses.min(0), losses.max(0), **band)


def _limit(axes: Axes, least: float, start: float, margin: float) -> None:
    """Limits the axis to the highest initial loss, so that an explosion does not hide the rest."""
    if 0 < least <= start < np.inf:
        axes.set_ylim(least / margin, start * margin)
        numbers = (1, 2, 5) if start < 30 * least else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=numbers))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def profiles(costs: np.ndarray, title: str) -> str:
    """Returns an `<svg>` of the performance profiles of costs (entrants, tasks), see stats."""
    taus = np.linspace(1, TAU_MAX, 601)

    def draw(axes: Axes) -> None:
        axes.set(
            xlabel="τ, times the steps of the fastest", ylabel="share of tasks", ylim=(0, 1.03)
        )
        for i, shares in enumerate(performance_profile(costs, taus)):
            axes.step(taus, shares, where="post", **_line(i))

    return _svg(draw, title)


def _svg(draw: Callable[[Axes], None], title: str) -> str:
    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    rc = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 11}  # ids differ by plot
    with rc_context(rc | dict.fromkeys(coloured, _TEXT)):
        figure = Figure(figsize=(4.6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue().replace(_TEXT, "currentColor")
    label = html.escape(title, quote=True)
    return svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _line(i: int) -> dict[str, Any]:
    colour, dashes = style(i)
    pattern = (0, tuple(map(float, dashes.split()))) if dashes else "-"
    return {"color": colour, "linestyle": pattern, "lw": 1.5}
