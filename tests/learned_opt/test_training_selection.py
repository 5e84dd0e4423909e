"""The outputs of meta-training: the best weights, plots and speed; and errors."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch
from safetensors import safe_open

from learned_opt.benchmarking.tune import half_decades
from learned_opt.config import TeacherConfig, TrainConfig
from learned_opt.errors import OutputError
from learned_opt.output_folder import claim_output
from learned_opt.run import run_rule
from learned_opt.tasks.base import seed_of
from learned_opt.training.callbacks import ADAM_GRID, tuned_adam
from learned_opt.training.fit import fit
from learned_opt.training.module import MetaTraining
from learned_opt.weights import load_rule
from tests.learned_opt.disks import Disk, disk, mount  # noqa: F401

CONFIG = replace(
    TrainConfig(rule_config={"hidden": 3}).smoke(),
    objectives=("meta_loss",),
    updates=15,
    epoch_length=5,
    selection_interval=2,
    validation_draws=2,
)
FIT = "learned_opt.training.fit.MetaTraining"


class Spoilt(MetaTraining):
    """Learns nothing, and forgets that in its last epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2:
            self.rule.head.bias.data += 5


def test_the_best_weights_are_written_by_a_score_anyone_can_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, learning_rate=1e-12)
    monkeypatch.setattr(FIT, Spoilt)
    best = fit(config, tmp_path / "best", None)
    with safe_open(best, "pt") as file:
        selected = json.loads(file.metadata()["learned-opt"])["facts"]["selected"]
    assert selected["update"] == 10
    rule, module = load_rule(best), MetaTraining(config)
    torch.testing.assert_close(rule.state_dict(), module.rule.state_dict(), rtol=0, atol=1e-9)

    tasks = [module.tasks(module.family, "validation", i) for i in range(2)]
    cheap = min((0, 1), key=lambda i: tasks[i].dim)
    runs = [(0, config.horizon[1]), (1, config.horizon[1]), (cheap, 10 * config.horizon[1])]
    first, second, far = (
        tasks[i].evaluate(run_rule(tasks[i], rule, seed_of("validation", i), steps)[1])
        for i, steps in runs
    )
    log = [(r["train_loss"] + config.loss_floor).log10().mean() for r in (first, second, far)]
    assert selected["score"] == pytest.approx(float((log[0] + log[1]) / 4 + log[2] / 2), rel=1e-5)

    last = load_rule(fit(replace(config, select="last"), tmp_path / "last", None))
    torch.testing.assert_close(last.head.bias, rule.head.bias + 5)


def test_candidates_are_drawn_beside_adam_on_the_same_runs(tmp_path: Path) -> None:
    fit(CONFIG, tmp_path, None)
    pictures = {p.name: matplotlib.image.imread(p) for p in tmp_path.glob("log/*/curves/*.png")}
    assert set(pictures) == {"update-10.png", "update-15.png"}
    assert all(picture.std() > 0 for picture in pictures.values())
    module = MetaTraining(CONFIG)
    lr, losses = tuned_adam(module, 0, 20)
    assert lr in half_decades(*ADAM_GRID)
    task = module.tasks(module.family, "validation", 0)
    with torch.no_grad():
        ours, _ = run_rule(task, module.rule, seed_of("validation", 0), 1)
    assert losses.shape == (20, 2) and losses[0].equal(ours[0])
    assert losses[-5:].mean() < losses[0].mean()


def test_inner_steps_are_counted_by_task_and_particle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []

    class Counted(MetaTraining):
        def on_train_epoch_end(self) -> None:
            counts.append(self.inner_steps)

    monkeypatch.setattr(FIT, Counted)
    config = replace(
        CONFIG,
        objectives=("pes", "meta_loss", "torch_imitation"),
        updates=6,
        epoch_length=3,
        horizon=(8, 8),
        teacher=TeacherConfig(length=5),
        select="last",
    )
    fit(config, tmp_path, None)
    pes, meta_loss, imitation = 2 * 2 * 4, 2 * 4, 2 * 5  # antithetic · tasks · window
    assert counts == [pes + meta_loss + imitation] * 2
    (log,) = tmp_path.glob("log/*/metrics.csv")
    assert "train/inner_steps/s" in log.read_text().splitlines()[0]


@pytest.mark.parametrize("basis", [0, 32])
def test_bfloat16_trains_weights_in_float32(tmp_path: Path, basis: int) -> None:
    config = replace(CONFIG, objectives=("meta_loss", "pes"), updates=10, precision="bf16-mixed")
    config = replace(config, select="last", rule_config=CONFIG.rule_config | {"basis": basis})
    rule = load_rule(fit(config, tmp_path / "bf16", None))
    exact = load_rule(fit(replace(config, precision="32-true"), tmp_path / "32", None))
    for name, value in rule.state_dict().items():
        assert value.dtype == torch.float32 and value.isfinite().all(), name
    assert not rule.head.weight.equal(exact.head.weight)


def test_a_disk_that_fails_leaves_the_last_checkpoint_and_training_goes_on(
    disk: Disk,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Failing(MetaTraining):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2 and not failed:
                failed.append(True)
                disk.fail()

    failed: list[bool] = []
    config = replace(CONFIG, select="last")
    monkeypatch.setattr(FIT, Failing)
    with (
        pytest.raises(OutputError, match=r"cannot be written to .* run the same command again"),
        claim_output(disk.folder, {}, "train"),
    ):
        fit(config, disk.folder, None)
    disk.mend()
    left = torch.load(disk.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert failed and left["global_step"] == 10
    with claim_output(disk.folder, {}, "train"):
        weights = fit(config, disk.folder, None)
    undisturbed = fit(config, tmp_path_factory.mktemp("undisturbed"), None)
    assert weights.read_bytes() == undisturbed.read_bytes()
    assert not list(disk.folder.rglob("*.tmp"))


def test_a_read_only_folder_is_refused_at_start(tmp_path: Path) -> None:
    try:
        mount("ro", tmp_path)  # what binds root too
    except (OSError, subprocess.CalledProcessError):
        tmp_path.chmod(0o555)
    try:
        with (
            pytest.raises(OutputError, match=r"cannot be written to .*; use another --output"),
            claim_output(tmp_path / "new", {}, "train"),
        ):
            pass
    finally:
        subprocess.run(["umount", tmp_path], capture_output=True)
        tmp_path.chmod(0o755)
