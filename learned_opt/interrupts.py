"""Ctrl-C and SIGTERM end a command cleanly: what it holds is released, and one line says so."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# What torchrun, Lightning and SLURM tell a process of its place in a job.
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = (
    3.0  # seconds in which repeated signals count as one, so that they do not cut cleaning up
)


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end; Lightning and torch know it as Ctrl-C."""


@contextmanager
def raised(last_of_process: bool = False) -> Iterator[list[int]]:
    """Raises Interrupted where SIGINT or SIGTERM arrives; yields the list of those that did.

    Signals that the process was started to ignore, as a shell's background jobs do, stay ignored.

    Args:
        last_of_process: that nothing but Python's own cleaning up comes after this; a signal would
            cut that short, and is ignored from then on.
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
    """Of a command: a signal becomes one line on stderr and the exit code 128 + its number."""
    with raised() as received:
        try:
            yield
        except BaseException:  # Lightning makes a SystemExit of it
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
    """Processes that are started here hold Ctrl-C back until they call `accept_interrupts`.

    A terminal sends it to them as well, and one that is still importing would print a traceback;
    it is for their parent to end them.
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
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def is_first() -> bool:
    """Whether this process is the first of its job, or alone."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def quiet_lightning() -> None:
    """Lightning announces Ctrl-C in a line of its own."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "KeyboardInterrupt" not in record.getMessage()
    )
