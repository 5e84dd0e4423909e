"""The recurrent cell that all rules share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def per_task(weight: Tensor, x: Tensor) -> Tensor:
    """A matrix to multiply x (*tasks, inputs, units) with, as a view for each task: else matmul
    transposes x to make one product of many, which costs several times the product. One that is
    there for each task stays as it is."""
    return weight.expand(*x.shape[:-2], *weight.shape[-2:])


class LSTMCell(nn.Module):
    """Hochreiter & Schmidhuber's LSTM over many independent units, features first.

        i, f, g, o = W x + U h + b;   c' = σ(f) c + σ(i) tanh(g);   h' = σ(o) tanh(c')

    Written from matrix products because `nn.LSTMCell` fails under vmap and wants features last:
    with units last every gate is a contiguous row, which on CPU is what makes it fast.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        bound = hidden**-0.5
        self.weight = nn.Parameter(torch.empty(4 * hidden, inputs + hidden).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(4 * hidden))

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """x (*, inputs, units), state (*, 2·hidden, units) = [h; c] -> (h', state')."""
        h, c = state.chunk(2, dim=-2)
        gates = per_task(self.weight, x) @ torch.cat([x, h], dim=-2) + self.bias.unsqueeze(-1)
        i, f, g, o = gates.chunk(4, dim=-2)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return h, torch.cat([h, c], dim=-2)
