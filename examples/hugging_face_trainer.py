"""`LearnedOptimizer` in the Hugging Face Trainer, beside the Trainer's own AdamW.

A tiny vision transformer, made from its config without a download, learns scikit-learn's digits
twice, from the same weights and on the same minibatches. The script prints the training and the
validation loss that each optimizer ends with. AdamW has the learning rate with the lowest
validation loss, of half decades. The shipped weights were meta-trained on networks for these
digits, so expect less on other data.

It needs `pip install transformers accelerate`.

    python examples/hugging_face_trainer.py
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.optim.lr_scheduler import ConstantLR
from transformers import (
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.utils import logging

from learned_opt import LearnedOptimizer

CONFIG = ViTConfig(
    image_size=8,
    patch_size=2,
    num_channels=1,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_labels=10,
)


def make_trainer(learned: bool, train_data: list, steps: int, folder: str) -> Trainer:
    set_seed(0)
    model = ViTForImageClassification(CONFIG)
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=512,
        learning_rate=3e-3,  # of AdamW, which decays it linearly
        warmup_steps=steps // 20,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    if not learned:
        return Trainer(model, arguments, train_dataset=train_data)
    optimizer = LearnedOptimizer(model.parameters())  # its lr is 1, and stays so
    optimizers = optimizer, ConstantLR(optimizer, factor=1.0)
    return Trainer(model, arguments, train_dataset=train_data, optimizers=optimizers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.set_verbosity_error()

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    data = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, labels, strict=True)]
    train, validation = train_test_split(data, random_state=0)

    print(f"after {steps} steps   train loss   validation loss")
    for name, learned in (("LearnedOptimizer", True), ("AdamW", False)):
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(learned, train, steps, folder)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            losses = [trainer.evaluate(part)["eval_loss"] for part in (train, validation)]
        print(f"{name:<17}{losses[0]:>12.4f}{losses[1]:>18.4f}")


if __name__ == "__main__":
    main()
