"""torch's Muon, extended to convolutions and to float32 on a CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

try:
    from torch.optim import Muon as _Muon
except ImportError as error:  # reported when an entrant is made
    raise ImportError("torch.optim.Muon needs torch 2.9 or later") from error


class Muon(_Muon):
    """torch.optim.Muon (Jordan et al. 2024) with two changes.

    The weight of a convolution, (out, in, k, k), is orthogonalized as the matrix (out, in·k·k), as
    in Jordan's code; torch accepts only matrices. On a CPU the Newton-Schulz iteration, for which
    torch converts to bfloat16, stays in float32: few CPUs have arithmetic for bfloat16, and the
    others are dozens of times slower with it.
    """

    def __init__(self, params: Iterable[Any], **kwargs: Any) -> None:
        groups = [g if isinstance(g, dict) else {"params": [g]} for g in params]
        self._whole: list[tuple[Tensor, Tensor]] = []  # a tensor and its view as a matrix
        super().__init__([g | {"params": list(map(self._matrix, g["params"]))} for g in groups],
                         **kwargs)  # fmt: skip

    def _matrix(self, p: Tensor) -> Tensor:
        if p.dim() == 2:
            return p
        matrix = torch.nn.Parameter(p.detach().flatten(1))
        self._whole.append((p, matrix))
        return matrix

    def step(self, closure: Any = None) -> Any:
        for p, matrix in self._whole:
            matrix.grad = None if p.grad is None else p.grad.flatten(1)
        with _Float32():
            return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for p, _ in self._whole:
            p.grad = None


class _Float32(TorchFunctionMode):
    """Copies CPU tensors instead of converting them to bfloat16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.bfloat16 and args[0].device.type == "cpu":
            return args[0].clone()
        return func(*args, **(kwargs or {}))
