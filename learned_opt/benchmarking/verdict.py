"""One sentence on a benchmark: who won, by how much, and what was missed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from learned_opt.benchmarking.stats import geometric_mean, iqm

Array = np.ndarray


def verdict(speed_ups: Mapping[str, Array], baseline: str, goal: str) -> str:
    """The sentence with which report and terminal begin.

    Args:
        speed_ups: (tasks, runs) of each entrant, 0 where a run missed the target.
        baseline: the entrant whose result is the target.
        goal: what was to be reached, as in "validation loss".
    """
    others = {name: scores for name, scores in speed_ups.items() if name != baseline}
    if not others:
        return f"Nobody was compared with {baseline}."
    winner = max(others, key=lambda name: float(geometric_mean(others[name])))
    scores = others[winner]
    gain = float(geometric_mean(scores))
    tasks, runs = scores.shape
    if gain <= 1:
        beginning = (
            f"{baseline} won: no other optimizer reached its {goal} in fewer steps over all "
            f"tasks; the nearest, {winner}, needed {_times(1 / gain)} the steps"
        )
    else:
        beginning = (
            f"{winner} won: it reached the {goal} of {baseline} in {_times(gain)} fewer steps"
        )
    missed = _misses(scores)
    return (
        f"{beginning} (geometric mean over {tasks} tasks and {runs} seeds, a miss counting half; "
        f"interquartile mean {float(iqm(scores)):.2f}), and it missed {missed}."
    )


def _misses(scores: Array) -> str:
    """In how many runs, and on how many tasks every time."""
    missed = int((scores == 0).sum())
    if not missed:
        return "it in no run"
    whole = int((scores == 0).all(1).sum())
    text = f"it in {missed} of {scores.size} runs"
    return text + (f", on {whole} of {len(scores)} tasks each time" if whole else "")


def _times(factor: float) -> str:
    return f"{factor:.2f} times"
