"""LearnedOptimizer in the place of Adam in Lightning, Fabric, accelerate and Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from learned_opt import LearnedOptimizer
from learned_opt.tasks.data import load_images

STEPS = 60


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def digits() -> tuple[Tensor, Tensor]:
    data = load_images("digits")
    return data.train_x, data.train_y


def batches(size: int = 64) -> DataLoader:
    return DataLoader(TensorDataset(*digits()), batch_size=size)


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    x, y = digits()
    return nn.functional.cross_entropy(model(x), y).item()


def learned(model: nn.Module) -> None:
    """From 2.3 to below a third of it."""
    assert loss_of(model) < 0.7


class Digits(L.LightningModule):
    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.model, self.batch_size = make_model(), batch_size

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.loss(batch)

    def train_dataloader(self) -> DataLoader:
        return batches(self.batch_size)

    def configure_optimizers(self) -> dict:
        optimizer = LearnedOptimizer(self.model.parameters())
        schedule = CosineAnnealingLR(optimizer, T_max=STEPS)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Manual(Digits):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()


def fit(
    module: L.LightningModule, steps: int = STEPS, ckpt_path: Path | None = None, **settings
) -> L.Trainer:
    quiet = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False,
    }  # fmt: skip
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", **(quiet | settings))
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (Digits, {"gradient_clip_val": 1.0}),
        (Digits, {"precision": "bf16-mixed"}),
        (Digits, {"precision": "bf16-true"}),
        (Manual, {}),
    ],
)
def test_lightning(module: Callable[[], Digits], settings: dict) -> None:
    trained = module()
    fit(trained, **settings)
    learned(trained.model.float())


def test_lightning_accumulates() -> None:
    module = Digits()
    trainer = fit(module, steps=STEPS, accumulate_grad_batches=2)
    states = trainer.optimizers[0].state.values()
    assert trainer.global_step == STEPS and {int(s["step"]) for s in states} == {STEPS}
    learned(module.model)


def test_lightning_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """Of one batch an epoch: resumed, Lightning reads batches in another order."""
    whole, resumed = Digits(batch_size=2000), Digits(batch_size=2000)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(whole, steps=12, callbacks=[keep], enable_checkpointing=True)
    trainer = fit(resumed, steps=12, ckpt_path=tmp_path / "epoch=5.ckpt")
    assert all(int(s["step"]) == 12 for s in trainer.optimizers[0].state.values())
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


class DigitsBefore(Digits):
    """As a user had it before the optimizer was replaced."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.01)


def test_lightning_does_not_resume_from_another_optimizer(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(DigitsBefore(batch_size=2000), steps=1, callbacks=[keep], enable_checkpointing=True)
    with pytest.raises(ValueError, match="of another optimizer"):
        fit(Digits(batch_size=2000), steps=2, ckpt_path=tmp_path / "epoch=0.ckpt")


def test_fabric() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model = make_model()
    wrapped, optimizer = fabric.setup(model, LearnedOptimizer(model.parameters()))
    for _, (x, y) in zip(range(STEPS), cycle(fabric.setup_dataloaders(batches())), strict=False):
        optimizer.zero_grad()
        fabric.backward(nn.functional.cross_entropy(wrapped(x), y))
        fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
        optimizer.step()
    learned(model)


def cycle(loader: DataLoader):
    while True:
        yield from loader


def test_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters())
    schedule = CosineAnnealingLR(optimizer, T_max=STEPS)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, batches(), schedule)

    def train(steps: int) -> None:
        for _, (x, y) in zip(range(steps), cycle(loader), strict=False):
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    train(2 * len(loader))
    accelerator.save_state(tmp_path)
    train(2 * len(loader))
    expected = [p.detach().clone() for p in model.parameters()]
    learned(accelerator.unwrap_model(model))
    accelerator.load_state(tmp_path)
    train(2 * len(loader))
    assert all(map(torch.equal, model.parameters(), expected))


class Images(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.x, self.y = digits()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": self.x[i].view(1, 8, 8), "labels": self.y[i]}


def test_hugging_face_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic",
        num_labels=10,
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config)
    optimizer = LearnedOptimizer(model.parameters())
    schedule = CosineAnnealingLR(optimizer, T_max=120)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=120, per_device_train_batch_size=32, use_cpu=True,
        report_to=[], save_steps=60, logging_steps=20, disable_tqdm=True, max_grad_norm=1.0,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Images(),
        optimizers=(optimizer, schedule),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > 2 * losses[-1]
    expected = [p.detach().clone() for p in model.parameters()]
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-60"))
    for p, q in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p, q)
