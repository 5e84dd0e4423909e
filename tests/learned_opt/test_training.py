"""Meta-training as a user runs it: real fits, real processes."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from geodesic.dataset import PathDataset
from learned_opt.config import (
    OBJECTIVES,
    RUN_OBJECTIVES,
    CurriculumConfig,
    PESConfig,
    StepSizeConfig,
    TeacherConfig,
    TrainConfig,
)
from learned_opt.errors import ConfigError, OutputError
from learned_opt.rules import make_rule
from learned_opt.target_paths import write_geodesics
from learned_opt.training.data import Updates
from learned_opt.training.fit import check_checkpoint, fit
from learned_opt.weights import load_rule

ROOT = Path(__file__).parents[2]
CHANGES = {
    "updates": 40,
    "epoch_length": 5,
    "open_runs": 3,
    "selection_interval": 4,
    "validation_draws": 1,
}
CONFIG = replace(TrainConfig(rule_config={"hidden": 3}).smoke(), **CHANGES)
ALL = {  # every objective, with particles and a curriculum, of a rule with matrices in its state
    "objectives": OBJECTIVES,
    "rule_config": {"hidden": 3, "basis": 32},
    "window": 2,
    "curriculum": CurriculumConfig((6, 8, 12), patience=1),
    "step_size": StepSizeConfig(together=2),
    "loss_clip": 1.5,
    "imitation_form": "cosine",
}
FIT = """
import json, sys, torch
from dataclasses import replace
from pathlib import Path
from geodesic.dataset import PathDataset
from learned_opt.config import CurriculumConfig, StepSizeConfig, TrainConfig
from learned_opt.training.fit import fit

torch.set_num_threads(1)
folder, paths, changes = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
for name, kind in (("curriculum", CurriculumConfig), ("step_size", StepSizeConfig)):
    if name in changes:
        changes[name] = kind(**changes[name])
config = TrainConfig(rule_config={"hidden": 3}).smoke()
fit(replace(config, **changes), folder, PathDataset.open(paths))
print("wandb" in sys.modules)
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PathDataset:
    return write_geodesics(CONFIG.geodesics, tmp_path_factory.mktemp("paths"))


@pytest.fixture(scope="module")
def trained(dataset: PathDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights file of an uninterrupted run of CONFIG."""
    return fit(CONFIG, tmp_path_factory.mktemp("trained"), dataset)


def start(folder: Path, dataset: PathDataset, **changes) -> subprocess.Popen:
    """`fit` in a process of its own, started as a user would start a script."""
    folder.mkdir(exist_ok=True)
    script = folder / "fit.py"
    script.write_text(FIT)
    settings = json.dumps(CHANGES | changes, default=vars)
    return subprocess.Popen(
        [sys.executable, script, folder, dataset.folder, settings],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for_checkpoint(process: subprocess.Popen, folder: Path, number: int = 1) -> Path:
    """The checkpoint, as soon as it was written for the `number`-th time."""
    checkpoint, written = folder / "checkpoints" / "last.ckpt", set()
    while len(written) < number:
        assert process.poll() is None, process.communicate()[0]
        if checkpoint.exists():
            written.add(checkpoint.stat().st_mtime_ns)
        time.sleep(0.001)
    return checkpoint


@pytest.mark.slow
def test_the_same_config_gives_the_same_weights(
    trained: Path, dataset: PathDataset, tmp_path: Path
) -> None:
    assert fit(CONFIG, tmp_path, dataset).read_bytes() == trained.read_bytes()
    other = fit(replace(CONFIG, seed=1), tmp_path / "other", dataset)
    assert not torch.equal(load_rule(other).head.weight, load_rule(trained).head.weight)


def test_a_checkpoint_of_another_config_is_refused(
    trained: Path, dataset: PathDataset, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    shutil.copy(trained.parent / "checkpoints" / "last.ckpt", checkpoint)
    for change, named in (
        ({"seed": 1}, "seed was 0, now it is 1"),
        ({"learning_rate": 0.5}, "learning_rate was .* now it is 0.5"),
        ({"rule_config": {"hidden": 4}}, "rule_config.hidden was 3, now it is 4"),
    ):
        with pytest.raises(OutputError, match=f"last.ckpt is of another config: {named}; delete"):
            fit(replace(CONFIG, **change), tmp_path, dataset)
    assert fit(CONFIG, tmp_path, dataset).read_bytes() == trained.read_bytes()
    left = torch.load(checkpoint, weights_only=True)
    del left["config"]  # as earlier versions wrote it
    torch.save(left, checkpoint)
    assert fit(CONFIG, tmp_path, dataset).read_bytes() == trained.read_bytes()


@pytest.mark.slow
def test_a_checkpoint_that_vanishes_meanwhile_costs_nothing(
    trained: Path, dataset: PathDataset, tmp_path: Path
) -> None:
    process = start(tmp_path, dataset)
    wait_for_checkpoint(process, tmp_path).unlink()
    finish(process)
    assert (tmp_path / "weights.safetensors").read_bytes() == trained.read_bytes()


def saved(content: object) -> bytes:
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


def test_no_flipped_bit_of_a_checkpoint_is_taken(trained: Path, tmp_path: Path) -> None:
    """Wherever it is: refused, or in a byte that says nothing. torch would load most of them."""
    whole = (trained.parent / "checkpoints" / "last.ckpt").read_bytes()
    path, rng, loaded, refused = tmp_path / "last.ckpt", random.Random(0), 0, 0
    expected = torch.load(io.BytesIO(whole), weights_only=True)
    for _ in range(100):
        content = bytearray(whole)
        content[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        with suppress(Exception):
            torch.load(path, weights_only=True)
            loaded += 1
        try:
            check_checkpoint(path, CONFIG)
        except OutputError as error:
            assert "is damaged; replace it by a whole copy, or delete it" in str(error)
            refused += 1
        else:
            assert saved(torch.load(path, weights_only=True)) == saved(expected)
    assert refused > 50 < loaded


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def laughs() -> list:
    """In memory some sixty lists, written out 2^60 items."""
    inner: list = [0]
    for _ in range(60):
        inner = [inner, inner]
    return inner


@pytest.mark.parametrize("kind", ["code", "code of old", "laughs", "cut", "compressed", "empty"])
def test_a_checkpoint_that_is_a_trap_is_refused(
    kind: str, trained: Path, dataset: PathDataset, tmp_path: Path
) -> None:
    whole, marker = trained.parent / "checkpoints" / "last.ckpt", tmp_path / "marker"
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    left = torch.load(whole, weights_only=True)
    if kind.startswith("code"):
        bomb = left | {"bomb": Bomb(marker)}
        torch.save(bomb, path, _use_new_zipfile_serialization=kind == "code")
    elif kind == "laughs":
        torch.save(left | {"config": left["config"] | {"seed": laughs()}}, path)
    elif kind == "compressed":
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    else:
        path.write_bytes(whole.read_bytes()[: 5000 * (kind == "cut")])
    with pytest.raises(OutputError, match=r"last\.ckpt .* delete it to train from the beginning"):
        fit(CONFIG, tmp_path, dataset)
    assert not marker.exists()


def test_training_moves_the_rule_and_logs_its_losses(trained: Path) -> None:
    assert load_rule(trained).head.weight.abs().max() > 0  # it starts at zero
    (log,) = trained.parent.glob("log/**/metrics.csv")
    with log.open() as file:
        rows = list(csv.DictReader(file))
    for name in ("train/imitation", "train/meta_loss", "val/log10_final_loss"):
        assert any(row[name] for row in rows), name


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"average": 0.9}, ALL], ids=["default", "average", "all"])
def test_a_run_killed_and_resumed_ends_with_the_same_weights(
    changes: dict, trained: Path, dataset: PathDataset, tmp_path: Path
) -> None:
    if changes:
        plain, trained = trained, fit(replace(CONFIG, **changes), tmp_path / "whole", dataset)
        assert plain.read_bytes() != trained.read_bytes()
    process = start(tmp_path, dataset, **changes)
    checkpoint = wait_for_checkpoint(process, tmp_path, random.randint(1, 4))
    time.sleep(random.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = torch.load(checkpoint, weights_only=True)
    assert 0 < left["global_step"] < CONFIG.updates
    if changes is ALL:
        for name in ("pes", "step_size"):
            particles = [run for run in left["objectives"][0][name]["runs"] if run]
            assert all(run["xi"] is not None for run in particles)  # 0 where they were reunited
    assert not (tmp_path / "weights.safetensors").exists()
    output = finish(start(tmp_path, dataset, **changes))
    assert output.splitlines()[-1] == "False"  # the csv logger does not import wandb
    assert (tmp_path / "weights.safetensors").read_bytes() == trained.read_bytes()
    finish(start(tmp_path, dataset, **changes))  # once more, with nothing left to do
    assert (tmp_path / "weights.safetensors").read_bytes() == trained.read_bytes()
    assert [p.name for p in checkpoint.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.slow
def test_a_curriculum_moves_on_and_says_so(dataset: PathDataset, tmp_path: Path) -> None:
    config = replace(CONFIG, **ALL | {"learning_rate": 1e-12})  # nothing is learned
    fit(config, tmp_path, dataset)
    (log,) = tmp_path.glob("log/**/metrics.csv")
    with log.open() as file:
        lengths = [float(row["val/length"]) for row in csv.DictReader(file) if row["val/length"]]
    assert lengths[0] == 6 and lengths[-1] == 12 and lengths == sorted(lengths)


def test_tasks_that_all_diverge_leave_the_rule_whole(tmp_path: Path) -> None:
    """Inputs of 1e30: losses and gradients overflow, and contribute zeros."""
    family = replace(CONFIG.family, log10_input_scale=(30.0, 30.0), activations=("relu",))
    config = replace(CONFIG, **ALL | {"objectives": RUN_OBJECTIVES, "updates": 20}, family=family)
    found = load_rule(fit(config, tmp_path, None)).state_dict()
    start = make_rule("geodesic_rnn", hidden=3).state_dict()
    assert all(value.isfinite().all() for value in found.values())
    assert found["head.weight"].equal(start["head.weight"])  # zeros taught it nothing


@pytest.mark.slow
def test_wandb_logs_offline(dataset: PathDataset, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    output = finish(start(tmp_path, dataset, logger="wandb", updates=5))
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert next(run.glob("*.wandb")).stat().st_size > 0
    assert list(run.glob("files/media/images/select/curves*.png"))
    assert not (tmp_path / "log").exists() and (tmp_path / "weights.safetensors").exists(), output


@pytest.mark.slow
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
    assert "ConfigError: logger is 'wandb', which is not installed; run pip install" in found.stderr


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
        ({"select": "worst"}, "select is 'worst'; use 'best' or 'last'"),
        ({"precision": "16-mixed"}, "use '32-true' or 'bf16-mixed'"),
        ({"horizon": (9, 3)}, "horizon"),
        (
            {"horizon": (10, 300)},
            "starts at 10, which is shorter than window=20; use a window of at most",
        ),
        ({"weights": {"pes": (1.0, 0.1)}}, "weights has .'pes'., but objectives is"),
        ({"imitation_form": "square"}, "'square'; use 'huber' or 'cosine'"),
        ({"loss_clip": 0.0}, "loss_clip is 0.0; use e.g. 1.5"),
        ({"average": 1.0}, "average is 1.0; use a decay below 1"),
        ({"average": 0.9, "curriculum": CurriculumConfig()}, "average is 0.9; .* no curriculum"),
        (
            {"objectives": ("imitation",), "curriculum": CurriculumConfig()},
            "objectives=.* has none; add one of",
        ),
        (
            {"curriculum": CurriculumConfig((10, 20))},
            "lengths starts at 10, which is shorter than window",
        ),
    ],
)
def test_a_bad_config_is_refused_by_name(wrong: dict, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        TrainConfig(**wrong)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: CurriculumConfig((20, 20, 40)), r"lengths=\(20, 20, 40\) must increase"),
        (lambda: CurriculumConfig(()), r"must increase from at least 1"),
        (lambda: CurriculumConfig(patience=0), "patience is 0"),
        (lambda: PESConfig(sigma=0.0), "pes.sigma=0.0 must be positive"),
        (lambda: StepSizeConfig(together=0), "together=0 at least 1; usual values are 0.2 and 10"),
        (lambda: TeacherConfig("LBFGS"), "teacher.optimizer is 'LBFGS'; use one of Adadelta, Ada"),
        (lambda: TeacherConfig("SGD", options={"betas": (0, 1)}), "SGD refuses .* 'betas'"),
        (lambda: TeacherConfig(steps=0), "teacher.steps=0"),
    ],
)
def test_a_bad_part_of_a_config_is_refused_by_name(make: Callable, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        make()
