"""Measures the peak memory of a piece of work."""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

_PROC = Path("/proc/self")


@contextlib.contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[Callable[[], float]]:
    """Yields a function that returns the peak memory so far beyond that at the start, in bytes.

    With CUDA it is the memory that torch allocates. Otherwise it is the growth of the process's
    resident set, whose maximum Linux records (`VmHWM`, reset through `clear_refs`), or NaN on other
    systems. Freed memory is returned to the system first, so that earlier work does not hide
    growth. The precision is limited by the page size of 4 kB and the allocator's reserve.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield lambda: float(torch.cuda.max_memory_allocated(device) - start)
        return
    with contextlib.suppress(OSError, AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    try:
        (_PROC / "clear_refs").write_text("5")
        start = _bytes("VmRSS")
    except (OSError, TypeError):
        yield lambda: math.nan
        return
    yield lambda: float(max(0, _bytes("VmHWM") - start))


def _bytes(entry: str) -> int:
    """Returns an entry of Linux's status of this process, in bytes."""
    return 1024 * int(re.search(rf"{entry}:\s+(\d+) kB", (_PROC / "status").read_text())[1])
