"""Shows progress, as a bar on a terminal and as a line every half minute elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Protocol, TypeVar

from tqdm import tqdm

PERIOD = 30.0  # the number of seconds between lines
T = TypeVar("T", covariant=True)


class Items(Sized, Iterable[T], Protocol[T]):
    """A list, or another iterable with a length."""


class Progress:
    """Shows the progress of some work on stderr; a context manager that ends with the work.

    On a terminal it shows tqdm's bar. Elsewhere, as in a log, it prints every half minute, even
    during a longer step, a line such as

        benchmark: 12 of 90 runs done in 02:05, about 13:32 left

    Args:
        what: the name of the work.
        unit: the name of the steps, in the plural.
        total: the number of steps in all; the attribute may be changed later.
        done: the number of steps that earlier runs did, on which no estimate of time is based.
        shown: whether to show anything.
    """

    def __init__(self, what: str, unit: str, total: int, done: int = 0, shown: bool = True) -> None:
        self.total, self.done = total, done
        self._what, self._unit, self._before = what, unit, done
        self._started, self._ended = time.monotonic(), threading.Event()
        terminal = sys.stderr.isatty()
        self._bar = (
            tqdm(desc=what, total=total, initial=done, unit=f" {unit}")
            if shown and terminal
            else None
        )
        if shown and not terminal:
            threading.Thread(target=self._report, daemon=True, name="progress").start()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, count: int = 1) -> None:
        """Counts `count` more steps as done."""
        self.done += count
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.update(count)

    def skip(self, count: int) -> None:
        """Counts `count` more steps as done by an earlier run."""
        self._before += count
        self.add(count)

    def close(self) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.close()

    def __str__(self) -> str:
        gone, made = time.monotonic() - self._started, self.done - self._before
        line = f"{self._what}: {self.done} of {self.total} {self._unit} done"
        line += f" in {tqdm.format_interval(gone)}"
        if made:
            left = gone / made * (self.total - self.done)
            line += f", about {tqdm.format_interval(left)} left"
        return line

    def _report(self) -> None:
        while not self._ended.wait(PERIOD):
            print(self, file=sys.stderr, flush=True)


def tracked(items: Items[T], what: str, unit: str, shown: bool = True) -> Iterator[T]:
    """Yields `items` and shows the progress of the loop over them."""
    with Progress(what, unit, len(items), shown=shown and len(items) > 0) as progress:
        for item in items:
            yield item
            progress.add()
