"""Meta-trains an optimizer on a task of its own, and then uses it.

The task is to predict the lower half of a digit from its upper half, with networks of random sizes.
The script registers it as a kind of task and trains the shipped weights further on it by evolution
strategies. Then it trains another network with the result, with the shipped weights, and with
AdamW, and prints the training and the validation loss of the three. AdamW has the learning rate of
half decades with the lowest validation loss. Most of the minute goes into the meta-training, which
is far shorter than a real one.

    python examples/own_task.py
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from learned_opt import FamilyConfig, LearnedOptimizer, TaskConfig, TrainConfig, load_rule, train
from learned_opt.config import StepSizeConfig
from learned_opt.tasks.base import choice, log_uniform
from learned_opt.tasks.kinds import SINGLE, register
from learned_opt.tasks.module import ModuleTask, squared_error

TRAIN = 1200  # digits to train on; the others are for validation


def halves() -> tuple[Tensor, Tensor]:
    """The upper and the lower halves of the digits, standardized, (digits, 32) each."""
    images = torch.tensor(load_digits().data, dtype=torch.float32)
    images = (images - images.mean()) / images.std()
    return images[:, :32], images[:, 32:]


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 32))


@register("halves")
class Halves(ModuleTask):
    """The mean squared error of the lower half; a guess of zeros has about 1."""

    unused = ("data", "activation", "init")

    @classmethod
    def make(cls, config, data_root=None, draw=SINGLE):
        upper, lower = map(draw.share, halves())
        training = upper[..., :TRAIN, :], lower[..., :TRAIN, :]
        others = upper[..., TRAIN:, :], lower[..., TRAIN:, :]
        chance = float(lower.square().mean())  # the loss of a guess
        make_module = partial(network, *config.hidden)
        return cls(config, make_module, training, others, chance, draw, squared_error)

    @classmethod
    def architecture(cls, family, rng):
        batch_size, width = choice(rng, family.batch_sizes), log_uniform(rng, *family.width)
        return TaskConfig(kind=cls.kind, hidden=(width,), batch_size=batch_size)


def meta_train(updates: int, output: Path) -> Path:
    """Trains the shipped weights further on networks for `halves`; returns their path."""
    config = TrainConfig(
        rule_config=load_rule().config,  # that of the shipped weights
        start_from="shipped",
        objectives=("step_size",),
        step_size=StepSizeConfig(common=0.5, mixture=0.2),
        updates=updates,
        epoch_length=updates,
        learning_rate=0.002,
        clip=0.1,
        horizon=(60, 400),
        loss_clip=1.5,
        family=FamilyConfig(kinds={"halves": 1.0}, num_tasks=4, width=(16, 128)),
        validation_steps=50,
        select="last",
    )
    return train(config, output)


def use(make_optimizer, steps: int) -> tuple[float, float]:
    """Returns the losses on all training data and on the validation data after `steps` steps."""
    torch.manual_seed(0)
    upper, lower = halves()
    model = network(100)
    optimizer = make_optimizer(model.parameters())
    for _ in range(steps):
        batch = torch.randint(TRAIN, (64,))
        optimizer.zero_grad()
        squared_error(model(upper[batch]), lower[batch]).mean().backward()
        optimizer.step()
    with torch.no_grad():
        losses = squared_error(model(upper), lower).mean(1)
        return losses[:TRAIN].mean().item(), losses[TRAIN:].mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=60, help="of the meta-training")
    parser.add_argument("--steps", type=int, default=300, help="of each run with the result")
    args = parser.parse_args()

    with TemporaryDirectory() as folder:
        weights = meta_train(args.updates, Path(folder))
        optimizers = {
            "trained further": lambda p: LearnedOptimizer(p, weights=weights),
            "as shipped": LearnedOptimizer,
            "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3),
        }
        print(f"after {args.steps} steps   train loss   validation loss")
        for name, make_optimizer in optimizers.items():
            losses = use(make_optimizer, args.steps)
            print(f"{name:<17}{losses[0]:>12.4f}{losses[1]:>18.4f}")


if __name__ == "__main__":
    main()
