"""The LightningModule: meta-parameters, objectives, and what a resumed run needs."""

from __future__ import annotations

from dataclasses import asdict

import lightning as L
import torch
from torch import Tensor

from learned_opt.config import TrainConfig
from learned_opt.errors import ConfigError
from learned_opt.rules import Layout, State, make_rule
from learned_opt.run import run_rule
from learned_opt.tasks.base import Task, generator, seed_of
from learned_opt.tasks.families import FamilyConfig, sample_tasks
from learned_opt.training.objectives import OpenRun, imitation_loss, meta_loss

FINAL_LEARNING_RATE = 0.05  # of the initial one
LOST = 3.0  # a run ends when all its losses are so many times that of chance, or θ overflows


class MetaTraining(L.LightningModule):
    """Trains `rule` by the config's objectives in turn, one of them each update.

    Randomness is keyed by (seed, rank, update), and the runs under way are part of the
    checkpoint: a resumed run makes the updates that an uninterrupted one would.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        self.family = config.family or config.geodesics.family
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.rule = make_rule(config.rule, **config.rule_config)
        self.runs: list[OpenRun | None] = [None] * config.open_runs

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.Adam(self.rule.parameters(), lr=self.config.learning_rate)
        schedule = torch.optim.lr_scheduler.LinearLR(
            optimizer, 1.0, FINAL_LEARNING_RATE, self.config.updates
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def tasks(self, family: FamilyConfig, *key: object) -> Task:
        return sample_tasks(family, key, self.config.geodesics.data_root, self.device)

    def training_step(self, item: dict) -> Tensor:
        loss = getattr(self, "_" + item["objective"])(item)
        self.log(f"train/{item['objective']}", loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def _imitation(self, item: dict) -> Tensor:
        done = item["number"] / self.config.updates
        share = _between(self.config.teacher_share, min(1.0, 2 * done))
        key = (self.config.seed, self.global_rank, item["number"])
        draw = float(torch.rand((), generator=generator("driver", *key)))
        geodesics = self.config.geodesics
        task = self.tasks(geodesics.family, "train", geodesics.seed, item["shard"])
        return _between(self.config.imitation_weight, done) * imitation_loss(
            self.rule, task, item["points"], item["lengths"], self.config.coordinates,
            student_drives=draw >= share, key=key,
        )  # fmt: skip

    def _meta_loss(self, item: dict) -> Tensor:
        config, slot = self.config, self._meta_updates_before(item["number"]) % len(self.runs)
        run = self.runs[slot] or self._open_run(item["number"])
        task = self.tasks(self.family, *run.key)
        steps = min(config.window, run.horizon - run.state.step)
        loss, losses = meta_loss(self.rule, task, run, steps, config.coordinates, config.loss_floor)
        self.log("train/loss", losses.nanmean(), prog_bar=True, batch_size=1)
        lost = ~(losses < LOST * task.chance).any() or not run.theta.isfinite().all()
        self.runs[slot] = None if lost or run.state.step >= run.horizon else run
        return loss

    def _meta_updates_before(self, number: int) -> int:
        cycles, rest = divmod(number, len(self.config.objectives))
        cycle = self.config.objectives
        return cycles * cycle.count("meta_loss") + cycle[:rest].count("meta_loss")

    def _open_run(self, number: int) -> OpenRun:
        key = ("train", self.config.seed, self.global_rank, number)
        low, high = torch.tensor(self.config.horizon).double().log()
        share = torch.rand((), generator=generator("horizon", *key), dtype=torch.double)
        task = self.tasks(self.family, *key)
        theta = task.init(seed_of(*key))
        state = self.rule.init_state(theta, task.shapes)
        return OpenRun(key, round(float((low + share * (high - low)).exp())), theta, state)

    def validation_step(self, draw: int) -> None:
        """log10 of final and of mean loss on validation draws of the family."""
        task = self.tasks(self.family, "validation", draw)
        losses, theta = run_rule(
            task, self.rule, seed_of("validation", draw), self.config.validation_steps
        )
        final = task.evaluate(theta)["train_loss"]
        for name, value in (("final", final), ("mean", losses.mean(0))):
            score = value.nan_to_num(nan=1e6, posinf=1e6).clamp(1e-6, 1e6).log10().mean()
            self.log(f"val/log10_{name}_loss", score, prog_bar=True, batch_size=1, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        ranks = [[run and _pack(run) for run in self.runs]]
        if self.trainer.world_size > 1:
            ranks *= self.trainer.world_size
            torch.distributed.all_gather_object(ranks, ranks[0])
        checkpoint["open_runs"] = ranks

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        ranks = checkpoint["open_runs"]
        if len(ranks) != self.trainer.world_size:
            raise ConfigError(
                f"the checkpoint is of {len(ranks)} processes, this run has "
                f"{self.trainer.world_size}; resume with the same devices and num_nodes"
            )
        self.runs = [packed and _unpack(packed, self.device) for packed in ranks[self.global_rank]]


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * share


def _pack(run: OpenRun) -> dict:
    """Tensors and plain values only, so that the checkpoint loads with weights_only=True."""
    packed = {"key": list(run.key), "horizon": run.horizon, "theta": run.theta.cpu()}
    packed |= {"layout": asdict(run.state.layout), "step": run.state.step}
    for kind in ("coordinate", "tensor"):
        packed[kind] = {name: value.cpu() for name, value in getattr(run.state, kind).items()}
    return packed


def _unpack(packed: dict, device: torch.device) -> OpenRun:
    layout = Layout(tuple(map(tuple, packed["layout"]["shapes"])))
    coordinate, tensor = (
        {name: value.to(device) for name, value in packed[kind].items()}
        for kind in ("coordinate", "tensor")
    )
    state = State(layout, packed["step"], coordinate, tensor)
    return OpenRun(tuple(packed["key"]), packed["horizon"], packed["theta"].to(device), state)
