"""Geodesics on disk: parity with memory, resuming, and real processes that share the work."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from geodesic import LevelProfile, find_geodesics, find_geodesics_on_disk
from geodesic.dataset import PathDataset
from geodesic.manifest import DatasetError

ROOT = Path(__file__).parents[2]


def bump(x, scale):
    return torch.exp(-scale * x.square().sum() / 2)


def pairs(count=7):
    """Around the ball, more and less of it."""
    angle = torch.linspace(1.5, 3.0, count, dtype=torch.float64)
    a = torch.tensor([1.5, 0.0, 0.0], dtype=torch.float64).expand(count, -1)
    b = 1.6 * torch.stack((angle.cos(), angle.sin(), 0 * angle), dim=1)
    return a, b, torch.linspace(0.9, 1.1, count, dtype=torch.float64)


def equal(first, second):
    return all(
        torch.equal(x, y) if torch.is_tensor(x) else x == y
        for x, y in ((getattr(first, f.name), getattr(second, f.name)) for f in fields(first))
    )


def level(falls):
    high = torch.full((7,), 0.61, dtype=torch.float64)
    return LevelProfile(torch.stack((high, high - 0.05), dim=1)) if falls else high


class Interrupted(Exception):
    pass


def stop_after_one(shards):
    yield from list(shards)[:1]
    raise Interrupted


@pytest.mark.parametrize("falls", [False, True])
def test_an_interrupted_search_goes_on_and_equals_one_in_memory(tmp_path, falls):
    a, b, scale = pairs()
    calls = []

    def counted(x, scale):
        calls.append(1)
        return bump(x, scale)

    arguments = (tmp_path, counted, a, b, level(falls), None, (scale,), 3)
    with pytest.raises(Interrupted):
        find_geodesics_on_disk(*arguments, progress=stop_after_one, num_segments=16)
    first = len(calls)
    done = []
    found = find_geodesics_on_disk(
        *arguments, progress=lambda shards: done.extend(shards) or done, num_segments=16
    )
    assert done == [1, 2] and len(calls) > first
    parts = [
        find_geodesics(
            bump,
            a[i : i + 3],
            b[i : i + 3],
            LevelProfile(level(True).values[i : i + 3]) if falls else level(False)[i : i + 3],
            loss_args=(scale[i : i + 3],),
            num_segments=16,
        )
        for i in range(0, 7, 3)
    ]
    torch.testing.assert_close(found.path, torch.cat([part.path for part in parts]))
    assert found.certified.all() and not found.chord_feasible.all()

    calls.clear()
    assert equal(find_geodesics_on_disk(*arguments, num_segments=16), found) and not calls
    with pytest.raises(DatasetError, match="theta_b"):
        find_geodesics_on_disk(tmp_path, counted, a, 2 * b, *arguments[4:], num_segments=16)
    with pytest.raises(DatasetError, match="num_segments"):
        find_geodesics_on_disk(*arguments, num_segments=8)


def test_after_memory_ran_out_a_smaller_chunk_goes_on(tmp_path):
    a, b, scale = pairs()
    arguments = tmp_path, bump, a, b, 0.61, None, (scale,), 3

    with pytest.raises(Interrupted):
        find_geodesics_on_disk(*arguments, progress=stop_after_one)
    done = []
    found = find_geodesics_on_disk(
        *arguments, progress=lambda shards: done.extend(shards) or done, chunk_size=64,
        num_segments=32, seed=0,
    )  # fmt: skip
    assert done == [1, 2] and found.certified.all()


def test_wrong_arguments_leave_no_folder_behind(tmp_path):
    a, b, scale = pairs()
    arguments = tmp_path / "paths", bump, a, b, 0.7
    with pytest.raises(TypeError, match="num_segment'"):
        find_geodesics_on_disk(*arguments, loss_args=(scale,), num_segment=8)
    with pytest.raises(ValueError, match="shard_size must be a positive integer"):
        find_geodesics_on_disk(*arguments, loss_args=(scale,), shard_size=0)
    with pytest.raises(ValueError, match="num_segments must be a positive integer"):
        find_geodesics_on_disk(*arguments, loss_args=(scale,), num_segments=0)
    for level in (torch.zeros(3), "high"):
        with pytest.raises(ValueError, match="level must be a number"):
            find_geodesics_on_disk(*arguments[:-1], level, loss_args=(scale,))
    with pytest.raises(ValueError, match="initial_path must have"):
        find_geodesics_on_disk(*arguments, [a, b], loss_args=(scale,))
    assert not (tmp_path / "paths").exists()


def test_errors_are_kept(tmp_path):
    a, b, scale = pairs()
    b = b.clone()
    b[4] = a[4]
    with pytest.warns(UserWarning, match="1 of 3 pairs"):
        found = find_geodesics_on_disk(tmp_path, bump, a, b, 0.7, loss_args=(scale,), shard_size=3)
    again = find_geodesics_on_disk(tmp_path, bump, a, b, 0.7, loss_args=(scale,), shard_size=3)
    assert [i for i, error in enumerate(found.error) if error] == [4] and equal(found, again)


SCRIPT = """
import sys, torch
from geodesic import find_geodesics_on_disk
from tests.geodesic.test_sharded import bump, pairs
made = []
def progress(shards):
    for shard in shards:
        made.append(shard)
        yield shard
a, b, scale = pairs()
found = find_geodesics_on_disk(
    sys.argv[1], bump, a, b, 0.61, loss_args=(scale,), shard_size=2, progress=progress)
print(made, found.length.tolist())
"""


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "paths")],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (worker.communicate(timeout=120)[0].strip() for worker in workers)
    assert first.startswith("[0, 2] ") and second.startswith("[1, 3] ")
    assert first[6:] == second[6:] and first.count(",") == 7


def test_a_process_that_makes_nothing_is_named_and_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("geodesic.dataset.NEWS", 0.1)
    dataset = PathDataset.create(tmp_path, {}, 2)
    with (
        pytest.warns(UserWarning, match="waiting for 1 shards"),
        pytest.raises(DatasetError, match="lacks 1 shards of other processes"),
    ):
        dataset.fill(lambda index: ({"x": torch.ones(1)}, {}), 0, 2, patience=0.5)
    assert dataset.missing() == [1]
