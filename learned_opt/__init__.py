"""Learned optimizers for PyTorch: use one, train your own, benchmark it."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from learned_opt.optimizer import LearnedOptimizer
from learned_opt.rules import UpdateRule, make_rule, register
from learned_opt.weights import load_rule, save_rule

if TYPE_CHECKING:
    from learned_opt.comparison import Comparison, compare

__version__ = version("learned-opt")
__all__ = [
    "Comparison",
    "LearnedOptimizer",
    "UpdateRule",
    "__version__",
    "compare",
    "load_rule",
    "make_rule",
    "register",
    "save_rule",
]


def __getattr__(name: str) -> Any:
    """What takes its time to import is imported when it is asked for."""
    if name in ("Comparison", "compare"):
        from learned_opt import comparison

        return getattr(comparison, name)
    raise AttributeError(f"module 'learned_opt' has no attribute {name!r}")
