"""Nothing is lost where a disk is full or read-only, or files vanish: real disks and processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from geodesic.dataset import PathDataset
from learned_opt.benchmarking import BenchmarkTask, Entrant
from learned_opt.benchmarking.stores import Rows
from learned_opt.benchmarking.validation import ValidationCell
from learned_opt.errors import OutputError
from learned_opt.output_folder import claim_output
from learned_opt.tasks.kinds import TaskConfig
from tests.learned_opt.disks import Disk, disk, mount  # noqa: F401

ROOT = Path(__file__).parents[2]
SHARDS = 12
COMMANDS = {  # arguments, and what each leaves at the end
    "geodesics": (
        {"num_shards": SHARDS, "evaluation_size": 64, "family": {"num_tasks": 2},
         "targets": {"horizon": 20, "updates": 4, "pairs_per_run": 1}},
        "geodesics/manifest.json",
    ),
    "benchmark": (
        {"tasks": [{"steps": 5, "task": {"kind": "quadratic", "options": {"condition": 10.0}}}],
         "entrants": [{"name": "SGD", "optimizer": "torch.optim.SGD", "kwargs": {"lr": 0.1}}],
         "reporting_seeds": 8},
        "results.csv",
    ),
}  # fmt: skip


def make(index: int) -> tuple[dict[str, torch.Tensor], dict]:
    generator = torch.Generator().manual_seed(index)
    return {"beads": torch.randn(40, 200, generator=generator)}, {"facts": [index] * 40}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    config = folder.parent / f"{command}.yaml"
    config.write_text(yaml.safe_dump(COMMANDS[command][0]))
    args = [sys.executable, "-m", "learned_opt.cli", command, "--config", config, "--output"]
    return subprocess.run(
        [*args, folder],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("file", ["shard", "manifest"])
def test_a_disk_that_fails_leaves_the_shards_and_writing_goes_on(
    file: str,
    disk: Disk,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    whole = PathDataset.create(tmp_path_factory.mktemp("whole"), {"seed": 0}, SHARDS)
    whole.fill(make)
    folder = disk.folder / "paths"
    dataset = PathDataset.create(folder, {"seed": 0}, SHARDS)
    done = 3 if file == "shard" else SHARDS

    def failing(index: int):
        if index == done:
            disk.fail()
        return make(index)

    with (
        pytest.raises(OutputError, match=r"cannot be written to .* run the same command again"),
        claim_output(disk.folder, {}, "geodesics"),
    ):
        if file == "manifest":
            for index in range(SHARDS):
                dataset.write_shard(index, *make(index))
            disk.fail()
        dataset.fill(failing)
    disk.mend()
    again = PathDataset.create(folder, {"seed": 0}, SHARDS)
    assert again.missing() == list(range(done, SHARDS)) and not again.finished
    again.fill(make)
    assert contents(folder) == contents(whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_whose_disk_gets_full_goes_on_when_there_is_space(command, tmp_path) -> None:
    """A disk that takes few files: it is full at some shard, or at some cell."""
    out = tmp_path / "out"
    out.mkdir()
    try:
        mount("nr_inodes=14", out)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a disk here")
    try:
        failed = run(command, out)
        assert failed.returncode == 2, failed.stderr
        assert "free some space and run the same command again" in failed.stderr
        assert "Traceback" not in failed.stderr
        last = out / COMMANDS[command][1]
        kept = {file: file.read_bytes() for file in out.rglob("*-*[0-9].*") if file != last}
        assert kept and not list(out.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,nr_inodes=0", out], check=True)
        again = run(command, out)
        assert again.returncode == 0, again.stderr
        assert last.exists() and all(file.read_bytes() == kept[file] for file in kept)
    finally:
        subprocess.run(["umount", out], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_disk_is_refused_in_one_line(command: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    try:
        mount("ro", out)  # what binds root too
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a disk here")
    try:
        refused = run(command, out)
    finally:
        subprocess.run(["umount", out], check=True)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "cannot be written to" in refused.stderr and "use another --output" in refused.stderr


@pytest.mark.parametrize("which", ["shard-00001.safetensors", "shard-00001.json"])
def test_a_shard_that_vanishes_meanwhile_is_made_again(which: str, tmp_path: Path) -> None:
    whole = PathDataset.create(tmp_path / "whole", {}, 4)
    whole.fill(make)
    made = []

    def deleting(index: int):
        made.append(index)
        if made == [0, 1, 2]:
            (tmp_path / "paths" / which).unlink()
        return make(index)

    dataset = PathDataset.create(tmp_path / "paths", {}, 4)
    dataset.fill(deleting, patience=60)
    assert made == [0, 1, 2, 3, 1] and dataset.finished
    assert contents(tmp_path / "paths") == contents(tmp_path / "whole")


def test_rows_that_vanish_meanwhile_are_written_again(tmp_path: Path) -> None:
    task = BenchmarkTask(TaskConfig(kind="image_mlp"))
    entrant = Entrant("SGD", "torch.optim.SGD", {"lr": 0.1})
    cells = [ValidationCell(task, entrant, {}, seed) for seed in range(3)]
    path = tmp_path / "rows.jsonl"
    Rows(path).keep(cells[0], cells[0].blank(), saved=False)
    rows = Rows(path)
    rows.keep(cells[1], cells[1].blank(), saved=False)
    path.unlink()
    rows.keep(cells[2], cells[2].blank(), saved=False)
    assert all(Rows(path).load(cell) is not None for cell in cells)
    assert len(path.read_text().splitlines()) == 3


def test_an_output_folder_that_vanishes_is_said_so(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"cannot be written to .*leave it there while a command"),
        claim_output(tmp_path / "out", {}, "benchmark") as folder,
    ):
        shutil.rmtree(folder)
        (folder / "results.csv").write_text("")
