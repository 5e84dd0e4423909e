"""Meta-training that starts from existing weights, and may keep some of them fixed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from learned_opt import make_rule
from learned_opt.cli import main
from learned_opt.config import PESConfig, TrainConfig
from learned_opt.errors import ConfigError
from learned_opt.tasks.families import FamilyConfig
from learned_opt.training.fit import fit, recipe
from learned_opt.training.initial_rule import start
from learned_opt.training.stages import first_stage, train
from learned_opt.weights import DEFAULT, load_rule, save_rule

SHIPPED = load_rule()
WORN = {"base": SHIPPED.name, "base_config": SHIPPED.config, "hidden": 4}
CONFIG = TrainConfig(
    rule="scheduled", rule_config=WORN, start_from="shipped", frozen=("base.",),
    objectives=("pes", "meta_loss"), updates=4, epoch_length=4, horizon=(8, 8), window=4,
    open_runs=1, validation_steps=4, pes=PESConfig(pairs=2),
    family=FamilyConfig(num_tasks=2, width=(4, 8), hidden_layers=(1, 1)),
)  # fmt: skip


def test_a_scheduler_is_trained_on_rules_that_stay_as_they_are(tmp_path: Path) -> None:
    rule = load_rule(fit(CONFIG, tmp_path, None))
    for name, value in SHIPPED.state_dict().items():
        assert rule.base.state_dict()[name].equal(value)
    assert rule.head.weight.abs().max() > 0  # zeros at first


def test_it_goes_on_with_weights_of_the_rule_itself(tmp_path: Path) -> None:
    rule = start(CONFIG)
    rule.head.weight.data.fill_(0.25)
    save_rule(rule, path := tmp_path / "w.safetensors")
    again = start(replace(CONFIG, start_from=str(path), frozen=()))
    assert all(value.equal(again.state_dict()[name]) for name, value in rule.state_dict().items())
    assert all(p.requires_grad for p in again.parameters())


def test_what_the_weights_are_of_is_kept_but_not_where_they_lie(tmp_path: Path) -> None:
    (tmp_path / "copy.safetensors").write_bytes(DEFAULT.read_bytes())
    copied = replace(CONFIG, start_from=str(tmp_path / "copy.safetensors"))
    assert recipe(copied) == recipe(CONFIG)
    assert recipe(CONFIG)["start_from"].startswith("sha256:")
    assert recipe(replace(CONFIG, start_from=None))["start_from"] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rule_config": {"base_config": {"hidden": 3}}}, "start_from='shipped'.*hidden"),
        ({"rule": "coordinatewise_lstm", "rule_config": {}, "frozen": ()}, "coordinatewise_lstm"),
        ({"frozen": ("bse",)}, "frozen has 'bse'"),
        ({"frozen": ("",)}, "nothing to train"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        start(replace(CONFIG, **change))


def test_a_fresh_rule_is_that_of_the_seed() -> None:
    fresh = start(replace(CONFIG, rule="geodesic_rnn", rule_config={}, start_from=None, frozen=()))
    assert fresh.config == make_rule("geodesic_rnn").config and not fresh.head.weight.any()


STAGES = replace(
    CONFIG, rule="geodesic_rnn", rule_config={"hidden": 3}, start_from=None, frozen=(),
    objectives=("meta_loss", "step_size"),
    first={"objectives": ["meta_loss"], "learning_rate": 0.01, "family": {"num_tasks": 3}},
)  # fmt: skip


@pytest.mark.slow
def test_a_first_stage_is_trained_as_it_would_be_by_itself(tmp_path: Path) -> None:
    train(STAGES, tmp_path / "both")
    alone = replace(
        STAGES, first=None, objectives=("meta_loss",), learning_rate=0.01,
        family=FamilyConfig(num_tasks=3),
    )  # fmt: skip
    assert first_stage(STAGES) == alone
    train(alone, tmp_path / "one")
    begun = tmp_path / "one" / "weights.safetensors"
    then = replace(STAGES, first=None, start_from=str(begun))
    train(then, tmp_path / "two")
    for one, other in (("both/first", "one"), ("both", "two")):
        found, expected = (load_rule(tmp_path / n / begun.name).state_dict() for n in (one, other))
        assert all(value.equal(expected[name]) for name, value in found.items())
    made_by = json.loads(json.dumps(recipe(replace(then, first=STAGES.first))))
    with safe_open(tmp_path / "both" / begun.name, "pt") as file:
        facts = json.loads(file.metadata()["learned-opt"])["facts"]
    assert facts["train"] == made_by


def test_where_files_lie_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    begun = tmp_path / "w.safetensors"
    save_rule(make_rule("geodesic_rnn", hidden=3), begun)
    first = {"dataset": str(tmp_path), "start_from": str(begun)}
    first["geodesics"] = {"data_root": str(tmp_path), "num_shards": 3}
    config = replace(STAGES, first=first)
    assert str(tmp_path) not in json.dumps(recipe(config))
    assert recipe(config)["first"]["geodesics"] == {"num_shards": 3} and config.first == first


def test_a_bad_first_stage_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"first=.*updatez"):
        first_stage(replace(STAGES, first={"updatez": 3}))
    with pytest.raises(ConfigError, match=r"first=.*clip=-1"):
        first_stage(replace(STAGES, first={"clip": -1}))
    config = tmp_path / "config.yaml"
    config.write_text("first: {objectives: [magic]}")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(config), "--output", str(tmp_path / "out")])
    assert "magic" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="but 2 were launched; train it by itself"):
        train(replace(STAGES, devices=2, strategy="ddp"), tmp_path / "out")
