"""Processes that do one job after the other, and are killed and replaced where one does not end."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.util
import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from learned_opt.errors import LearnedOptError
from learned_opt.interrupts import children_spared

# Bytes that the path of a socket may have on every system: 108 on Linux, 104 on macOS, less one.
SOCKET_PATH = 103
LISTENER = "/pymp-12345678/listener-12345678"  # what multiprocessing appends to the folder
GRACE = 2.0  # seconds that a job past its limit has to say where it was and to end by itself


@dataclass(frozen=True)
class Lost:
    """A job without a result: its process was killed or died.

    Attributes:
        reason: one line.
        where: the traceback of where it was, empty if unknown.
    """

    reason: str
    where: str


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    dump: Path  # where it writes, dying, where it was
    job: int = -1
    started: float = 0.0


class Workers:
    """`count` processes, started as they are needed; a context manager that ends them.

    A process lasts for many jobs, so that imports and data are loaded once. Jobs are picklable
    callables without arguments.

    Args:
        time_limit: seconds that a job may take.
    """

    def __init__(self, count: int, time_limit: float) -> None:
        self._count, self._limit = count, time_limit
        # torch's threads do not survive a fork: of a process that has used none, or of none
        methods = multiprocessing.get_all_start_methods()
        method = "forkserver" if "forkserver" in methods else "spawn"
        self._context = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload(["learned_opt.benchmarking.preload"])
            _start_server()
        self._idle: list[_Worker] = []
        self._busy: dict[Connection, _Worker] = {}
        self._started = 0

    def __enter__(self) -> Workers:
        self._folder = tempfile.TemporaryDirectory()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in [*self._idle, *self._busy.values()]:
            _end(worker)
        self._idle, self._busy = [], {}
        self._folder.cleanup()

    def run(self, jobs: Sequence[Callable[[], Any]]) -> Iterator[tuple[int, Any]]:
        """(index, what the job returned, or Lost) of each job, in the order in which they end."""
        waiting = deque(range(len(jobs)))
        while waiting or self._busy:
            while waiting and len(self._busy) < self._count:
                worker = self._idle.pop() if self._idle else self._start()
                worker.job, worker.started = waiting.popleft(), time.monotonic()
                self._busy[worker.connection] = worker
                with contextlib.suppress(OSError):  # it has died: seen below
                    worker.connection.send(jobs[worker.job])
            oldest = min(worker.started for worker in self._busy.values())
            patience = oldest + self._limit + GRACE - time.monotonic()
            done = wait(list(self._busy), max(0.0, patience))
            for connection in done:
                worker = self._busy.pop(connection)
                try:
                    result = connection.recv()
                except (EOFError, OSError):
                    yield worker.job, self._lost(worker)
                else:
                    self._idle.append(worker)
                    yield worker.job, result
            now = time.monotonic()
            late = [w for w in self._busy.values() if now > w.started + self._limit + GRACE]
            for worker in late:
                del self._busy[worker.connection]
                yield worker.job, self._lost(worker)

    def _start(self) -> _Worker:
        self._started += 1
        dump = Path(self._folder.name, f"{self._started}.txt")
        connection, other = self._context.Pipe()
        process = self._context.Process(
            target=_work, args=(other, dump, self._limit), daemon=True, name="benchmark worker"
        )
        worker = _Worker(process, connection, dump)
        process.start()
        other.close()  # so that its death ends the connection
        try:
            connection.recv()  # it is ready: from now on time counts
        except EOFError:
            raise LearnedOptError(
                "a worker process died while starting, for the reason it printed above; a script "
                "must call benchmark under `if __name__ == '__main__':`"
            ) from None
        except BaseException:  # an interrupt: nobody else knows of it yet
            _end(worker)
            raise
        return worker

    def _lost(self, worker: _Worker) -> Lost:
        late = time.monotonic() > worker.started + self._limit
        _end(worker)
        where = worker.dump.read_text(errors="replace") if worker.dump.exists() else ""
        if late:
            return Lost(f"TimeLimitError: no result after time_limit={self._limit:g} s", where)
        code = worker.process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            memory = ", most often for want of memory: use fewer processes"
            return Lost(f"WorkerDied: by {name}{memory if name == 'SIGKILL' else ''}", where)
        return Lost(f"WorkerDied: with exit code {code}", where)


def _start_server() -> None:
    """Python puts the working folder first on the path of a fork server: a learned_opt/ there, a
    clone perhaps, must not take the place of what is installed."""
    _make_socket_folder()
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        with children_spared():
            forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def _make_socket_folder() -> None:
    """The fork server listens on a socket in the temporary folder, or in /tmp where the name of
    that is longer than a socket's may be. multiprocessing keeps the folder, and removes it."""
    before, usual = tempfile.tempdir, tempfile.gettempdir()
    if len(os.fsencode(usual + LISTENER)) <= SOCKET_PATH:
        return
    tempfile.tempdir = "/tmp"
    try:
        multiprocessing.util.get_temp_dir()
    except OSError as error:
        raise LearnedOptError(
            f"TMPDIR={usual!r} is too long for a socket, and /tmp cannot be used ({error}); set "
            f"TMPDIR to a folder of at most {SOCKET_PATH - len(LISTENER)} characters"
        ) from error
    finally:
        tempfile.tempdir = before


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.connection.close()


def _work(connection: Connection, dump: Path, time_limit: float) -> None:
    """Of a worker process: does jobs until nobody sends any."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for whoever sends the jobs
    with open(dump, "w") as file, contextlib.suppress(EOFError, OSError):
        faulthandler.enable(file)
        connection.send(None)
        while True:
            job = connection.recv()
            # also ends a process whose parent is gone
            faulthandler.dump_traceback_later(time_limit, exit=True, file=file)
            result = job()
            faulthandler.cancel_dump_traceback_later()
            connection.send(result)
    os._exit(0)  # whatever threads an entrant has left behind
