"""Runs meta-training, from a config to a weights file."""

from __future__ import annotations

import logging
import os
import pickle
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO

from geodesic.dataset import PathDataset
from geodesic.files import write_atomic
from geodesic.processes import process_rank
from learned_opt.config import TrainConfig
from learned_opt.errors import ConfigError, OutputError
from learned_opt.output_folder import describe_difference, plain
from learned_opt.training.callbacks import Pictures, Selection, Speed, Waiting
from learned_opt.training.data import UpdatesModule
from learned_opt.training.initial_rule import origin
from learned_opt.training.module import MetaTraining
from learned_opt.weights import save_rule

WEIGHTS = "weights.safetensors"  # the name of the file in the output folder
# Settings on which a checkpoint does not depend. It records the number of processes by itself.
PLACE = ("accelerator", "devices", "num_nodes", "strategy", "logger")


def make_logger(config: TrainConfig, folder: Path) -> Logger:
    if config.logger == "csv":
        return CSVLogger(folder, name="log")  # each run has a version, so resumed runs add to it
    _find_wandb()
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(project="learned-opt", save_dir=folder, config=asdict(config))


def _find_wandb() -> None:
    try:
        import wandb  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError(
            "logger is 'wandb', which is not installed; run pip install 'learned-opt[wandb]', or "
            "use --logger csv"
        ) from None


def recipe(config: TrainConfig) -> dict:
    """Returns the config that makes the weights, without the places of files on this machine."""
    facts = asdict(config)
    for stage in (facts, facts["first"] or {}):
        stage.pop("dataset", None)
        stage.get("geodesics", {}).pop("data_root", None)
        if "start_from" in stage:
            stage["start_from"] = origin(stage["start_from"])
    return facts


def identity(config: TrainConfig) -> dict:
    """Returns what identifies a checkpoint: the recipe without the settings in PLACE."""
    facts = recipe(config)
    for stage in (facts, facts["first"] or {}):
        for name in PLACE:
            stage.pop(name, None)
    return plain(facts)


def check_checkpoint(path: Path, config: TrainConfig) -> None:
    """Raises OutputError if a checkpoint is damaged or of another config.

    A checkpoint of an earlier version, which does not record its config, is accepted.
    """
    damaged = OutputError(
        f"{path} is damaged; replace it by a whole copy, or delete it to train from the beginning"
    )
    if not _is_whole(path):
        raise damaged
    try:
        found = torch.load(path, "cpu", weights_only=True).get("config")
    except pickle.UnpicklingError as error:  # torch's own advice would run its code
        raise OutputError(
            f"{path} contains objects that no checkpoint of training has, perhaps code, and is not "
            "loaded; put the run's own checkpoint there, or delete it to train from the beginning"
        ) from error
    except RuntimeError as error:
        raise damaged from error
    if found is not None and (difference := describe_difference(found, identity(config))):
        raise OutputError(
            f"{path} is of another config: {difference}; delete it to train from the beginning, or "
            "put the checkpoint of this config there"
        )


def _is_whole(path: Path) -> bool:
    """Whether the file is an archive of torch.save, and each member has its checksum.

    torch does not compare checksums: it loads a flipped bit as another number.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            stored = all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
            return stored and archive.testzip() is None
    except OSError:
        raise
    except Exception:  # of any kind: bits of the format's own flags and versions may flip too
        return False


def check(config: TrainConfig) -> None:
    """Raises an error for a config that cannot work on this machine, before any work is done.

    Raises:
        ConfigError: the rule or its config is unknown; an objective cannot train the rule; the
            logger is wandb, which is not installed; there are fewer GPUs or cores than devices;
            torchrun or SLURM has started another number of processes; or Lightning refuses a
            setting.
        DataError: a data set of the family cannot be read.
    """
    MetaTraining(config).validation_tasks(0)
    if config.logger == "wandb":
        _find_wandb()
    kind, there = config.accelerator, torch.cuda.device_count()
    wanted = config.devices if isinstance(config.devices, int) else 1  # Lightning checks "0,1"
    if kind in ("gpu", "cuda") and there < max(wanted, 1):
        raise ConfigError(
            f"accelerator={kind!r} and devices={config.devices!r} need more GPUs than the {there} "
            "that torch sees here; use --accelerator cpu, or fewer devices"
        )
    cores = os.cpu_count() or 1
    if (kind == "cpu" or (kind == "auto" and not there)) and cores < wanted:
        raise ConfigError(
            f"accelerator={kind!r} and devices={wanted} need a CPU core for each device, but there "
            f"are {cores} cores here; use fewer devices, or more machines with --num_nodes"
        )
    with quiet_lightning():
        trainer = make_trainer(
            config,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    launched, wanted = process_rank()[1], trainer.num_devices * trainer.num_nodes
    if launched not in (1, wanted):
        raise ConfigError(
            f"devices={config.devices!r} on num_nodes={config.num_nodes} make {wanted} processes, "
            f"but {launched} were launched; set --devices to the processes of each node, and "
            "--num_nodes to the nodes"
        )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's news of the machine, its advice on other products, and warnings of what
    is meant to be so or is a matter between Lightning and torch."""
    talk = logging.getLogger("lightning.pytorch")
    level = talk.level
    talk.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers")  # data are in memory
            warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated")
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            yield
    finally:
        talk.setLevel(level)


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes checkpoints atomically, with the identity of their config under "config".

    Lightning writes to the system's temporary folder first. From there a file is copied if the
    output is on another disk, and an interrupted copy would leave a damaged checkpoint.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self._config = config

    @cached_property
    def _identity(self) -> dict:
        return identity(self._config)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        file = BytesIO()
        torch.save(checkpoint | {"config": self._identity}, file)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, file.getvalue())


def make_trainer(config: TrainConfig, **settings: Any) -> L.Trainer:
    """Returns Lightning's Trainer for the devices of the config.

    Raises:
        ConfigError: Lightning refuses a setting.
    """
    plugins: list = [AtomicCheckpoints(config)]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # Lightning's requeue would save within an epoch, from where a run cannot be resumed.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    place = ("accelerator", "devices", "num_nodes", "strategy", "precision")
    place = {name: getattr(config, name) for name in place}
    try:
        return L.Trainer(**place, plugins=plugins, **settings)
    except (MisconfigurationException, TypeError, ValueError) as error:
        said = ", ".join(f"{name}={value!r}" for name, value in place.items())
        raise ConfigError(f"{said} cannot work here: {error}") from error


@quiet_lightning()
def fit(config: TrainConfig, folder: Path, paths: PathDataset | None) -> Path:
    """Trains the rule, writes weights.safetensors into `folder`, and returns its path.

    Training resumes from the last checkpoint in `folder`, if there is one. The weights are the best
    or the last, see TrainConfig.select.

    Args:
        config: the config.
        folder: the output folder.
        paths: the target paths, if an objective needs them.
    """
    module, data = MetaTraining(config), UpdatesModule(config, paths)
    last = folder / "checkpoints" / "last.ckpt"
    selection = Selection(config) if config.select == "best" else None
    watching = [Speed()] + ([selection, Pictures(selection)] if selection else [])
    averaging = None if config.average is None else EMAWeightAveraging(decay=config.average)
    terminal = sys.stdout.isatty()
    if not terminal:
        watching.append(Waiting())
    if averaging:  # last, because it takes the averaged weights back, which selection tests
        watching.append(averaging)
    trainer = make_trainer(
        config,
        max_epochs=config.updates // config.epoch_length,
        default_root_dir=folder,
        gradient_clip_val=config.clip,
        logger=make_logger(config, folder),
        # save_last with save_top_k=0 would write nothing before the end.
        callbacks=[
            *watching,
            ModelCheckpoint(last.parent, last.stem, enable_version_counter=False),
        ],
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=min(10, config.epoch_length),
        inference_mode=False,
        enable_model_summary=False,
        enable_progress_bar=terminal,
    )
    if last.exists():
        check_checkpoint(last, config)
    trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)
    if averaging:  # Lightning does not call this if a resumed run has no updates left
        averaging.on_train_end(trainer, module)
    weights = folder / WEIGHTS
    if trainer.is_global_zero:
        facts = {"train": recipe(config)}
        if selection:
            module.rule.load_state_dict(selection.weights)
            facts["selected"] = {"update": selection.update, "score": selection.score}
        save_rule(module.rule.cpu(), weights, facts)
    trainer.strategy.barrier()
    return weights
