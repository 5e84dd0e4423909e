"""The objectives of meta-training, by the names that they have in a config."""

from learned_opt.training.objectives.base import Objective
from learned_opt.training.objectives.imitation import Imitation
from learned_opt.training.objectives.meta_loss import Backprop, MetaLoss
from learned_opt.training.objectives.pes import PES
from learned_opt.training.objectives.step_size import StepSize
from learned_opt.training.objectives.torch_imitation import TorchImitation

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (Imitation, TorchImitation, MetaLoss, Backprop, PES, StepSize)
}
