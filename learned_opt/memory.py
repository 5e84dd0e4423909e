"""How much memory a piece of work takes at most."""

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
    """Yields a function: the most bytes so far beyond those at the start; NaN where unknown.

    On an accelerator of CUDA these are torch's, else the growth of the process's resident set, of
    which Linux keeps the maximum (`VmHWM`, set back through `clear_refs`). Memory that was freed
    before goes back to the system first, so that what was done earlier in the process hides
    nothing; what is left are pages, 4 kB, and what the allocator keeps in reserve.
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
    """What Linux says of this process."""
    return 1024 * int(re.search(rf"{entry}:\s+(\d+) kB", (_PROC / "status").read_text())[1])
