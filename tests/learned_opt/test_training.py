"""Meta-training as a user runs it: real fits, real processes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from geodesic.dataset import PathDataset
from learned_opt.config import TrainConfig
from learned_opt.errors import ConfigError
from learned_opt.geodesics import make_geodesics
from learned_opt.training.data import Updates
from learned_opt.training.fit import fit
from learned_opt.weights import load_rule

ROOT = Path(__file__).parents[2]
CHANGES = {"updates": 40, "epoch_length": 5, "open_runs": 3}
CONFIG = replace(TrainConfig(rule_config={"hidden": 3}).smoke(), **CHANGES)
FIT = """
import json, sys, torch
from dataclasses import replace
from pathlib import Path
import learned_opt.training.fit
from geodesic.dataset import PathDataset
from learned_opt.config import TrainConfig
from learned_opt.training.module import MetaTraining

class Watched(MetaTraining):  # keeps what each rank saw and ended with
    def on_fit_start(self):
        self.seen = []

    def tasks(self, family, *key):
        self.seen.append(list(key))
        return super().tasks(family, *key)

    def on_train_end(self):
        kept = {"rule": self.rule.state_dict(), "seen": self.seen}
        torch.save(kept, folder / f"rank{self.global_rank}.pt")

torch.set_num_threads(1)
folder, paths, changes = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
config = TrainConfig(rule_config={"hidden": 3}).smoke()
learned_opt.training.fit.MetaTraining = Watched
learned_opt.training.fit.fit(replace(config, **changes), folder, PathDataset.open(paths))
print("wandb" in sys.modules)
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PathDataset:
    return make_geodesics(CONFIG.geodesics, tmp_path_factory.mktemp("paths"))


@pytest.fixture(scope="module")
def trained(dataset: PathDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights file of an uninterrupted run of CONFIG."""
    return fit(CONFIG, tmp_path_factory.mktemp("trained"), dataset)


def start(folder: Path, dataset: PathDataset, **changes) -> subprocess.Popen:
    """`fit` in a process of its own, started as a user would start a script."""
    folder.mkdir(exist_ok=True)
    script = folder / "fit.py"
    script.write_text(FIT)
    return subprocess.Popen(
        [sys.executable, script, folder, dataset.folder, json.dumps(CHANGES | changes)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for_checkpoint(process: subprocess.Popen, folder: Path) -> Path:
    checkpoint = folder / "checkpoints" / "last.ckpt"
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    return checkpoint


def test_the_same_config_gives_the_same_weights(
    trained: Path, dataset: PathDataset, tmp_path: Path
) -> None:
    assert fit(CONFIG, tmp_path, dataset).read_bytes() == trained.read_bytes()
    other = fit(replace(CONFIG, seed=1), tmp_path / "other", dataset)
    assert not torch.equal(load_rule(other).head.weight, load_rule(trained).head.weight)


def test_training_moves_the_rule_and_logs_its_losses(trained: Path) -> None:
    assert load_rule(trained).head.weight.abs().max() > 0  # it starts at zero
    (log,) = trained.parent.glob("log/**/metrics.csv")
    with log.open() as file:
        rows = list(csv.DictReader(file))
    for name in ("train/imitation", "train/meta_loss", "val/log10_final_loss"):
        assert any(row[name] for row in rows), name


def test_a_run_killed_and_resumed_ends_with_the_same_weights(
    trained: Path, dataset: PathDataset, tmp_path: Path
) -> None:
    process = start(tmp_path, dataset)
    checkpoint = wait_for_checkpoint(process, tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < torch.load(checkpoint, weights_only=True)["global_step"] < CONFIG.updates
    assert not (tmp_path / "weights.safetensors").exists()
    output = finish(start(tmp_path, dataset))
    assert output.splitlines()[-1] == "False"  # the csv logger does not import wandb
    assert (tmp_path / "weights.safetensors").read_bytes() == trained.read_bytes()
    assert [p.name for p in checkpoint.parent.iterdir()] == ["last.ckpt"]


def test_two_processes_train_one_rule_on_different_tasks_and_resume(
    trained: Path, dataset: PathDataset, tmp_path: Path
) -> None:
    folder, resumed = tmp_path / "whole", tmp_path / "resumed"
    process = start(folder, dataset, devices=2, strategy="ddp")
    checkpoint = wait_for_checkpoint(process, folder)
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copy(checkpoint, resumed / "checkpoints")
    finish(process)
    ranks = [torch.load(folder / f"rank{i}.pt", weights_only=True) for i in range(2)]
    for key, value in ranks[0]["rule"].items():
        assert torch.equal(value, ranks[1]["rule"][key])
    rule = load_rule(folder / "weights.safetensors")
    assert torch.equal(rule.head.weight, ranks[0]["rule"]["head.weight"])
    assert not torch.equal(rule.head.weight, load_rule(trained).head.weight)
    first, second = ({tuple(k) for k in rank["seen"] if len(k) == 4} for rank in ranks)
    assert first and second and not first & second  # (train, seed, rank, update)

    copied = torch.load(resumed / "checkpoints" / "last.ckpt", weights_only=True)
    assert 0 < copied["global_step"] < CONFIG.updates
    finish(start(resumed, dataset, devices=2, strategy="ddp"))
    weights = [f / "weights.safetensors" for f in (folder, resumed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    with pytest.raises(ConfigError, match="of 2 processes, this run has 1"):
        fit(CONFIG, resumed, dataset)


def test_wandb_logs_offline(dataset: PathDataset, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    output = finish(start(tmp_path, dataset, logger="wandb", updates=5))
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert next(run.glob("*.wandb")).stat().st_size > 0
    assert not (tmp_path / "log").exists() and (tmp_path / "weights.safetensors").exists(), output


def test_without_wandb_the_logger_says_what_to_install() -> None:
    script = """
import sys
sys.modules["wandb"] = None  # what an import finds where it is not installed
from pathlib import Path
from learned_opt.config import TrainConfig
from learned_opt.training.fit import make_logger
make_logger(TrainConfig(logger="wandb"), Path("."))
"""
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "ConfigError: logger is 'wandb', which is not installed; pip install" in found.stderr


def test_items_are_keyed_by_update_and_rank(dataset: PathDataset) -> None:
    first, again = (Updates(CONFIG, dataset, 0, rank=0) for _ in range(2))
    later = Updates(CONFIG, dataset, CONFIG.epoch_length, rank=0)
    n, cycle = CONFIG.epoch_length, CONFIG.objectives
    assert [first[i]["objective"] for i in range(n)] == [cycle[i % len(cycle)] for i in range(n)]
    assert [later[i]["number"] for i in range(n)] == list(range(n, 2 * n))
    assert torch.equal(first[0]["points"], again[0]["points"])
    shards = [
        [Updates(CONFIG, dataset, len(cycle) * i, rank)[0]["shard"] for i in range(12)]
        for rank in (0, 1)
    ]
    assert shards[0] != shards[1] and set(shards[0]) == {0, 1}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"objectives": ("magic",)}, "magic"),
        ({"updates": 7, "epoch_length": 5}, "multiple of epoch_length"),
        ({"logger": "mlflow"}, "mlflow"),
        ({"horizon": (9, 3)}, "horizon"),
    ],
)
def test_a_bad_config_is_refused_by_name(wrong: dict, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        TrainConfig(**wrong)
