"""Training-loss curves as inline SVG that follows the page's text colour, light or dark."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe & Ito 2008, told apart with any colour vision; without their yellow and black, which one
# of the two backgrounds would hide. More entrants than colours differ by the dashes.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
DASHES = ("-", "--", ":", "-.")
_TEXT = "#010203"  # stands for the page's text colour while matplotlib draws
_POINTS = 100  # per curve: a phone shows no more, and the report stays small


def loss_curves(runs: Mapping[str, Sequence[np.ndarray]], key: str) -> str:
    """`<svg>` of the losses of each entrant's runs: mean over seeds, band from least to most.

    A line ends at the step at which the first of its runs diverged. `key` keeps the ids of
    several figures on a page apart.
    """
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": key,
        "font.size": 9,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _TEXT
        ),
    }
    with rc_context(style):
        figure = Figure(figsize=(5, 3.3), layout="constrained")
        draw_losses(figure.add_subplot(), runs)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_TEXT, "currentColor")


def draw_losses(axes: Axes, runs: Mapping[str, Sequence[np.ndarray]]) -> None:
    """The curves of `loss_curves` on `axes`."""
    axes.set(yscale="log", xlabel="step", ylabel="minibatch training loss")
    start = 0.0
    for i, (name, losses) in enumerate(runs.items()):
        losses = [run for run in losses if len(run)]  # a failed run has none
        if not losses:
            continue
        start = max(start, *(float(run[0]) for run in losses))
        steps, smooth = _smooth(np.stack(losses))
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        axes.plot(steps, smooth.mean(0), dash, color=colour, lw=1.5, label=name)
        axes.fill_between(steps, smooth.min(0), smooth.max(0), color=colour, alpha=0.2, lw=0)
    if np.isfinite(start) and start > 0:
        bottom = axes.get_ylim()[0]
        axes.set_ylim(min(bottom, start / 2), 2 * start)  # an explosion must not hide the rest
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)


def _smooth(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(seeds, steps) -> steps and means of at most _POINTS windows; NaN once a run diverged."""
    losses = np.where(np.isfinite(losses), losses, np.nan)
    windows = np.array_split(np.arange(losses.shape[1]), min(_POINTS, losses.shape[1]))
    steps = np.array([window.mean() + 1 for window in windows])
    return steps, np.stack([losses[:, window].mean(1) for window in windows], axis=1)
