"""Stores records of cells, in a file or a row for each, so that nothing is run twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from geodesic.files import user_path, write_atomic
from learned_opt.benchmarking.cells import Cell, Job, Record, load, save, whole
from learned_opt.errors import ConfigError


class Store(Protocol):
    """The interface of what a Runner keeps records in."""

    def load(self, cell: Cell) -> Record | None:
        """Returns the record of a cell that has run, or None."""

    def job(self, cell: Cell) -> Callable[[], Record]:
        """Returns the job of a worker process that runs the cell."""

    def keep(self, cell: Cell, record: Record, saved: bool) -> None:
        """Keeps a record; `saved` says whether `job` returned it."""


class Files:
    """Keeps a file for each cell, which the worker process writes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, cell: Cell) -> Record | None:
        return load(cell, self._folder)

    def job(self, cell: Cell) -> Callable[[], Record]:
        return Job(cell, self._folder)

    def keep(self, cell: Cell, record: Record, saved: bool) -> None:
        if not saved:
            save(cell, record, self._folder)


class Rows:
    """Keeps a line of JSON for each cell, which is appended to a file of this rank.

    A line that was cut off by an interruption, or is not a record of its cell, is ignored, and the
    cell is run again. A file that was deleted in the meantime is written again with all its lines.

    Args:
        path: the file of rank 0. Other ranks have their number before the suffix. All are read.
        known: further files, whose cells count as done. They are not written to.
    """

    def __init__(self, path: Path, rank: int = 0, known: Iterable[str | Path] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path.with_stem(f"{path.stem}-{rank}") if rank else path
        self._rows: dict[str, Record] = {}
        self._lines: list[bytes] = []  # of the file at `_path`
        for file in (user_path(path, "done", ConfigError) for path in known):
            if not file.is_file():
                raise ConfigError(
                    f"done names {str(file)!r}, which is not a file; run from the folder to which "
                    "it is relative, or give done: [] to run everything again"
                )
            self._read(file)
        for file in sorted(path.parent.glob(f"{path.stem}*{path.suffix}")):
            self._read(file)
        if self._path.exists():
            self._lines = self._path.read_bytes().splitlines(keepends=True)

    def load(self, cell: Cell) -> Record | None:
        record = self._rows.get(cell.name)
        return record if whole(record, cell) else None

    def job(self, cell: Cell) -> Callable[[], Record]:
        return Job(cell, None)

    def keep(self, cell: Cell, record: Record, saved: bool) -> None:
        line = (json.dumps({"cell": cell.name} | record, default=repr) + "\n").encode()
        if self._lines and not self._path.exists():
            write_atomic(self._path, b"".join(self._lines))
        with open(self._path, "ab+") as file:
            if file.tell() and not _ends_line(file):
                line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._lines.append(line)
        if record["error"] is None:
            self._rows[cell.name] = record

    def _read(self, path: Path) -> None:
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
                if row["error"] is None:
                    self._rows[row.pop("cell")] = row
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                continue  # the line is cut off or damaged


def _ends_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
