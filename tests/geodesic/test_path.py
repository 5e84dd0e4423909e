import math

import pytest
import torch

from geodesic import path as paths

L_SHAPE = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 1.0]], dtype=torch.float64)


def test_lengths_of_an_l_shape():
    assert paths.segment_lengths(L_SHAPE).tolist() == [3.0, 1.0]
    assert paths.length(L_SHAPE).item() == 4.0
    assert paths.normalized_length(L_SHAPE).item() == pytest.approx(4 / math.sqrt(10))
    assert paths.fractions(L_SHAPE).tolist() == [0.0, 0.75, 1.0]


def test_points_lie_at_their_arclength():
    points = paths.points_at(L_SHAPE, torch.tensor([0.0, 0.375, 0.75, 0.875, 1.0]))
    assert points.tolist() == [[0, 0], [1.5, 0], [3, 0], [3, 0.5], [3, 1]]


def test_resampling_is_even_and_batched():
    batch = torch.stack((L_SHAPE, 2 * L_SHAPE))
    even = paths.resample(batch, 4)
    expected = torch.tensor([[1.0], [2.0]], dtype=torch.float64).expand(2, 4)
    torch.testing.assert_close(paths.segment_lengths(even), expected)
    assert torch.equal(even[0], paths.resample(L_SHAPE, 4))
    assert torch.equal(even[:, [0, -1]], batch[:, [0, -1]])


def test_subdividing_keeps_curve_and_beads():
    fine = paths.subdivide(L_SHAPE, 5)
    assert fine.shape == (11, 2)
    assert torch.equal(fine[::5], L_SHAPE)
    assert paths.length(fine).item() == pytest.approx(4.0)


def test_projection_onto_the_nearest_segment():
    nearest, s = paths.project(L_SHAPE, torch.tensor([1.0, -2.0], dtype=torch.float64))
    assert nearest.tolist() == [1, 0] and s.item() == 0.25
    nearest, s = paths.project(L_SHAPE, torch.tensor([5.0, 0.5], dtype=torch.float64))
    assert nearest.tolist() == [3, 0.5] and s.item() == 0.875


def test_a_path_of_one_point():
    still = torch.ones(3, 2)
    assert paths.length(still) == 0 and paths.normalized_length(still) == 1
    assert paths.fractions(still).tolist() == [0, 0.5, 1]
    assert torch.equal(paths.points_at(still, torch.tensor([0.3])), still[:1])


def test_refining_keeps_the_curve_and_cuts_its_longest_segments():
    fine = paths.refine(L_SHAPE, 5)
    expected = [[0, 0], [0.75, 0], [1.5, 0], [2.25, 0], [3, 0], [3, 1]]
    assert fine.tolist() == expected and paths.length(fine) == paths.length(L_SHAPE)
    assert paths.refine(L_SHAPE, 2).equal(L_SHAPE)
    assert paths.refine(L_SHAPE, 1).equal(L_SHAPE[[0, -1]])
