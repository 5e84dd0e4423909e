"""Data sets of target paths: geodesics, chords and SGD's paths of the same pairs."""

import pytest
import torch

from geodesic.manifest import DatasetError
from geodesic.targets import Problem, TargetConfig, run_teacher, target_paths, write_dataset

CURVATURE = torch.tensor([9.0, 1.0, 0.3], dtype=torch.float64)


def problem(index):
    """Two runs down a valley that bends: steep first, then along its floor."""
    theta = torch.tensor([[1.0, 1.0, 0.2], [0.5, -1.0, 0.1 + index]], dtype=torch.float64)
    return Problem(
        theta,
        lambda theta, step: (theta.square() @ CURVATURE / 2, theta * CURVATURE),
        lambda theta, shift: theta.square() @ CURVATURE / 2 + shift,
        (torch.tensor([1.0, 2.0], dtype=torch.float64),),
        {},
    )


def config(path):
    return TargetConfig(
        40, 4, pairs_per_run=2, stride=4, level="sgd_profile", num_segments=8, path=path
    )


def test_chords_trajectories_and_geodesics_are_of_the_same_pairs(tmp_path):
    shards = {
        path: write_dataset(tmp_path / path, problem, 1, config(path), {}).shard(0)
        for path in ("chord", "geodesic", "trajectory")
    }
    chord, geodesic, trajectory = shards.values()
    assert len(chord["run"]) == 4
    for name in ("run", "time", "learning_rate", "loss_a", "loss_b"):
        assert all(torch.equal(tensors[name], chord[name]) for tensors in shards.values())

    sgd = run_teacher(problem(0), 80, 4).points  # (records, runs, d)
    ends = {name: target_paths(tensors, 4, 2)[0] for name, tensors in shards.items()}
    for points in ends.values():  # after 40 and 80 steps
        assert torch.allclose(points[:, [0, 4, 8]], sgd[[0, 10, 20]].transpose(0, 1))
    beads = trajectory["beads"].unflatten(0, (4, 11))
    first = (trajectory["run"] == 0).nonzero()[0].item()
    assert torch.equal(beads[first], sgd[:11, 0])
    assert torch.allclose(ends["chord"][:, 2], (sgd[0] + sgd[10]) / 2)

    assert (chord["normalized_length"] == 1).all()
    assert (chord["length"] <= geodesic["length"] + 1e-12).all()
    assert (geodesic["length"] <= trajectory["length"] + 1e-12).all()
    assert not geodesic["chord_feasible"].all()  # or they would be no controls


def test_a_folder_of_other_paths_is_refused(tmp_path):
    write_dataset(tmp_path, problem, 1, config("chord"), {})
    with pytest.raises(DatasetError, match="path"):
        write_dataset(tmp_path, problem, 1, config("geodesic"), {})
    with pytest.raises(ValueError, match="path is 'line'"):
        config("line")
