"""Worker processes that do one job after another, and are replaced if a job does not end."""

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

# The most bytes in the path of a socket on every system: 108 on Linux, 104 on macOS, less one.
SOCKET_PATH = 103
LISTENER = "/pymp-12345678/listener-12345678"  # what multiprocessing appends to the folder
GRACE = 2.0  # seconds in which a job past its limit can write its traceback and end by itself


@dataclass(frozen=True)
class Lost:
    """The result of a job whose process was killed or died.

    Attributes:
        reason: the reason, in one line.
        where: the traceback at that time; empty if it is unknown.
    """

    reason: str
    where: str


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    dump: Path  # the file into which it writes its traceback when it dies
    job: int = -1
    started: float = 0.0


class Workers:
    """Up to `count` processes, started when they are needed; a context manager that ends them.

    A process does many jobs, so that imports and data are loaded once. Jobs are picklable
    callables without arguments.

    Args:
        count: the number of processes.
        time_limit: the number of seconds that a job may take.
    """

    def __init__(self, count: int, time_limit: float) -> None:
        self._count, self._limit = count, time_limit
        # torch's threads do not survive a fork, so fork a server that has used none, or spawn
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
        """Yields the index of each job and what it returned, or Lost, when the job ends."""
        waiting = deque(range(len(jobs)))
        while waiting or self._busy:
            while waiting and len(self._busy) < self._count:
                worker = self._idle.pop() if self._idle else self._start()
                worker.job, worker.started = waiting.popleft(), time.monotonic()
                self._busy[worker.connection] = worker
                with contextlib.suppress(OSError):  # the process has died, which is noticed below
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
        other.close()  # then the death of the process closes the connection
        try:
            connection.recv()  # it is ready; the time limit counts from now on
        except EOFError:
            raise LearnedOptError(
                "a worker process died while starting, for the reason it printed above; a script "
                "must call benchmark under `if __name__ == '__main__':`"
            ) from None
        except BaseException:  # an interrupt: nothing else would end this worker
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
            memory = ", most often because memory ran out; use fewer processes"
            return Lost(f"WorkerDied: killed by {name}{memory if name == 'SIGKILL' else ''}", where)
        return Lost(f"WorkerDied: it ended with exit code {code}", where)


def _start_server() -> None:
    """Starts the fork server without the working folder on its path.

    Python puts that folder first, and a learned_opt/ in it, such as that of a clone, must not
    replace the installed package.
    """
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
    """Makes the folder of the fork server's socket in /tmp if the usual path is too long.

    The usual path is in the temporary folder. multiprocessing keeps the folder, and removes it at
    the end.
    """
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
    """Does jobs in a worker process until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that sends jobs handles it
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
    os._exit(0)  # even if an entrant has left threads behind
