"""Short paths between two parameter vectors along which a loss stays below a level."""

from geodesic.level_set import LevelProfile, sgd_profile
from geodesic.model import ModelLoss
from geodesic.path import length, normalized_length, points_at, project, resample
from geodesic.sharded import find_geodesics_on_disk
from geodesic.solve import Geodesic, find_geodesic, find_geodesics

__all__ = [
    "Geodesic",
    "LevelProfile",
    "ModelLoss",
    "find_geodesic",
    "find_geodesics",
    "find_geodesics_on_disk",
    "length",
    "normalized_length",
    "points_at",
    "project",
    "resample",
    "sgd_profile",
]
