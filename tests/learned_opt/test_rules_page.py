"""docs/rules.md: its example rule trains and runs from a file, and its table is right."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from learned_opt import LearnedOptimizer, make_rule
from learned_opt.rules.base import _REGISTRY

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "rules.md").read_text()


@pytest.mark.slow
def test_the_rule_of_the_tutorial_is_trained_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, usage = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (command,) = re.findall(r"^python (my_rule\.py train .*)$", PAGE, re.MULTILINE)
    (tmp_path / "my_rule.py").write_text(rule)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, *shlex.split(command), "--smoke"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(_REGISTRY, "mixer", None)  # and out again afterwards
    names: dict = {}
    exec(usage, names)  # the page's own
    optimizer = names["optimizer"]
    assert optimizer.rule.config == {"hidden": 8, "alpha": 0.01}
    assert all(optimizer.state[p]["step"] == 20 for p in names["model"].parameters())
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.zeros(3)
    LearnedOptimizer([p], weights=names["my_rule"].Mixer()).step()
    assert torch.equal(p.detach(), torch.ones(3))


def test_the_table_has_every_rule_and_its_state() -> None:
    rows = re.findall(r"^\| `(\w+)`(?: `(.*?)`)? \|.*\| (\d+) \|$", PAGE, re.MULTILINE)
    assert {name for name, *_ in rows} == set(_REGISTRY)
    for name, config, size in rows:
        p = torch.ones(5, 40, requires_grad=True)
        p.grad = torch.ones_like(p)
        rule = make_rule(name, **yaml.safe_load(config or "{}"))
        optimizer = LearnedOptimizer([p], weights=rule)
        optimizer.step()
        state = [s for s in optimizer.state[p].values() if s.shape[:2] == p.shape]
        assert sum(s.numel() * s.element_size() for s in state) == int(size) * p.numel()


def test_a_scheduler_fits_the_shipped_weights() -> None:
    (config,) = re.findall(r"`rule_config: (\{base_config.*?\}\})`", PAGE)
    scheduler = make_rule("scheduled", **yaml.safe_load(config))
    shipped = LearnedOptimizer([torch.ones(2, requires_grad=True)]).rule
    assert scheduler.config["base_config"] == shipped.config
