"""The built wheel has everything that a user needs, including the shipped weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
USE = """
import torch, learned_opt, geodesic
from pathlib import Path
assert Path(learned_opt.__file__).is_relative_to(Path.cwd()), learned_opt.__file__
assert Path(geodesic.__file__).is_relative_to(Path.cwd()), geodesic.__file__
p = torch.nn.Parameter(torch.ones(3))
optimizer = learned_opt.LearnedOptimizer([p])
p.square().sum().backward()
optimizer.step()
assert (p < 1).all()
"""


@pytest.mark.slow
def test_an_installed_wheel_trains(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("geodesic", "learned_opt"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, source], check=True, timeout=300)
    (wheel,) = tmp_path.glob("learned_opt-*.whl")
    names = ZipFile(wheel).namelist()
    assert "learned_opt/weights/default.safetensors" in names
    assert "learned_opt/benchmarking/report.html" in names
    assert not [n for n in names if n.startswith(("tests", "experiments", "configs"))]
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True, timeout=300)
    environment = os.environ | {"PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", USE], cwd=site, env=environment, check=True, timeout=300)
