"""Meta-training from a config to a weights file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from geodesic.dataset import PathDataset
from learned_opt.config import TrainConfig
from learned_opt.errors import ConfigError
from learned_opt.training.data import UpdatesModule
from learned_opt.training.module import MetaTraining
from learned_opt.training.start import origin
from learned_opt.weights import save_rule


def make_logger(config: TrainConfig, folder: Path) -> Logger:
    if config.logger == "csv":
        return CSVLogger(folder, name="log")  # a version per run: a resumed one adds to the log
    try:
        import wandb  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError(
            "logger is 'wandb', which is not installed; pip install 'learned-opt[wandb]', or use "
            "--logger csv"
        ) from None
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(project="learned-opt", save_dir=folder, config=asdict(config))


def recipe(config: TrainConfig) -> dict:
    """What made the weights: the config, but for where files lie on this machine."""
    facts = asdict(config)
    del facts["dataset"], facts["geodesics"]["data_root"]
    facts["start_from"] = origin(config.start_from)
    return facts


def check(config: TrainConfig) -> None:
    """Refuses what cannot work on this machine, before any work is done.

    Raises:
        ConfigError: the rule or its config is unknown, an objective cannot train it, or there are
            fewer GPUs than asked for.
    """
    MetaTraining(config)
    if config.accelerator in ("gpu", "cuda"):
        wanted = config.devices if isinstance(config.devices, int) else 1
        there = torch.cuda.device_count()
        if there < max(wanted, 1):
            raise ConfigError(
                f"accelerator={config.accelerator!r}, devices={config.devices!r}, but torch sees "
                f"{there} GPUs here; use --accelerator cpu, or fewer devices"
            )


def fit(config: TrainConfig, folder: Path, paths: PathDataset | None) -> Path:
    """Trains, resuming from the last checkpoint in `folder`, and writes weights.safetensors.

    Args:
        paths: the target paths, where an objective needs them.
    """
    module, data = MetaTraining(config), UpdatesModule(config, paths)
    last = folder / "checkpoints" / "last.ckpt"
    trainer = L.Trainer(
        max_epochs=config.updates // config.epoch_length,
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=config.strategy,
        gradient_clip_val=config.clip,
        logger=make_logger(config, folder),
        # not save_last, which with save_top_k=0 writes nothing before the end
        callbacks=[ModelCheckpoint(last.parent, last.stem, enable_version_counter=False)],
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=min(10, config.epoch_length),
        inference_mode=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)
    weights = folder / "weights.safetensors"
    if trainer.is_global_zero:
        save_rule(module.rule.cpu(), weights, facts={"train": recipe(config)})
    trainer.strategy.barrier()
    return weights
