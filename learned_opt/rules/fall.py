"""How steps fall over a run whose length is known, and over one whose length is not."""

from __future__ import annotations

import torch
from torch import Tensor

from learned_opt.rules.layout import State
from learned_opt.rules.steps import as_tensor
from learned_opt.rules.trained import TRAINED

SHORT = 300  # in runs up to this length, a known length makes no difference
WARM_UP = 0.05  # in long runs of known length N, steps of a tensor rise over N · WARM_UP steps
# Of nets that were trained before, if the length is not known: steps rise over CAREFUL steps of a
# tensor, and are half as long after HALVED.
CAREFUL, HALVED = 20, 100
LATE = 50  # steps of a tensor that joins the run late rise over at most so many of its steps


def known_share(state: State, x: Tensor) -> Tensor:
    """Returns k, the share of the untrained rule, (*tasks, tensors) or (1,), with dtype of `x`.

    It is 0 if the length of the run is not known. The network knows runs of some hundred steps; the
    longer the run, the less its say. In nets that were trained before it has none, and k = 1.
    """
    share = 0.0 if state.num_steps is None else 1 - min(1.0, SHORT / state.num_steps)
    share = state.layout.constant((share,), x)
    before = state.tensor.get(TRAINED)
    return share if before is None else torch.maximum(before.squeeze(-2), share)


def rest(state: State, step: Tensor, decay_after: int, warm_up: bool) -> Tensor:
    """Returns the factor by which steps have fallen, (*tasks, tensors), (tensors,) or (1,).

    Args:
        state: the state before this update.
        step: the number of this update, (tensors,) or (1,).
        decay_after: the step after which steps fall in a run whose length is not known.
        warm_up: whether the first steps are shorter, of all tensors in a long run of known length,
            and of a tensor that joins the run late in any.
    """
    made = step - 1 if state.clock is None else as_tensor(state.clock, step)
    anytime = (decay_after / step).clamp(max=1)
    if warm_up:
        late = (made - (step - 1)).clamp(1, LATE)
        anytime = anytime * (step / late).clamp(max=1)
    before = state.tensor.get(TRAINED)
    if state.num_steps is None:
        if before is None:
            return anytime
        careful = (step / CAREFUL).clamp(max=1) / (1 + step / HALVED)
        return anytime.lerp(careful, before.squeeze(-2).to(step.dtype))
    falling = 1 - made.clamp(max=state.num_steps - 1) / state.num_steps
    if warm_up:
        falling = falling * (step / (WARM_UP * state.num_steps)).clamp(max=1)
    known = known_share(state, step)
    return anytime ** (1 - known) * falling**known
