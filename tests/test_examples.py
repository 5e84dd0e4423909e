"""The scripts in examples/ run as they are, shorter, and print losses beside AdamW's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = {
    "plain_loop.py": "--steps 30",
    "lightning_module.py": "--steps 10",
    "hugging_face_trainer.py": "--steps 5",
    "own_task.py": "--steps 10 --updates 2",
}


def test_every_script_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_it_prints_the_losses_of_each_optimizer(name: str, tmp_path: Path) -> None:
    if name == "hugging_face_trainer.py":
        pytest.importorskip("transformers")
    command = [sys.executable, str(EXAMPLES / name), *SHORT[name].split()]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert "train loss   validation loss" in process.stdout
    rows = re.findall(r"^(\w[\w ]+?) +(\d+\.\d{4}) +(\d+\.\d{4})$", process.stdout, re.MULTILINE)
    names = [row[0] for row in rows]
    first = ["trained further", "as shipped"] if name == "own_task.py" else ["LearnedOptimizer"]
    assert names == [*first, "AdamW"]
    assert not list(tmp_path.iterdir())  # nothing is left behind
