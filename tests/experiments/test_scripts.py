"""All scripts in experiments/ fit the packages that they import."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "experiments").rglob("*.py"))
]


@pytest.mark.parametrize("module", MODULES)
def test_it_can_be_imported(module: str) -> None:
    import_module(module)


def test_they_are_found() -> None:
    assert len(MODULES) > 20
