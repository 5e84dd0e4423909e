"""The configs of the commands: documented, validated dataclasses, filled from YAML."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from geodesic.targets import TargetConfig
from learned_opt.errors import ConfigError
from learned_opt.tasks.families import FamilyConfig

OBJECTIVES = ("imitation", "meta_loss")


@dataclass(frozen=True)
class GeodesicsConfig:
    """`learned-opt geodesics`: SGD runs of a family, and target paths made of them.

    Attributes:
        family: the tasks.
        targets: pairs, level and target updates.
        num_shards: draws from the family, one shard each.
        evaluation_size: training examples in the fixed F of level and certificate.
        seed: of everything random.
        data_root: where data sets lie; by default $LEARNED_OPT_DATA.
    """

    family: FamilyConfig = field(default_factory=FamilyConfig)
    targets: TargetConfig = field(default_factory=TargetConfig)
    num_shards: int = 96
    evaluation_size: int = 256
    seed: int = 0
    data_root: str | None = None

    def __post_init__(self) -> None:
        if self.num_shards < 1 or self.evaluation_size < 1:
            raise ConfigError(
                f"num_shards={self.num_shards} and evaluation_size={self.evaluation_size} "
                "must be at least 1"
            )

    def smoke(self) -> GeodesicsConfig:
        """The same, shrunk to seconds."""
        targets = replace(self.targets, horizon=20, updates=4, stride=10, num_segments=8)
        family = replace(self.family, num_tasks=2)
        return replace(self, family=family, targets=targets, num_shards=2, evaluation_size=64)


@dataclass(frozen=True)
class TrainConfig:
    """`learned-opt train`: meta-trains a rule on target paths and on its own runs.

    Attributes:
        rule: registered name of the update rule.
        rule_config: its constructor's arguments.
        geodesics: the data set of target paths, made first where it is missing.
        dataset: a folder of target paths to use; by default `geodesics` in the output folder.
        objectives: what the updates train, in turn: "imitation", "meta_loss".
        updates: meta-updates in all.
        epoch_length: meta-updates between validations and checkpoints.
        learning_rate: of Adam; falls linearly to 5 %.
        clip: largest norm of a meta-gradient.
        coordinates: coordinates that a meta-update learns from, where the rule does not have
            gains per tensor, which allow for all.
        teacher_share: share of imitation sequences driven by the teacher, at the start and
            from half way on; (1, 1) is off policy throughout.
        imitation_weight: multiplies the imitation loss before its gradient is clipped, at the
            start and at the end: most weight to what is robust first, to what is fast later.
        window: updates per meta_loss window; states are carried from one to the next.
        horizon: least and most steps of a meta_loss run, log-uniform.
        open_runs: meta_loss runs under way at once, so that long ones do not crowd out others.
        loss_floor: meta_loss weighs tasks by 1 / (mean loss + loss_floor).
        family: tasks of meta_loss runs; by default those of `geodesics`.
        validation_steps: length of the validation runs.
        seed: of everything random but the data set.
        accelerator: Lightning's, as are the next three: "cpu", "gpu", "auto".
        devices: processes or GPUs per node.
        num_nodes: machines.
        strategy: "ddp" for several devices.
        logger: "csv" or "wandb".
    """

    rule: str = "geodesic_rnn"
    rule_config: dict[str, Any] = field(default_factory=dict)
    geodesics: GeodesicsConfig = field(default_factory=GeodesicsConfig)
    dataset: str | None = None
    objectives: tuple[str, ...] = ("imitation", "meta_loss", "meta_loss")
    updates: int = 900
    epoch_length: int = 60
    learning_rate: float = 3e-3
    clip: float = 1.0
    coordinates: int = 2400
    teacher_share: tuple[float, float] = (1.0, 0.3)
    imitation_weight: tuple[float, float] = (0.15, 0.02)
    window: int = 20
    horizon: tuple[int, int] = (20, 800)
    open_runs: int = 5
    loss_floor: float = 0.003
    family: FamilyConfig | None = None
    validation_steps: int = 200
    seed: int = 0
    accelerator: str = "cpu"
    devices: int | str = 1
    num_nodes: int = 1
    strategy: str = "auto"
    logger: str = "csv"

    def __post_init__(self) -> None:
        if not self.objectives or set(self.objectives) - set(OBJECTIVES):
            raise ConfigError(f"objectives={self.objectives}; use some of {OBJECTIVES}")
        for name in ("updates", "epoch_length", "coordinates", "window", "open_runs",
                     "validation_steps"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; use at least 1")
        if min(self.learning_rate, self.clip, self.loss_floor) <= 0:
            raise ConfigError(
                f"learning_rate={self.learning_rate}, clip={self.clip} and "
                f"loss_floor={self.loss_floor} must be positive"
            )
        if not all(0 <= share <= 1 for share in self.teacher_share):
            raise ConfigError(f"teacher_share is {self.teacher_share}; use two shares in [0, 1]")
        if self.updates % self.epoch_length:
            raise ConfigError(
                f"updates={self.updates} is not a multiple of epoch_length={self.epoch_length}"
            )
        if self.logger not in ("csv", "wandb"):
            raise ConfigError(f"logger is {self.logger!r}; use 'csv' or 'wandb'")
        if not 1 <= self.horizon[0] <= self.horizon[1]:
            raise ConfigError(f"horizon={self.horizon}: give two steps, the lower first")

    def smoke(self) -> TrainConfig:
        """The same, shrunk to seconds."""
        return replace(
            self,
            geodesics=self.geodesics.smoke(),
            family=replace(self.family or self.geodesics.family, num_tasks=2),
            updates=2 * len(self.objectives),
            epoch_length=len(self.objectives),
            coordinates=200,
            horizon=(4, 10),
            window=4,
            open_runs=2,
            validation_steps=5,
        )
