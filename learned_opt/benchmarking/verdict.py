"""Sums up a benchmark in a sentence: who won, by how much, and what was missed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from learned_opt.benchmarking.stats import geometric_mean

Array = np.ndarray


def verdict(speed_ups: Mapping[str, Array], baseline: str, goal: str) -> str:
    """Returns the sentence of the report and of the terminal.

    Args:
        speed_ups: the speed-ups of each entrant, (tasks, runs); 0 if a run missed the target.
        baseline: the entrant whose result is the target.
        goal: what was to be reached, such as "validation loss".
    """
    others = {name: scores for name, scores in speed_ups.items() if name != baseline}
    if not others:
        return f"Nothing was compared with {baseline}."
    winner = max(others, key=lambda name: float(geometric_mean(others[name])))
    scores = others[winner]
    if not scores.any():
        return f"{baseline} won: {winner} never reached its {goal}, and no other came closer."
    gain = float(geometric_mean(scores))
    if gain <= 1:
        beginning = (
            f"{baseline} won: no other optimizer reached its {goal} in fewer steps; the nearest, "
            f"{winner}, needed {1 / gain:.2f} times the steps"
        )
    else:
        beginning = (
            f"{winner} won: it reached the {goal} of {baseline} in {gain:.2f} times fewer steps"
        )
    tasks, runs = scores.shape
    return (
        f"{beginning} and {_misses(scores)} (geometric mean over "
        f"{counted(tasks, 'task')} and {counted(runs, 'seed')}; a miss counts as half)."
    )


def counted(number: int, noun: str, nouns: str = "") -> str:
    """Returns a number with its noun, such as "1 task" and "2 tasks"."""
    return f"{number} {noun if number == 1 else nouns or noun + 's'}"


def _misses(scores: Array) -> str:
    """Says how many runs missed the target, and on how many tasks all of them did."""
    missed = int((scores == 0).sum())
    if not missed:
        return "never missed it"
    whole = int((scores == 0).all(1).sum())
    text = f"missed it in {missed} of {counted(scores.size, 'run')}"
    return text + (f", on {whole} of {counted(len(scores), 'task')} every time" if whole else "")
