"""A task in the user's own file, by real processes in the folder of the file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from learned_opt.errors import ConfigError
from learned_opt.tasks.kinds import Draw
from learned_opt.tasks.own import OwnTask, own_task
from learned_opt.training.stages import first_stage

FILE = """
import torch
from torch import nn
from learned_opt import OwnTask

def make_task(draw):
    x, y = torch.randn(30, 3), torch.randint(4, (30,))
    return OwnTask(lambda: nn.Linear(3, 4), (x, y), batch_size=5, draw=draw)

def number(draw):
    return 3

def alone(draw):
    return OwnTask(lambda: nn.Linear(3, 4), (torch.randn(30, 3), torch.randn(30, 4)))

def raises(draw):
    return {}["key"]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current one, with my_own_task.py in it."""
    (tmp_path / "my_own_task.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_own_task", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def run(*args: str) -> subprocess.CompletedProcess:
    """The command, which has the folder of its script on its path and not the current one."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "learned_opt.cli", *args],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_worker_processes_train_on_it(folder: Path):
    task = ["--task", "my_own_task:make_task", "--output", "out", "--smoke"]
    entrants = ["--entrants", "[learned, Adam]", "--tuning_seeds", "1", "--processes", "2"]
    done = run("benchmark", *task, "--steps", "7", *entrants)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("my_own_task:make_task\n")
    (task,) = yaml.safe_load((folder / "out/config-benchmark.yaml").read_text())["tasks"]
    assert task["task"]["options"]["function"] == "my_own_task:make_task"


def test_a_changed_file_is_another_task(folder: Path):
    before = own_task("my_own_task:make_task")
    (folder / "my_own_task.py").write_text(FILE + "# changed\n")
    assert own_task("my_own_task:make_task") != before


def test_both_stages_of_training_draw_from_it(folder: Path):
    from learned_opt.cli import parse

    args = ["train", "--output", "out", "--first", '{"family": {"num_tasks": 3}, "updates": 300}']
    _, config, _ = parse([*args, "--task", "my_own_task:make_task"])
    for stage in (config, first_stage(config)):
        for family in (stage.family or stage.geodesics.family, stage.geodesics.family):
            assert family.task.own.function == "my_own_task:make_task"
    assert first_stage(config).updates == 300


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_own_task", "is not of the form module:function"),
        ("nowhere_at_all:make_task", "there is no nowhere_at_all.py"),
        ("my_own_task:make_tusk", "has no function 'make_tusk'"),
        ("my_own_task:number", "returned int"),
        ("my_own_task:raises", r"KeyError: 'key' \(my_own_task.py, line 17\)"),
    ],
)
def test_what_is_wrong_is_named(name: str, words: str, folder: Path):
    with pytest.raises(ConfigError, match=words):
        own_task(name)


def test_a_function_that_forgets_the_draw_is_told(folder: Path):
    config = own_task("my_own_task:alone")
    with pytest.raises(ConfigError, match=r"num_tasks=None; return .* num_tasks=3"):
        OwnTask.make(config, draw=Draw(3))


def test_chance_and_loss_follow_from_the_targets():
    x, y = torch.randn(50, 3), torch.randn(50, 2)
    task = OwnTask(lambda: torch.nn.Linear(3, 2), (x, y))
    assert task.chance == pytest.approx(float((y - y.mean(0)).square().mean()))
    classes = OwnTask(lambda: torch.nn.Linear(3, 4), (x, torch.arange(50) % 4))
    assert classes.chance == pytest.approx(torch.tensor(4.0).log().item())
    theta = torch.zeros(classes.dim)
    assert float(classes.loss(theta, classes.fixed_batch())) == pytest.approx(classes.chance)


def test_steps_go_with_a_task(folder: Path):
    done = run("benchmark", "--steps", "3", "--output", "out")
    assert done.returncode == 2 and "--steps goes with --task" in done.stderr
