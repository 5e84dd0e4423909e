"""The LightningModule of meta-training, with all the state that a resumed run needs."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor

from learned_opt.config import TrainConfig
from learned_opt.errors import ConfigError
from learned_opt.rules.base import trainable
from learned_opt.run import run_rule
from learned_opt.tasks.base import Task, seed_of
from learned_opt.tasks.families import FamilyConfig, sample_tasks
from learned_opt.training.curriculum import Curriculum
from learned_opt.training.initial_rule import start
from learned_opt.training.objectives import OBJECTIVES
from learned_opt.training.objectives.base import Context, between

FINAL_LEARNING_RATE = 0.05  # as a share of the initial one


class MetaTraining(L.LightningModule):
    """Trains `rule` by the objectives of the config, which take turns in the updates.

    The state of the objectives and of the curriculum is part of the checkpoint.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        self.family = config.family or config.geodesics.family
        self.rule = start(config)
        self.objectives = {
            name: OBJECTIVES[name](config, self.rule) for name in dict.fromkeys(config.objectives)
        }
        self.curriculum = Curriculum(config.curriculum) if config.curriculum else None
        self.scores: list[Tensor] = []  # the scores of this validation
        self.inner_steps: int | Tensor = 0  # made by this process in this epoch, see callbacks.py

    def context(self) -> Context:
        """Returns what the objectives are given."""
        return Context(
            self.rule, self.family, self.global_rank, self.tasks,
            log=lambda name, value: self.log(name, value, prog_bar=True, batch_size=1),
            count=self._count, length=self.curriculum and self.curriculum.length,
        )  # fmt: skip

    def _count(self, steps: int | Tensor) -> None:
        self.inner_steps += steps

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(trainable(self.rule), lr=self.config.learning_rate)
        schedule = torch.optim.lr_scheduler.LinearLR(
            optimizer, 1.0, FINAL_LEARNING_RATE, self.config.updates
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def tasks(self, family: FamilyConfig, *key: object) -> Task:
        return sample_tasks(family, key, self.config.geodesics.data_root, self.device)

    def validation_tasks(self, draw: int) -> Task:
        return self.tasks(self.family, "validation", draw)

    def on_train_start(self) -> None:
        """Fails if ranks resumed different checkpoints; otherwise they would diverge silently."""
        updates = self.all_gather(torch.tensor(self.global_step, device=self.device))
        if updates.min() != updates.max():
            raise ConfigError(
                f"the processes resume at updates {updates.tolist()}, because they see different "
                "checkpoints; use a folder that all nodes share as --output"
            )

    def training_step(self, item: dict) -> Tensor:
        name, done = item["objective"], item["number"] / self.config.updates
        weight = between(self.config.weight_of(name), done)
        loss = weight * self.objectives[name].loss(self.context(), item)
        self.log(f"train/{name}", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def validation_step(self, draw: int) -> None:
        """Logs log10 of the final and of the mean loss on a validation draw of the family."""
        task, config = self.validation_tasks(draw), self.config
        steps = self.curriculum.validation_length if self.curriculum else config.validation_steps
        losses, theta = run_rule(task, self.rule, seed_of("validation", draw), steps)
        final = task.evaluate(theta)["train_loss"]
        for name, value in (("final", final), ("mean", losses.mean(0))):
            score = value.nan_to_num(nan=1e6, posinf=1e6).clamp(1e-6, 1e6).log10().mean()
            self.log(f"val/log10_{name}_loss", score, prog_bar=True, batch_size=1, sync_dist=True)
        self.scores.append(score)

    def on_validation_epoch_end(self) -> None:
        score = self.trainer.strategy.reduce(torch.stack(self.scores).mean(), reduce_op="mean")
        self.scores.clear()
        if self.curriculum is None:
            return
        best = self.curriculum.validated(float(score), self.rule.state_dict())
        if best is not None:
            self.rule.load_state_dict(best)
        self.log("val/length", float(self.curriculum.length), batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        own = {name: objective.state_dict() for name, objective in self.objectives.items()}
        ranks = [own] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(ranks, own)
        checkpoint["objectives"] = ranks
        checkpoint["curriculum"] = self.curriculum and self.curriculum.state_dict()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        ranks = checkpoint["objectives"]
        if len(ranks) != self.trainer.world_size:
            raise ConfigError(
                f"the checkpoint is of {len(ranks)} processes, but this run has "
                f"{self.trainer.world_size}; resume with the same devices and num_nodes"
            )
        for name, objective in self.objectives.items():
            objective.load_state_dict(ranks[self.global_rank][name], self.device)
        if self.curriculum:
            self.curriculum.load_state_dict(checkpoint["curriculum"])
