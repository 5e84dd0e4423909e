"""The Python API: the functions behind the commands, and the cost of `import learned_opt`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import geodesic
import learned_opt
from learned_opt import BenchmarkConfig, FamilyConfig, GeodesicsConfig, TrainConfig

GEODESICS = GeodesicsConfig(family=FamilyConfig(num_tasks=2)).smoke()
TRAIN = replace(
    TrainConfig(rule_config={"hidden": 3}, geodesics=GEODESICS).smoke(),
    validation_draws=1,
)


@pytest.mark.parametrize("package", [learned_opt, geodesic], ids=lambda p: p.__name__)
def test_every_public_name_is_there(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        package.nothing_like_it  # noqa: B018


def test_all_errors_of_the_commands_are_exported():
    for name in ("ConfigError", "DataError", "OutputError", "WeightsError"):
        assert issubclass(getattr(learned_opt, name), learned_opt.LearnedOptError)
    assert learned_opt.DatasetError is geodesic.DatasetError


def test_importing_imports_neither_lightning_nor_torch_s_compiler():
    code = "import sys, learned_opt; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    slow = {"torch._dynamo", "lightning", "jsonargparse", "matplotlib", "scipy", "sklearn"}
    assert not slow & {*done.stdout.split()}


def test_a_rule_is_trained_and_used(tmp_path: Path):
    threads = torch.get_num_threads()
    weights = learned_opt.train(TRAIN, tmp_path)
    assert weights == tmp_path / "weights.safetensors"
    assert torch.get_num_threads() == threads
    model = torch.nn.Linear(3, 2)
    optimizer = learned_opt.LearnedOptimizer(model.parameters(), weights=weights)
    model(torch.ones(3)).square().sum().backward()
    optimizer.step()
    with pytest.raises(learned_opt.OutputError, match="learning_rate was"):
        learned_opt.train(replace(TRAIN, learning_rate=0.01), tmp_path)


def test_a_data_set_of_paths_is_made(tmp_path: Path):
    paths = learned_opt.make_geodesics(GEODESICS, tmp_path)
    assert paths.folder == tmp_path / "geodesics" and len(paths) == GEODESICS.num_shards
    assert paths.shard(0)["beads"].isfinite().all()
    with pytest.raises(learned_opt.ConfigError, match="processes is 0"):
        learned_opt.make_geodesics(GEODESICS, tmp_path, processes=0)


def test_a_benchmark_returns_its_rows(tmp_path: Path):
    config = replace(BenchmarkConfig(entrants=["learned", "Adam"]), tuning_seeds=1).smoke()
    rows = learned_opt.benchmark(config, tmp_path)
    assert {row["entrant"] for row in rows} == {"learned", "Adam"}
    assert all(row["final_train_loss"] > 0 and row["error"] is None for row in rows)
    assert (tmp_path / "report.html").exists()


def test_aligned_weights_are_the_same_network():
    theta_a, theta_b = torch.randn(2, 3 * 4 + 3 + 2 * 3 + 2, dtype=torch.float64)
    spec = geodesic.mlp_spec([(3, 4), (3,), (2, 3), (2,)])
    aligned = geodesic.align(theta_a, theta_b, spec)
    assert (aligned - theta_a).norm() <= (theta_b - theta_a).norm()
    assert aligned.sort().values.equal(theta_b.sort().values)
