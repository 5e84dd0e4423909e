"""The faults of mutants.yaml still fit the code, so `python -m tests.mutants.run` can try them."""

from __future__ import annotations

import pytest

from tests.mutants.run import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["fault"])
def test_its_text_is_in_its_file_once(mutant: dict) -> None:
    assert (ROOT / mutant["file"]).read_text().count(mutant["old"]) == 1
    assert mutant["new"] != mutant["old"]
    assert all((ROOT / test).is_file() for test in mutant["tests"])


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 30
