"""Tells nets that were trained before from fresh ones, by the singular values of their matrices."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

TRAINED = "trained"  # of State.tensor, 1 if the net was trained before the first step
SHARE = 1 / 4  # a net counts as trained if at least this share of its matrices does
BEYOND = 1.1  # the largest singular value of a trained matrix, in units of what chance gives
DEVIATIONS = 6.0  # and how far beyond that, in units of the scale of its fluctuations
ITERATIONS = 16


def is_trained(matrices: Iterable[Tensor]) -> bool:
    """Returns whether a net with these matrices was trained before, rather than drawn at random.

    The largest singular value of a matrix (m, n) with independent entries of RMS s is about
    s (√m + √n), and its square fluctuates by about s² (√m + √n) (1/√m + 1/√n)^(1/3), the scale of
    the Tracy-Widom law (Johnstone 2001, Annals of Statistics 29). Training adds directions that
    the matrix has learned, whose singular values are far beyond that (Martin & Mahoney 2021, JMLR
    22). Matrices of zeros, which tell nothing, do not count.

    Args:
        matrices: tensors of two or more dimensions; all but the first are columns.
    """
    found = [
        _beyond_chance(w) for w in (x.detach().flatten(1).float() for x in matrices) if w.any()
    ]
    return bool(found) and sum(found) >= SHARE * len(found)


def _beyond_chance(w: Tensor) -> bool:
    m, n = (side**0.5 for side in w.shape)
    rng = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(w.shape[1], generator=rng, dtype=w.dtype, device="cpu").to(w.device)
    for _ in range(ITERATIONS):  # of the power method, which finds it from below
        x = w.mT @ (w @ (x / x.norm()))
    largest = float(x.norm() / w.square().mean())
    scale = (m + n) * (1 / m + 1 / n) ** (1 / 3)
    return largest > max((BEYOND * (m + n)) ** 2, (m + n) ** 2 + DEVIATIONS * scale)
