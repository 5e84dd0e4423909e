"""How steps fall over a run whose length is known, and over one whose length is not."""

from __future__ import annotations

from torch import Tensor

from learned_opt.rules.layout import State
from learned_opt.rules.steps import as_tensor

SHORT = 300  # in runs up to this length, a known length makes no difference
WARM_UP = 0.05  # in long runs of known length N, steps of a tensor rise over N · WARM_UP steps


def known_share(state: State) -> float:
    """Returns k, how much the length of the run counts, from 0 if it is not known to 1.

    The network knows runs of some hundred steps; the longer the run, the less its say.
    """
    return 0.0 if state.num_steps is None else 1 - min(1.0, SHORT / state.num_steps)


def rest(state: State, step: Tensor, decay_after: int, warm_up: bool) -> Tensor:
    """Returns the factor by which steps have fallen, (tensors,) or (1,).

    Args:
        state: the state before this update.
        step: the number of this update, (tensors,) or (1,).
        decay_after: the step after which steps fall in a run whose length is not known.
        warm_up: whether the first steps of a tensor in a long run of known length are shorter.
    """
    anytime = (decay_after / step).clamp(max=1)
    if state.num_steps is None:
        return anytime
    made = step - 1 if state.clock is None else as_tensor(state.clock, step)
    falling = 1 - made.clamp(max=state.num_steps - 1) / state.num_steps
    if warm_up:
        falling = falling * (step / (WARM_UP * state.num_steps)).clamp(max=1)
    known = known_share(state)
    return anytime ** (1 - known) * falling**known
