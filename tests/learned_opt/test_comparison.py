"""compare(): optimizers on a user's own model."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import learned_opt
from learned_opt.benchmarking import Entrant
from learned_opt.errors import ConfigError, OutputError

SGD = Entrant("SGD", "torch.optim.SGD", search={"lr": [1e-2, 1.0]})
EXPLODES = Entrant("explodes", "torch.optim.SGD", {"lr": 1e30})


def loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1),
                         nn.Linear(8, 1))  # fmt: skip


@pytest.fixture(scope="module")
def loaders() -> tuple[DataLoader, DataLoader]:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(120, 3, generator=rng)
    y = x[:, :1] * x[:, 1:2]
    data = TensorDataset(x[:90], y[:90]), TensorDataset(x[90:], y[90:])
    return DataLoader(data[0], 16, shuffle=True), DataLoader(data[1], 7)


@pytest.fixture(scope="module")
def found(loaders) -> learned_opt.Comparison:
    optimizers = ("learned", EXPLODES, SGD)
    return learned_opt.compare(make_model, loss, *loaders, 40, optimizers, progress=False)


def test_the_best_rate_of_each_and_the_lowest_loss_first(found) -> None:
    rows = {row["optimizer"]: row for row in found.rows}
    assert set(rows) == {"learned", "SGD", "explodes"} and found.rows[-1] is rows["explodes"]
    losses = [row["final_loss"] for row in found.rows]
    assert losses == sorted(losses) and losses[-1] == math.inf
    assert rows["SGD"]["setting"]["lr"] in (0.03162, 0.1, 0.3162)  # three in the middle of five
    assert rows["SGD"]["steps_to_match"] <= 40 and rows["explodes"]["steps_to_match"] == math.inf
    assert found.curves["learned"][[0, -1], 0].tolist() == [0, 40]
    assert rows["learned"]["lowest_loss"] <= found.curves["learned"][-1, 1]
    assert "| SGD | lr " in str(found) and found.sentence().count("ended") == 2


def test_all_see_the_same_and_a_second_time_gives_the_same(found, loaders) -> None:
    first = {name: curve[0, 1] for name, curve in found.curves.items()}
    assert len(set(first.values())) == 1
    before = torch.random.get_rng_state()
    again = learned_opt.compare(make_model, loss, *loaders, 40, ("learned", SGD), progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name in ("learned", "SGD"):
        assert (again.curves[name] == found.curves[name]).all()


def test_the_validation_loss_is_that_of_all_examples_in_evaluation_mode(loaders) -> None:
    """Batches of 7, 7, 7, 7 and 2."""
    made = []

    def kept() -> nn.Module:
        made.append(make_model())
        return made[-1]

    frozen = Entrant("frozen", "torch.optim.SGD", {"lr": 0.0})
    found = learned_opt.compare(kept, loss, *loaders, 2, [frozen], progress=False)
    model = made[0].eval()
    x, y = loaders[1].dataset.tensors
    with torch.no_grad():
        assert found.rows[0]["final_loss"] == pytest.approx(float(loss(model, [x, y])), rel=1e-5)


def test_the_report_is_a_page_and_is_not_overwritten(found, tmp_path: Path) -> None:
    page = found.save(tmp_path / "out").read_text()
    assert found.sentence() in page and "<svg" in page and "explodes" in page
    with open(tmp_path / "out" / "curves.csv", newline="") as file:
        assert {row["optimizer"] for row in csv.DictReader(file)} == set(found.curves)
    with pytest.raises(OutputError, match="has a report already"):
        found.save(tmp_path / "out")


@pytest.mark.parametrize("wrong, message", [
    ({"steps": 0}, "steps=0"),
    ({"optimizers": ()}, r"optimizers=\[\] must not be empty"),
    ({"optimizers": ("Adamm",)}, "'Adamm' is not known by name"),
    ({"make_model": lambda: 3}, "make_model returned a int"),
    ({"train_loader": []}, "train_loader has no batch"),
    ({"validation_loader": []}, "validation_loader has no batch"),
])  # fmt: skip
def test_what_is_wrong_is_said(wrong: dict, message: str, loaders) -> None:
    given = dict(zip(("train_loader", "validation_loader"), loaders, strict=True))
    arguments = {"make_model": make_model, "loss": loss, **given, "steps": 2}
    arguments |= {"optimizers": [SGD], "progress": False}
    with pytest.raises(ConfigError, match=message):
        learned_opt.compare(**arguments | wrong)


def test_the_cost_is_said_first(loaders, capsys: pytest.CaptureFixture) -> None:
    learned_opt.compare(make_model, loss, *loaders, 3, ["learned", SGD], tuning_runs=2)
    assert capsys.readouterr().out.startswith("3 runs of 3 steps, 9 in all\n")
