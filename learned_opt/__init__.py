"""Learned optimizers for PyTorch: use one, train your own, benchmark it."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from geodesic.lazy import lazy as _lazy
from learned_opt.errors import ConfigError, DataError, LearnedOptError, OutputError, WeightsError

if TYPE_CHECKING:
    from geodesic.dataset import PathDataset
    from geodesic.manifest import DatasetError
    from learned_opt.benchmarking import BenchmarkConfig, BenchmarkTask, Entrant, benchmark
    from learned_opt.comparison import Comparison, compare
    from learned_opt.config import GeodesicsConfig, TrainConfig
    from learned_opt.optimizer import LearnedOptimizer
    from learned_opt.rules import UpdateRule, make_rule, register
    from learned_opt.target_paths import make_geodesics
    from learned_opt.tasks.base import Task
    from learned_opt.tasks.families import FamilyConfig
    from learned_opt.tasks.kinds import TaskConfig
    from learned_opt.tasks.own import OwnTask
    from learned_opt.training.stages import train
    from learned_opt.weights import load_rule, save_rule

__version__ = version("learned-opt")
__all__ = [
    "BenchmarkConfig",
    "BenchmarkTask",
    "Comparison",
    "ConfigError",
    "DataError",
    "DatasetError",
    "Entrant",
    "FamilyConfig",
    "GeodesicsConfig",
    "LearnedOptError",
    "LearnedOptimizer",
    "OutputError",
    "OwnTask",
    "PathDataset",
    "Task",
    "TaskConfig",
    "TrainConfig",
    "UpdateRule",
    "WeightsError",
    "__version__",
    "benchmark",
    "compare",
    "load_rule",
    "make_geodesics",
    "make_rule",
    "register",
    "save_rule",
    "train",
]
# The modules of the public names that are imported on first use. They are slow to import, and the
# command must handle Ctrl-C before it imports torch.
_MODULES = {
    "geodesic.dataset": ("PathDataset",),
    "geodesic.manifest": ("DatasetError",),
    "learned_opt.benchmarking": (
        "BenchmarkConfig",
        "BenchmarkTask",
        "Entrant",
        "benchmark",
    ),
    "learned_opt.comparison": ("Comparison", "compare"),
    "learned_opt.config": ("GeodesicsConfig", "TrainConfig"),
    "learned_opt.target_paths": ("make_geodesics",),
    "learned_opt.optimizer": ("LearnedOptimizer",),
    "learned_opt.rules": ("UpdateRule", "make_rule", "register"),
    "learned_opt.tasks.base": ("Task",),
    "learned_opt.tasks.families": ("FamilyConfig",),
    "learned_opt.tasks.kinds": ("TaskConfig",),
    "learned_opt.tasks.own": ("OwnTask",),
    "learned_opt.training.stages": ("train",),
    "learned_opt.weights": ("load_rule", "save_rule"),
}
if not TYPE_CHECKING:  # type checkers would take any name
    __getattr__, __dir__ = _lazy("learned_opt", _MODULES)
