"""Ends a command cleanly on Ctrl-C and SIGTERM: resources are released and one line says so."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Variables in which torchrun, Lightning and SLURM give the rank of a process in its job.
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = (
    3.0  # seconds in which repeated signals count as one, so that they do not cut cleaning up
)


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end; Lightning and torch know it as Ctrl-C."""


@contextmanager
def raised(last_of_process: bool = False) -> Iterator[list[int]]:
    """Raises Interrupted when SIGINT or SIGTERM arrives, and yields the list of signals received.

    Signals that the process was started to ignore, as in a shell's background jobs, stay ignored.

    Args:
        last_of_process: whether only Python's own clean-up follows. Signals are ignored from then
            on, because they would interrupt it.
    """
    received: list[int] = []
    last = -PATIENCE

    def stop(number: int, frame: object) -> None:
        nonlocal last
        if time.monotonic() - last < PATIENCE:
            return
        last = time.monotonic()
        received.append(number)
        raise Interrupted

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS} if main else {}
    before = {n: handler for n, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last_of_process else handler)


@contextmanager
def interruptible() -> Iterator[None]:
    """Turns a signal into one line on stderr and the exit code 128 + its number."""
    with raised() as received:
        try:
            yield
        except BaseException:  # Lightning turns it into a SystemExit
            if not received:
                raise
            if is_first():
                name = signal.Signals(received[0]).name
                print(
                    f"learned-opt: ended by {name}; the same command resumes where it stopped",
                    file=sys.stderr,
                )
            sys.exit(128 + received[0])


@contextmanager
def children_spared() -> Iterator[None]:
    """Blocks Ctrl-C in processes that are started here until they call `accept_interrupts`.

    A terminal sends Ctrl-C to them as well, and a process that is still importing would print a
    traceback. Their parent ends them instead.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def accept_interrupts() -> None:
    """Unblocks Ctrl-C in a process that was started under `children_spared`."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def is_first() -> bool:
    """Whether this process is the first of its job, or the only one."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)
