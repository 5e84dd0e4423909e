"""The recurrent cell: its in-place computation matches the one with an autograd graph."""

from __future__ import annotations

import pytest
import torch

from learned_opt.rules.cell import LSTMCell


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("shared_inputs", [0, 4])
def test_in_place_it_gives_the_same(lead: tuple[int, ...], shared_inputs: int) -> None:
    """On columns of a larger state, of which the others stay as they are."""
    torch.manual_seed(0)
    cell = LSTMCell(shared_inputs + 2, 5).double()
    cell.bias.data.normal_()
    x = torch.randn(*lead, 2, 7, dtype=torch.float64)
    shared = torch.randn(*lead, shared_inputs, 1, dtype=torch.float64) if shared_inputs else None
    whole = torch.randn(*lead, 10, 20, dtype=torch.float64)
    before, part = whole.clone(), whole[..., 4:11]
    h, state = cell(x, part.clone(), shared)
    assert h.requires_grad
    with torch.no_grad():
        new_h, new_state = cell(x, part, shared, in_place=True)
    torch.testing.assert_close((new_h, new_state), (h.detach(), state.detach()))
    assert new_state.data_ptr() == part.data_ptr()
    assert torch.equal(whole[..., :4], before[..., :4])
    assert torch.equal(whole[..., 11:], before[..., 11:])


def test_shared_inputs_are_the_first_ones() -> None:
    cell = LSTMCell(6, 3)
    x, state, shared = torch.randn(2, 5), torch.randn(6, 5), torch.randn(4, 1)
    together = torch.cat([shared.expand(4, 5), x])
    torch.testing.assert_close(cell(x, state, shared), cell(together, state))
