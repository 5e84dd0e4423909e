"""Meta-training by many processes: real ones, over loopback with gloo, started in every way."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from learned_opt.config import OBJECTIVES, RUN_OBJECTIVES, CurriculumConfig, TrainConfig
from learned_opt.errors import ConfigError
from learned_opt.training.fit import check, fit, make_trainer
from learned_opt.weights import load_rule

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIG = replace(
    TrainConfig(rule_config={"hidden": 3}).smoke(),
    objectives=OBJECTIVES,
    updates=16,
    epoch_length=4,
    selection_interval=2,
    validation_draws=1,
    window=2,
    curriculum=CurriculumConfig((6, 8, 12), patience=1),
    loss_clip=1.5,
    devices=2,
    strategy="ddp",
)
# `learned-opt` that notes in $SEEN what each process did, and has the misfortunes it is told to.
SCRIPT = """
import json, os, shutil, signal, sys
from dataclasses import replace
from pathlib import Path

if "ENV" in globals():  # forked from a server, see `together`
    os.environ.update(ENV)
    sys.argv = ["learned-opt", *ARGS]
    sys.stdout = sys.stderr = open(ENV["LOG"], "w", buffering=1)

import torch
import learned_opt.target_paths, learned_opt.training.fit
from learned_opt.cli import main
from learned_opt.training.module import MetaTraining

torch.set_num_threads(1)
seen, KILL = Path(os.environ["SEEN"]), int(os.environ["KILL"])
seen.mkdir(exist_ok=True)
make_problem = learned_opt.target_paths.make_problem

def note(what, rank, value):
    with open(seen / f"{what}-{rank}", "a") as file:
        file.write(json.dumps([os.getpid(), value]) + "\\n")

def noted(config, index):
    note("shards", os.environ.get("RANK", "0"), index)
    return make_problem(config, index)

class Watched(MetaTraining):
    def tasks(self, family, *key):
        note("keys", self.global_rank, key)
        if key[0] == "train" and self.global_rank == 1 and "ROUGH" in os.environ:
            family = replace(family, log10_input_scale=(30.0, 30.0), activations=("relu",))
        return super().tasks(family, *key)

    def training_step(self, item):
        note("updates", self.global_rank, item["number"])
        return super().training_step(item)

    def on_before_optimizer_step(self, optimizer):
        grads = torch.cat([p.grad.flatten() for p in self.rule.parameters()])
        note("grads", self.global_rank, grads.tolist())

    def on_train_batch_end(self, outputs, item, index):
        killed = seen / "killed"
        if self.global_rank == 1 and item["number"] == KILL and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_epoch_start(self):
        if self.current_epoch == 2 and self.global_rank == 0:
            shutil.copy(Path(self.trainer.default_root_dir) / "checkpoints/last.ckpt", seen)

    def on_train_end(self):
        torch.save(self.rule.state_dict(), seen / f"rule-{self.global_rank}.pt")

learned_opt.target_paths.make_problem = noted
learned_opt.training.fit.MetaTraining = Watched
main()
"""


def settings(folder: Path) -> dict[str, str]:
    return {"SEEN": str(folder), "KILL": "-1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def script_in(folder: Path) -> str:
    path = folder / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def save(config: TrainConfig, path: Path) -> str:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))))
    return str(path)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def notes(folder: Path, what: str, rank: int) -> list[list]:
    """[process, value] of each note."""
    return [json.loads(line) for line in (folder / f"{what}-{rank}").read_text().splitlines()]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory):
    """Runs `learned-opt` in as many processes as it gets argument lists, placed as by torchrun.

    They are forked from a server that has imported everything, which saves them that.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["learned_opt.training.fit", "learned_opt.cli"])
    folder = tmp_path_factory.mktemp("script")
    script = script_in(folder)

    def run(seen: Path, *ranks: list[str], **env: str) -> list[tuple[int, str]]:
        """Exit code and output of each."""
        common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        common |= {"WORLD_SIZE": str(len(ranks)), "TORCHELASTIC_RUN_ID": "test"}
        processes, logs = [], [folder / f"{seen.name}-{i}.log" for i in range(len(ranks))]
        for i, args in enumerate(ranks):
            own = {"RANK": str(i), "LOCAL_RANK": str(i), "LOG": str(logs[i])}
            names = {"ENV": settings(seen) | common | own | env, "ARGS": args}
            processes.append(context.Process(target=runpy.run_path, args=(script, names)))
            processes[-1].start()
        for process in processes:
            process.join(400)
        return [(p.exitcode, log.read_text()) for p, log in zip(processes, logs, strict=True)]

    return run


@pytest.fixture(scope="module")
def whole(together, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted run by two processes on one machine, its notes in seen/."""
    folder = tmp_path_factory.mktemp("whole")
    args = ["train", "--config", save(CONFIG, folder / "c.yaml"), "--output", str(folder / "out")]
    for code, output in together(folder / "seen", args, args):
        assert code == 0, output
    return folder


def rules(seen: Path) -> list[dict[str, Tensor]]:
    return [torch.load(seen / f"rule-{rank}.pt", weights_only=True) for rank in (0, 1)]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[k].equal(other[k]) for k in one)


def test_processes_share_the_rule_and_the_geodesics_but_not_the_tasks(whole: Path) -> None:
    seen = whole / "seen"
    assert same(*rules(seen))
    assert [[i for _, i in notes(seen, "shards", rank)] for rank in (0, 1)] == [[0], [1]]
    keys = [{tuple(key) for _, key in notes(seen, "keys", rank)} for rank in (0, 1)]
    runs = [{key for key in some if key[0] == "train" and len(key) == 4} for some in keys]
    assert runs[0] and runs[1] and not runs[0] & runs[1]  # (train, seed, rank, update)
    validation = [{key for key in some if key[0] == "validation"} for some in keys]
    assert validation[0] == validation[1] and len(validation[0]) == CONFIG.validation_draws


def test_a_process_killed_under_torchrun_is_restarted_from_the_last_checkpoint(
    whole: Path, tmp_path: Path
) -> None:
    """Two nodes of one process each, by the command of docs/scaling.md."""
    page = (ROOT / "docs" / "scaling.md").read_text()
    command = re.search(r"^(torchrun .*?[^\\])\n", page, re.MULTILINE | re.DOTALL)[1]
    config = save(replace(CONFIG, devices=1, num_nodes=2), tmp_path / "c.yaml")
    assert "first:" not in (ROOT / "configs/train/mlps.yaml").read_text()  # would be refused
    for old, new in {
        "\\\n": " ",
        "$HOST:29400": f"localhost:{free_port()} --local_addr localhost",  # not by its name
        "-m learned_opt.cli": script_in(tmp_path),
        "configs/train/mlps.yaml": config,
        "runs/seed3": str(tmp_path / "out"),
        "--seed 3": "",
        "--num_nodes 2 --devices 1 --strategy ddp": "",  # they are in the config
    }.items():
        assert old in command
        command = command.replace(old, new)
    killed = random.randrange(CONFIG.epoch_length, CONFIG.updates)
    exported = dict(re.findall(r"^export (\w+)=(\w+)\n", page, re.MULTILINE))
    env = {**os.environ, **settings(tmp_path / "seen"), **exported, "KILL": str(killed)}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *command.split()[1:]],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        outputs = [node.communicate(timeout=500)[0] for node in nodes]
    finally:
        for node in nodes:
            node.terminate()  # torchrun then ends its processes
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    seen, checkpoint = tmp_path / "seen", killed // CONFIG.epoch_length * CONFIG.epoch_length
    for rank in (0, 1):
        numbers: dict[int, list[int]] = {}
        for process, number in notes(seen, "updates", rank):
            numbers.setdefault(process, []).append(number)
        before, after = numbers.values()
        assert before[: killed + 1] == list(range(killed + 1))
        assert after == list(range(checkpoint, CONFIG.updates))
    assert all(same(rule, rules(whole / "seen")[0]) for rule in rules(seen))
    written = [load_rule(f / "out" / "weights.safetensors").state_dict() for f in (whole, tmp_path)]
    assert same(*written)
    shards = {i for rank in (0, 1) for _, i in notes(seen, "shards", rank)}
    assert shards == set(range(CONFIG.geodesics.num_shards))
    for path in (whole / "out" / "geodesics").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / "geodesics" / path.name).read_bytes()


def test_the_slurm_script_is_one() -> None:
    """Its options are all that srun's processes need to agree with, and bash can read it."""
    page = (ROOT / "docs" / "scaling.md").read_text()
    (script,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    options = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", script))
    flags = dict(re.findall(r"--(devices|num_nodes|strategy|accelerator) (\S+)", script))
    config = TrainConfig(
        devices=int(flags["devices"]),
        num_nodes=int(flags["num_nodes"]),
        strategy=flags["strategy"],
    )
    slurm = {
        "SLURM_NTASKS": str(config.devices * config.num_nodes),
        "SLURM_NTASKS_PER_NODE": options["ntasks-per-node"],
        "SLURM_NNODES": options["nodes"],
        "SLURM_JOB_NAME": options["job-name"],
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_JOB_ID": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in slurm.items():
            patch.setenv(name, value)
        patch.setattr(os, "cpu_count", lambda: config.devices)
        trainer = make_trainer(config, logger=False, enable_progress_bar=False)
        environment = trainer.strategy.cluster_environment
        assert trainer.world_size == 8
        assert not environment.auto_requeue
        with pytest.raises(ConfigError, match=r"make 6 processes, but 8 were launched"):
            check(replace(config, devices=3))


def test_processes_that_lightning_starts_resume_to_the_same_weights(
    whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole / "out" / "geodesics", out / "geodesics")
    (out / "checkpoints").mkdir()
    shutil.copy(whole / "seen" / "last.ckpt", out / "checkpoints")
    args = ["train", "--config", str(whole / "c.yaml"), "--output", str(out)]
    process = subprocess.run(
        [sys.executable, script_in(tmp_path), *args],
        env={**os.environ, **settings(tmp_path / "seen")},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout
    for rank in (0, 1):
        assert notes(tmp_path / "seen", "updates", rank)[0][1] == 2 * CONFIG.epoch_length
    weights = [f / "out" / "weights.safetensors" for f in (whole, tmp_path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    with pytest.raises(ConfigError, match="of 2 processes, but this run has 1"):
        fit(replace(CONFIG, devices=1, strategy="auto"), out, None)


def test_a_process_whose_tasks_diverge_adds_zeros_to_the_gradient(together, tmp_path: Path) -> None:
    config = replace(
        CONFIG,
        objectives=RUN_OBJECTIVES,
        updates=6,
        epoch_length=6,
        curriculum=None,
        learning_rate=1e-12,  # so that the gradients are of the same weights
        select="last",
    )
    grads = []
    for ranks in (1, 2):
        name = str(tmp_path / f"{ranks}")
        path = save(replace(config, devices=ranks), tmp_path / f"{ranks}.yaml")
        args = ["train", "--config", path, "--output", name]
        for code, output in together(tmp_path / f"seen-{ranks}", *[args] * ranks, ROUGH="1"):
            assert code == 0, output
        grads.append(torch.tensor([g for _, g in notes(tmp_path / f"seen-{ranks}", "grads", 0)]))
    alone, mean = grads
    assert alone.isfinite().all() and (alone.norm(dim=1) > 0).all()
    torch.testing.assert_close(mean, alone / 2, rtol=1e-4, atol=1e-7)


def test_processes_that_see_different_folders_are_told(
    together, whole: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, dataset=str(whole / "out" / "geodesics"))
    args = ["train", "--config", save(config, tmp_path / "c.yaml"), "--output"]
    (tmp_path / "0" / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "seen" / "last.ckpt", tmp_path / "0" / "checkpoints")
    ranks = [[*args, str(tmp_path / name)] for name in "01"]
    for code, output in together(tmp_path / "seen", *ranks):
        assert code == 2
        assert "resume at updates [8, 0]" in output and "folder that all nodes share" in output
