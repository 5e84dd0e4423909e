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

    def forward(
        self, x: Tensor, state: Tensor, shared: Tensor | None = None, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        """x (*, inputs, units), state (*, 2·hidden, units) = [h; c] -> (h', state').

        Args:
            shared: (*, first inputs, 1 or units), those that come before x.
            in_place: without a graph, in fewer passes over memory; overwrites `state`.
        """
        h, c = state.chunk(2, dim=-2)
        if in_place and not torch.compiler.is_compiling():
            return self._overwrite(x, h, c, shared), state
        gates, weight = self.bias.unsqueeze(-1), self.weight
        if shared is not None:  # their product, once for all units
            first, weight = weight.split([shared.shape[-2], weight.shape[-1] - shared.shape[-2]], 1)
            gates = gates + per_task(first, shared) @ shared
        gates = gates + per_task(weight, x) @ torch.cat([x, h], dim=-2)
        i, f, g, o = gates.chunk(4, dim=-2)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        new = torch.cat([h, c], dim=-2)
        return h, state.copy_(new) if in_place else new

    def _overwrite(self, x: Tensor, h: Tensor, c: Tensor, shared: Tensor | None) -> Tensor:
        weight, bias = self.weight, self.bias.unsqueeze(-1)
        if shared is not None:  # (*, 4·hidden, 1): the product for all units at once
            first, weight = weight.split([shared.shape[-2], weight.shape[-1] - shared.shape[-2]], 1)
            bias = first @ shared + bias
        # a row of ones makes the bias part of the product, which saves a pass over the gates
        weight = torch.cat([per_task(weight, x), bias.expand(*x.shape[:-2], -1, 1)], dim=-1)
        ones = x.new_ones(()).expand(*x.shape[:-2], 1, x.shape[-1])
        gates = weight @ torch.cat([x, h, ones], dim=-2)
        # compiled, these were slower with every form of tanh that was tried
        i, f, g, o = gates.chunk(4, dim=-2)
        for gate in (i, f, o):
            gate.sigmoid_()
        c.mul_(f).addcmul_(i, g.tanh_())
        return torch.tanh(c, out=h).mul_(o)
