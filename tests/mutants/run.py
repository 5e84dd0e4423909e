"""Puts faults into copies of the repository, and says which of them the tests find.

    python -m tests.mutants.run            # all of mutants.yaml
    python -m tests.mutants.run basis      # those whose description or file contains a word

It exits with code 1 if a fault is not found.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
MUTANTS: list[dict] = yaml.safe_load((Path(__file__).parent / "mutants.yaml").read_text())
COPIED = ("geodesic", "learned_opt", "experiments", "configs", "tests", "pyproject.toml")
SECONDS = 600  # a test that hangs has found the fault, too


def put_into(folder: Path, mutant: dict) -> None:
    """Replaces the mutant's text in the copy of its file."""
    path = folder / mutant["file"]
    path.write_text(path.read_text().replace(mutant["old"], mutant["new"]))


def failing_test(mutant: dict) -> str | None:
    """Returns the name of the first test that fails with the mutant, or None if all pass."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in COPIED:
            source = ROOT / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / part)
        put_into(folder, mutant)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
        command += ["-m", "not slow", *mutant["tests"]]
        try:
            ended = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            return "a test that does not end"
    if ended.returncode not in (0, 1):  # of pytest: all passed, and some failed
        raise RuntimeError(
            f"{mutant['fault']}: pytest ended with {ended.returncode}\n{ended.stdout}"
        )
    failed = (line for line in ended.stdout.splitlines() if line.startswith(("FAILED", "ERROR")))
    return next((line.split()[1] for line in failed), None)


def main() -> None:
    chosen = [
        mutant
        for mutant in MUTANTS
        if all(word in f"{mutant['fault']} {mutant['file']}" for word in sys.argv[1:])
    ]
    alive = 0
    for mutant in chosen:
        start = time.monotonic()
        found = failing_test(mutant)
        alive += found is None
        print(f"| {mutant['fault']} | {found or 'NOT FOUND'} | {time.monotonic() - start:.0f} s |",
              flush=True)  # fmt: skip
    sys.exit(f"{alive} of {len(chosen)} faults were not found" if alive else 0)


if __name__ == "__main__":
    main()
