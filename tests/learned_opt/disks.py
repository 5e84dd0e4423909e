"""Disks that fail when they are told to."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest


class Disk(NamedTuple):
    folder: Path
    fail: Callable[[], None]
    mend: Callable[[], None]


@pytest.fixture(params=["full", "limit"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """A disk that fails when it is told to: a real one, or a limit on the size of files."""
    if request.param == "limit":
        free = resource.getrlimit(resource.RLIMIT_FSIZE)

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, free[1]))  # less than a checkpoint

        mend = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, free)  # noqa: E731
        try:
            yield Disk(tmp_path, limit, mend)
        finally:
            mend()
        return
    try:
        mount("size=4m", tmp_path)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a disk here")
    filler = tmp_path / "filler"

    def fill() -> None:
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    try:
        yield Disk(tmp_path, fill, filler.unlink)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def mount(options: str, folder: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
