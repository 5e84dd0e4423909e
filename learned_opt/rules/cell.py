"""The LSTM cell that all rules share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def per_task(weight: Tensor, x: Tensor) -> Tensor:
    """Returns `weight`, to be multiplied with x (*tasks, inputs, units), as a view for each task.

    Without the view, matmul would transpose x to merge the tasks into one product, which costs
    several times the product itself. A weight that already has a matrix for each task is unchanged.
    """
    return weight.expand(*x.shape[:-2], *weight.shape[-2:])


class LSTMCell(nn.Module):
    """Hochreiter & Schmidhuber's LSTM for many independent units, which are the last dimension.

        i, f, g, o = W x + U h + b;   c' = σ(f) c + σ(i) tanh(g);   h' = σ(o) tanh(c')

    It is written with matrix products because `nn.LSTMCell` fails under vmap and needs features
    last. With units last, each gate is a contiguous row, which is much faster on a CPU.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        bound = hidden**-0.5
        self.weight = nn.Parameter(torch.empty(4 * hidden, inputs + hidden).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(4 * hidden))

    def forward(self, x: Tensor, state: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
        """Returns h' (*, hidden, units) and the next state (*, 2·hidden, units).

        Args:
            x: the inputs, (*, inputs, units).
            state: [h; c], (*, 2·hidden, units).
            in_place: whether to overwrite `state`, with fewer passes over memory and without an
                autograd graph.
        """
        h, c = state.chunk(2, dim=-2)
        if in_place and not torch.compiler.is_compiling():
            return self._overwrite(x, h, c), state
        inputs = torch.cat([x, h], dim=-2)
        gates = self.bias.unsqueeze(-1) + per_task(self.weight, x) @ inputs
        i, f, g, o = gates.chunk(4, dim=-2)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        new = torch.cat([h, c], dim=-2)
        return h, state.copy_(new) if in_place else new

    def _overwrite(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        # A row of ones makes the bias part of the product, which saves a pass over the gates.
        bias = self.bias.unsqueeze(-1).expand(*x.shape[:-2], -1, 1)
        weight = torch.cat([per_task(self.weight, x), bias], dim=-1)
        ones = x.new_ones(()).expand(*x.shape[:-2], 1, x.shape[-1])
        gates = weight @ torch.cat([x, h, ones], dim=-2)
        i, f, g, o = gates.chunk(4, dim=-2)
        for gate in (i, f, o):
            gate.sigmoid_()
        c.mul_(f).addcmul_(i, g.tanh_())
        return torch.tanh(c, out=h).mul_(o)
