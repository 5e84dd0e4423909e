"""The items of meta-training, keyed by update so that a resumed run gets the same ones."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from geodesic.dataset import PathDataset
from geodesic.targets import target_paths
from learned_opt.config import TrainConfig
from learned_opt.errors import DataError
from learned_opt.tasks.base import generator


class Updates(Dataset):
    """An item for each meta-update of an epoch: its number, objective and, for imitation, paths."""

    def __init__(self, config: TrainConfig, paths: PathDataset | None, start: int, rank: int):
        self.config, self.paths, self.start, self.rank = config, paths, start, rank

    def __len__(self) -> int:
        return self.config.epoch_length

    def __getitem__(self, index: int) -> dict:
        number = self.start + index
        item = {
            "number": number,
            "objective": self.config.objectives[number % len(self.config.objectives)],
        }
        if item["objective"] == "imitation":
            item |= self._paths((self.config.seed, self.rank, number))
        return item

    def _paths(self, key: tuple[int, ...]) -> dict[str, Tensor | int]:
        """Returns the target paths of a random shard that has any."""
        for shard in torch.randperm(len(self.paths), generator=generator("shard", *key)).tolist():
            if self.paths.facts(shard)["pairs"]:
                updates = self.paths.header["targets"]["updates"]
                runs = self.paths.facts(shard)["runs"]
                points, lengths = target_paths(self.paths.shard(shard), updates, runs)
                if lengths.any():
                    return {"shard": shard, "points": points, "lengths": lengths}
        raise DataError(
            f"the data set {self.paths.folder} has no certified path to learn from; make it again "
            "from other tasks, with more steps or with another level"
        )


class UpdatesModule(L.LightningDataModule):
    """Serves the items of this rank, keyed by rank and update."""

    def __init__(self, config: TrainConfig, paths: PathDataset | None) -> None:
        super().__init__()
        self.config, self.paths = config, paths

    def train_dataloader(self) -> DataLoader:
        start = self.trainer.current_epoch * self.config.epoch_length
        updates = Updates(self.config, self.paths, start, self.trainer.global_rank)
        return DataLoader(updates, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(range(self.config.validation_draws), batch_size=None)
