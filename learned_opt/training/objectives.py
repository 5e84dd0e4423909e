"""The objectives by the names that they have in a config."""

from learned_opt.training.base import Objective
from learned_opt.training.imitation import Imitation
from learned_opt.training.meta_loss import Backprop, MetaLoss
from learned_opt.training.pes import PES
from learned_opt.training.step_size import StepSize
from learned_opt.training.torch_imitation import TorchImitation

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (Imitation, TorchImitation, MetaLoss, Backprop, PES, StepSize)
}
