"""The suites under configs/benchmark: their properties, and where their data come from."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from learned_opt.benchmarking import BenchmarkConfig, benchmark
from learned_opt.benchmarking.entrants import DEFAULTS
from learned_opt.cli import parse
from learned_opt.errors import DataError
from learned_opt.tasks.data import load_images
from learned_opt.tasks.download import download

FOLDER = Path(__file__).parents[2] / "configs" / "benchmark"
REPORTING = ("digits", "mnist", "cifar", "text", "mixed")
FULL = ("mnist_full", "cifar_full", "text_full")


def suite(name: str) -> BenchmarkConfig:
    _, config, _ = parse(["benchmark", "--config", str(FOLDER / f"{name}.yaml"), "--output", "x"])
    return config


def networks(config: BenchmarkConfig) -> set[str]:
    """Each task's data and network: how long it is trained and on how much does not tell it from
    others. A copy of CIFAR-10 is CIFAR-10."""
    kept = ("kind", "data", "hidden", "activation", "options")
    facts = [{key: asdict(entry.task)[key] for key in kept} for entry in config.tasks]
    for fact in facts:
        fact["data"] = fact["data"].removesuffix("_jpeg")
    return {json.dumps(fact, sort_keys=True) for fact in facts}


@pytest.mark.parametrize("name", [*REPORTING, *FULL])
def test_no_suite_reports_on_what_choices_were_made_on(name: str) -> None:
    config, validation = suite(name), suite("validation")
    assert not networks(config) & networks(validation)
    assert all(entry.family not in ("", "validation") for entry in config.tasks)
    assert {entry.family for entry in validation.tasks} == {"validation"}


def test_the_validation_tasks_are_frozen() -> None:
    """The prototypes' six rows and one more, as choices between rules have been made on them."""
    labels = [entry.label for entry in suite("validation").tasks]
    rows = [f"{net} {steps}" for net in ("mnist sigmoid", "mnist relu", "cifar10 relu")
            for steps in (200, 1000)]  # fmt: skip
    assert labels == [*rows, "digits tanh 200"]
    nets = {e.task.data: set() for e in suite("validation").tasks}
    for e in suite("validation").tasks:
        nets[e.task.data].add((e.task.hidden, e.task.activation, e.task.train_size))
    assert nets == {
        "mnist": {((20,), "sigmoid", 10_000), ((64, 64), "relu", 10_000)},
        "cifar10_jpeg": {((64,), "relu", 8_000)},
        "digits": {((64, 32), "tanh", None)},
    }


@pytest.mark.parametrize("name", [*REPORTING, *FULL])
def test_every_suite_has_the_default_entrants_and_a_baseline(name: str) -> None:
    config = suite(name)
    assert [entrant.name for entrant in config.entrants] == list(DEFAULTS)
    assert config.baseline == "Adam" and config.name == name and len(config.reporting) >= 5
    assert all(entry.targets for entry in config.tasks)


def test_a_full_suite_is_the_small_one_on_more_data_and_for_longer() -> None:
    for name in FULL:
        small, full = suite(name.removesuffix("_full")), suite(name)
        assert min(e.steps for e in full.tasks) > max(e.steps for e in small.tasks)
        assert all(e.task.train_size is None for e in full.tasks)


def test_other_data_may_stand_in() -> None:
    config = replace(suite("cifar"), data={"cifar10": "cifar10_jpeg"})
    assert {entry.task.data for entry in config.tasks} == {"cifar10_jpeg"}
    assert all(entry.label.startswith("cifar10_jpeg ") for entry in config.tasks)
    elsewhere = replace(suite("cifar"), data={"cifar10": "/home/someone/my_cifar"})
    assert all(entry.label.startswith("my_cifar ") for entry in elsewhere.tasks)


def test_missing_data_are_named_before_anything_is_run(tmp_path: Path) -> None:
    config = replace(suite("cifar"), data_root=str(tmp_path / "data")).smoke()
    with pytest.raises(DataError, match=r"task 'cifar10 conv .*missing .*train\.npz"):
        benchmark(config, tmp_path / "out")
    assert not list((tmp_path / "out" / "cells").iterdir())


def arrays(height: int, channels: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.arange(60_050) % 3
    return rng.integers(0, 256, (len(labels), height, height, *channels), dtype=np.uint8), labels


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_downloaded_images_are_those_that_are_loaded(name: str, tmp_path, monkeypatch) -> None:
    """The network is not asked: OpenML's table is made here, in its layout."""
    mnist = name == "mnist"
    images, labels = arrays(28) if mnist else arrays(32, (3,))
    train = 60_000 if mnist else 50_000
    rows = images if mnist else images.transpose(0, 3, 1, 2)
    table = SimpleNamespace(data=rows.reshape(len(rows), -1), target=labels.astype(str))
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda *_, **__: table)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if not installed
    download(name, tmp_path)
    data = load_images(name, tmp_path)
    assert data.image_shape == images.shape[1:] and len(data.train_x) == train
    assert data.train_y.tolist() == labels[:train].tolist()
    grey = data.test_x[:40] - data.test_x.min()
    expected = images[train : train + 40].reshape(40, -1)
    np.testing.assert_allclose(grey / grey.max() * expected.max(), expected, atol=1e-3)
    monkeypatch.setattr("sklearn.datasets.fetch_openml", None)
    download(name, tmp_path)  # they are there: nobody is asked


def test_a_download_leaves_the_files_that_are_there(tmp_path: Path, monkeypatch) -> None:
    """OpenML's table is made here, in its layout."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    folder = tmp_path / "cifar10"
    folder.mkdir()
    own = np.random.rand(6, 4, 4, 3)  # floats, which are refused
    for split in ("train", "test"):
        np.savez(folder / split, images=own, labels=np.arange(6) % 3)
    before = [path.read_bytes() for path in sorted(folder.iterdir())]
    with pytest.raises(DataError, match="images must be uint8"):
        download("cifar10", tmp_path)
    assert before == [path.read_bytes() for path in sorted(folder.iterdir())]
    images, labels = arrays(32, (3,))
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    table = SimpleNamespace(data=rows, target=labels.astype(str))
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda *_, **__: table)
    np.savez(folder / "train", images=images[:50], labels=labels[:50])
    (folder / "test.npz").unlink()
    download("cifar10", tmp_path)
    data = load_images("cifar10", tmp_path)
    assert len(data.train_x) == 50 and len(data.test_x) == len(images) - 50_000


def test_without_a_network_the_download_says_so(tmp_path: Path, monkeypatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fails)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DataError, match=r"'mnist' could not be downloaded from OpenML \(no route"):
        download("mnist", tmp_path)
    download("my_own_images", tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
