"""The configs of the commands: documented and validated dataclasses, filled from YAML and flags.

The command line shows each description alone, so each of them is a full sentence.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from geodesic.finite import check_finite
from geodesic.targets import TargetConfig
from learned_opt.errors import ConfigError
from learned_opt.tasks.families import FamilyConfig
from learned_opt.tasks.kinds import TaskConfig
from learned_opt.training.objectives import OBJECTIVES as REGISTRY

OBJECTIVES = tuple(REGISTRY)
RUN_OBJECTIVES = tuple(name for name, objective in REGISTRY.items() if objective.runs)
# Element-wise optimizers: they treat the parameters of many tasks in one tensor independently.
TEACHERS = ("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop", "Rprop",
            "SGD")  # fmt: skip
# Adam moves each meta-parameter by up to its rate in an update, and initially they are about 1.
LARGEST_RATE = 1.0


@dataclass(frozen=True)
class GeodesicsConfig:
    """The config of `learned-opt geodesics`, which makes target paths from SGD runs of a family.

    Attributes:
        family: The family of tasks on which SGD runs.
        targets: What the target paths are.
        num_shards: The number of draws from the family. Each draw is a shard.
        evaluation_size: The number of training examples on which the loss F of a path is evaluated.
        seed: The seed of everything random.
        data_root: The folder of data sets; the default is $LEARNED_OPT_DATA.
    """

    family: FamilyConfig = field(default_factory=FamilyConfig)
    targets: TargetConfig = field(default_factory=TargetConfig)
    num_shards: int = 96
    evaluation_size: int = 256
    seed: int = 0
    data_root: str | None = None

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if self.num_shards < 1 or self.evaluation_size < 1:
            raise ConfigError(
                f"num_shards={self.num_shards} and evaluation_size={self.evaluation_size} "
                "must both be at least 1"
            )

    def on(self, task: TaskConfig) -> GeodesicsConfig:
        """Returns this config with one task in place of the family's random ones."""
        return replace(self, family=replace(self.family, task=task))

    def smoke(self) -> GeodesicsConfig:
        """Returns a config of the same kind that runs in seconds."""
        targets = replace(self.targets, horizon=20, updates=4, stride=10, num_segments=8)
        family = replace(self.family, num_tasks=2)
        return replace(self, family=family, targets=targets, num_shards=2, evaluation_size=64)


@dataclass(frozen=True)
class TeacherConfig:
    """A torch optimizer that the rule imitates.

    Attributes:
        optimizer: The name of the optimizer in torch.optim.
        lr: The learning rate of the optimizer.
        options: Further arguments of the optimizer.
        steps: The number of the optimizer's steps that one update of the rule imitates.
        length: The number of updates of the rule in a sequence.
    """

    optimizer: str = "Adam"
    lr: float = 0.003
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 1
    length: int = 100

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if self.optimizer not in TEACHERS:
            raise ConfigError(
                f"teacher.optimizer is {self.optimizer!r}; use one of {', '.join(TEACHERS)}"
            )
        if self.steps < 1 or self.length < 1:
            raise ConfigError(
                f"teacher.steps={self.steps} and teacher.length={self.length} must both be at "
                "least 1"
            )
        try:
            self.make(torch.zeros(1, requires_grad=True))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"teacher: torch.optim.{self.optimizer} refuses lr={self.lr}, {self.options} "
                f"({error}); see its documentation for options"
            ) from None

    def make(self, theta: Tensor) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)([theta], lr=self.lr, **self.options)


@dataclass(frozen=True)
class PESConfig:
    """Persistent evolution strategies (PES).

    Attributes:
        sigma: The standard deviation of the perturbations of the meta-parameters.
        pairs: The number of antithetic pairs for each task.
        particles: What `pairs` was called in version 0.1.0.
    """

    sigma: float = 0.01
    pairs: int = 1
    particles: int | None = None

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if self.particles is not None:
            warnings.warn(
                f"pes.particles={self.particles} is now called pes.pairs; rename it",
                FutureWarning,
                stacklevel=3,
            )
            object.__setattr__(self, "pairs", self.particles)
            object.__setattr__(self, "particles", None)
        if self.sigma <= 0 or self.pairs < 1:
            raise ConfigError(
                f"pes.sigma={self.sigma} must be positive and pes.pairs={self.pairs} at least 1; "
                "usual values are 0.01 and 1"
            )


@dataclass(frozen=True)
class StepSizeConfig:
    """Evolution strategies on the step sizes of the tensors.

    Attributes:
        sigma: The standard deviation of the perturbation of the logarithm of a tensor's step size.
        together: The number of windows after which the two perturbed runs of a pair restart from
            the same point. The effect of a perturbed step is measured by the losses of both runs up
            to then.
        common: The share of the perturbation's variance that comes from a part which is the same
            for all tensors of a network.
        pace: All steps of a run are multiplied by e^u, with u uniform between these bounds.
        mixture: The standard deviation of the perturbation of the gains, the weights with which the
            rule mixes the gradient and its averages, relative to the norm of the gains; 0 does not
            perturb them. It needs a rule with gains per tensor, such as geodesic_rnn.
    """

    sigma: float = 0.2
    together: int = 10
    common: float = 0.0
    pace: tuple[float, float] = (0.0, 0.0)
    mixture: float = 0.0

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        if self.mixture < 0:
            raise ConfigError(f"step_size.mixture is {self.mixture}; use 0 for none, or e.g. 0.2")
        if self.pace[0] > self.pace[1]:
            raise ConfigError(f"step_size.pace is {self.pace}; give the lower bound first")
        if not 0 <= self.common < 1:
            raise ConfigError(f"step_size.common is {self.common}; use 0 or more, and less than 1")
        if self.sigma <= 0 or self.together < 1:
            raise ConfigError(
                f"step_size.sigma={self.sigma} must be positive and step_size.together="
                f"{self.together} at least 1; usual values are 0.2 and 10"
            )


@dataclass(frozen=True)
class CurriculumConfig:
    """A curriculum of run lengths.

    The length of runs grows when validation at the next length stops improving.

    Attributes:
        lengths: The increasing lengths of the runs, one for each stage.
        patience: The number of validations without a better score after which a stage ends.
    """

    lengths: tuple[int, ...] = (50, 100, 200, 400, 800)
    patience: int = 2

    def __post_init__(self) -> None:
        check_finite(self, ConfigError)
        rising = all(a < b for a, b in pairwise(self.lengths))
        if not self.lengths or self.lengths[0] < 1 or not rising:
            raise ConfigError(
                f"curriculum.lengths={self.lengths} must increase from at least 1, such as "
                "[50, 100, 200]"
            )
        if self.patience < 1:
            raise ConfigError(f"curriculum.patience is {self.patience}; use at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """The config of `learned-opt train`, which trains an update rule on paths and its own runs.

    Attributes:
        rule: The registered name of the update rule.
        rule_config: The constructor arguments of the rule.
        geodesics: The data set of target paths. It is made first if it is missing.
        dataset: The folder of the target paths; the default is `geodesics` in the output folder.
        start_from: The initial weights: "shipped", or the path of a weights file of this rule, or,
            for the rule "scheduled", of the rule that it scales. By default the rule is initialized
            afresh.
        first: A first training stage: those of its settings that differ from the settings of this
            training. A nested config that is given, such as `family`, replaces the whole nested
            config. The stage is trained on one device in the folder `first` of the output folder,
            and its weights are the initial weights of this training.
        frozen: The prefixes of the names of meta-parameters that are not trained, such as
            ["base."].
        objectives: The objectives, which take turns in the meta-updates. "imitation" imitates
            target paths, and "torch_imitation" a torch optimizer. The others minimize the loss of
            the rule's own runs. "meta_loss" records what the rule's network saw and differentiates
            the network on these records (replay); "backprop" differentiates through the unrolled
            run, which keeps its whole graph; "pes" uses persistent evolution strategies on the
            meta-parameters, and "step_size" evolution strategies on the step sizes and gains.
        updates: The number of meta-updates.
        epoch_length: The number of meta-updates between validations and checkpoints.
        learning_rate: The initial learning rate of the meta-optimizer, Adam. It falls linearly to
            5 % of this.
        clip: The norm to which longer meta-gradients are clipped.
        average: The decay of an exponential moving average of the meta-parameters over the updates.
            The averaged meta-parameters are then validated, selected and written. By default there
            is no averaging.
        coordinates: The number of randomly chosen coordinates on which a meta-update replays the
            rule. It has no effect on a rule with gains per tensor, such as the default
            geodesic_rnn, which uses all coordinates.
        teacher_share: The share of imitation sequences in which the parameters follow the imitated
            path (off-policy) instead of the rule's own updates (on-policy), at the start of
            training and from halfway on. (1, 1) is off-policy throughout.
        imitation_weight: The factor of the imitation losses, at the start and at the end. It is
            applied before the meta-gradient is clipped. A falling factor trains for robustness
            first and for speed later.
        weights: Loss factors by objective, such as {pes: [1, 0.5]}: a factor at the start and one
            at the end. They override imitation_weight; the default for other objectives is 1.
        imitation_form: The imitation loss: "huber" is the Huber loss of the error relative to the
            teacher's step; "cosine" compares direction and size separately.
        teacher: The torch optimizer that torch_imitation imitates.
        window: The number of steps of a run between two meta-updates, over which its loss is
            minimized. The state of the run continues from one window to the next. With null, each
            meta-update makes a whole run.
        known_length: The share of the rule's own runs that are told their length, which makes a
            difference in runs of more than 300 steps. It needs a rule that uses it, as geodesic_rnn
            does. Validation runs are told nothing.
        horizon: The least and the largest length of a run, in steps, drawn log-uniformly.
        curriculum: Increasing lengths of the training runs, in place of `horizon`. They are the
            lengths of the validation runs too.
        open_runs: The number of runs that are in progress at the same time, so that long runs do
            not displace short ones.
        loss_floor: A task is weighted by 1 / (mean loss of the window + loss_floor).
        judged: The share of a window, at its end, whose losses pes and step_size compare. With
            whole runs and a small share, they learn from how runs end.
        loss_clip: Losses of runs are clipped at this many times the loss of a guess that ignores
            the inputs. By default they are not clipped.
        first_order: Whether backprop treats the inputs of the rule as constants. If not, second
            derivatives of the loss are used, and the rule's statistics must be differentiable.
        pes: The settings of the objective pes.
        step_size: The settings of the objective step_size.
        family: The tasks of the rule's own runs; the default is the family of `geodesics`.
        validation_steps: The length of the validation runs after each epoch.
        validation_draws: The number of draws of the family to validate on. Each draw has
            `num_tasks` tasks. Training never uses these draws, and no benchmark reports them.
        select: The weights that are written to weights.safetensors: the "last", or the "best" of
            some candidates. A candidate is run on all validation draws for as many steps as the
            longest training run, and on the draw with the fewest parameters for ten times as many.
            Its score is the average of two means of log10(final loss + loss_floor): that of the
            first runs measures how low the loss gets, and that of the long runs whether it stays
            low far beyond the horizon. See training/callbacks.py.
        selection_interval: The number of epochs between candidates for the best weights, see
            `select`. The last epoch is always a candidate.
        seed: The seed of everything random except the data set.
        accelerator: The accelerator of Lightning's Trainer: "cpu", "gpu" or "auto".
        devices: The number of processes or GPUs on each node.
        num_nodes: The number of machines.
        strategy: The strategy of Lightning's Trainer; use "ddp" for several devices.
        precision: "32-true", or "bf16-mixed" for matrix products in bfloat16 and all else in
            float32.
        logger: The logger, "csv" or "wandb".
    """

    rule: str = "geodesic_rnn"
    rule_config: dict[str, Any] = field(default_factory=dict)
    start_from: str | None = None
    first: dict[str, Any] | None = None
    frozen: tuple[str, ...] = ()
    geodesics: GeodesicsConfig = field(default_factory=GeodesicsConfig)
    dataset: str | None = None
    objectives: tuple[str, ...] = ("imitation", "meta_loss", "meta_loss")
    updates: int = 900
    epoch_length: int = 60
    learning_rate: float = 3e-3
    clip: float = 1.0
    average: float | None = None
    coordinates: int = 2400
    teacher_share: tuple[float, float] = (1.0, 0.3)
    imitation_weight: tuple[float, float] = (0.15, 0.02)
    weights: dict[str, tuple[float, float]] = field(default_factory=dict)
    imitation_form: str = "huber"
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    window: int | None = 20
    known_length: float = 0.0
    horizon: tuple[int, int] = (20, 800)
    curriculum: CurriculumConfig | None = None
    open_runs: int = 5
    loss_floor: float = 0.003
    judged: float = 1.0
    loss_clip: float | None = None
    first_order: bool = True
    pes: PESConfig = field(default_factory=PESConfig)
    step_size: StepSizeConfig = field(default_factory=StepSizeConfig)
    family: FamilyConfig | None = None
    validation_steps: int = 200
    validation_draws: int = 3
    select: str = "best"
    selection_interval: int = 5
    seed: int = 0
    accelerator: str = "cpu"
    devices: int | str = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    logger: str = "csv"

    def __post_init__(self) -> None:
        if not self.objectives or set(self.objectives) - set(OBJECTIVES):
            raise ConfigError(f"objectives is {self.objectives}; use some of {OBJECTIVES}")
        names = ["updates", "epoch_length", "coordinates", "open_runs", "validation_steps",
                 "validation_draws", "selection_interval"]  # fmt: skip
        for name in names if self.window is None else [*names, "window"]:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; use at least 1")
        if not all(x > 0 for x in (self.learning_rate, self.clip, self.loss_floor)):
            raise ConfigError(
                f"learning_rate={self.learning_rate}, clip={self.clip} and "
                f"loss_floor={self.loss_floor} must all be positive"
            )
        check_finite(self, ConfigError)
        if self.learning_rate > LARGEST_RATE:
            raise ConfigError(
                f"learning_rate is {self.learning_rate}; use at most {LARGEST_RATE:g}; usual "
                "values are 0.001 to 0.003"
            )
        weights = {"imitation_weight": self.imitation_weight}
        weights |= {f"weights.{name}": pair for name, pair in self.weights.items()}
        for name, pair in weights.items():
            if min(pair) < 0:
                raise ConfigError(
                    f"{name} is {pair}; use 0 or more at the start and at the end (a negative "
                    "weight would maximize the objective)"
                )
        if not all(0 <= share <= 1 for share in self.teacher_share):
            raise ConfigError(f"teacher_share is {self.teacher_share}; use two shares in [0, 1]")
        if self.updates % self.epoch_length:
            raise ConfigError(
                f"updates={self.updates} must be a multiple of epoch_length={self.epoch_length}"
            )
        if self.logger not in ("csv", "wandb"):
            raise ConfigError(f"logger is {self.logger!r}; use 'csv' or 'wandb'")
        if self.select not in ("best", "last"):
            raise ConfigError(f"select is {self.select!r}; use 'best' or 'last'")
        if self.precision not in ("32-true", "bf16-mixed"):
            raise ConfigError(
                f"precision is {self.precision!r}; use '32-true' or 'bf16-mixed' (float16 would "
                "overflow on tasks that diverge)"
            )
        if self.imitation_form not in ("huber", "cosine"):
            raise ConfigError(f"imitation_form is {self.imitation_form!r}; use 'huber' or 'cosine'")
        if unused := set(self.weights) - set(self.objectives):
            raise ConfigError(
                f"weights has {sorted(unused)}, but objectives is {self.objectives}; use only "
                "names of objectives"
            )
        if self.average is not None and (not 0 < self.average < 1 or self.curriculum):
            raise ConfigError(
                f"average is {self.average}; use a decay below 1 such as 0.99, and no curriculum, "
                "because a curriculum returns to weights that were not averaged"
            )
        if not 0 <= self.known_length <= 1 or not 0 < self.judged <= 1:
            raise ConfigError(
                f"known_length is {self.known_length} and judged is {self.judged}; use shares from "
                "0 to 1, and more than 0 for judged"
            )
        if self.loss_clip is not None and self.loss_clip <= 0:
            raise ConfigError(f"loss_clip is {self.loss_clip}; use e.g. 1.5, or null for none")
        self._check_runs()

    def _check_runs(self) -> None:
        if not 1 <= self.horizon[0] <= self.horizon[1]:
            raise ConfigError(
                f"horizon is {self.horizon}; give two lengths of at least 1, the lower first"
            )
        runs = set(self.objectives) & set(RUN_OBJECTIVES)
        if self.curriculum and not runs:
            raise ConfigError(
                f"curriculum needs an objective with runs, but objectives={self.objectives} has "
                f"none; add one of {RUN_OBJECTIVES}, or leave the curriculum out"
            )
        name, shortest = "horizon", self.horizon[0]
        if self.curriculum:
            name, shortest = "curriculum.lengths", self.curriculum.lengths[0]
        if runs and self.window is not None and shortest < self.window:
            raise ConfigError(
                f"{name} starts at {shortest}, which is shorter than window={self.window}; use a "
                f"window of at most {shortest}, or longer runs"
            )

    @property
    def unroll(self) -> int:
        """The largest number of steps of a run between two meta-updates."""
        return self.longest_run if self.window is None else self.window

    @property
    def longest_run(self) -> int:
        """The number of steps of the longest runs that the rule is trained on."""
        return self.curriculum.lengths[-1] if self.curriculum else self.horizon[1]

    def weight_of(self, objective: str) -> tuple[float, float]:
        """Returns the factor of an objective's loss at the start and at the end."""
        given = self.imitation_weight if objective.endswith("imitation") else (1.0, 1.0)
        return self.weights.get(objective, given)

    def on(self, task: TaskConfig) -> TrainConfig:
        """Returns this config with one task in place of the families' random ones."""
        family = self.family and replace(self.family, task=task)
        return replace(self, family=family, geodesics=self.geodesics.on(task))

    def smoke(self) -> TrainConfig:
        """Returns a config of the same kind that runs in seconds."""
        every = max(1, self.rule_config.get("every", 1))
        window = -(-4 // every) * every  # windows must begin with a step that runs the network
        return replace(
            self,
            geodesics=self.geodesics.smoke(),
            family=replace(self.family or self.geodesics.family, num_tasks=2),
            updates=2 * len(self.objectives),
            epoch_length=len(self.objectives),
            coordinates=200,
            teacher=replace(self.teacher, length=5),
            horizon=(window, window + 6),
            curriculum=self.curriculum and CurriculumConfig((window, 2 * window), patience=1),
            window=window,
            open_runs=2,
            validation_steps=5,
        )
