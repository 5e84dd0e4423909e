"""A plain training loop with `LearnedOptimizer`, beside the same loop with AdamW.

Both train the same small network on scikit-learn's digits, from the same weights and on the same
minibatches. The script prints the training and the validation loss that each of them ends with.
AdamW has the learning rate with the lowest validation loss, of half decades. The shipped weights
were meta-trained on networks for these digits, so expect less on other data.

    python examples/plain_loop.py
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy

from learned_opt import LearnedOptimizer

OPTIMIZERS = {
    "LearnedOptimizer": LearnedOptimizer,  # no learning rate
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=3e-2),
}


def train(make_optimizer, train_data, validation_data, steps: int) -> tuple[float, float]:
    """Returns the losses on all training data and on the validation data after `steps` steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = make_optimizer(model.parameters())
    images, labels = train_data
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        losses = (cross_entropy(model(x), y).item() for x, y in (train_data, validation_data))
        return tuple(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps

    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    x, validation_x, y, validation_y = train_test_split(images, labels, random_state=0)

    print(f"after {steps} steps   train loss   validation loss")
    for name, make_optimizer in OPTIMIZERS.items():
        losses = train(make_optimizer, (x, y), (validation_x, validation_y), steps)
        print(f"{name:<17}{losses[0]:>12.4f}{losses[1]:>18.4f}")


if __name__ == "__main__":
    main()
