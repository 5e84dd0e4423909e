"""`LearnedOptimizer` in a Lightning module, beside the same module with AdamW.

All that differs is what `configure_optimizers` returns. Both modules train on scikit-learn's
digits, from the same weights and on the same minibatches. The script prints the training and the
validation loss that each of them ends with. AdamW has the learning rate with the lowest validation
loss, of half decades. The shipped weights were meta-trained on networks for these digits, so expect
less on other data.

    python examples/lightning_module.py
"""

from __future__ import annotations

import argparse
import logging
import warnings

import lightning
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from learned_opt import LearnedOptimizer


class Classifier(lightning.LightningModule):
    """A small convolutional network."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.learned = learned
        self.model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        return cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.learned:
            return LearnedOptimizer(self.parameters())  # no learning rate, no scheduler
        return torch.optim.AdamW(self.parameters(), lr=3e-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning's own

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    x, validation_x, y, validation_y = train_test_split(
        images, torch.tensor(labels), random_state=0
    )

    print(f"after {steps} steps   train loss   validation loss")
    for name, learned in (("LearnedOptimizer", True), ("AdamW", False)):
        lightning.seed_everything(0, verbose=False)
        module = Classifier(learned)
        trainer = lightning.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))
        with torch.no_grad():
            losses = [
                module.training_step(batch) for batch in ((x, y), (validation_x, validation_y))
            ]
        print(f"{name:<17}{losses[0]:>12.4f}{losses[1]:>18.4f}")


if __name__ == "__main__":
    main()
