"""Runs cells that have no record yet, in worker processes and on the ranks of a torchrun job."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from geodesic.processes import process_rank
from learned_opt.benchmarking.cells import Cell, Record, without_folders
from learned_opt.benchmarking.stores import Store
from learned_opt.benchmarking.workers import Lost, Workers
from learned_opt.errors import ConfigError
from learned_opt.progress import Progress

FOREVER = timedelta(days=365)  # ranks wait for each other's cells; torchrun ends them if one dies


class Runner:
    """Runs cells and keeps their records; a context manager that ends its worker processes.

    Each rank of a job makes its own runner, and all ranks call `run` with the same cells. They
    divide the cells by rank, and share `store`, which must be on a file system that all can access.

    Args:
        store: keeps the records of cells.
        processes: the number of cells that this rank runs at the same time.
        time_limit: the number of seconds that a cell may take.
        total: the expected number of cells, for the progress bar.
        on_record: is called on rank 0 with each cell that has been run and its record.
    """

    def __init__(
        self,
        store: Store,
        processes: int = 1,
        time_limit: float = 300.0,
        total: int = 0,
        on_record: Callable[[Cell, Record], None] | None = None,
    ) -> None:
        self.rank, self.ranks = process_rank()
        self._store, self._on_record = store, on_record
        self._workers = Workers(processes, time_limit)
        self.records: dict[str, Record] = {}
        self._total = total

    def __enter__(self) -> Runner:
        self._joined = self.ranks > 1 and not dist.is_initialized()
        if self._joined:
            if "MASTER_ADDR" not in os.environ:
                raise ConfigError(
                    f"this is process {self.rank} of {self.ranks}, but MASTER_ADDR is not set; "
                    "start several processes with torchrun, or one with --processes"
                )
            dist.init_process_group("gloo", timeout=FOREVER)
        self._workers.__enter__()
        self._progress = Progress("benchmark", "runs", self._total, shown=self.rank == 0)
        return self

    def __exit__(self, *error: Any) -> None:
        self._workers.__exit__(*error)
        self._progress.close()
        if self._joined and error[0] is None:
            dist.destroy_process_group()

    def call(self, jobs: Sequence[Callable[[], Any]]) -> list[Any]:
        """Returns what `jobs` return, or Lost, in their order; on other ranks than 0, only None."""
        results = [None] * len(jobs)
        if self.rank == 0:
            for index, result in self._workers.run(jobs):
                results[index] = result
        return results

    def run(self, cells: Sequence[Cell]) -> list[Record]:
        """Returns the records of `cells` in their order; runs those that the store lacks."""
        wanted = {cell.name: cell for cell in cells if cell.name not in self.records}
        found = {n: r for n, c in wanted.items() if (r := self._store.load(c)) is not None}
        (found,) = self._from_first([found])
        missing = [cell for name, cell in wanted.items() if name not in found]
        self.records |= found
        self._progress.total = max(self._progress.total, self._progress.done + len(wanted))
        self._progress.skip(len(found))
        mine = self._run_share(missing[self.rank :: self.ranks])
        if self.ranks > 1:
            shares: list[Any] = [None] * self.ranks
            dist.all_gather_object(shares, mine)
            for rank, share in enumerate(shares):
                self.records |= share
                if rank:
                    for name, record in share.items():
                        self._done(wanted[name], record)
        else:
            self.records |= mine
        return [self.records[cell.name] for cell in cells]

    def _run_share(self, cells: list[Cell]) -> dict[str, Record]:
        records = {}
        for index, result in self._workers.run([self._store.job(cell) for cell in cells]):
            cell, record = cells[index], result
            if isinstance(result, Lost):
                where = without_folders(result.where)
                error = f"{where}\n{result.reason}" if where else result.reason
                record = cell.blank(error=error)
            self._store.keep(cell, record, record is result)
            records[cell.name] = record
            if self.rank == 0:
                self._done(cell, record)
        return records

    def _done(self, cell: Cell, record: Record) -> None:
        self._progress.add()
        if self._on_record and self.rank == 0:
            self._on_record(cell, record)

    def _from_first(self, values: list[Any]) -> list[Any]:
        """Returns the values of rank 0, because files may change while the ranks read them."""
        if self.ranks > 1:
            dist.broadcast_object_list(values, 0)
        return values
