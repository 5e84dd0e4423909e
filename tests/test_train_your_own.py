"""Runs the commands of docs/train_your_own.md, shrunk, in their order."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

PAGE = (Path(__file__).parents[1] / "docs" / "train_your_own.md").read_text()


@pytest.mark.slow
def test_the_page_can_be_followed(tmp_path, monkeypatch):
    mine, compare = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    module, usage = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my_module.py").write_text(module)
    (tmp_path / "mine.yaml").write_text(mine)
    (tmp_path / "paths.yaml").write_text(yaml.safe_dump(yaml.safe_load(mine)["geodesics"]))
    (tmp_path / "compare.yaml").write_text(compare)
    commands = re.findall(r"^learned-opt (.*)$", PAGE, re.MULTILINE)
    names = ["train", "geodesics", "train", "benchmark", "train", "benchmark"]
    assert [c.split()[0] for c in commands] == names
    for command in commands:
        process = subprocess.run(
            [sys.executable, "-m", "learned_opt.cli", *shlex.split(command.replace(" --smoke", "")),
             "--smoke"],
            cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
    assert list((tmp_path / "runs" / "paths").rglob("*.png"))
    assert "shipped" in (tmp_path / "runs" / "compare" / "report.html").read_text()

    monkeypatch.chdir(tmp_path)
    names = {"model": torch.nn.Linear(3, 1)}
    exec(usage, names)
    assert names["optimizer"].rule.name == "geodesic_rnn"
