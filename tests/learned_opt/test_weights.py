"""Weights files: round trips, and errors that name damage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from learned_opt import LearnedOptimizer, load_rule, make_rule, save_rule
from learned_opt.cli import parse
from learned_opt.errors import WeightsError
from learned_opt.tasks.data import load_images
from learned_opt.training.fit import recipe
from learned_opt.training.stages import first_stage
from learned_opt.weights import DEFAULT, MAX_HEADER, digest
from tests.learned_opt.rule_cases import RULES

ROOT = Path(__file__).parents[2]
FIRST_GENERATION = ROOT / "experiments" / "weights" / "first_generation.safetensors"
TRAIN = ROOT / "configs" / "train"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "mine.safetensors"
    save_rule(make_rule("geodesic_rnn", hidden=2), path)
    return path


FACTS = {"updates": 3, "task": "digits", "draws": {3: [0.25, None]}}


def header_of(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["learned-opt"])


def rewrite(path: Path, **changes) -> None:
    """Changes entries of the file's JSON header, and signs it anew as another package would.

    A file of version 1 is signed without its facts, as it always was.
    """
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["learned-opt"]) | changes
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    facts = header["facts"] if header["version"] > 1 else None
    header["sha256"] = digest(header["rule"], header["config"], tensors, facts)
    save_file(tensors, path, {"learned-opt": json.dumps(header)})


@pytest.mark.parametrize(("name", "config"), RULES.values(), ids=RULES)
def test_round_trip(name: str, config: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rule, path = make_rule(name, **config), tmp_path / "new" / "weights.safetensors"
    save_rule(rule, path, facts={"updates": 3})
    state = torch.get_rng_state()
    loaded = load_rule(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert (loaded.name, loaded.config) == (rule.name, rule.config)
    for key, value in rule.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    params, grads = torch.ones(4), torch.arange(4.0)
    update, _ = loaded.update(grads, params, loaded.init_state(params, ((4,),)))
    assert torch.equal(update, rule.update(grads, params, rule.init_state(params, ((4,),)))[0])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_rule_in_use_does_not_change_with_its_file(path: Path) -> None:
    rule = load_rule(path)
    before = {name: value.clone() for name, value in rule.state_dict().items()}
    with path.open("r+b") as file:  # in place, as cp does
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(rule.state_dict()[name], value) for name, value in before.items())
    with path.open("r+b") as file:
        file.truncate()
    assert all(torch.equal(rule.state_dict()[name], value) for name, value in before.items())


def test_equal_rules_make_equal_files(path: Path) -> None:
    save_rule(load_rule(path), again := path.with_name("again.safetensors"))
    assert again.read_bytes() == path.read_bytes()


def refused(path: Path, why: str) -> None:
    with pytest.raises(WeightsError, match=why) as error:
        load_rule(path)
    assert str(path) in str(error.value)
    with pytest.raises(WeightsError):
        LearnedOptimizer([torch.ones(2, requires_grad=True)], weights=str(path))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "is not a file")


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_refused(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "truncated")


def test_an_altered_tensor_is_refused(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    refused(path, "checksum")


def test_an_altered_config_is_refused(tmp_path: Path) -> None:
    save_rule(make_rule("coordinatewise_lstm", hidden=2), path := tmp_path / "w.safetensors")
    content = path.read_bytes()
    path.write_bytes(content.replace(b'log_scale\\": 5.0', b'log_scale\\": 7.0'))
    assert path.read_bytes() != content
    refused(path, "checksum")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_torch_is_refused_unread(path: Path, zipped: bool) -> None:
    torch.save(load_rule(path).state_dict(), path, _use_new_zipfile_serialization=zipped)
    refused(path, "is a checkpoint of torch.save.*give the .safetensors file")


def test_a_missing_file_of_training_says_what_makes_it(tmp_path: Path) -> None:
    missing = tmp_path / "runs" / "weights.safetensors"
    refused(missing, f"make it with: learned-opt train --config CONFIG --output {missing.parent}")


def test_a_foreign_file_is_refused(path: Path) -> None:
    save_file({"weight": torch.ones(3)}, path)
    refused(path, "not written by learned-opt")


def test_a_file_of_a_future_version_is_refused(path: Path) -> None:
    rewrite(path, version=99)
    refused(path, "version 99.*upgrade")


def test_a_header_beyond_all_bounds_is_refused_unread(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes((MAX_HEADER + 1).to_bytes(8, "little") + content[8:] + bytes(MAX_HEADER))
    refused(path, f"header would be {MAX_HEADER + 1} bytes")


def test_altered_shipped_weights_are_refused(path: Path, monkeypatch) -> None:
    """A file that is sound in itself, in the place of the shipped one."""
    monkeypatch.setattr("learned_opt.weights.DEFAULT", path)
    with pytest.raises(WeightsError, match=r"shipped weights .* were altered"):
        LearnedOptimizer([torch.ones(2, requires_grad=True)])


def test_an_unknown_rule_is_refused(path: Path) -> None:
    rewrite(path, rule="os.system")
    refused(path, "'os.system'; known rules are")


def test_the_tensors_of_another_rule_are_refused(path: Path) -> None:
    rewrite(path, rule="coordinatewise_lstm", config={"hidden": 2})
    refused(path, "do not fit.*Missing key")


COMMIT = 40 * "a"


@pytest.mark.parametrize(
    ("address", "revision", "why"),
    [
        ("hf://owner", COMMIT, "names no repository"),
        ("hf:///name", COMMIT, "names no repository"),
        ("hf://owner/name", None, "revision is None.*full hash"),
        ("hf://owner/name", "main", "revision is 'main'.*full hash"),
        ("somewhere.safetensors", COMMIT, "revision='a+' goes with weights='hf://owner/name'"),
    ],
)
def test_an_unclear_address_of_the_hub_is_refused(address, revision, why: str) -> None:
    with pytest.raises(WeightsError, match=why):
        LearnedOptimizer([torch.ones(2, requires_grad=True)], weights=address, revision=revision)


def test_without_the_hub_s_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match=r"pip install 'learned-opt\[hub\]'"):
        load_rule("hf://owner/name", COMMIT)


def test_what_the_hub_has_cached_is_loaded_without_network(path: Path, tmp_path: Path) -> None:
    """In a process of its own, as the package reads its settings when it is imported."""
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT
    for file in ("weights.safetensors", "small/other.safetensors"):
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, snapshot / file)
    script = f"""
from learned_opt import load_rule
from learned_opt.errors import WeightsError
for address in ("hf://owner/name", "hf://owner/name/small/other.safetensors"):
    print(load_rule(address, "{COMMIT}").config["hidden"])
try:
    load_rule("hf://owner/name", "{40 * "b"}")
except WeightsError as error:
    print(error)
"""
    settings = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script]
    found = subprocess.run(
        command, env=os.environ | settings, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert lines[:2] == ["2", "2"] and "cannot be downloaded" in lines[2]
    assert not found.stderr  # no noise


@pytest.mark.parametrize("config", [{"hidden": 7}, {"hidden": 2, "units": 4}, {"per": "row"}])
def test_a_config_that_does_not_fit_is_refused(path: Path, config: dict) -> None:
    rewrite(path, config=config)
    refused(path, "do not fit")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_flipped_bit_is_refused_or_harmless(path: Path, data: st.DataObject) -> None:
    save_rule(rule := load_rule(path), path, FACTS)
    header, content = header_of(path), bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    damaged = path.with_name("damaged.safetensors")
    damaged.write_bytes(content)
    try:
        loaded = load_rule(damaged)
    except WeightsError:
        return
    assert loaded.config == rule.config and header_of(damaged) == header
    for key, value in rule.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_each_byte_of_the_facts_is_covered(path: Path) -> None:
    save_rule(load_rule(path), path, FACTS)
    content = path.read_bytes()
    assert header_of(path)["facts"] == FACTS | {"draws": {"3": [0.25, None]}}
    start = content.index(b"facts")
    for place in range(start, content.index(b"rule", start)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        refused(path, "altered|damaged|truncated|not written by")


def test_files_of_the_first_version_are_read(path: Path) -> None:
    """Its checksum does not cover the facts. The file of the first generation is one."""
    rule = load_rule(path)
    rewrite(path, version=1, facts=FACTS)
    again = load_rule(path)
    assert again.config == rule.config
    assert all(torch.equal(again.state_dict()[k], v) for k, v in rule.state_dict().items())
    assert header_of(FIRST_GENERATION)["version"] == 1
    assert load_rule(FIRST_GENERATION).config["decay_after"] == 300


@pytest.mark.parametrize("version", [0, -1, 1.5, "2", None, True])
def test_a_version_that_never_was_is_refused(path: Path, version: object) -> None:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    changed = header_of(path) | {"version": version}
    save_file(tensors, path, {"learned-opt": json.dumps(changed)})
    refused(path, "damaged header .*version")


def test_the_shipped_rule_trains_on_digits_without_a_learning_rate() -> None:
    torch.manual_seed(0)
    data = load_images("digits")
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    optimizer = LearnedOptimizer(model.parameters())
    for _ in range(100):
        index = torch.randint(len(data.train_y), (64,))
        optimizer.zero_grad()
        logits = model(data.train_x[index])
        torch.nn.functional.cross_entropy(logits, data.train_y[index]).backward()
        optimizer.step()
    loss = torch.nn.functional.cross_entropy(model(data.train_x), data.train_y)
    assert loss < 0.2  # from 2.3


def test_the_shipped_weights_are_those_of_the_default_config(tmp_path: Path) -> None:
    """Settings that are newer than the weights have defaults that change nothing."""
    with safe_open(DEFAULT, "pt") as file:
        facts = json.loads(file.metadata()["learned-opt"])["facts"]["train"]
    facts["start_from"] = None  # what the first stage made, by its checksum
    recorded = tmp_path / "recorded.yaml"
    recorded.write_text(json.dumps(facts))
    _, then, _ = parse(["train", "--config", str(recorded), "--output", "unused"])
    _, config, _ = parse(["train", "--config", str(TRAIN / "default.yaml"), "--output", "unused"])
    assert recipe(then) == recipe(config)


def test_the_first_stage_of_the_first_generation_is_that_of_mlps() -> None:
    """Figures of the first stage by itself are of weights that mlps.yaml makes."""
    configs = (
        ["train", "--config", str(TRAIN / f"{name}.yaml")] for name in ("first_generation", "mlps")
    )
    default, mlps = (parse([*config, "--output", "unused"])[1] for config in configs)
    stage = replace(first_stage(default), seed=mlps.seed, step_size=mlps.step_size)  # no part of it
    assert recipe(stage) == recipe(mlps)
