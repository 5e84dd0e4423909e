"""Meta-training on GPUs; without a GPU these tests are skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from geodesic.dataset import PathDataset
from learned_opt.config import OBJECTIVES, CurriculumConfig, TrainConfig
from learned_opt.target_paths import write_geodesics
from learned_opt.training.fit import check, fit
from learned_opt.training.module import MetaTraining
from learned_opt.weights import load_rule

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="needs a GPU")]
CONFIG = replace(
    TrainConfig(rule_config={"hidden": 3}).smoke(),
    objectives=OBJECTIVES,
    updates=20,
    epoch_length=5,
    selection_interval=2,
    validation_draws=1,
    curriculum=CurriculumConfig((6, 8, 12), patience=1),
    loss_clip=1.5,
    accelerator="gpu",
)
FIT = "learned_opt.training.fit.MetaTraining"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PathDataset:
    return write_geodesics(CONFIG.geodesics, tmp_path_factory.mktemp("paths"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_objective_trains(precision: str, dataset: PathDataset, tmp_path: Path) -> None:
    config = replace(CONFIG, precision=precision)
    check(config)
    rule = load_rule(fit(config, tmp_path, dataset))
    for name, value in rule.state_dict().items():
        assert value.dtype == torch.float32 and value.isfinite().all(), name
    assert rule.head.weight.abs().max() > 0  # it starts at zero
    assert list(tmp_path.glob("log/*/curves/*.png"))


def test_gradients_are_those_of_the_cpu(
    dataset: PathDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each objective, at nearly the same weights: tasks do not depend on the device."""
    found: dict[str, list[Tensor]] = {"cpu": [], "gpu": []}

    class Noted(MetaTraining):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            grads = [p.grad.flatten() for p in self.rule.parameters()]
            found[self.config.accelerator].append(torch.cat(grads).cpu())

    monkeypatch.setattr(FIT, Noted)
    for kind in found:
        config = replace(CONFIG, updates=5, accelerator=kind, learning_rate=1e-12, select="last")
        fit(config, tmp_path / kind, dataset)
    for cpu, gpu, name in zip(found["cpu"], found["gpu"], OBJECTIVES, strict=True):
        assert (cpu - gpu).norm() < 0.02 * cpu.norm(), name


def test_an_interrupted_run_resumes(
    dataset: PathDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(MetaTraining):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                raise OSError("the power is gone")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="power"):
        patch.setattr(FIT, Interrupted)
        fit(CONFIG, tmp_path / "resumed", dataset)
    resumed = load_rule(fit(CONFIG, tmp_path / "resumed", dataset)).state_dict()
    whole = load_rule(fit(CONFIG, tmp_path / "whole", dataset)).state_dict()
    torch.testing.assert_close(resumed, whole, rtol=1e-2, atol=1e-3)  # GPUs sum in any order


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_two_gpus_train_one_rule(dataset: PathDataset, tmp_path: Path) -> None:
    config = "configs/train/default.yaml"
    args = f"train --config {config} --smoke --accelerator gpu --devices 2 --strategy ddp".split()
    root = Path(__file__).parents[2]
    process = subprocess.run(
        [sys.executable, "-m", "learned_opt.cli", *args, "--output", tmp_path],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert "nccl" in process.stdout + process.stderr
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert len(checkpoint["objectives"]) == 2
    assert load_rule(tmp_path / "weights.safetensors").head.weight.isfinite().all()
