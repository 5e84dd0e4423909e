"""Counts of steps, in Python and as tensors, and what is due after how many."""

from __future__ import annotations

import torch
from torch import Tensor

# torch.compiler.disable, except that torch's compiler, which takes a second to import, is imported
# at the first call and not here.
not_compiled = torch._disable_dynamo


def due(step: int, every: int) -> bool:
    """Whether something that is renewed every `every` steps is due after `step` steps.

    Before the first multiple of `every` it is also due after 0, 1, 2, 4, 8, ... steps.
    """
    return step % every == 0 or (step < every and step & (step - 1) == 0)


def as_numbers(step: int | Tensor) -> list[int]:
    """Returns `State.step` as a list of ints, which waits for the device.

    Tensors on the meta device, which have no values, give 0.
    """
    if not isinstance(step, Tensor):
        return [step]
    return [0] * step.numel() if step.is_meta else [int(t) for t in step.flatten().tolist()]


def as_tensor(step: int | Tensor, x: Tensor) -> Tensor:
    """Returns a step count as (tensors,) or (1,), in a dtype that is exact enough for β**step."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64  # mps has no float64
    return step.to(dtype) if isinstance(step, Tensor) else x.new_full((1,), step, dtype=dtype)


def common(step: Tensor) -> Tensor:
    """Returns step counts (tensors,) as (1,) if they are equal, which saves work.

    Elsewhere than on the CPU Python would have to wait for the answer.
    """
    known = step.device.type == "cpu" and not torch.compiler.is_compiling()
    return step[:1] if known and len(step) > 1 and bool((step == step[0]).all()) else step
