"""The recurrent cell: its in-place computation matches the one with an autograd graph."""

from __future__ import annotations

import pytest
import torch

from learned_opt.rules.cell import LSTMCell


@pytest.mark.parametrize("lead", [(), (3,)])
def test_in_place_it_gives_the_same(lead: tuple[int, ...]) -> None:
    """On columns of a larger state, of which the others stay as they are."""
    torch.manual_seed(0)
    cell = LSTMCell(2, 5).double()
    cell.bias.data.normal_()
    x = torch.randn(*lead, 2, 7, dtype=torch.float64)
    whole = torch.randn(*lead, 10, 20, dtype=torch.float64)
    before, part = whole.clone(), whole[..., 4:11]
    h, state = cell(x, part.clone())
    assert h.requires_grad
    with torch.no_grad():
        new_h, new_state = cell(x, part, in_place=True)
    torch.testing.assert_close((new_h, new_state), (h.detach(), state.detach()))
    assert new_state.data_ptr() == part.data_ptr()
    assert torch.equal(whole[..., :4], before[..., :4])
    assert torch.equal(whole[..., 11:], before[..., 11:])
