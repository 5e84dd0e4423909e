"""Impossible paths of files, which each argument that takes a path refuses with its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from geodesic.dataset import PathDataset
from geodesic.files import user_path
from geodesic.manifest import DatasetError
from learned_opt import load_rule
from learned_opt.benchmarking.entrants import Entrant
from learned_opt.benchmarking.stores import Rows
from learned_opt.cli import main
from learned_opt.config import TrainConfig
from learned_opt.errors import ConfigError, DataError, OutputError, WeightsError
from learned_opt.output_folder import claim_output
from learned_opt.tasks.data import load_images
from learned_opt.tasks.kinds import TaskConfig
from learned_opt.tasks.text import load_text
from learned_opt.tasks.workloads.texts import load_corpus
from learned_opt.training.initial_rule import origin

IMPOSSIBLE = ("~nosuchuser/x", "a\0b", 300 * "n")


@pytest.mark.parametrize("path", IMPOSSIBLE)
@pytest.mark.parametrize(
    ("use", "argument", "error"),
    [
        (load_rule, "weights", WeightsError),
        (lambda p: Entrant("a", "learned", weights=p).check(), "weights", ConfigError),
        (origin, "start_from", ConfigError),
        (lambda p: claim_output(p, {}, "train").__enter__(), "output", OutputError),
        (lambda p: load_images(p, "."), "data", DataError),
        (lambda p: load_images("mine", p), "data_root", DataError),
        (lambda p: load_text(p, "."), "data", DataError),
        (lambda p: load_corpus(p, "."), "data", DataError),
        (PathDataset.open, "folder", DatasetError),
        (lambda p: PathDataset.create(p, {}, 1), "folder", DatasetError),
        (lambda p: Rows(Path("unused") / "rows.jsonl", known=[p]), "done", ConfigError),
    ],
)
def test_a_path_that_cannot_be_is_refused_by_name(
    path: str, use: Callable, argument: str, error: type, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=f"{argument}=.*cannot be a path here") as raised:
        use(path)
    assert repr(path) in str(raised.value)


@pytest.mark.parametrize("command", ["geodesics", "train", "benchmark"])
@pytest.mark.parametrize("path", IMPOSSIBLE)
def test_so_do_the_commands(command: str, path: str, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([command, "--smoke", "--output", path])
    assert "output=" in (text := capsys.readouterr().err) and "cannot be a path" in text
    if command == "train":
        with pytest.raises(SystemExit):
            main([command, "--smoke", "--output", "out", "--dataset", path])
        assert "dataset=" in capsys.readouterr().err


@pytest.mark.parametrize("path", IMPOSSIBLE)
def test_a_config_may_name_any_path(path: str) -> None:
    """It is read elsewhere than it is used; tables leave folders out."""
    assert TaskConfig(data=path).label.startswith(("x ", "a\0b ", "nnn"))
    assert TrainConfig(dataset=path).dataset == path


def test_paths_that_can_be_are_left_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/absent/file", "output") == tmp_path / "absent" / "file"
    assert user_path(tmp_path / "a", "output") == tmp_path / "a"
    (tmp_path / "file").write_text(json.dumps(1))
    assert user_path(tmp_path / "file" / "below", "output") == tmp_path / "file" / "below"
    with pytest.raises(ValueError, match="output='~nosuchuser'"):
        user_path("~nosuchuser", "output")
