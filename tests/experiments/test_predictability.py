"""predictability.py, shrunk to seconds: its rows, and known properties of them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.geodesics import connectivity
from experiments.geodesics import predictability as study
from geodesic.targets import TargetConfig
from learned_opt.rules import make_rule
from learned_opt.training.objectives.imitation import imitation_loss

CONFIG = replace(
    study.CONFIG,
    family=replace(study.CONFIG.family, num_tasks=2, hidden_layers=(1, 1), width=(8, 8)),
    targets=TargetConfig(40, 4, pairs_per_run=2, stride=10, level="sgd_profile", num_segments=6),
    evaluation_size=32,
)
STANDING_STILL = 9 * (math.sqrt(1 + 1 / 9) - 1)


@pytest.fixture(scope="module")
def shard():
    return study.make_shard(CONFIG, 0)


def test_turning_angle_of_a_square_a_line_and_a_way_back():
    square = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])
    assert study.turning_angle(square).item() == pytest.approx(3 * math.pi / 2)
    line = torch.lerp(torch.randn(500), torch.randn(500), torch.linspace(0, 1, 11)[:, None])
    assert study.turning_angle(line) < 1e-4
    assert study.turning_angle(square[[0, 1, 0]]).item() == pytest.approx(math.pi)


def test_errors_of_a_pair_are_those_of_the_imitation_loss(shard):
    task, points = study.task_of(CONFIG, 0), shard["points"]["geodesic"]
    assert shard["used"].any()
    steps = (shard["lengths"][shard["run"][shard["used"]]] > 0).sum() * CONFIG.targets.updates
    rule = make_rule("geodesic_rnn", **study.RULE)
    loss = imitation_loss(rule, task, points, shard["lengths"], 0, False, ("key",))
    error, _ = study.errors(rule, task, points, CONFIG.targets.updates, ("key",))
    used = shard["run"][shard["used"]], shard["position"][shard["used"]]
    assert len(used[0]) * CONFIG.targets.updates == steps
    torch.testing.assert_close(error[used].mean(), loss.detach(), rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        rule.head.bias.zero_()  # mixes nothing: stands still
    error, relative = study.errors(rule, task, points, CONFIG.targets.updates, ("key",))
    torch.testing.assert_close(error[used], torch.full_like(error[used], STANDING_STILL))
    torch.testing.assert_close(relative[used], torch.ones_like(relative[used]))


def test_the_three_kinds_join_the_same_points(shard):
    every = shard["points"]
    step = CONFIG.targets.updates
    for i in shard["used"].nonzero().squeeze(1).tolist():
        run, start = shard["run"][i], int(shard["position"][i]) * step
        for kind in study.KINDS:
            ends = every[kind][run, [start, start + step]]
            torch.testing.assert_close(ends, every["chord"][run, [start, start + step]])


@pytest.mark.slow
def test_rows_and_tables(shard, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "make_shard", lambda config, index: shard)
    study.imitate(tmp_path, CONFIG, draws=1, held_out=1, seeds=2, updates=2)
    facts = json.loads((tmp_path / "predictability.json").read_text())["held_out"]
    rows = study.read(tmp_path / "predictability.csv")
    pairs = facts["chord_feasible"] + facts["shortened"]
    assert facts["pairs"] == pairs + facts["not_certified"] + facts["after_one"]
    assert len(rows) == pairs * 2 * len(study.KINDS) > 0
    for row in rows:
        straight = row["kind"] == "chord" or (
            row["kind"] == "geodesic" and row["chord_feasible"] == "1"
        )
        if straight:
            assert float(row["turning_angle"]) == 0
        assert float(row["normalized_length"]) == pytest.approx(1, abs=1e-4) or not straight
        assert 0 < float(row["error"]) < 5

    monkeypatch.setattr(connectivity, "WIDTHS", (4,))
    study.width(tmp_path, pairs=1, steps=300)
    rows = study.read(tmp_path / "width.csv")
    for raw, aligned in zip(rows[::2], rows[1::2], strict=True):
        assert (raw["aligned"], aligned["aligned"]) == ("0", "1")
        assert float(aligned["distance"]) <= float(raw["distance"])
        for row in (raw, aligned):
            assert float(row["normalized_length"]) >= 1
            assert row["chord_feasible"] == "0" or float(row["normalized_length"]) == 1

    text = study.table(tmp_path)
    assert "SGD − geodesic" in text and f"median, all ({pairs})" in text
    study.plot(tmp_path, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0


def test_bootstrap_knows_a_perfect_correlation_and_a_constant():
    x, draw = np.arange(12.0), np.repeat(np.arange(3), 4)
    assert study.spearman(np.stack([x**3, x**3]), x, draw) == "1.000 [1.000, 1.000]"
    assert study.spearman(np.stack([x]), np.zeros(12), draw) == "–"
    assert study.centre(np.mean, np.full((2, 12), 0.25), draw) == "0.250 [0.250, 0.250]"


def test_relu_networks_of_known_loss():
    for width in (2, 8):
        loss = connectivity.relu_loss(width)
        assert loss(torch.zeros(4 * width + 1, dtype=torch.float64)).item() == pytest.approx(1)
        _, first = connectivity.train_nets(width, 4, 200)
        for level, nets in zip(connectivity.COMMON, first, strict=True):
            for theta in nets[~nets[:, 0].isnan()]:
                assert loss(theta) <= level
