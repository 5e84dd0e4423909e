"""figure1.py, shrunk: its problems, its files, resuming, and its figure."""

from __future__ import annotations

import csv
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.functional import cross_entropy
from torch.nn.utils import vector_to_parameters

from experiments.geodesics import figure1 as script
from experiments.geodesics import throughput

WORDS = "the cat sat on a mat and then <unk> ran far away from N dogs".split()


@pytest.fixture
def figure1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The script, and a folder of small data sets: ten colours to tell apart, random sentences."""
    monkeypatch.setenv("LEARNED_OPT_DATA", str(tmp_path))
    for folder in ("cifar10_jpeg", "ptb"):
        (tmp_path / folder).mkdir()
    random = np.random.default_rng(0)
    for split, count in (("train", 300), ("test", 100)):
        labels = np.arange(count) % 10
        colours = np.random.default_rng(1).integers(0, 256, (10, 1, 1, 3))[labels]
        pixels = np.clip(colours + random.normal(0, 20, (count, 32, 32, 3)), 0, 255)
        file = tmp_path / "cifar10_jpeg" / f"{split}.npz"
        np.savez(file, images=pixels.astype(np.uint8), labels=labels)
    for split, unknown in (("valid", ()), ("test", ("giraffe",))):
        lines = random.choice([*WORDS, *unknown], (250, 9))
        text = "".join(" " + " ".join(line) + " \n" for line in lines)
        (tmp_path / "ptb" / f"ptb.{split}.txt").write_text(text)
    return script


def words(tmp_path: Path, split: str) -> list[str]:
    text = (tmp_path / "ptb" / f"ptb.{split}.txt").read_text()
    return [w for line in text.splitlines() for w in (*line.split(), "<eos>")]


def test_error_and_cross_entropy_of_images(figure1, tmp_path: Path) -> None:
    torch.manual_seed(0)
    problem = figure1.images("cifar10_jpeg", (2, 3), std=0.1, batch=70, count=60)
    network = problem.module()
    theta = torch.stack([problem.loss.flatten(problem.module()) for _ in range(3)])
    splits = []
    train = np.load(tmp_path / "cifar10_jpeg" / "train.npz")["images"]
    for split in ("train", "test"):
        file = np.load(tmp_path / "cifar10_jpeg" / f"{split}.npz")
        x = torch.tensor((file["images"] - train.mean()) / train.std()).float().flatten(1)
        splits.append((x, torch.tensor(file["labels"])))
    (train_x, train_y), (x, y) = splits

    for point, error, smooth in zip(
        theta, vmap(problem.loss)(theta), vmap(problem.smooth)(theta), strict=True
    ):
        vector_to_parameters(point, network.parameters())
        predicted = network.eval()(x).argmax(1)
        assert error == pytest.approx(100 * (predicted != y)[:60].float().mean().item())
        assert smooth == pytest.approx(cross_entropy(network(x), y).item(), rel=1e-5)
        rows = torch.arange(70 * 4, 70 * 5) % 300  # the fifth minibatch, over the end
        expected = cross_entropy(network(train_x[rows]), train_y[rows]).item()
        assert problem.train_fn(point, 4).item() == pytest.approx(expected, rel=1e-5)
    assert problem.bound is None


def test_perplexity_is_that_of_an_lstm(figure1, tmp_path: Path) -> None:
    """nn.LSTM with the same weights, on windows cut by hand."""
    torch.manual_seed(0)
    problem = figure1.language(vocabulary=12, width=5, steps=4, batch=3)
    train, test = words(tmp_path, "valid"), words(tmp_path, "test")
    kept = sorted(set(train), key=lambda w: (-train.count(w), train.index(w)))[:12]

    def windows(text: list[str]) -> list[list[int]]:
        assert "<unk>" in kept
        index = [kept.index(w if w in kept else "<unk>") for w in text]
        return [index[i : i + 5] for i in range(0, len(index) - 4, 4)]

    def entropy(network: nn.Module, chosen: Tensor) -> Tensor:
        lstm = nn.LSTM(5, 5, batch_first=True)
        gates, zeros = network.gates, torch.zeros(20)
        given = (gates.weight[:, :5], gates.weight[:, 5:], gates.bias, zeros)  # input, state
        lstm.load_state_dict(dict(zip(lstm.state_dict(), given, strict=True)))
        logits = network.output(lstm(network.embedding(chosen[:, :-1]))[0])
        return cross_entropy(logits.flatten(0, 1), chosen[:, 1:].flatten())

    theta = torch.stack([5 * problem.loss.flatten(problem.module()) for _ in range(3)])
    (all_train, all_test), network = (windows(train), windows(test)), problem.module()
    even = torch.tensor(all_test)[torch.linspace(0, len(all_test) - 1, 250).long()]
    stride = len(all_train) // 3
    batch = torch.tensor([all_train[i * stride + 7] for i in range(3)])
    for point, perplexity in zip(theta, vmap(problem.loss)(theta), strict=True):
        vector_to_parameters(point, network.parameters())
        expected = entropy(network, even).item()
        assert perplexity.log().item() == pytest.approx(expected, rel=1e-5)
        assert problem.bound(perplexity.item()) == pytest.approx(expected, rel=1e-5)
        assert problem.smooth(point).item() == pytest.approx(expected, rel=1e-5)
        step = stride + 7  # the second time round
        summed = 4 * entropy(network, batch).item()
        assert problem.train_fn(point, step).item() == pytest.approx(summed, rel=1e-5)


def test_a_text_that_is_not_there_is_named(figure1, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEARNED_OPT_DATA", "nowhere")
    with pytest.raises(FileNotFoundError, match=r"nowhere.ptb.ptb.valid.txt"):
        figure1.language(vocabulary=12, width=5)


@pytest.mark.parametrize(("name", "level"), [("cifar", 70), ("ptb", 200)])
def test_nets_and_strings_by_minibatches(
    figure1, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, level: int
) -> None:
    small = {
        "cifar": lambda: figure1.images("cifar10_jpeg", (2, 4), std=0.1, batch=50, count=50),
        "ptb": lambda: figure1.language(vocabulary=300, width=4, batch=5),
    }
    setting = replace(figure1.SETTINGS[name], problem=small[name], segments=2, iterations=2)
    monkeypatch.setitem(figure1.SETTINGS, name, setting)
    paths = ["--results", tmp_path, "--cache", tmp_path, "--picture", tmp_path / "figure.png"]
    shrunk = ["--setting", name, "--levels", level, "--pairs", 1, "--steps", 100]
    figure1.main([str(word) for word in ("run", *shrunk, *paths)])
    string, shortened = csv.DictReader((tmp_path / f"{name}.csv").open())
    assert string["found"] == shortened["found"] == "1" and int(string["beads"]) >= 3
    assert float(string["max_loss"]) <= 1.1 * level + 1e-3
    assert float(shortened["max_loss"]) <= float(shortened["bound"]) + 1e-5
    lengths = [float(row["normalized_length"]) for row in (shortened, string)]
    assert 1 - 1e-6 <= lengths[0] <= lengths[1]  # float32
    figure1.main([str(word) for word in ("plot", *paths)])
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_rows_resume_and_picture(figure1, tmp_path: Path) -> None:
    paths = [
        "--results",
        tmp_path,
        "--cache",
        tmp_path / "nets",
        "--picture",
        tmp_path / "figure.png",
    ]

    def run(command: str, *levels: str, pairs: int = 2) -> list[dict[str, str]]:
        shrunk = ["--levels", *levels, "--pairs", pairs, "--steps", 350]
        words = [command, "--setting", "cubic", *(shrunk if levels else ()), *paths]
        figure1.main([str(word) for word in words])
        return list(csv.DictReader((tmp_path / "cubic.csv").open()))

    rows = run("run", "0.2")
    assert [(r["pair"], r["method"]) for r in rows] == [
        (pair, method) for pair in "01" for method in ("DSS", "shortened")
    ]
    for string, shortened in zip(rows[::2], rows[1::2], strict=True):
        assert string["found"] == shortened["found"] == "1"
        assert 1 < float(string["normalized_length_weights"])
        assert 1 < float(string["normalized_length"]) < 1.1  # published: 1.004 in the mean
        assert 1 <= float(shortened["normalized_length"]) <= float(string["normalized_length"])
        if shortened["chord_feasible"] == "1":
            assert float(shortened["normalized_length"]) == 1
        assert int(string["beads"]) >= 3  # a midpoint, whatever the chord
        assert float(string["max_loss"]) <= 0.22 and float(shortened["max_loss"]) <= 0.22

    more = run("run", "0.2", "0.32")
    assert more[:4] == rows and {row["level"] for row in more[4:]} == {"0.32"}
    with pytest.raises(SystemExit, match="other settings"):
        run("run", "0.2", pairs=3)

    run("plot")
    assert (tmp_path / "figure.png").stat().st_size > 0


class Bomb:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self):
        return Path.touch, (self.touched,)


@pytest.mark.parametrize("study", ["figure1", "throughput"])
def test_cached_files_run_no_code(study: str, figure1, tmp_path: Path, monkeypatch) -> None:
    """Whatever torch's default is, as it was before version 2.6."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(Bomb(tmp_path / "touched"), path := tmp_path / "cubic.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        if study == "figure1":
            figure1.run("cubic", figure1.SETTINGS["cubic"], [0.2], tmp_path, tmp_path)
        else:
            throughput.solve_saved(str(path), "constant", 1, 64)
    assert not (tmp_path / "touched").exists()
