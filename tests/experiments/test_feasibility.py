"""feasibility.py, shrunk: its levels, its rows, its fit and its picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.geodesics import feasibility as study
from geodesic import LevelProfile
from geodesic.path import fractions
from learned_opt.config import GeodesicsConfig


def test_levels_lead_from_the_constant_to_the_profile_and_beyond() -> None:
    losses = torch.tensor([[4.0, 2.5, 3.0, 1.5, 1.0]]).expand(5, -1)
    points = torch.tensor([0.0, 1.0, 3.0, 4.0, 4.5])[None, :, None].expand(5, -1, 2)
    alphas, s = torch.tensor([0.0, 0.5, 1.0, 1.25, 9.0]), fractions(points)  # λ is linear between
    profile = LevelProfile(losses, fractions(points))
    levels, profile = study.mixed_level(profile, losses, alphas)(s), profile(s)
    assert (levels[0] == 4).all()
    torch.testing.assert_close(levels[1], (4 + profile[1]) / 2)
    torch.testing.assert_close(levels[2], profile[2])
    torch.testing.assert_close(levels[3], (4 + 1.25 * (profile[3] - 4)).clamp_min(1))
    assert (levels[:, 0] == 4).all() and (levels[1:, -1] == torch.tensor([2.5, 1, 1, 1])).all()
    assert (levels.diff(dim=0) <= 0).all() and (levels.diff(dim=1) <= 0).all()


def test_the_fit_recovers_a_known_exponent_within_its_interval() -> None:
    rng, draws, pairs, samples = np.random.default_rng(0), 10, 4, 20
    draw, covers = np.repeat(np.arange(draws), pairs), []
    for _ in range(samples):
        critical = rng.uniform(0, 0.8, draws * pairs)
        scale = np.exp(rng.normal(0, 1, draws).repeat(pairs))[:, None]  # of a draw's own
        exact = scale * np.clip(np.array(study.ALPHAS) - critical[:, None], 0, None) ** 1.5
        assert study.exponent(critical, exact, draw) == pytest.approx((1.5, 1.5, 1.5), abs=0.02)

        noisy = exact * np.exp(0.3 * rng.normal(size=exact.shape))
        noisy[exact < 1e-3] = 0  # lost in the tolerance of the level
        noisy[rng.uniform(size=noisy.shape) < 0.1] = np.nan  # a path that was not certified
        q, low, high = study.exponent(critical, noisy, draw)
        assert low <= q <= high < low + 1
        covers.append(low <= 1.5 <= high)
    assert sum(covers) >= 16  # of 20; 19 are expected of 95 %
    assert np.isnan(study.exponent(critical, 0 * exact, draw)).all()


def test_rows_tables_and_picture(tmp_path: Path) -> None:
    config = GeodesicsConfig(evaluation_size=32)
    small = replace(config.family, num_tasks=3, hidden_layers=(1, 1), width=(8, 8))
    config = replace(config, family=replace(small, input_sizes=(16,), projection_probability=1.0))
    study.run(tmp_path, config, draws=1, steps=60, horizons=[20], limit=2)
    cells = study.load(tmp_path)
    assert {horizon for horizon, _ in cells} == {20}
    for data in cells.values():
        alpha, critical = data["alpha"], data["critical_alpha"]
        assert (alpha == study.ALPHAS).all()
        chord = data["chord_feasible"] == 1
        assert (data["normalized_length"][chord] == 1).all() and (data["excess"][chord] == 0).all()
        clear = abs(alpha - critical) > 0.02  # of what lies between samples
        np.testing.assert_array_equal(chord[clear], (alpha < critical)[clear])
        nested = (data["profile_start"] == data["loss_a"])[
            :, 0
        ]  # SGD does not climb above its start
        assert (np.diff(data["level_half_way"][nested], axis=1) <= 0).all()
        excess = np.nan_to_num(data["excess"][nested], nan=np.inf)
        np.testing.assert_array_equal(excess, np.maximum.accumulate(excess, axis=1))
        found = data["certified"] == 1
        assert (data["excess"][found] <= data["normalized_length"][found] - 1 + 1e-12).all()
    assert len(study.readme_table(tmp_path).splitlines()) == 2 + len(cells)
    fits = study.table(tmp_path).partition("\n\n")[2].splitlines()
    groups = ["T = 20", *(stage for _, stage in cells), "all"]
    assert [line.split(" | ")[0].strip("| ") for line in fits[2:]] == groups
    study.plot(cells, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0
