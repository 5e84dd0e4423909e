"""Short paths between two parameter vectors along which a loss stays below a level."""

from typing import TYPE_CHECKING

from geodesic.lazy import lazy as _lazy

if TYPE_CHECKING:
    from geodesic.alignment import (
        PermutationSpec,
        align,
        match_weights,
        mlp_spec,
        permute,
        sequential_spec,
    )
    from geodesic.dataset import PathDataset
    from geodesic.dss import Strings, StringSampling, sample_strings
    from geodesic.level_set import LevelProfile, sgd_profile
    from geodesic.manifest import DatasetError
    from geodesic.model import ModelLoss
    from geodesic.path import length, normalized_length, points_at, project, resample
    from geodesic.sharded import find_geodesics_on_disk
    from geodesic.solve import Geodesic, find_geodesic, find_geodesics

__all__ = [
    "DatasetError",
    "Geodesic",
    "LevelProfile",
    "ModelLoss",
    "PathDataset",
    "PermutationSpec",
    "StringSampling",
    "Strings",
    "align",
    "find_geodesic",
    "find_geodesics",
    "find_geodesics_on_disk",
    "length",
    "match_weights",
    "mlp_spec",
    "normalized_length",
    "permute",
    "points_at",
    "project",
    "resample",
    "sample_strings",
    "sequential_spec",
    "sgd_profile",
]
if not TYPE_CHECKING:  # type checkers would take any name
    __getattr__, __dir__ = _lazy(
        "geodesic",
        {
            "geodesic.alignment": (
                "PermutationSpec",
                "align",
                "match_weights",
                "mlp_spec",
                "permute",
                "sequential_spec",
            ),
            "geodesic.dataset": ("PathDataset",),
            "geodesic.manifest": ("DatasetError",),
            "geodesic.dss": ("Strings", "StringSampling", "sample_strings"),
            "geodesic.level_set": ("LevelProfile", "sgd_profile"),
            "geodesic.model": ("ModelLoss",),
            "geodesic.path": ("length", "normalized_length", "points_at", "project", "resample"),
            "geodesic.sharded": ("find_geodesics_on_disk",),
            "geodesic.solve": ("Geodesic", "find_geodesic", "find_geodesics"),
        },
    )
